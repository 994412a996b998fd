"""GPT-2.

Oracles: torch.nn.TransformerEncoder and logits of Hugging Face transformers 5.23.0 (GPT2LMHeadModel, written
down below), both with the same weights; the parameter count of §A.1 as DESIGN.md settles it; slow loops for
top-k, top-p and sampling; the uncached forward for the cached one.

The logits of transformers were computed in float64 with torch 2.13.0 by

    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3,
                                     tie_word_embeddings=False)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in gpt2_weights().items()})
    print(model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])).logits)
"""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gpt
from gpt import GPT, GPTConfig, KeyValueCache, check_sampling, next_token_probabilities
from kernels import causal_attention

TINY = GPTConfig(vocab_size=13, block_size=16, n_layer=2, n_head=2, n_embd=8)
SMALL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=3, n_embd=12)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])  # (2, 8)

# (picture, position): logits of the tokens 0 to 10
TRANSFORMERS_LOGITS = {
    (0, 0): [-0.5102379915, -1.9779039695, 1.0967167112, -1.4802369508, 1.2420369486, 0.3246812983,
             2.1919882562, -0.7426630295, -0.0111407111, -2.2598283131, 1.8066305568],
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
    model = GPT(config).to(dtype)
    generator = seeded(0)
    for parameter in model.parameters():
        values = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values)
    return model.eval()


def random_tokens(batch, length):
    return torch.randint(TINY.vocab_size, (batch, length), generator=seeded(0))


# ---- the network


def test_the_default_network_has_the_papers_307_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 307_030_016


def test_gpt2_small_has_the_size_that_its_layers_add_up_to():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    released = 124_439_808  # GPT-2 small, where the head is the token embedding
    assert sum(parameter.numel() for parameter in model.parameters()) == released + 50257 * 768


def test_logits_are_those_of_transformers_gpt2():
    logits = gpt_with_gpt2_weights()(TOKENS)
    assert logits.shape == (2, 8, 11)
    for (batch, position), expected in TRANSFORMERS_LOGITS.items():
        assert logits[batch, position].tolist() == pytest.approx(expected, abs=1e-9)


def test_float32_logits_are_those_of_transformers_gpt2():
    logits = gpt_with_gpt2_weights().float()(TOKENS)
    for (batch, position), expected in TRANSFORMERS_LOGITS.items():
        assert logits[batch, position].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layers, heads, width, length", [(1, 1, 4, 5), (2, 2, 8, 16), (3, 4, 12, 7)])
def test_logits_are_those_of_torchs_transformer_encoder(layers, heads, width, length):
    model = random_gpt(replace(TINY, n_layer=layers, n_head=heads, n_embd=width))
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True,
                                       norm_first=True, activation=nn.GELU(approximate="tanh"))
    encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False).double()
    for theirs, ours in zip(encoder.layers, model.blocks, strict=True):
        theirs.self_attn.in_proj_weight.data = ours.attention.qkv.weight.data
        theirs.self_attn.in_proj_bias.data = ours.attention.qkv.bias.data
        theirs.self_attn.out_proj.load_state_dict(ours.attention.out.state_dict())
        theirs.norm1.load_state_dict(ours.norm_1.state_dict())
        theirs.norm2.load_state_dict(ours.norm_2.state_dict())
        theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
        theirs.linear2.load_state_dict(ours.mlp[2].state_dict())
    encoder.norm.load_state_dict(model.norm.state_dict())
    tokens = random_tokens(3, length)
    x = model.token_embedding(tokens) + model.position_embedding.weight[:length]
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    expected = encoder(x, mask=mask) @ model.head.weight.T
    torch.testing.assert_close(model(tokens), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("changed", [1, 5, 15])
def test_later_tokens_change_no_bit_of_earlier_logits(changed):
    model = random_gpt(dtype=torch.float32)
    tokens = random_tokens(3, 16)
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1) % 13
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(2).all()


def test_every_weight_learns():
    model = random_gpt().train()
    tokens = random_tokens(2, 16)
    nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_those_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=200, block_size=100, n_layer=8, n_head=2, n_embd=64))
    into_the_residual_stream = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        elif name.endswith(("attention.out.weight", "mlp.2.weight")):
            into_the_residual_stream += 1
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        assert parameter.ndim == 1 or abs(parameter.mean().item()) < 0.001, name
    assert into_the_residual_stream == 2 * 8


def test_the_head_is_not_the_token_embedding():
    model = random_gpt()
    before = model(random_tokens(1, 4))
    model.token_embedding.weight.data[12] += 1  # a token that does not occur
    assert 12 not in random_tokens(1, 4)
    assert torch.equal(model(random_tokens(1, 4)), before)


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
def test_training_drops_out_after_the_embedding_each_attention_and_each_mlp(place):
    model = random_gpt(replace(TINY, n_layer=1, dropout=0.5))
    block = model.blocks[0]
    silent = {"embedding": [model.token_embedding, model.position_embedding],
              "attention": [block.attention.out], "mlp": [block.mlp[2]]}
    for name, modules in silent.items():  # all but one place write zeros, which dropout leaves as they are
        for parameter in (p for module in modules for p in module.parameters() if name != place):
            parameter.data.zero_()
    tokens = random_tokens(2, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_without_dropout_training_and_evaluation_agree():
    model = random_gpt()
    tokens = random_tokens(2, 8)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("name, value, sentence", [
    ("vocab_size", 0, "vocab_size is 0; it must be at least 1"),
    ("block_size", 0, "block_size is 0; it must be at least 1"),
    ("n_layer", 0, "n_layer is 0; it must be at least 1"),
    ("n_head", 0, "n_head is 0; it must be at least 1"),
    ("n_embd", -8, "n_embd is -8; it must be at least 1"),
    ("n_embd", 100, "n_embd is 100, which 16 heads do not divide"),
    ("dropout", 1.0, r"dropout is 1.0; it must lie in \[0, 1\)"),
    ("dropout", -0.1, r"dropout is -0.1; it must lie in \[0, 1\)"),
])
def test_sizes_that_do_not_fit_together_are_refused(name, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig(**{name: value})


def test_a_sequence_as_long_as_the_block_fits_and_a_longer_one_is_refused():
    model = random_gpt()
    assert model(random_tokens(1, 16)).shape == (1, 16, 13)
    with pytest.raises(ValueError, match="17 tokens do not fit the 16 positions"):
        model(random_tokens(1, 17))


# ---- the key/value cache


@pytest.mark.parametrize("chunks", [[1] * 16, [16], [3, 1, 5, 2, 1, 4], [15, 1], [1, 15], [8, 8]])
def test_tokens_fed_in_chunks_get_the_logits_of_the_whole_sequence(chunks):
    model = random_gpt()
    tokens = random_tokens(3, 16)
    cache = KeyValueCache(model.config, 3, 16, model.head.weight)
    cache.keys.fill_(float("nan"))  # so that a position read before it is written shows
    cache.values.fill_(float("nan"))
    logits, end = [], 0
    with torch.no_grad():
        for chunk in chunks:
            logits.append(model(tokens[:, end:end + chunk], cache))
            end += chunk
            assert cache.length == end
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), atol=1e-12, rtol=0)


def test_float32_tokens_fed_one_at_a_time_get_the_same_logits_to_rounding():
    model = random_gpt(dtype=torch.float32)
    tokens = random_tokens(3, 16)
    cache = KeyValueCache(model.config, 3, 16, model.head.weight)
    with torch.no_grad():
        logits = torch.cat([model(tokens[:, t:t + 1], cache) for t in range(16)], 1)
    torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_a_cache_may_have_room_for_more_than_is_fed():
    model = random_gpt()
    tokens = random_tokens(2, 6)
    cache = KeyValueCache(model.config, 2, 40, model.head.weight)
    cache.keys.fill_(float("nan"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, cache), model(tokens), atol=1e-12, rtol=0)


def test_a_cached_sequence_that_outgrows_the_block_is_refused_and_the_cache_stays_usable():
    model = random_gpt()
    tokens = random_tokens(1, 16)
    cache = KeyValueCache(model.config, 1, 20, model.head.weight)
    with torch.no_grad():
        model(tokens[:, :14], cache)
        with pytest.raises(ValueError, match="17 tokens do not fit the 16 positions"):
            model(random_tokens(1, 3), cache)
        torch.testing.assert_close(model(tokens[:, 14:], cache), model(tokens)[:, 14:], atol=1e-12, rtol=0)


# ---- generate


def slow_generate(model, prefix, steps, temperature, top_k, top_p, sampled_tokens, generator):
    """The whole sequence anew for each token."""
    tokens = prefix
    for _ in range(steps):
        logits = model(tokens)[:, -1]
        if sampled_tokens is not None:
            logits = logits[:, :sampled_tokens]
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens


SETTINGS = pytest.mark.parametrize("top_k, top_p, temperature, sampled_tokens", [
    (0, 1.0, 1.0, None), (5, 1.0, 1.0, None), (100, 1.0, 1.0, None), (0, 0.7, 1.0, None),
    (5, 0.9, 2.0, 9), (3, 1.0, 3.0, 4)])


@SETTINGS
def test_cached_sampling_gives_the_same_tokens(top_k, top_p, temperature, sampled_tokens):
    model = random_gpt()
    prefix = random_tokens(4, 3)
    cached, uncached = (
        model.generate(prefix, 14, temperature, top_k, seeded(1), top_p, sampled_tokens, cached=use_cache)
        for use_cache in (True, False))
    assert torch.equal(cached, uncached)


@SETTINGS
@pytest.mark.parametrize("length", [1, 6])
def test_generate_draws_what_a_slow_loop_draws(top_k, top_p, temperature, sampled_tokens, length):
    model = random_gpt()
    prefix = random_tokens(4, length)
    expected = slow_generate(model, prefix, 10, temperature, top_k, top_p, sampled_tokens, seeded(2))
    tokens = model.generate(prefix, 10, temperature, top_k, seeded(2), top_p, sampled_tokens)
    assert torch.equal(tokens, expected)


def test_the_defaults_of_sampling_are_the_papers():
    model = random_gpt(replace(TINY, vocab_size=300), scale=0.2)
    prefix = random_tokens(50, 2)
    paper = model.generate(prefix, 6, temperature=1.0, top_k=100, generator=seeded(3))
    assert torch.equal(model.generate(prefix, 6, generator=seeded(3)), paper)
    assert not torch.equal(model.generate(prefix, 6, top_k=0, generator=seeded(3)), paper)


def test_cached_generation_runs_each_token_once_and_uncached_all_of_them_anew(monkeypatch):
    lengths = []

    def counting_attention(query, key, value):
        assert not query.requires_grad  # no graph is kept
        lengths.append((query.shape[2], key.shape[2]))
        return causal_attention(query, key, value)

    monkeypatch.setattr(gpt, "causal_attention", counting_attention)
    model = random_gpt(replace(TINY, n_layer=1))
    model.generate(random_tokens(1, 3), 4)
    assert lengths == [(3, 3), (1, 4), (1, 5), (1, 6)]
    lengths.clear()
    model.generate(random_tokens(1, 3), 4, cached=False)
    assert lengths == [(3, 3), (4, 4), (5, 5), (6, 6)]


@pytest.mark.parametrize("cached", [True, False])
def test_the_prefix_comes_back_untouched(cached):
    prefix = random_tokens(3, 5)
    sequence = random_gpt().generate(prefix, 7, generator=seeded(0), cached=cached)
    assert sequence.shape == (3, 12)
    assert sequence.dtype == torch.int64
    assert torch.equal(sequence[:, :5], prefix)
    assert torch.equal(prefix, random_tokens(3, 5))


@pytest.mark.parametrize("cached", [True, False])
def test_no_steps_return_the_prefix(cached):
    prefix = random_tokens(2, 4)
    assert torch.equal(random_gpt().generate(prefix, 0, cached=cached), prefix)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (100, 1.0), (0, 0.5)])
def test_tokens_beyond_sampled_tokens_are_never_drawn(cached, top_k, top_p):
    model = random_gpt()
    model.norm.bias.data.fill_(50.0)
    model.head.weight.data[4:] = 1.0  # logits of about 400 for the tokens from 4 on
    prefix = random_tokens(20, 2)
    free = model.generate(prefix, 8, 1.0, top_k, seeded(0), top_p, cached=cached)[:, 2:]
    limited = model.generate(prefix, 8, 1.0, top_k, seeded(0), top_p, 4, cached=cached)[:, 2:]
    assert free.min() >= 4
    assert limited.max() <= 3


def test_all_sampled_tokens_are_drawn():
    model = random_gpt(scale=0.05)  # nearly uniform
    tokens = model.generate(random_tokens(100, 1), 6, sampled_tokens=4, generator=seeded(0))[:, 1:]
    assert tokens.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cached", [True, False])
def test_generated_tokens_are_as_frequent_as_the_softmax_says(cached):
    model = random_gpt(replace(TINY, n_layer=1, vocab_size=6))
    prefix = torch.tensor([[2, 5, 1]])
    expected = (model(prefix)[0, -1] / 1.5).softmax(0)
    n = 20_000
    drawn = model.generate(prefix.expand(n, 3), 1, 1.5, 0, seeded(5), cached=cached)[:, -1]
    frequencies = torch.bincount(drawn, minlength=6) / n
    assert (frequencies - expected).abs().max() < 4 * 0.5 / math.sqrt(n)  # 4 standard deviations at most
    assert expected.max() - expected.min() > 0.1  # else the comparison would say little


@pytest.mark.parametrize("cached", [True, False])
def test_the_last_token_needs_no_position(cached):
    model = random_gpt()
    assert model.generate(random_tokens(2, 5), 12, cached=cached).shape == (2, 17)  # 16 positions
    assert model.generate(random_tokens(2, 16), 1, cached=cached).shape == (2, 17)
    with pytest.raises(ValueError, match="a prefix of 5 and 13 steps do not fit the 16 positions"):
        model.generate(random_tokens(2, 5), 13, cached=cached)


def test_generate_refuses_an_empty_prefix():
    with pytest.raises(ValueError, match="generate needs a prefix of at least one token"):
        random_gpt().generate(torch.zeros(2, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize("training", [True, False])
def test_generate_drops_nothing_out_and_gives_the_mode_back(training):
    prefix = random_tokens(3, 2)
    expected = random_gpt().generate(prefix, 10, generator=seeded(1))
    model = random_gpt(replace(TINY, dropout=0.5)).train(training)
    assert torch.equal(model.generate(prefix, 10, generator=seeded(1)), expected)
    assert all(module.training == training for module in model.modules())


def test_generate_draws_from_its_generator_only():
    model = random_gpt()
    prefix = random_tokens(3, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.generate(prefix, 10, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model.generate(prefix, 10, generator=seeded(8)), first)
    torch.manual_seed(2)
    assert torch.equal(model.generate(prefix, 10, generator=seeded(7)), first)


@pytest.mark.parametrize("weights, autocast, expected", [
    (torch.float32, False, torch.float32), (torch.float32, True, torch.bfloat16),
    (torch.bfloat16, False, torch.bfloat16)])
def test_cached_keys_and_values_have_the_dtype_of_the_queries(monkeypatch, weights, autocast, expected):
    dtypes = set()

    def recording_attention(query, key, value):
        dtypes.add((query.dtype, key.dtype, value.dtype))
        return causal_attention(query, key, value)

    monkeypatch.setattr(gpt, "causal_attention", recording_attention)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = random_gpt(dtype=weights).generate(random_tokens(2, 3), 5)
    assert tokens.shape == (2, 8)
    assert dtypes == {(expected, expected, expected)}


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


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 19, 20, 21, 100])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_probabilities_are_those_of_a_slow_loop(temperature, top_k, top_p):
    logits = 2 * torch.randn(5, 20, generator=seeded(0))
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
    expected = [slow_probabilities(row, temperature, top_k, top_p) for row in logits.tolist()]
    torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    assert ((probabilities > 0) == (torch.tensor(expected) > 0)).all()


def test_probabilities_without_a_limit_are_the_softmax():
    logits = torch.randn(5, 20, generator=seeded(0))
    torch.testing.assert_close(next_token_probabilities(logits, 1.0, 0, 1.0), logits.softmax(1))
    torch.testing.assert_close(next_token_probabilities(logits, 0.5, 0, 1.0), (2 * logits).softmax(1))


def test_top_k_keeps_k_tokens_and_what_ties_with_the_last():
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 0.0], [9.0, 8.0, 7.0, 6.0, 5.0]])
    kept = next_token_probabilities(logits, 1.0, 2, 1.0) > 0
    assert kept.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]


@pytest.mark.parametrize("top_p, kept", [
    (0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(top_p, kept):
    probabilities = next_token_probabilities(torch.zeros(2, 4), 1.0, 0, top_p)  # 1/4 each, exactly
    assert (probabilities > 0).sum(1).tolist() == [kept, kept]
    assert probabilities.max().item() == pytest.approx(1 / kept)


def test_top_p_counts_the_probability_among_the_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    of_two = next_token_probabilities(logits, 1.0, 2, 0.5)
    of_all = next_token_probabilities(logits, 1.0, 0, 0.5)
    assert (of_two > 0).tolist() == [[True, False, False, False]]  # 4/7 ≥ 0.5
    assert (of_all > 0).tolist() == [[True, True, False, False]]


def test_a_low_temperature_leaves_the_likeliest_token_and_a_high_one_all_alike():
    logits = torch.tensor([[0.1, 0.3, 0.2]])
    assert next_token_probabilities(logits, 1e-4, 0, 1.0).tolist() == [[0.0, 1.0, 0.0]]
    assert next_token_probabilities(logits, 1e6, 0, 1.0).tolist() == [pytest.approx([1 / 3] * 3, abs=1e-6)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_are_float32_whatever_the_logits_are(dtype):
    logits = torch.randn(3, 1000, generator=seeded(0)).to(dtype)
    probabilities = next_token_probabilities(logits, 0.9, 500, 0.9)
    assert probabilities.dtype == torch.float32
    expected = next_token_probabilities(logits.float(), 0.9, 500, 0.9)
    torch.testing.assert_close(probabilities, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(3, 20, generator=seeded(0))
    next_token_probabilities(logits, 1.0, 3, 0.5)
    assert torch.equal(logits, torch.randn(3, 20, generator=seeded(0)))


@pytest.mark.parametrize("settings, sentence", [
    ((0.0, 0, 1.0), "temperature is 0.0; it must be above 0"),
    ((-1.0, 0, 1.0), "temperature is -1.0; it must be above 0"),
    ((math.inf, 0, 1.0), "temperature is inf"),
    ((math.nan, 0, 1.0), "temperature is nan"),
    ((1.0, -1, 1.0), "top_k is -1; it must be at least 1, or 0 to keep all tokens"),
    ((1.0, 0, 0.0), r"top_p is 0.0; it must lie in \(0, 1\]"),
    ((1.0, 0, 1.1), r"top_p is 1.1; it must lie in \(0, 1\]"),
    ((1.0, 0, math.nan), "top_p is nan"),
])
def test_settings_that_no_distribution_can_be_sampled_with_are_refused(settings, sentence):
    temperature, top_k, top_p = settings
    with pytest.raises(ValueError, match=sentence):
        check_sampling(temperature, top_k, top_p)
    with pytest.raises(ValueError, match=sentence):
        random_gpt().generate(random_tokens(1, 2), 3, temperature, top_k, top_p=top_p)


def test_settings_at_the_edge_of_what_is_allowed_pass():
    check_sampling(1e-3, 0, 1.0)
    check_sampling(100.0, 1, 1e-9)
