"""Claims about gpt.py.

Oracles: logits of Hugging Face transformers 5.23.0 (GPT2LMHeadModel) with the same weights; the parameter
count of §A.1; slow loops for top-k, top-p, guidance and sampling; the uncached forward for the cached one.
Different lengths are compared to rounding, because torch's attention may sum them in another order.

The logits of transformers were computed in float64 with torch 2.13.0 by

    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3,
                                     tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in gpt2_weights().items()})
    print(model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])).logits)
"""
import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpt
from gpt import GPT, GPTConfig, KeyValueCache, Sampling, next_token_probabilities
from kernels import causal_attention

TINY = GPTConfig(vocab_size=13, block_size=16, n_layer=2, n_head=2, n_embd=8)
SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=3, n_embd=12)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])  # (2, 8)

# (picture, position): logits of the tokens 0 to 10
TRANSFORMERS_LOGITS = {
    (0, 7): [-0.6012630896, -1.6467119278, 1.1841763474, -1.3927979054, 1.4515787410, -0.0704108104,
             2.0707900887, -0.6389447213, -0.2747179953, -1.9926124642, 1.8128823263],
    (1, 3): [-0.3441822770, -1.8567744204, 1.1427761069, -1.5557441124, 1.3752687191, 0.5165355996,
             2.2900919728, -0.6915768866, 0.2923288300, -2.2796002071, 2.1543527837],
    (1, 7): [-0.3911633403, -1.5696028142, 1.0331951176, -1.4383807051, 1.2929519321, 0.1857486576,
             2.1049340183, -0.9199797139, -0.2492239950, -1.9897864942, 1.6854785286],
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gpt2_weights():
    """Weights of a small GPT-2 by their names in transformers, drawn in the order of these names."""
    C = 12
    shapes = {"transformer.wte.weight": (11, C), "transformer.wpe.weight": (8, C),
              "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), "lm_head.weight": (11, C)}
    for layer in range(2):
        block = f"transformer.h.{layer}."
        shapes |= {block + "ln_1.weight": (C,), block + "ln_1.bias": (C,), block + "ln_2.weight": (C,),
                   block + "ln_2.bias": (C,), block + "attn.c_attn.weight": (C, 3 * C),
                   block + "attn.c_attn.bias": (3 * C,), block + "attn.c_proj.weight": (C, C),
                   block + "attn.c_proj.bias": (C,), block + "mlp.c_fc.weight": (C, 4 * C),
                   block + "mlp.c_fc.bias": (4 * C,), block + "mlp.c_proj.weight": (4 * C, C),
                   block + "mlp.c_proj.bias": (C,)}
    generator = np.random.default_rng(0)
    return {name: 0.5 * generator.standard_normal(shapes[name]) for name in sorted(shapes)}


def gpt_with_gpt2_weights():
    """Ours in float64, with `gpt2_weights`. Matrices are (in, out) in transformers and (out, in) in torch."""
    weights = {name: torch.from_numpy(array) for name, array in gpt2_weights().items()}
    model = GPT(SMALL).double().eval()
    ours = {"token_embedding.weight": weights["transformer.wte.weight"],
            "position_embedding.weight": weights["transformer.wpe.weight"],
            "norm.weight": weights["transformer.ln_f.weight"], "norm.bias": weights["transformer.ln_f.bias"],
            "head.weight": weights["lm_head.weight"]}
    names = {"norm_1": "ln_1", "norm_2": "ln_2", "attention.qkv": "attn.c_attn",
             "attention.out": "attn.c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}
    for layer in range(2):
        for our_name, name in names.items():
            weight = weights[f"transformer.h.{layer}.{name}.weight"]
            ours[f"blocks.{layer}.{our_name}.weight"] = weight.T if weight.ndim == 2 else weight
            ours[f"blocks.{layer}.{our_name}.bias"] = weights[f"transformer.h.{layer}.{name}.bias"]
    model.load_state_dict(ours)
    return model


def random_gpt(config=TINY, dtype=torch.float64, scale=0.5):
    """A GPT whose weights are large enough that its distributions are far from uniform, in eval mode."""
    model, generator = GPT(config).to(dtype), seeded(0)
    for parameter in model.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def random_tokens(batch, length):
    return torch.randint(TINY.vocab_size, (batch, length), generator=seeded(0))


# ---- the network


def test_the_network_has_the_papers_307_million_parameters_and_gpt2_small_those_released():
    small = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    untied = 50257 * 768  # in the released model the head is the token embedding
    for config, count in ((GPTConfig(), 307_030_016), (small, 124_439_808 + untied)):
        with torch.device("meta"):
            assert sum(parameter.numel() for parameter in GPT(config).parameters()) == count


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_logits_are_those_of_transformers_gpt2(dtype, tolerance):
    logits = gpt_with_gpt2_weights().to(dtype)(TOKENS)
    assert logits.shape == (2, 8, 11)
    for (batch, position), expected in TRANSFORMERS_LOGITS.items():
        assert logits[batch, position].tolist() == pytest.approx(expected, abs=tolerance)


def test_later_tokens_do_not_reach_earlier_logits():
    model, tokens = random_gpt(dtype=torch.float32), random_tokens(3, 16)
    before = model(tokens)
    for changed in (1, 5, 15):
        after = model(torch.cat([tokens[:, :changed], (tokens[:, changed:] + 1) % 13], 1))
        torch.testing.assert_close(after[:, :changed], before[:, :changed], atol=1e-5, rtol=1e-5)
        assert ((before - after)[:, changed:].abs().amax(2) > 0.01).all()


def test_every_weight_learns():
    model, tokens = random_gpt().train(), random_tokens(2, 16)
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_those_of_gpt2_and_larger_in_narrower_networks():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=8, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            residual = any(parameter is layer.weight for block in model.blocks
                           for layer in (block.attention.out, block.mlp[-2]))
            expected = 0.08 / math.sqrt(2 * 8) if residual else 0.08  # 0.02 where it is 1,024 wide, not 64
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.06 * expected, name


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
def test_training_drops_out_after_the_embedding_each_attention_and_each_mlp(place):
    model, tokens = random_gpt(replace(TINY, n_layer=1, dropout=0.5)), random_tokens(2, 8)
    block = model.blocks[0]
    places = {"embedding": model.dropout, "attention": block.attention.dropout, "mlp": block.mlp[-1]}
    for module in (module for name, module in places.items() if name != place):  # 0 has nothing to drop
        module.register_forward_pre_hook(lambda module, inputs: torch.zeros_like(inputs[0]))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    without = random_gpt().train()
    assert torch.equal(without(tokens), without(tokens))


def test_sizes_that_do_not_fit_together_are_refused():
    for name, value, sentence in [
            *((name, 0, f"{name} is 0; it must be at least 1")
              for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")),
            ("n_embd", 100, "n_embd is 100, which 16 heads do not divide"),
            ("dropout", 1.0, "dropout is 1.0"), ("dropout", -0.1, "dropout is -0.1"),
            ("gelu", "relu", "gelu is 'relu'; choose one of tanh, none")]:
        with pytest.raises(ValueError, match=sentence):
            GPTConfig(**{name: value})


# ---- the key/value cache


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_tokens_fed_in_chunks_get_the_logits_of_the_whole_sequence(dtype, tolerance):
    model, tokens = random_gpt(dtype=dtype), random_tokens(3, 16)
    for chunks in ([1] * 16, [16], [3, 1, 5, 2, 1, 4], [15, 1], [1, 15], [8, 8]):
        cache = KeyValueCache(model.config, 3, 16 if chunks[0] == 1 else 40, model.head.weight)
        cache.keys.fill_(float("nan"))  # so that a position read before it is written shows
        cache.values.fill_(float("nan"))
        logits, end = [], 0
        with torch.no_grad():
            for chunk in chunks:
                logits.append(model(tokens[:, end:end + chunk], cache))
                end += chunk
                assert cache.length == end
        torch.testing.assert_close(torch.cat(logits, 1), model(tokens), atol=tolerance, rtol=tolerance)


def test_a_sequence_that_outgrows_the_block_is_refused_and_its_cache_stays_usable():
    model, tokens = random_gpt(), random_tokens(1, 17)
    cache = KeyValueCache(model.config, 1, 20, model.head.weight)
    with torch.no_grad():
        expected = model(tokens[:, :16])
        model(tokens[:, :14], cache)
        for refused in ((tokens,), (tokens[:, 14:], cache)):
            with pytest.raises(ValueError, match="17 tokens do not fit the 16 positions"):
                model(*refused)
        torch.testing.assert_close(model(tokens[:, 14:16], cache), expected[:, 14:], atol=1e-10, rtol=0)


# ---- generate


def slow_generate(model, prefix, steps, temperature, top_k, top_p, sampled_tokens, generator,
                  guidance=1.0, null_prefix=None):
    """The whole sequence anew for each token; with guidance in two passes."""
    tokens = prefix
    for _ in range(steps):
        logits = model(tokens)[:, -1]
        if null_prefix is not None:
            null = model(torch.cat([null_prefix, tokens[:, prefix.shape[1]:]], 1))[:, -1]
            logits = null + guidance * (logits - null)
        probabilities = next_token_probabilities(logits[:, :sampled_tokens], temperature, top_k, top_p)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens


CACHED = pytest.mark.parametrize("cached", [True, False])


@CACHED
@pytest.mark.parametrize("top_k, top_p, temperature, sampled_tokens", [
    (0, 1.0, 1.0, None), (5, 1.0, 1.0, None), (100, 1.0, 1.0, None), (0, 0.7, 1.0, None),
    (5, 0.9, 2.0, 9), (3, 1.0, 3.0, 4)])
def test_generate_draws_what_a_slow_loop_draws(cached, top_k, top_p, temperature, sampled_tokens):
    model = random_gpt()
    for length in (1, 6):
        prefix = random_tokens(4, length)
        expected = slow_generate(model, prefix, 10, temperature, top_k, top_p, sampled_tokens, seeded(2))
        tokens = model.generate(prefix, 10, temperature, top_k, seeded(2), top_p, sampled_tokens, cached)
        assert tokens.dtype == torch.int64 and torch.equal(tokens, expected)
        assert torch.equal(prefix, random_tokens(4, length))  # left as it was
        assert torch.equal(model.generate(prefix, 0, cached=cached), prefix)


@CACHED
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 3.0])
def test_guidance_draws_what_a_slow_loop_of_two_passes_draws(cached, guidance):
    model, prefix = random_gpt(), random_tokens(4, 3)
    null_prefix = torch.full((4, 3), 12)
    expected = slow_generate(model, prefix, 10, 2.0, 5, 0.9, 9, seeded(2), guidance, null_prefix)
    tokens = model.generate(prefix, 10, 2.0, 5, seeded(2), 0.9, 9, cached, guidance, null_prefix)
    assert torch.equal(tokens, expected)


def test_the_defaults_of_sampling_are_the_papers():
    model = random_gpt(replace(TINY, vocab_size=300), scale=0.2)
    prefix = random_tokens(50, 2)
    paper = model.generate(prefix, 6, temperature=1.0, top_k=100, generator=seeded(3))
    assert torch.equal(model.generate(prefix, 6, generator=seeded(3)), paper)
    assert not torch.equal(model.generate(prefix, 6, top_k=0, generator=seeded(3)), paper)


@pytest.mark.parametrize("weights, autocast, expected", [
    (torch.float32, False, torch.float32), (torch.float32, True, torch.bfloat16),
    (torch.bfloat16, False, torch.bfloat16)])
def test_cached_generation_runs_each_token_once_and_keeps_keys_in_the_dtype_of_the_queries(
        monkeypatch, weights, autocast, expected):
    lengths, dtypes = [], set()

    def recording_attention(query, key, value):
        assert not query.requires_grad  # no graph is kept
        lengths.append((query.shape[2], key.shape[2]))
        dtypes.add((query.dtype, key.dtype, value.dtype))
        return causal_attention(query, key, value)

    monkeypatch.setattr(gpt, "causal_attention", recording_attention)
    model = random_gpt(replace(TINY, n_layer=1), weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.generate(random_tokens(1, 3), 4)
        model.generate(random_tokens(1, 3), 4, cached=False)
    assert lengths == [(3, 3), (1, 4), (1, 5), (1, 6)] + [(3, 3), (4, 4), (5, 5), (6, 6)]
    assert dtypes == {(expected, expected, expected)}


class ReplayedByHand(gpt.CapturedStep):
    """Without a GPU: in place of its graph a step runs the network, and attends to a slice of the cache."""

    def __init__(self, model, cache):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
            patch.setattr(gpt, "capture_stream", lambda device: None)
            patch.setattr(torch.cuda, "graph", lambda graph, **_: contextlib.nullcontext())
            super().__init__(model, cache)
        self.model = model
        self.length -= 1  # recording does not run what is recorded

    def replay(self):
        self.logits = self.model(self.tokens, self)


@pytest.mark.parametrize("guidance, autocast", [(1.0, False), (2.0, False), (1.0, True)])
def test_a_captured_step_draws_the_same_tokens(monkeypatch, guidance, autocast):
    device, made = "cuda" if torch.cuda.is_available() else "cpu", []
    step = gpt.CapturedStep if device == "cuda" else ReplayedByHand
    monkeypatch.setattr(gpt, "CapturedStep", lambda *x: made.append(step(*x)) or made[-1])
    if device == "cpu":
        monkeypatch.setattr(gpt, "kernels_fit", lambda *_: True)
        monkeypatch.setattr(gpt, "attend_to_cache", lambda query, keys, values, position: causal_attention(
            query, *(x[:, :, :int(position) + 1] for x in (keys, values))))
    model = random_gpt(dtype=torch.float32).to(device)
    prefix, null = random_tokens(3, 4).to(device), torch.full((3, 4), 12, device=device)
    drawn = []
    for captured in (True, False):
        torch.manual_seed(1)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            drawn.append(model.generate(prefix, 13, top_k=5, guidance=guidance, null_prefix=null,
                                        captured=captured))
        assert [step.length.item() for step in made] == [16]
    assert torch.equal(*drawn)


@CACHED
def test_what_generate_cannot_do_is_refused_and_the_last_token_needs_no_position(cached):
    model = random_gpt()
    for length, steps in ((5, 12), (16, 1)):
        assert model.generate(random_tokens(2, length), steps, cached=cached).shape == (2, 17)  # 16 positions
    for length, steps, sampled_tokens, sentence in (
            (5, 13, None, "a prefix of 5 and 13 steps do not fit the 16 positions"),
            (0, 3, None, "a prefix of at least one token"), (5, -1, None, "steps is -1"),
            (5, 3, 14, "sampled_tokens 14"), (5, 3, -1, "sampled_tokens -1")):
        with pytest.raises(ValueError, match=sentence):
            model.generate(random_tokens(2, length), steps, sampled_tokens=sampled_tokens, cached=cached)
    for null_prefix in (None, random_tokens(2, 4)):
        with pytest.raises(ValueError, match="guidance needs a null_prefix of the prefix's shape"):
            model.generate(random_tokens(2, 5), 3, guidance=2.0, null_prefix=null_prefix, cached=cached)


@pytest.mark.parametrize("training", [True, False])
def test_generate_drops_nothing_out_and_restores_the_mode(training):
    prefix = random_tokens(3, 2)
    expected = random_gpt().generate(prefix, 10, generator=seeded(1))
    model = random_gpt(replace(TINY, dropout=0.5)).train(training)
    assert torch.equal(model.generate(prefix, 10, generator=seeded(1)), expected)
    assert all(module.training == training for module in model.modules())


def test_generate_draws_from_its_generator_only():
    model, prefix = random_gpt(), random_tokens(3, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.generate(prefix, 10, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.generate(prefix, 10, generator=seeded(8)), first)


# ---- the distribution


def slow_probabilities(logits, temperature, top_k, top_p):
    """One row of logits → probabilities, token by token, likeliest first."""
    weights = [math.exp(logit / temperature) for logit in logits]
    likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])
    if top_k:
        likeliest = likeliest[:top_k]
    total = sum(weights[token] for token in likeliest)
    kept, held = [], 0.0
    for token in likeliest:
        kept.append(token)
        held += weights[token] / total
        if held >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 19, 20, 21])
def test_probabilities_are_those_of_a_slow_loop(top_k):
    logits = 2 * torch.randn(5, 20, generator=seeded(0))
    before = logits.clone()
    for temperature in (0.3, 1.0, 2.5):
        for top_p in (1e-6, 0.2, 0.5, 0.9, 0.999, 1.0):
            probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
            expected = [slow_probabilities(row, temperature, top_k, top_p) for row in logits.tolist()]
            torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-6, rtol=1e-5)
            assert torch.equal(probabilities > 0, torch.tensor(expected) > 0)
    assert torch.equal(logits, before)  # not changed in place


def test_top_k_keeps_what_ties_with_the_last_and_top_p_the_fewest_that_reach_p():
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 0.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    kept = next_token_probabilities(logits, 1.0, 2, 1.0) > 0
    assert kept.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    for top_p, count in ((0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        probabilities = next_token_probabilities(torch.zeros(2, 4), 1.0, 0, top_p)  # 1/4 each, exactly
        assert (probabilities > 0).sum(1).tolist() == [count, count]
        assert probabilities.max().item() == pytest.approx(1 / count)
    assert next_token_probabilities(logits, 1e-3, 0, 1.0)[1].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_are_float32_whatever_the_logits_are(dtype):
    logits = torch.randn(3, 1000, generator=seeded(0)).to(dtype)
    probabilities = next_token_probabilities(logits, 0.9, 500, 0.9)
    assert probabilities.dtype == torch.float32
    expected = next_token_probabilities(logits.float(), 0.9, 500, 0.9)
    torch.testing.assert_close(probabilities, expected, atol=1e-7, rtol=0)


def test_settings_that_no_distribution_can_be_sampled_with_are_refused():
    for temperature, top_k, top_p, sentence in (
            (0.0, 0, 1.0, "temperature is 0.0"), (-1.0, 0, 1.0, "temperature is -1.0"),
            (math.inf, 0, 1.0, "temperature is inf"), (math.nan, 0, 1.0, "temperature is nan"),
            (1.0, -1, 1.0, "top_k is -1; it must be at least 1, or 0 to keep all tokens"),
            (1.0, 0, 0.0, "top_p is 0.0"), (1.0, 0, 1.1, "top_p is 1.1"), (1.0, 0, math.nan, "top_p is nan")):
        with pytest.raises(ValueError, match=sentence):
            Sampling(temperature, top_k, top_p)
        with pytest.raises(ValueError, match=sentence):
            random_gpt().generate(random_tokens(1, 2), 3, temperature, top_k, top_p=top_p)
    Sampling(1e-3, 0, 1.0)  # at the edge
    Sampling(100.0, 1, 1e-9)
