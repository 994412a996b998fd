"""A training step of our GPT against plain nn modules of the same shape, on a CPU.

    python results/speed/gpt_step.py

Both have SDPA, the same GELU, float32 and fused AdamW. Medians of alternating rounds.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from gpt import GPT, GPTConfig

ROUNDS, VOCABULARY = 9, 1025


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm_2(x))


class Plain(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, length: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions.weight[:tokens.shape[1]])))


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    began = time.perf_counter()
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - began


def main():
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, medians of {ROUNDS} alternating rounds")
    for layers, heads, width, batch, length in ((6, 6, 384, 8, 256), (12, 12, 768, 2, 256), (4, 4, 160, 16, 64)):
        tokens = torch.randint(VOCABULARY, (batch, length + 1))
        models = [GPT(GPTConfig(VOCABULARY, length, layers, heads, width, gelu="none")), Plain(layers, heads, width, length)]
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, fused=True) for model in models]
        times = [[], []]
        for attempt in range(ROUNDS + 2):  # the first two warm up
            for i in range(2):
                times[i].append(seconds(models[i], optimizers[i], tokens))
        ours, plain = (statistics.median(each[2:]) for each in times)
        ratios = sorted(a / b for a, b in zip(times[0][2:], times[1][2:]))
        print(f"{layers} layers × {width}, {batch}×{length} tokens: {ours / plain:.2f} of the plain modules' time "
              f"(single rounds {ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
