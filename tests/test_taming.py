"""Files of the authors' taming-transformers: parity with what their network computes, and what is refused.

Oracles: `theirs_encode`, `theirs_decode` and `theirs_logits`, which compute straight from a file's names, one
function call a layer; and, where PARITY_DATA names a folder that holds them, what the authors' own code
computed (vqgan_f16_seed0.npz, gpt_seed0.npz and taming_vqgan_f16_1024_keys.txt, somewhere below it).
"""
import argparse
import ast
import collections
import dataclasses
import datetime
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import run
import sample
import taming
import train_gpt
from gpt import GPT, GPTConfig
from orderings import ORDERINGS
from vq import VQ, VQConfig

# What is in a file


def vq_shapes(base: int, multipliers: tuple, blocks: int, codes: int, width: int, channels: int = 3) -> dict:
    """The names and shapes of a VQModel's state_dict, without its losses."""
    shapes = {}

    def affine(name, *shape):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": (shape[0],)})

    def block(name, c, out):
        affine(f"{name}.norm1", c)
        affine(f"{name}.conv1", out, c, 3, 3)
        affine(f"{name}.norm2", out)
        affine(f"{name}.conv2", out, out, 3, 3)
        if c != out:
            affine(f"{name}.nin_shortcut", out, c, 1, 1)

    def attention(name, c):
        affine(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            affine(f"{name}.{part}", c, c, 1, 1)

    def middle(name, c):
        block(f"{name}.block_1", c, c)
        attention(f"{name}.attn_1", c)
        block(f"{name}.block_2", c, c)

    widths, last = [base * multiplier for multiplier in multipliers], len(multipliers) - 1
    affine("encoder.conv_in", base, channels, 3, 3)
    c = base
    for level, out in enumerate(widths):
        for i in range(blocks):
            block(f"encoder.down.{level}.block.{i}", c, out)
            c = out
            if level == last:
                attention(f"encoder.down.{level}.attn.{i}", c)
        if level != last:
            affine(f"encoder.down.{level}.downsample.conv", c, c, 3, 3)
    middle("encoder.mid", c)
    affine("encoder.norm_out", c)
    affine("encoder.conv_out", width, c, 3, 3)
    affine("decoder.conv_in", c, width, 3, 3)
    middle("decoder.mid", c)
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            block(f"decoder.up.{level}.block.{i}", c, widths[level])
            c = widths[level]
            if level == last:
                attention(f"decoder.up.{level}.attn.{i}", c)
        if level != 0:
            affine(f"decoder.up.{level}.upsample.conv", c, c, 3, 3)
    affine("decoder.norm_out", c)
    affine("decoder.conv_out", channels, c, 3, 3)
    affine("quant_conv", width, width, 1, 1)
    affine("post_quant_conv", width, width, 1, 1)
    return shapes | {"quantize.embedding.weight": (codes, width)}


def gpt_shapes(layers: int, width: int, vocabulary: int, positions: int) -> dict:
    """The names and shapes of their GPT's state_dict, without its masks."""
    shapes = {"pos_emb": (1, positions, width), "tok_emb.weight": (vocabulary, width),
              "head.weight": (vocabulary, width)}
    inner = {f"attn.{name}": (width, width) for name in ("key", "query", "value", "proj")}
    inner |= {"mlp.0": (4 * width, width), "mlp.2": (width, 4 * width), "ln1": (width,), "ln2": (width,)}
    for layer in range(layers):
        for name, shape in inner.items():
            shapes |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def random_weights(shapes: dict, seed: int) -> dict[str, Tensor]:
    """The weights for which PARITY_DATA has the authors' results: each drawn in the order of the names."""
    random, weights = np.random.default_rng(seed), {}
    for key, shape in sorted(shapes.items()):
        value = random.standard_normal(shape, dtype=np.float32)
        if key == "quantize.embedding.weight":
            value = value * np.float32(0.6)
        elif len(shape) == 1:
            value = value * np.float32(0.1) + np.float32(key.endswith("weight"))
        elif "emb" in key:
            value = value * np.float32(0.5)
        else:
            value = value / np.float32(np.sqrt(np.prod(shape[1:])))
        weights[key] = torch.from_numpy(value.astype(np.float32))
    return weights


def picture(batch: int, size: int, seed: int) -> Tensor:
    """The pictures of PARITY_DATA, (batch, 3, size, size): sums of waves."""
    random = np.random.default_rng(1000 + seed)
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    image = np.zeros((batch, 3, size, size))
    for b in range(batch):
        for c in range(3):
            for _ in range(8):
                fy, fx, phase = random.uniform(-20, 20), random.uniform(-20, 20), random.uniform(0, 6.28)
                image[b, c] += np.sin(fy * y + fx * x + phase) / 3
    return torch.from_numpy(np.clip(image, -1, 1).astype(np.float32))


def write(path: Path, weights: dict, **others) -> Path:
    torch.save({"epoch": 3, "global_step": 12, "state_dict": weights, **others}, path)
    return path


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": weight for key, weight in weights.items()}


SMALL_VQ = vq_shapes(32, (1, 2), 1, codes=20, width=16)  # pictures of 2n×2n ↔ n×n codes
SMALL_GPT = gpt_shapes(2, 128, vocabulary=20, positions=16)  # a grid of 4×4
LOSSES = {"loss.discriminator.main.0.weight": torch.ones(3), "loss.perceptual_loss.lin0": torch.ones(2)}


def both_stages(seed: int = 0) -> dict[str, Tensor]:
    """An unconditional Net2NetTransformer's state_dict."""
    masks = {f"blocks.{layer}.attn.mask": torch.ones(16, 16).tril()[None, None] for layer in range(2)}
    return (prefixed("first_stage_model.", random_weights(SMALL_VQ, seed))
            | prefixed("transformer.", random_weights(SMALL_GPT, seed) | masks))


# What their network computes


def conv(w, name, x, **options):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def normalized(w, name, x):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def swish(x):
    return x * torch.sigmoid(x)


def theirs_block(w, name, x):
    y = conv(w, f"{name}.conv1", swish(normalized(w, f"{name}.norm1", x)), padding=1)
    y = conv(w, f"{name}.conv2", swish(normalized(w, f"{name}.norm2", y)), padding=1)
    return y + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def theirs_attention(w, name, x):
    if f"{name}.q.weight" not in w:
        return x
    B, C, height, width = x.shape
    q, k, v = (conv(w, f"{name}.{part}", normalized(w, f"{name}.norm", x)).flatten(2) for part in "qkv")
    attention = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / C**0.5, dim=2)
    mixed = torch.einsum("bij,bcj->bci", attention, v).reshape(B, C, height, width)
    return x + conv(w, f"{name}.proj_out", mixed)


def theirs_middle(w, name, x):
    x = theirs_attention(w, f"{name}.attn_1", theirs_block(w, f"{name}.block_1", x))
    return theirs_block(w, f"{name}.block_2", x)


def theirs_encode(w, images, levels, blocks):
    """Latents (B, D, h, w) and the nearest codes (B, h, w)."""
    x = conv(w, "encoder.conv_in", images, padding=1)
    for level in range(levels):
        for i in range(blocks):
            x = theirs_block(w, f"encoder.down.{level}.block.{i}", x)
            x = theirs_attention(w, f"encoder.down.{level}.attn.{i}", x)
        if level < levels - 1:
            x = conv(w, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = theirs_middle(w, "encoder.mid", x)
    x = conv(w, "encoder.conv_out", swish(normalized(w, "encoder.norm_out", x)), padding=1)
    latents = conv(w, "quant_conv", x)
    distance = torch.cdist(latents.flatten(2).transpose(1, 2), w["quantize.embedding.weight"][None])
    return latents, distance.argmin(2).view(len(latents), *latents.shape[2:])


def theirs_decode(w, codes, levels, blocks):
    """Images of codes (B, h, w); up.0 is the finest resolution, and has no upsampling after it."""
    x = conv(w, "post_quant_conv", w["quantize.embedding.weight"][codes].permute(0, 3, 1, 2))
    x = theirs_middle(w, "decoder.mid", conv(w, "decoder.conv_in", x, padding=1))
    for level in range(levels - 1, -1, -1):
        for i in range(blocks + 1):
            x = theirs_block(w, f"decoder.up.{level}.block.{i}", x)
            x = theirs_attention(w, f"decoder.up.{level}.attn.{i}", x)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(w, f"decoder.up.{level}.upsample.conv", x, padding=1)
    return conv(w, "decoder.conv_out", swish(normalized(w, "decoder.norm_out", x)), padding=1)


def theirs_logits(w, tokens, layers, heads):
    """Logits (B, T, V) of tokens (B, T)."""
    T = tokens.shape[1]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    x = w["tok_emb.weight"][tokens] + w["pos_emb"][:, :T]
    for layer in range(layers):
        y, mixed = layer_norm(f"blocks.{layer}.ln1", x), []
        q, k, v = (linear(f"blocks.{layer}.attn.{name}", y) for name in ("query", "key", "value"))
        for part in torch.arange(x.shape[2]).chunk(heads):  # head after head
            scores = q[..., part] @ k[..., part].transpose(1, 2) / len(part)**0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            mixed.append(scores.softmax(2) @ v[..., part])
        x = x + linear(f"blocks.{layer}.attn.proj", torch.cat(mixed, 2))
        y = linear(f"blocks.{layer}.mlp.0", layer_norm(f"blocks.{layer}.ln2", x))
        x = x + linear(f"blocks.{layer}.mlp.2", y * (1 + torch.erf(y / 2**0.5)) / 2)
    return layer_norm("ln_f", x) @ w["head.weight"].T


# Parity


@pytest.mark.parametrize("base, multipliers, blocks, codes, width, channels, seed", [
    (32, (1, 2), 1, 20, 16, 3, 0),
    (32, (1, 1, 3), 2, 12, 8, 1, 1),
    (64, (2, 1, 1, 2), 1, 16, 24, 4, 2),
    (96, (1,), 1, 10, 4, 3, 3),
    (128, (1, 2), 2, 8, 6, 3, 4),
])
def test_a_first_stage_computes_what_theirs_computes(
        tmp_path, base, multipliers, blocks, codes, width, channels, seed):
    w = random_weights(vq_shapes(base, multipliers, blocks, codes, width, channels), seed)
    vq = VQ.from_taming(write(tmp_path / "vqgan.ckpt", w | LOSSES))
    levels = len(multipliers)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, channels, 2 * 2**levels, 3 * 2**levels, generator=generator)
    latents, nearest = theirs_encode(w, images, levels, blocks)
    with torch.no_grad():
        torch.testing.assert_close(vq.latents(images), latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(vq.encode(images), nearest)
    torch.testing.assert_close(
        vq.decode(nearest), theirs_decode(w, nearest, levels, blocks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers, width, vocabulary, positions, prefix", [
    (2, 128, 20, 16, "transformer."), (1, 64, 7, 9, ""), (3, 192, 30, 40, "")])
def test_a_transformer_computes_what_theirs_computes(tmp_path, layers, width, vocabulary, positions, prefix):
    w = random_weights(gpt_shapes(layers, width, vocabulary, positions), seed=layers)
    gpt = GPT.from_taming(write(tmp_path / "net2net.ckpt", prefixed(prefix, w))).eval()
    tokens = torch.randint(vocabulary, (2, positions), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            gpt(tokens), theirs_logits(w, tokens, layers, width // 64), rtol=1e-5, atol=1e-5)


def parity_file(name: str) -> Path:
    """A file below the folder that PARITY_DATA names; the test is skipped if it names none."""
    if "PARITY_DATA" not in os.environ:
        pytest.skip("PARITY_DATA names no folder with results of the authors' code")
    return next(Path(os.environ["PARITY_DATA"]).rglob(name))


def test_the_first_stage_agrees_with_the_authors_code(tmp_path):
    text = parity_file("taming_vqgan_f16_1024_keys.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines()]
    shapes = {line[0]: ast.literal_eval(line[1]) for line in lines if line[-1] == "param"}
    found = {key: shape for key, shape in shapes.items() if not key.startswith("loss.")}
    assert found == vq_shapes(128, (1, 1, 2, 2, 4), 2, codes=1024, width=256)
    vq = VQ.from_taming(write(tmp_path / "vqgan.ckpt", random_weights(shapes, seed=0)))
    assert vq.config == VQConfig()
    theirs = np.load(parity_file("vqgan_f16_seed0.npz"))
    images = picture(1, 256, seed=0)
    with torch.no_grad():
        np.testing.assert_allclose(vq.latents(images).numpy(), theirs["latent"], atol=1e-4)
    codes = vq.encode(images)
    assert np.array_equal(codes.numpy(), theirs["codes"])
    np.testing.assert_allclose(vq.decode(codes).numpy(), theirs["reconstruction"], rtol=0, atol=5e-3)


def test_the_transformer_agrees_with_the_authors_code(tmp_path):
    theirs = np.load(parity_file("gpt_seed0.npz"))
    shapes = {str(key): ast.literal_eval(str(shape)) for key, shape in zip(theirs["keys"], theirs["shapes"])}
    assert shapes == gpt_shapes(3, 128, vocabulary=64, positions=48)
    gpt = GPT.from_taming(write(tmp_path / "net2net.ckpt", random_weights(shapes, seed=0))).eval()
    with torch.no_grad():
        logits = gpt(torch.from_numpy(theirs["tokens"])).numpy()
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-4)


# Sizes


def shapes_only(shapes: dict) -> dict[str, Tensor]:
    """Tensors of any size that take one number in a file."""
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


def test_the_sizes_of_the_released_first_stages_are_read_off_the_shapes(tmp_path):
    path = tmp_path / "vqgan.ckpt"
    write(path, shapes_only(vq_shapes(128, (1, 1, 2, 2, 4), 2, codes=1024, width=256)) | LOSSES)
    assert VQConfig(**taming.vq_sizes(path)) == VQConfig()
    write(path, shapes_only(vq_shapes(128, (1, 2, 2, 4), 2, codes=16384, width=4)))
    f8 = VQConfig(channel_multipliers="1,2,2,4", codebook_size=16384, code_width=4)
    assert VQConfig(**taming.vq_sizes(path)) == f8 and f8.downsampling == 8
    segmentation = shapes_only(vq_shapes(128, (1, 1, 2, 2, 4), 2, codes=1024, width=256, channels=182))
    write(path, segmentation | {"colorize": torch.zeros(3, 182, 1, 1)})
    assert VQConfig(**taming.vq_sizes(path)) == VQConfig(image_channels=182)
    assert VQ.from_taming(path).config.image_channels == 182


@pytest.mark.parametrize("layers, width, heads, model", [
    (24, 1024, 16, "S-FLCKR, D-RIN, FacesHQ"), (24, 1664, 16, "FFHQ, CelebA-HQ"), (48, 1536, 24, "ImageNet"),
    (36, 1536, 16, "Open Images scenes"), (40, 1408, 16, "COCO scenes"), (12, 768, 12, "custom")])
def test_released_transformers_have_the_heads_that_their_configs_tell(tmp_path, layers, width, heads, model):
    path = write(tmp_path / "net2net.ckpt", shapes_only(gpt_shapes(layers, width, 1024, positions=512)))
    config = GPTConfig(**taming.gpt_sizes(path))
    assert config == GPTConfig(1024, 512, layers, heads, width, gelu="none"), model


def test_the_number_of_heads_can_be_named(tmp_path):
    w = random_weights(SMALL_GPT, seed=0)
    path = write(tmp_path / "net2net.ckpt", w)
    gpt, tokens = GPT.from_taming(path, n_head=4).eval(), torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens), theirs_logits(w, tokens, 2, heads=4), rtol=1e-5, atol=1e-5)
    write(path, random_weights(gpt_shapes(1, 96, 20, 16), seed=0))
    with pytest.raises(ValueError, match="96 wide, which heads 64 wide do not divide; name their number"):
        GPT.from_taming(path)
    assert GPT.from_taming(path, n_head=3).config.n_head == 3


def test_a_first_stage_is_found_inside_a_transformers_file(tmp_path):
    states = both_stages() | {"first_stage_model.loss.logvar": torch.ones(1)}
    states |= {f"permuter.{way}_shuffle_idx": torch.arange(16) for way in ("forward", "backward")}
    states |= prefixed("cond_stage_model.", random_weights(vq_shapes(64, (1,), 1, 4, 8), seed=9))
    inside = VQ.from_taming(write(tmp_path / "net2net.ckpt", states))
    alone = VQ.from_taming(write(tmp_path / "vqgan.ckpt", random_weights(SMALL_VQ, seed=0)))
    assert inside.config == alone.config
    for name, weight in alone.state_dict().items():
        assert torch.equal(inside.state_dict()[name], weight), name
    assert GPT.from_taming(tmp_path / "net2net.ckpt").config == GPTConfig(20, 16, 2, 2, 128, gelu="none")


def test_a_model_without_the_new_fields_in_its_config_is_the_model_it_was():
    for config, field in ((GPTConfig(), "gelu"), (VQConfig(), "group_channels")):
        old = dataclasses.asdict(config)
        del old[field]
        assert type(config)(**old) == config
    assert (GPTConfig().gelu, VQConfig().group_channels) == ("tanh", 4)
    with pytest.raises(ValueError, match="gelu is 'exact'; choose one of tanh, none"):
        GPTConfig(gelu="exact")


# Strictness


NETWORKS = [(VQ, "first_stage_model.", vq_shapes(32, (1, 2), 1, codes=4, width=4)),
            (GPT, "transformer.", gpt_shapes(1, 64, vocabulary=4, positions=4))]


@pytest.mark.parametrize("model, prefix, shapes", NETWORKS)
def test_every_weight_is_needed_and_none_may_be_left_over(tmp_path, model, prefix, shapes):
    weights = shapes_only(prefixed(prefix, shapes))
    model.from_taming(write(tmp_path / "x.ckpt", weights))
    for key in weights:
        write(tmp_path / "x.ckpt", {name: weight for name, weight in weights.items() if name != key})
        with pytest.raises(ValueError, match="x.ckpt has "):
            model.from_taming(tmp_path / "x.ckpt")
    path = write(tmp_path / "x.ckpt", weights | {f"{key}_2": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"has {key.removeprefix(prefix)}_2, for which there is no place"):
        model.from_taming(path)


@pytest.mark.parametrize("model, prefix, shapes", NETWORKS)
def test_weights_of_other_shapes_are_refused_by_name(tmp_path, model, prefix, shapes):
    weights = shapes_only(prefixed(prefix, shapes))
    for key, shape in shapes.items():
        other = (*shape, 2) if key == "quantize.embedding.weight" else (shape[0] + 32, *shape[1:])
        path = write(tmp_path / "x.ckpt", weights | {prefix + key: torch.zeros(1).expand(other)})
        try:
            loaded = model.from_taming(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} has ") and "\n" not in str(error)
        else:
            pytest.fail(f"{key} of {other} was read as {loaded.config}")


def test_the_sentence_about_a_shape_names_both(tmp_path):
    weights = random_weights(SMALL_GPT, seed=0) | {"blocks.1.mlp.0.weight": torch.zeros(128, 512)}
    with pytest.raises(ValueError, match=r"x.ckpt has a blocks.1.mlp.0.weight of \(128, 512\), where the "
                                         r"network's other sizes ask for \(512, 128\)"):
        GPT.from_taming(write(tmp_path / "x.ckpt", weights))


@pytest.mark.parametrize("model, key, shape, sentence", [
    (VQ, "encoder.down.0.attn.0.q.weight", (32, 32, 1, 1), r"has attention at the resolutions \[0, 1\] of 2"),
    (VQ, "decoder.up.0.attn.0.q.weight", (32, 32, 1, 1), r"has attention at the resolutions \[0, 1\] of 2"),
    (VQ, "quant_conv.weight", (16, 32, 1, 1), "has 32 channels before the projection to codes of 16"),
    (VQ, "encoder.conv_in.weight", (48, 3, 3, 3), "has 48 channels at first and then"),
    (VQ, "loss", (1,), "has loss, for which there is no place"),
    (VQ, "encoder.loss.weight", (1,), "has encoder.loss.weight, for which there is no place"),
    (VQ, "colorize.weight", (1,), "has colorize.weight, for which there is no place"),
    (VQ, "quantize.used", (20,), "has quantize.used, for which there is no place"),
    (GPT, "blocks.0.attn.masks", (1,), "has blocks.0.attn.masks, for which there is no place"),
    (GPT, "blocks.1.attn.mask", (1, 1, 4, 4), r"has a blocks.1.attn.mask that is not causal \(n_unmasked\)"),
    (GPT, "blocks.0.attn.mask", (1,), "has a blocks.0.attn.mask that is not causal"),
    (GPT, "blocks.0.mask", (1,), "has blocks.0.mask, for which there is no place"),
    (GPT, "head.bias", (20,), "has head.bias, for which there is no place"),
])
def test_a_network_unlike_ours_is_refused_with_one_sentence(tmp_path, model, key, shape, sentence):
    weights = random_weights(SMALL_VQ if model is VQ else SMALL_GPT, seed=0) | {key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=sentence) as error:
        model.from_taming(write(tmp_path / "x.ckpt", weights))
    assert "\n" not in str(error.value)


def test_layers_too_narrow_for_32_groups_are_refused(tmp_path):
    path = write(tmp_path / "x.ckpt", shapes_only(vq_shapes(16, (1, 2), 1, codes=4, width=4)))
    with pytest.raises(ValueError, match=r"has 16 channels at first and then \[16, 32\]; they must be"):
        VQ.from_taming(path)


def test_a_first_stage_without_attention_is_refused(tmp_path):
    weights = {key: weight for key, weight in random_weights(SMALL_VQ, 0).items() if ".attn." not in key}
    with pytest.raises(ValueError, match=r"has attention at the resolutions \[\] of 2; only models"):
        VQ.from_taming(write(tmp_path / "x.ckpt", weights))


def test_a_file_without_the_network_asked_for_says_so(tmp_path):
    vq = write(tmp_path / "vqgan.ckpt", random_weights(SMALL_VQ, seed=0) | LOSSES)
    with pytest.raises(ValueError, match="vqgan.ckpt has no transformer of taming-transformers in it"):
        GPT.from_taming(vq)
    gpt = write(tmp_path / "gpt.ckpt", random_weights(SMALL_GPT, seed=0))
    with pytest.raises(ValueError, match="gpt.ckpt has no VQ model of taming-transformers in it"):
        VQ.from_taming(gpt)
    write(gpt, both_stages() | {"ema.decay": torch.zeros(1)})
    with pytest.raises(ValueError, match="has ema.decay beside transformer., first_stage_model., cond_stage"):
        VQ.from_taming(gpt)


# Reading without trust


def archive(path: Path, pickled: bytes) -> Path:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
    return path


def call(module: str, name: str, argument: str) -> bytes:
    """The pickle of {"state_dict": module.name(argument)}, protocol 2."""
    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()
    return (b"\x80\x02}" + text("state_dict") + f"c{module}\n{name}\n".encode() + text(argument)
            + b"\x85Rs.")


def test_the_file_written_for_these_tests_would_run_if_it_were_trusted(tmp_path):
    pickle.loads(call("os", "system", f"touch {tmp_path / 'ran'}"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "getattr"), ("builtins", "__import__"), ("subprocess", "Popen"),
    ("runpy", "run_path"), ("torch.hub", "load"), ("torch.serialization", "load"), ("torch", "load"),
    ("pytorch_lightningx", "f"), ("not.lightning", "f"), ("builtins.int", "f"), ("pathlib2", "Path")])
@pytest.mark.parametrize("model", [VQ, GPT])
def test_a_file_that_calls_for_anything_else_is_refused_by_name_and_runs_nothing(
        tmp_path, module, name, model):
    ran = str(tmp_path / "ran")
    code = f"touch {ran}" if name in ("system", "Popen") else f"open({ran!r}, 'w')"
    path = archive(tmp_path / "evil.ckpt", call(module, name, code))
    real = {"__builtin__": "builtins"}.get(module, module)
    with pytest.raises(ValueError) as error:
        model.from_taming(path)
    assert str(error.value) == (f"{path} was not opened: it calls for {real}.{name}, which no file of "
                                "taming-transformers does; nothing in it was run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module, name", [
    ("pytorch_lightning.os", "system"), ("pytorch_lightning", "os.system"), ("collections.os", "system"),
    ("argparse", "_os.system"), ("numpy.testing", "runstring"), ("pathlib", "os.mkdir"),
    ("typing", "sys.exit")])
def test_an_allowed_name_runs_nothing_even_where_it_leads_to_code(tmp_path, module, name):
    path = archive(tmp_path / "evil.ckpt", call(module, name, f"touch {tmp_path / 'ran'}"))
    with pytest.raises(ValueError, match='has no "state_dict"'):
        VQ.from_taming(path)
    assert not (tmp_path / "ran").exists()


def test_code_beside_good_weights_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    path = write(tmp_path / "evil.ckpt", random_weights(SMALL_VQ, seed=0), callbacks=[Malicious()])
    with pytest.raises(ValueError, match=r"was not opened: it calls for (posix|nt)\.system"):
        VQ.from_taming(path)
    assert not (tmp_path / "ran").exists()


def test_objects_that_are_no_plain_weights_are_refused_whatever_they_pretend(tmp_path):
    weights, name = random_weights(SMALL_VQ, seed=0), "encoder.conv_in.weight"
    shadowed = collections.OrderedDict(state_dict=weights)
    shadowed.get = "not a method"
    torch.save(shadowed, tmp_path / "shadowed.ckpt")
    assert VQ.from_taming(tmp_path / "shadowed.ckpt").config.codebook_size == 20
    for weight in (weights[name].to_sparse(), weights[name].to("meta"), weights[name].to(torch.complex64)):
        with pytest.raises(ValueError, match=f"has '{name}' in its state_dict, which is not|is damaged"):
            VQ.from_taming(write(tmp_path / "odd.ckpt", weights | {name: weight}))


def test_the_trainers_objects_are_passed_over_without_the_trainer(tmp_path, monkeypatch):
    """As pickle writes them: classes, calls, new objects with items, attributes, slots or another state."""
    class ModelCheckpoint:
        def __getstate__(self):
            return (1, "two", None)

    class AttributeDict(dict):
        pass

    class Slots:
        __slots__ = ("a",)

    class Called:
        def __reduce__(self):
            return (Called, (1, [2]), {"a": 3})

    class LocalFileSystem:  # a ModelCheckpoint holds one
        pass

    files = types.ModuleType("fsspec.implementations.local")
    LocalFileSystem.__module__, LocalFileSystem.__qualname__ = files.__name__, "LocalFileSystem"
    files.LocalFileSystem = LocalFileSystem
    monkeypatch.setitem(sys.modules, files.__name__, files)
    module = types.ModuleType("pytorch_lightning")
    for trainers in (ModelCheckpoint, AttributeDict, Slots, Called):
        trainers.__module__, trainers.__qualname__ = module.__name__, trainers.__name__
        setattr(module, trainers.__name__, trainers)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    slots, attributes = Slots(), AttributeDict(lr=1.0, nested=AttributeDict(a=1))
    slots.a, attributes.note = 5, "an attribute beside the items"
    counts = collections.defaultdict(list, {"a": [1]})
    others = {
        "callbacks": {ModelCheckpoint: {"best": torch.tensor(1.0), "path": Path("a/b.ckpt")}},
        "objects": [LocalFileSystem(), ModelCheckpoint(), slots, Called(), argparse.Namespace(lr=0.1)],
        "hyper_parameters": attributes, "counts": counts, "ordered": collections.OrderedDict(a=1),
        "numbers": [np.float64(2.5), np.dtype("float32"), np.arange(3)], "bytes": b"abc", "set": {1, 2},
        "time": datetime.datetime(2020, 11, 9), "big": 2**80, "type": dict, "none": None,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
    }
    path = write(tmp_path / "vqgan.ckpt", collections.OrderedDict(random_weights(SMALL_VQ, seed=0)), **others)
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    safe = torch.serialization.get_safe_globals()
    vq = VQ.from_taming(path)
    assert "pytorch_lightning" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == set(safe)
    assert torch.equal(vq.quantizer.codebook, random_weights(SMALL_VQ, 0)["quantize.embedding.weight"])


def test_a_file_is_mapped_so_that_the_optimizers_state_stays_on_the_disk(tmp_path):
    path = write(tmp_path / "vqgan.ckpt", random_weights(SMALL_VQ, seed=0))
    content = path.read_bytes()

    def starts(weights) -> set[int]:  # where in memory the file would begin if these lay in it
        return {weight.data_ptr() - content.find(weight.numpy().tobytes()) for weight in weights.values()}
    mapped = taming.read(path)
    assert len(starts(mapped)) == 1
    assert starts(VQ.from_taming(path).state_dict()).isdisjoint(starts(mapped))


def test_files_that_are_damaged_or_of_another_kind_are_refused_with_one_sentence(tmp_path):
    whole = write(tmp_path / "whole.ckpt", random_weights(SMALL_VQ, seed=0)).read_bytes()
    short = archive(tmp_path / "short.ckpt", call("os", "system", "")[:-3]).read_bytes()
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for i, content in enumerate((b"", b"hello", whole[:100], whole[:len(whole) // 2], whole[:-10], short,
                                 (tmp_path / "arrays.npz").read_bytes(), pickle.dumps({"state_dict": {}}))):
        path = tmp_path / f"{i}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^\S+/{i}.ckpt is damaged, or was not written by torch.save"):
            VQ.from_taming(path)
        assert not taming.recognizes(path)
    for content in ([1, 2], {"model": 1}, {"state_dict": {}}, {"state_dict": [1]}):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match='x.ckpt has no "state_dict": it is not a file of taming-tran'):
            GPT.from_taming(tmp_path / "x.ckpt")
    for content in ({"a": 1}, {3: torch.zeros(1)}):
        torch.save({"state_dict": content}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="in its state_dict, which is not a tensor with a name"):
            GPT.from_taming(tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match="none.ckpt does not exist"):
        VQ.from_taming(tmp_path / "none.ckpt")


def test_their_files_are_told_from_ours_by_content(tmp_path):
    theirs = write(tmp_path / "checkpoint.pt", random_weights(SMALL_VQ, seed=0))
    assert taming.recognizes(theirs) and taming.recognizes(str(theirs))
    ours = tmp_path / "vqgan.ckpt"
    torch.save({"kind": "vq", "config": {"out": "state_dict"}, "model_config": {}, "model": {}}, ours)
    kind = write(tmp_path / "kind.ckpt", random_weights(SMALL_VQ, seed=0), hyper_parameters={"kind": "vq"})
    assert taming.recognizes(kind)
    assert not taming.recognizes(ours) and not taming.recognizes(tmp_path) and not taming.recognizes("none")


# The scripts


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four training and two validation pictures of 32×32, one of them half as large."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 4), ("val", 2)):
        (folder / split).mkdir()
        for i, pixels in enumerate(run.to_pixels(picture(count, 32, seed=count))):
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    Image.new("RGB", (16, 16)).save(folder / "train" / "0.png")  # is enlarged
    return folder


def test_a_gpt_trains_on_a_first_stage_of_theirs_and_keeps_it(pictures, tmp_path, monkeypatch):
    w = random_weights(SMALL_VQ, seed=0)
    path = write(tmp_path / "vqgan.pt", w | LOSSES)
    flags = ["--data", "folder", "--data-dir", str(pictures), "--codes-dir", str(tmp_path / "codes"),
             "--vq", str(path), "--out", str(tmp_path / "gpt"), "--n-layer", "1", "--n-head", "2",
             "--n-embd", "16", "--batch-size", "2", "--device", "cpu", "--workers", "0", "--order", "spiral"]
    saved = train_gpt.main([*flags, "--steps", "1"])
    checkpoint = run.load_checkpoint(saved, "gpt")
    first_stage, vq = checkpoint["first_stage"], VQ.from_taming(path)
    assert set(first_stage) == {"config", "model_config", "model", "path", "hash"}
    assert first_stage["path"] == str(path) and VQConfig(**first_stage["model_config"]) == vq.config
    assert first_stage["hash"] == train_gpt.weights_hash(dataclasses.asdict(vq.config), vq.state_dict())
    assert (checkpoint["grid"], first_stage["config"]["codebook_size"]) == ([16, 16], 20)
    images = picture(2, 32, seed=2).mul(127.5).add(127.5).round() / 127.5 - 1  # as the files hold them
    caches = [np.load(file) for file in (tmp_path / "codes").glob("*.npy")]
    codes = next(cache for cache in caches if cache.shape[1] == 2)[0]
    assert np.array_equal(codes, theirs_encode(w, images, 2, 1)[1].numpy())

    path.unlink()
    train_gpt.main([*flags, "--steps", "2", "--resume"])
    monkeypatch.chdir(tmp_path)
    sample.main(["--checkpoint", str(saved), "--count", "1", "--device", "cpu"])
    assert Image.open("samples.png").size == (96, 96)


def greedy_picture(states: dict, order: list[int]) -> np.ndarray:
    """What their sampling draws if it always takes the likeliest code, from the start token 0: pixels."""
    w = {key.removeprefix("transformer."): weight for key, weight in states.items()}
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    for _ in order:
        tokens = torch.cat([tokens, theirs_logits(w, tokens, 2, 2)[:, -1].argmax(1, keepdim=True)], 1)
    side = int(len(order)**0.5)
    codes = torch.empty(1, side * side, dtype=torch.int64)
    codes[0, order] = tokens[0, 1:]
    w = {key.removeprefix("first_stage_model."): weight for key, weight in states.items()}
    return run.to_pixels(theirs_decode(w, codes.view(1, side, side), 2, 1))[0]


@pytest.mark.parametrize("order", [None, "spiral", "subsample"])
def test_an_unconditional_file_of_theirs_is_sampled_in_the_order_it_names(tmp_path, order):
    states, p = both_stages(seed=1), torch.arange(16)
    if order:
        p = ORDERINGS[order](4, 4)
        states |= {"permuter.forward_shuffle_idx": p, "permuter.backward_shuffle_idx": p.argsort()}
    path = write(tmp_path / "checkpoint.pt", states)
    out = tmp_path / "samples"
    flags = ["--count", "2", "--top-k", "1", "--out", str(out), "--device", "cpu"]
    sample.main(["--checkpoint", str(path), *flags])
    expected = greedy_picture(states, p.tolist()).astype(int)
    assert expected.std() > 20
    for i in range(2):
        assert np.abs(np.asarray(Image.open(out / f"{i:06d}.png")).astype(int) - expected).max() <= 1


def test_a_file_of_theirs_is_sampled_with_the_heads_that_are_named(tmp_path):
    path = write(tmp_path / "net2net.ckpt", both_stages())
    config = sample.SampleConfig(checkpoint=str(path), n_head=8)
    gpt, _, p, grid, start_token = sample.open_model(config, torch.device("cpu"))
    assert (gpt.config.n_head, p.tolist(), grid, start_token) == (8, list(range(16)), (4, 4), 0)


@pytest.mark.parametrize("changes, sentence", [
    ({"cond_stage_model.quant_conv.weight": torch.zeros(1)}, "writes pictures to a condition (cond_stage"),
    ({"transformer.pos_emb": torch.zeros(1, 32, 128)}, "has 32 positions, which are not those of a square"),
    ({"transformer.pos_emb": torch.zeros(1, 32, 128), "permuter.forward_shuffle_idx": torch.arange(16)},
     "has 32 positions, which are not those of a square grid of codes: some belong to a condition"),
    ({"permuter.forward_shuffle_idx": torch.ones(16, dtype=torch.int64)}, "that is not a permutation"),
    ({"permuter.forward_shuffle_idx": torch.arange(1, 17)}, "that is not a permutation"),
    ({"permuter.forward_shuffle_idx": torch.arange(16).view(4, 4)}, "that is not a permutation"),
])
def test_a_conditional_file_of_theirs_is_not_sampled(tmp_path, changes, sentence, monkeypatch, capsys):
    path = write(tmp_path / "net2net.ckpt", both_stages() | changes)
    out = tmp_path / "samples.png"
    flags = ["--checkpoint", str(path), "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    with pytest.raises(SystemExit) as ending:
        run.command_line(sample.main)
    errors = capsys.readouterr().err
    assert ending.value.code == 1 and errors.count("\n") == 1 and sentence in errors
    assert not out.exists()


@pytest.mark.parametrize("script, flag", [(sample, "--checkpoint"), (train_gpt, "--vq")])
def test_the_scripts_refuse_a_malicious_file_with_one_sentence(script, flag, tmp_path, monkeypatch, capsys):
    path = archive(tmp_path / "evil.ckpt", call("os", "system", f"touch {tmp_path / 'ran'}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", flag, str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as ending:
        run.command_line(script.main)
    assert ending.value.code == 1
    assert capsys.readouterr().err == (
        f"script.py: {path} was not opened: it calls for os.system, which no file of taming-transformers "
        "does; nothing in it was run\n")
    assert not (tmp_path / "ran").exists()
