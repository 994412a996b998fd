"""GPT-2 as an autoregressive prior over code tokens (§2; §A.1: 24 layers, 16 heads, 1,024 wide, 307 M).

One forward serves training, the prompt and single-token decoding: without a cache it sees the whole sequence,
with one it sees the new tokens and reads keys and values of the earlier ones from the cache.

Symbols: B batch, T sequence, C embedding width, V vocabulary, P prefix, d head_dim.
"""
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import taming
from kernels.causal_attention import attend_to_cache, causal_attention, kernels_fit


@dataclass(frozen=True)
class GPTConfig:
    """All that is needed to rebuild the network. Raises ValueError for sizes that do not fit together."""
    vocab_size: int = 2048  # 1,024 codes of an image and 1,024 of a condition: 307 M parameters, §A.1
    block_size: int = 512  # positions: 256 of a condition and 256 of an image, §4
    n_layer: int = 24  # GPT2-medium, §A.1
    n_head: int = 16
    n_embd: int = 1024
    dropout: float = 0.0  # on the embeddings and after each attention and MLP
    gelu: str = "tanh"  # GPT-2's approximation; "none": the exact function, as in the authors' models

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, which {self.n_head} heads do not divide; "
                             "choose a multiple of n_head")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu is {self.gelu!r}; choose one of tanh, none")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises ValueError for values out of range."""
    temperature: float = 1.0  # §A.1
    top_k: int = 100  # §A.1; 0: all
    top_p: float = 1.0
    guidance: float = 1.0  # of a condition; 1: none

    def __post_init__(self):
        if not 1e-3 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0.001 "
                             "(for the likeliest token always, use top_k 1)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance is {self.guidance}; it must lie in [0, 100], where 1 is none")


class KeyValueCache:
    """Keys and values of the tokens so far, allocated once for `capacity` positions on `weight`'s device."""

    def __init__(self, config: GPTConfig, batch: int, capacity: int, weight: Tensor):
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        shape = (config.n_layer, batch, config.n_head, capacity, config.n_embd // config.n_head)
        # (layers, B, heads, capacity, d), of the dtype that linear layers return
        self.keys = weight.new_empty(shape, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions filled

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append a layer's new keys and values, attend to all: (B, heads, T, d) each → (B, heads, T, d)."""
        end = self.length + key.shape[2]
        assert end <= self.keys.shape[3], f"{end} tokens in a cache for {self.keys.shape[3]}"
        self.keys[layer, :, :, self.length:end] = key
        self.values[layer, :, :, self.length:end] = value
        return causal_attention(query, self.keys[layer, :, :, :end], self.values[layer, :, :, :end])


capture_stream = functools.cache(torch.cuda.Stream)  # one per device: cuBLAS keeps a workspace per stream


class CapturedStep:
    """A decoding step as a CUDA graph, since launching its kernels takes longer than running them.

    Continues a KeyValueCache; its length is a tensor on the GPU, which each replay reads and increments.
    Not thread-safe: the graph reads autocast's cached weight copies, which another thread may free.
    """

    def __init__(self, gpt: "GPT", cache: KeyValueCache):
        self.keys, self.values = cache.keys, cache.values
        self.tokens = torch.zeros(self.keys.shape[1], 1, dtype=torch.int64, device=self.keys.device)  # (B, 1)
        self.length = torch.tensor([cache.length], device=self.keys.device)
        gpt(self.tokens, self)  # compiles the kernels; the first replay overwrites what this has written
        self.length -= 1
        self.graph = torch.cuda.CUDAGraph()
        stream = capture_stream(self.keys.device)
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.logits = gpt(self.tokens, self)  # (B, 1, V)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As that of the cache, for one position: (B, heads, 1, d) each → (B, heads, 1, d)."""
        self.keys[layer].index_copy_(2, self.length, key)
        self.values[layer].index_copy_(2, self.length, value)
        return attend_to_cache(query, self.keys[layer], self.values[layer], self.length)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1) → logits (B, 1, V), which the next step overwrites."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


Cache = KeyValueCache | CapturedStep


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # 3 × (B, heads, T, d)
        x = causal_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        return self.dropout(self.out(x.transpose(1, 2).reshape(B, T, C)))  # from (B, heads, T, d)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config, layer)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(approximate=config.gelu),
            nn.Linear(4 * config.n_embd, config.n_embd),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attention(self.norm_1(x), cache)  # (B, T, C)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """tokens (B, T) int64 in [0, vocab_size) → logits (B, T, V). The head is not tied to the embedding.

    The default config has 307,030,016 parameters (§A.1: 307 M).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)  # by step, not by grid cell
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        std = 0.64 / math.sqrt(config.n_embd)  # 0.02 at GPT2-medium's width
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, std=std)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for block in self.blocks:
            for layer in (block.attention.out, block.mlp[-2]):  # into the residual stream
                layer.weight.data /= math.sqrt(2 * config.n_layer)  # GPT-2's report, §2.3

    @classmethod
    def from_taming(cls, path: str | Path, n_head: int = 0) -> "GPT":
        """The transformer in a file of the authors' taming-transformers, as a model without dropout.

        The file does not store n_head. 0: that of the released model of this size, else heads 64
        wide. Raises FileNotFoundError; ValueError for another file, or a network unlike ours.
        """
        gpt = cls(GPTConfig(**taming.gpt_sizes(path, n_head)))
        gpt.load_state_dict(taming.gpt_weights(path, gpt.state_dict()))
        return gpt

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """For AdamW: weights of linear layers decay, the head's too; biases, norms and embeddings do not."""
        named = list(self.named_parameters())
        linear = [x for name, x in named if x.ndim == 2 and "embedding" not in name]
        others = [x for name, x in named if x.ndim != 2 or "embedding" in name]
        return [{"params": linear, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the next token at each position: tokens (B, T) → (B, T, V).

        With a cache the tokens follow the `cache.length` tokens it has seen, and it is extended by them.
        Raises ValueError if the sequence outgrows `block_size`.
        """
        T, start = tokens.shape[1], 0 if cache is None else cache.length
        # While a CUDA graph is recorded, the length lies in GPU memory; `generate` has checked that all fits.
        if not isinstance(start, Tensor) and start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit the {self.config.block_size} positions of this "
                             "GPT (block_size)")
        positions = start + torch.arange(T, device=tokens.device)  # (T,)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.head(self.norm(x))  # (B, T, V)

    @torch.no_grad()
    def generate(self, prefix: Tensor, steps: int, temperature: float = 1.0, top_k: int = 100,  # both §A.1
                 generator: torch.Generator | None = None, top_p: float = 1.0,
                 sampled_tokens: int | None = None, cached: bool = True, guidance: float = 1.0,
                 null_prefix: Tensor | None = None, captured: bool = True) -> Tensor:
        """Continue a prefix: (B, P) int64 → (B, P + steps), the prefix first.

        Only tokens below `sampled_tokens` are drawn (None: the whole vocabulary), so that a null token or a
        condition is never written into an image; of those the `top_k` likeliest (0: all), and of those the
        fewest that together hold `top_p` of the probability. `cached=False` runs the whole sequence anew for
        each token: the same tokens, slower (results/efficiency). Classifier-free guidance takes the logits
        null + guidance·(conditional − null), where `null_prefix` (B, P) has no condition: one batch of both.
        `captured`: on a GPU the steps with the cache become a CUDA graph, which draws the same tokens.
        Threads may share a model in eval mode on a CPU. Raises ValueError for values out of range, an empty
        prefix, guidance without null_prefix, or P + steps − 1 positions above `block_size`.
        """
        Sampling(temperature, top_k, top_p, guidance)  # raises ValueError for values out of range
        batch, P = prefix.shape
        V, training, tokens = self.config.vocab_size, self.training, prefix
        if P == 0:
            raise ValueError("generate needs a prefix of at least one token: the null token or a condition")
        if P + steps - 1 > self.config.block_size:
            raise ValueError(f"a prefix of {P} and {steps} steps do not fit the {self.config.block_size} "
                             "positions of this GPT (block_size)")
        sampled_tokens = V if sampled_tokens is None else sampled_tokens
        if steps < 0 or not 1 <= sampled_tokens <= V:
            raise ValueError(f"steps is {steps} and sampled_tokens {sampled_tokens}; steps must be at least "
                             f"0, sampled_tokens at least 1 and at most the vocabulary's {V}")
        if guidance != 1:
            if null_prefix is None or null_prefix.shape != prefix.shape:
                raise ValueError("guidance needs a null_prefix of the prefix's shape")
            tokens = torch.cat([prefix, null_prefix])  # (2B, P)
        cache = KeyValueCache(self.config, len(tokens), P + steps, self.head.weight) if cached else None
        captured = (captured and cached and steps > 8  # fewer do not repay recording
                    and kernels_fit(prefix.device, self.config.n_embd // self.config.n_head))
        self.eval()
        try:
            for step in range(steps):
                new = tokens[:, -1:] if cached and step else tokens
                if step == 1 and captured:
                    recorded = CapturedStep(self, cache)
                logits = recorded(new) if step and captured else self(new, cache)  # (B or 2B, 1 or more, V)
                logits = logits[:, -1, :sampled_tokens].float()  # (B or 2B, V)
                if guidance != 1:
                    conditional, null = logits.chunk(2)
                    logits = null + guidance * (conditional - null)  # (B, V)
                probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
                drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
                tokens = torch.cat([tokens, drawn.repeat(2, 1) if guidance != 1 else drawn], 1)
        finally:
            self.train(training)
        return tokens[:batch]


def next_token_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Distribution that the next token is drawn from: logits (B, V) → (B, V) float32, rows sum to 1.

    top_k keeps the k likeliest tokens and whatever ties with the last of them; top_p the likeliest tokens up
    to and including the one whose cumulative probability first reaches p.
    """
    logits = logits.float() / temperature  # (B, V)
    if 0 < top_k < logits.shape[1]:
        smallest = logits.topk(top_k, dim=1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, index = F.softmax(logits, dim=1).sort(dim=1, descending=True)  # (B, V)
        unlikely = ordered.cumsum(1) - ordered >= top_p  # the likelier tokens hold p already
        logits = logits.masked_fill(unlikely.scatter(1, index, unlikely), float("-inf"))
    return F.softmax(logits, dim=1)
