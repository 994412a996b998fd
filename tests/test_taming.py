"""Files of the authors' taming-transformers: parity with what their network computes, and what is refused.

Oracles: `theirs_encode`, `theirs_decode` and `theirs_logits`, which compute straight from a file's names, one
function call a layer; and, where PARITY_DATA names a folder that holds them, what the authors' own code
computed (vqgan_f16_seed0.npz, gpt_seed0.npz and taming_vqgan_f16_1024_keys.txt, somewhere below it).
"""
import argparse
import ast
import collections
import datetime
import functools
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import taming
from gpt import GPT, GPTConfig
from orderings import ORDERINGS
from stages import FirstStage
from vq import VQ, VQConfig

# What their network computes, with weights w by their names


class Sizes(NamedTuple):  # of a VQModel: their ch, ch_mult, num_res_blocks, n_embed, embed_dim, in_channels
    base: int = 32
    multipliers: tuple = (1, 2)
    blocks: int = 1
    codes: int = 20
    width: int = 16
    channels: int = 3


class Recorder(dict):
    """In place of weights: is filled with tensors without values, of the shapes that a network asks for."""


def parameters(w, name, *shape):
    if isinstance(w, Recorder):
        w |= {f"{name}.weight": empty(*shape), f"{name}.bias": empty(shape[0])}
    return w[f"{name}.weight"], w[f"{name}.bias"]


def empty(*shape):
    return torch.empty(shape, device="meta")


def conv(w, name, x, out, size=3, **options):
    return F.conv2d(x, *parameters(w, name, out, x.shape[1], size, size), **options)


def normalized(w, name, x):
    return F.group_norm(x, 32, *parameters(w, name, x.shape[1]), eps=1e-6)


def activated(w, name, x):
    x = normalized(w, name, x)
    return x * torch.sigmoid(x)


def theirs_block(w, name, x, out):
    y = conv(w, f"{name}.conv1", activated(w, f"{name}.norm1", x), out, padding=1)
    y = conv(w, f"{name}.conv2", activated(w, f"{name}.norm2", y), out, padding=1)
    return y + (conv(w, f"{name}.nin_shortcut", x, out, 1) if x.shape[1] != out else x)


def theirs_attention(w, name, x):
    C, height, width = x.shape[1:]
    normal = normalized(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", normal, C, 1).flatten(2) for part in "qkv")  # (B, C, h*w)
    weights = torch.softmax(q.transpose(1, 2) @ k / C**0.5, dim=2)
    mixed = (v @ weights.transpose(1, 2)).unflatten(2, (height, width))
    return x + conv(w, f"{name}.proj_out", mixed, C, 1)


def theirs_level(w, name, x, out, blocks, attention):
    for i in range(blocks):
        x = theirs_block(w, f"{name}.block.{i}", x, out)
        if attention:
            x = theirs_attention(w, f"{name}.attn.{i}", x)
    return x


def theirs_middle(w, name, x):
    x = theirs_attention(w, f"{name}.attn_1", theirs_block(w, f"{name}.block_1", x, x.shape[1]))
    return theirs_block(w, f"{name}.block_2", x, x.shape[1])


def theirs_encode(w, images, sizes=Sizes()):
    """Latents (B, D, h, w) and the nearest codes (B, h, w)."""
    x, last = conv(w, "encoder.conv_in", images, sizes.base, padding=1), len(sizes.multipliers) - 1
    for level, multiplier in enumerate(sizes.multipliers):
        x = theirs_level(w, f"encoder.down.{level}", x, sizes.base * multiplier, sizes.blocks, level == last)
        if level < last:
            padded = F.pad(x, (0, 1, 0, 1))
            x = conv(w, f"encoder.down.{level}.downsample.conv", padded, x.shape[1], stride=2)
    x = activated(w, "encoder.norm_out", theirs_middle(w, "encoder.mid", x))
    x = conv(w, "encoder.conv_out", x, sizes.width, padding=1)
    latents = conv(w, "quant_conv", x, sizes.width, 1)
    codebook = w.setdefault("quantize.embedding.weight", empty(sizes.codes, sizes.width))
    distance = torch.cdist(latents.flatten(2).transpose(1, 2), codebook[None])
    return latents, distance.argmin(2).view(len(latents), *latents.shape[2:])


def theirs_decode(w, codes, sizes=Sizes()):
    """Images of codes (B, h, w); up.0 is the finest resolution, and has no upsampling after it."""
    x = w["quantize.embedding.weight"][codes].permute(0, 3, 1, 2)
    x, last = conv(w, "post_quant_conv", x, sizes.width, 1), len(sizes.multipliers) - 1
    x = conv(w, "decoder.conv_in", x, sizes.base * sizes.multipliers[-1], padding=1)
    x = theirs_middle(w, "decoder.mid", x)
    for level, multiplier in reversed([*enumerate(sizes.multipliers)]):
        out, name = sizes.base * multiplier, f"decoder.up.{level}"
        x = theirs_level(w, name, x, out, sizes.blocks + 1, level == last)
        if level > 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(w, f"{name}.upsample.conv", x, out, padding=1)
    return conv(w, "decoder.conv_out", activated(w, "decoder.norm_out", x), sizes.channels, padding=1)


def theirs_logits(w, tokens, layers, heads):
    """Logits (B, T, V) of tokens (B, T)."""
    def linear(name, x, out=None):
        return F.linear(x, *parameters(w, name, out or x.shape[2], x.shape[2]))

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[2:], *parameters(w, name, x.shape[2]), eps=1e-5)

    x = w["tok_emb.weight"][tokens] + w["pos_emb"][:, :tokens.shape[1]]
    for layer in range(layers):
        y = layer_norm(f"blocks.{layer}.ln1", x)
        q, k, v = (linear(f"blocks.{layer}.attn.{name}", y).unflatten(2, (heads, -1)).transpose(1, 2)
                   for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"blocks.{layer}.attn.proj", mixed)
        y = linear(f"blocks.{layer}.mlp.0", layer_norm(f"blocks.{layer}.ln2", x), 4 * x.shape[2])
        x = x + linear(f"blocks.{layer}.mlp.2", y * (1 + torch.erf(y / 2**0.5)) / 2, x.shape[2])
    return layer_norm("ln_f", x) @ w["head.weight"].T


# What is in a file


@functools.cache
def vq_shapes(sizes: Sizes = Sizes()) -> dict:
    """The names and shapes of a VQModel's state_dict, without its losses."""
    w, side = Recorder(), 2 ** len(sizes.multipliers)
    _, codes = theirs_encode(w, empty(1, sizes.channels, side, side), sizes)
    theirs_decode(w, codes, sizes)
    return {key: tuple(weight.shape) for key, weight in w.items()}


def gpt_shapes(layers: int = 2, width: int = 128, vocabulary: int = 20, positions: int = 16) -> dict:
    """The names and shapes of their GPT's state_dict, without its masks."""
    w = Recorder({"tok_emb.weight": empty(vocabulary, width), "pos_emb": empty(1, positions, width),
                  "head.weight": empty(vocabulary, width)})
    theirs_logits(w, empty(1, positions).long(), layers, heads=1)
    return {key: tuple(weight.shape) for key, weight in w.items()}


def random_weights(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
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
    images = np.zeros((batch, 3, size, size))
    for channel in images.reshape(-1, size, size):
        for _ in range(8):
            fy, fx, phase = random.uniform(-20, 20), random.uniform(-20, 20), random.uniform(0, 6.28)
            channel += np.sin(fy * y + fx * x + phase) / 3
    return torch.from_numpy(np.clip(images, -1, 1).astype(np.float32))


def parity_file(name: str) -> Path:
    """A file below the folder that PARITY_DATA names; the test is skipped if it names none."""
    if "PARITY_DATA" not in os.environ:
        pytest.skip("PARITY_DATA names no folder with results of the authors' code")
    return next(Path(os.environ["PARITY_DATA"]).rglob(name))


def write(path: Path, weights: dict, **others) -> Path:
    torch.save({"epoch": 3, "global_step": 12, "state_dict": weights, **others}, path)
    return path


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": weight for key, weight in weights.items()}


LOSSES = {"loss.discriminator.main.0.weight": torch.ones(3), "loss.perceptual_loss.lin0": torch.ones(2)}
MASKS = {f"blocks.{layer}.attn.mask": torch.ones(16, 16).tril()[None, None] for layer in range(2)}


def both_stages(seed: int = 0) -> dict[str, Tensor]:
    """An unconditional Net2NetTransformer's state_dict: pictures of 8×8, a grid of 4×4 codes."""
    return (prefixed("first_stage_model.", random_weights(vq_shapes(), seed) | LOSSES)
            | prefixed("transformer.", random_weights(gpt_shapes(), seed) | MASKS))


# Parity


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(32, (1, 1, 3), 2, 12, 8, 1),
                                   Sizes(64, (2, 1, 1, 2), 1, 16, 24, 4), Sizes(96, (1,), 1, 10, 4, 3)])
def test_a_first_stage_computes_what_theirs_computes(tmp_path, sizes):
    w = random_weights(vq_shapes(sizes))
    states = w | LOSSES
    if sizes == Sizes():  # inside a transformer's file
        states = prefixed("first_stage_model.", states | {"colorize": torch.zeros(3, 3, 1, 1)})
        states |= {"cond_stage_model.conv_in.weight": torch.zeros(1), "transformer.pos_emb": torch.zeros(1)}
    vq = VQ.from_taming(write(tmp_path / "vqgan.ckpt", states))
    side = 2 ** len(sizes.multipliers)
    images = torch.randn(2, sizes.channels, 2 * side, 3 * side, generator=torch.manual_seed(0))
    latents, nearest = theirs_encode(w, images, sizes)
    with torch.no_grad():
        torch.testing.assert_close(vq.latents(images), latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(vq.encode(images), nearest)
    torch.testing.assert_close(vq.decode(nearest), theirs_decode(w, nearest, sizes), rtol=1e-4, atol=1e-4)


def test_a_transformer_computes_what_theirs_computes(tmp_path):
    path = tmp_path / "net2net.ckpt"
    for layers, width, positions, prefix, heads in (
            (2, 128, 16, "transformer.", 0), (3, 192, 40, "", 0), (1, 96, 16, "", 3), (2, 128, 16, "", 4)):
        w = random_weights(gpt_shapes(layers, width, 20, positions), seed=layers)
        gpt = GPT.from_taming(write(path, prefixed(prefix, w)), heads).eval()
        tokens = torch.randint(20, (2, positions), generator=torch.manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(
                gpt(tokens), theirs_logits(w, tokens, layers, heads or width // 64), rtol=1e-5, atol=1e-5)
    write(path, random_weights(gpt_shapes(1, 96)))
    with pytest.raises(ValueError, match="96 wide, which is no multiple of heads 64 wide; pass their number"):
        GPT.from_taming(path)


def test_the_first_stage_agrees_with_the_authors_code(tmp_path):
    text = parity_file("taming_vqgan_f16_1024_keys.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines()]
    shapes = {line[0]: ast.literal_eval(line[1]) for line in lines if line[-1] == "param"}
    assert {key: shape for key, shape in shapes.items() if not key.startswith("loss.")} == vq_shapes(PAPER)
    vq = VQ.from_taming(write(tmp_path / "vqgan.ckpt", random_weights(shapes)))
    assert vq.config == VQConfig()
    theirs, images = np.load(parity_file("vqgan_f16_seed0.npz")), picture(1, 256, seed=0)
    with torch.no_grad():
        np.testing.assert_allclose(vq.latents(images).numpy(), theirs["latent"], atol=1e-4)
    codes = vq.encode(images)
    assert np.array_equal(codes.numpy(), theirs["codes"])
    np.testing.assert_allclose(vq.decode(codes).numpy(), theirs["reconstruction"], rtol=0, atol=5e-3)


def test_the_transformer_agrees_with_the_authors_code(tmp_path):
    theirs = np.load(parity_file("gpt_seed0.npz"))
    shapes = {str(key): ast.literal_eval(str(shape)) for key, shape in zip(theirs["keys"], theirs["shapes"])}
    assert shapes == gpt_shapes(3, 128, vocabulary=64, positions=48)
    gpt = GPT.from_taming(write(tmp_path / "net2net.ckpt", random_weights(shapes))).eval()
    with torch.no_grad():
        logits = gpt(torch.from_numpy(theirs["tokens"])).numpy()
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-4)


# Sizes

PAPER = Sizes(128, (1, 1, 2, 2, 4), 2, 1024, 256)


def replace_read(monkeypatch, weights: dict):
    monkeypatch.setattr(taming, "read", lambda path: dict(weights))


def test_the_sizes_of_the_released_models_are_read_off_the_shapes(monkeypatch):
    masks = {"encoder.conv_in.weight": (128, 182, 3, 3), "colorize": (3, 182, 1, 1)}
    f8 = VQConfig(channel_multipliers="1,2,2,4", codebook_size=16384, code_width=4)
    paper = vq_shapes(PAPER)
    for shapes, config in ((paper, VQConfig()), (paper | masks, VQConfig(image_channels=182)),
                           (vq_shapes(Sizes(128, (1, 2, 2, 4), 2, 16384, 4)), f8)):
        replace_read(monkeypatch, {key: empty(*shape) for key, shape in shapes.items()})
        assert VQConfig(**taming.vq_sizes("")) == config
    for layers, width, heads in ((24, 1024, 16), (12, 768, 12), (48, 1536, 24),  # 64 wide
                                 (24, 1664, 16), (32, 1280, 16), (36, 1536, 16), (40, 1408, 16)):  # others
        weights = {"tok_emb.weight": empty(1024, width), "pos_emb": empty(1, 512, width)}
        replace_read(monkeypatch, weights | {f"blocks.{i}.ln1.bias": empty(width) for i in range(layers)})
        config = GPTConfig(**taming.gpt_sizes(""))
        sizes = (config.vocab_size, config.block_size, config.n_layer, config.n_embd, config.n_head)
        assert sizes == (1024, 512, layers, width, heads)


# Strictness


@functools.cache
def our_state(config) -> dict:
    with torch.device("meta"):
        return (VQ if isinstance(config, VQConfig) else GPT)(config).state_dict()


def load_vq(path="x.ckpt"):
    return taming.vq_weights(path, our_state(VQConfig(**taming.vq_sizes(path))))


def load_gpt(path="x.ckpt"):
    return taming.gpt_weights(path, our_state(GPTConfig(**taming.gpt_sizes(path))))


@pytest.mark.parametrize("load, prefix, shapes", [
    (load_vq, "first_stage_model.", vq_shapes()), (load_gpt, "transformer.", gpt_shapes(1, 64))])
def test_every_weight_is_needed_finite_and_of_its_shape_and_no_other(monkeypatch, load, prefix, shapes):
    weights = {prefix + key: torch.zeros(shape) for key, shape in shapes.items()}
    replace_read(monkeypatch, weights)
    load()
    for i, (key, weight) in enumerate(weights.items()):
        more = weight.T if key.endswith("quantize.embedding.weight") else weight  # any number of codes passes
        changes = [{}, {key: torch.cat([more, more[:1]])}]
        if i % 8 == 0:
            changes += [{key: weight[:0]}, {key: weight[None]}, {key: weight + torch.inf},
                        {key: weight, f"{key}_2": weight}]
        for change in changes:
            replace_read(monkeypatch, {name: weights[name] for name in weights if name != key} | change)
            with pytest.raises(ValueError, match=r"^x.ckpt has [^\n]*$"):
                load()
                pytest.fail(f"{key} was read from {change}")


@pytest.mark.parametrize("load, changes, sentence", [
    (load_vq, {"encoder.down.0.attn.0.q.weight": (32, 32)}, r"attention at the resolutions \[0, 1\] of 2"),
    (load_vq, {"decoder.up.0.attn.0.q.weight": (32, 32)}, r"attention at the resolutions \[0, 1\] of 2"),
    (load_vq, dict.fromkeys(key for key in vq_shapes() if ".attn." in key), r"attention at .* \[\] of 2"),
    (load_vq, {"quant_conv.weight": (16, 32, 1, 1)}, "32 channels before the projection to codes of 16"),
    (load_vq, {"encoder.conv_in.weight": (16, 3, 3, 3)}, r"16 channels at first and then \[32, 64\]"),
    (load_vq, {"encoder.conv_in.weight": (64, 3, 3, 3)}, r"64 channels at first and then \[32, 64\]"),
    (load_vq, {"encoder.conv_in.weight": None}, "no VQ model of taming-transformers in it"),
    (load_vq, {"losses": (1,)}, "losses, for which there is no place"),
    (load_vq, {"encoder.loss.weight": (1,)}, "encoder.loss.weight, for which there is no place"),
    (load_vq, {"colorize.weight": (1,)}, "colorize.weight, for which there is no place"),
    (load_gpt, {"tok_emb.weight": None}, "no transformer of taming-transformers in it"),
    (load_gpt, {"blocks.1.mlp.0.weight": (128, 512)},
     r"a blocks.1.mlp.0.weight of \(128, 512\), where the network's other sizes ask for \(512, 128\)"),
    (load_gpt, {"blocks.0.attn.masks": (1,)}, "blocks.0.attn.masks, for which there is no place"),
    (load_gpt, {"blocks.1.attn.mask": (1, 1, 4, 4)}, r"a blocks.1.attn.mask that is not causal"),
    (load_gpt, {"blocks.0.attn.mask": (1,)}, "a blocks.0.attn.mask that is not causal"),
    (load_gpt, {"transformer.ema": (1,)}, r"\S+ beside transformer., first_stage_model., cond_stage")])
def test_a_network_unlike_ours_is_refused_with_one_sentence(monkeypatch, load, changes, sentence):
    shapes = {**(vq_shapes() if load is load_vq else gpt_shapes()), **changes}
    replace_read(monkeypatch, {key: torch.zeros(shape) for key, shape in shapes.items() if shape})
    with pytest.raises(ValueError, match=rf"^x.ckpt has {sentence}[^\n]*$"):
        load()


# Reading without trust


def archive(path: Path, pickled: bytes) -> Path:
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (("data.pkl", pickled), ("byteorder", "little"), ("version", "3\n")):
            file.writestr(f"archive/{name}", content)
    return path


def call(module: str, name: str, argument: str) -> bytes:
    """The pickle of {"state_dict": module.name(argument)}, protocol 2."""
    key, value = (pickle.dumps(text, 2)[2:-1] for text in ("state_dict", argument))
    return b"\x80\x02}" + key + f"c{module}\n{name}\n".encode() + value + b"\x85Rs."


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("builtins", "eval"), ("__builtin__", "eval"), ("builtins", "getattr"),
    ("subprocess", "Popen"), ("torch", "load"), ("pytorch_lightningx", "f"), ("not.lightning", "f"),
    ("builtins.int", "f"), ("pathlib2", "Path")])
def test_a_file_that_imports_anything_else_is_refused_by_name_and_runs_nothing(tmp_path, module, name):
    ran = str(tmp_path / "ran")
    pickled = call(module, name, f"touch {ran}" if name in ("system", "Popen") else f"open({ran!r}, 'w')")
    path, real = archive(tmp_path / "evil.ckpt", pickled), module.replace("__builtin__", "builtins")
    for model in (VQ, GPT):
        with pytest.raises(ValueError, match=f"was not opened: it imports {real}.{name}, which"):
            model.from_taming(path)
    for allowed in ("pytorch_lightning.os", "collections.os", "numpy.testing"):  # whatever it leads to
        archive(path, call(allowed, name, f"touch {ran}"))
        with pytest.raises(ValueError, match='has no "state_dict"'):
            VQ.from_taming(path)
    assert not (tmp_path / "ran").exists()
    if name == "system":  # the file would run if it were trusted
        pickle.loads(pickled)
        assert (tmp_path / "ran").exists()


def test_objects_that_are_no_plain_weights_are_refused_whatever_they_pretend(tmp_path):
    weights, name = random_weights(vq_shapes()), "encoder.conv_in.weight"
    shadowed = collections.OrderedDict(state_dict=weights)
    shadowed.get = "not a method"
    weights[name].float = torch.Size
    assert VQ.from_taming(write(tmp_path / "x.ckpt", weights)).config.codebook_size == 20
    torch.save(shadowed, tmp_path / "shadowed.ckpt")
    assert VQ.from_taming(tmp_path / "shadowed.ckpt").config.codebook_size == 20
    weight = weights[name].detach()
    for odd in (weight.to_sparse(), weight.to("meta"), weight.to(torch.complex64),
                torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), weight[:1].expand(10**12, 3, 3, 3)):
        for load in (VQ.from_taming, FirstStage.load):
            with pytest.raises(ValueError, match=f"'{name}' in its state_dict, which is not|is damaged|too few"):
                load(write(tmp_path / "odd.ckpt", weights | {name: odd}))


def test_the_trainers_objects_are_skipped_without_the_trainer(tmp_path, monkeypatch):
    """As pickle writes them: classes, calls, new objects with items, attributes, slots or another state."""
    name = "pytorch_lightning"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    for trainers, base, attributes in (
            ("ModelCheckpoint", object, {"__getstate__": lambda self: (1, "two", None)}),
            ("AttributeDict", dict, {}), ("Slots", object, {"__slots__": ("a",)}),
            ("Called", object, {"__reduce__": lambda self: (module.Called, (1, [2]), {"a": 3})})):
        setattr(module, trainers, type(trainers, (base,), attributes | {"__module__": name}))
    slots, attributes = module.Slots(), module.AttributeDict(lr=1.0, nested=module.AttributeDict(a=1))
    slots.a, attributes.note = 5, "an attribute beside the items"
    others = {
        "callbacks": {module.ModelCheckpoint: {"best": torch.tensor(1.0), "path": Path("a/b.ckpt")}},
        "objects": [module.ModelCheckpoint(), slots, module.Called(), argparse.Namespace(lr=0.1)],
        "hyper_parameters": attributes, "counts": collections.defaultdict(list, {"a": [1]}),
        "numbers": [np.float64(2.5), np.dtype("float32"), np.arange(3)], "bytes": b"abc", "set": {1, 2},
        "time": datetime.datetime(2020, 11, 9), "big": 2**80, "type": dict, "none": None,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}]}
    path = write(tmp_path / "vqgan.ckpt", collections.OrderedDict(random_weights(vq_shapes())), **others)
    monkeypatch.delitem(sys.modules, name)
    safe = set(torch.serialization.get_safe_globals())
    vq = VQ.from_taming(path)
    assert name not in sys.modules and set(torch.serialization.get_safe_globals()) == safe
    assert torch.equal(vq.quantizer.codebook, random_weights(vq_shapes())["quantize.embedding.weight"])


def test_a_file_is_mapped_so_that_the_optimizers_state_stays_on_the_disk(tmp_path):
    path = write(tmp_path / "vqgan.ckpt", random_weights(vq_shapes()))
    content = path.read_bytes()

    def starts(weights) -> set[int]:  # where in memory the file would begin if these lay in it
        return {weight.data_ptr() - content.find(weight.numpy().tobytes()) for weight in weights.values()}
    mapped = taming.read(path)
    assert len(starts(mapped)) == 1
    assert starts(VQ.from_taming(path).state_dict()).isdisjoint(starts(mapped))


def test_files_that_are_damaged_or_of_another_kind_are_refused_with_one_sentence(tmp_path):
    whole = write(tmp_path / "whole.ckpt", random_weights(vq_shapes())).read_bytes()
    short = archive(tmp_path / "short.ckpt", call("os", "system", "")[:-3]).read_bytes()
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for i, content in enumerate((b"", b"hello", whole[:100], whole[:len(whole) // 2], whole[:-10], short,
                                 (tmp_path / "arrays.npz").read_bytes(), pickle.dumps({"state_dict": {}}))):
        path = tmp_path / f"{i}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^\S+/{i}.ckpt is damaged, or was not written by torch.save"):
            VQ.from_taming(path)
        assert not taming.recognizes(path)
    for content in ([1, 2], {"model": 1}, {"state_dict": {}}, {"state_dict": [1]}, {"state_dict": {"a": 1}},
                    {"state_dict": {3: torch.zeros(1)}}):
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match='x.ckpt has no "state_dict"|which is not a tensor with a name'):
            GPT.from_taming(tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match="none.ckpt does not exist"):
        VQ.from_taming(tmp_path / "none.ckpt")


def test_their_files_are_told_from_ours_by_content(tmp_path):
    theirs = write(tmp_path / "checkpoint.pt", random_weights(vq_shapes()))
    assert taming.recognizes(theirs) and taming.recognizes(str(theirs))
    ours = tmp_path / "vqgan.ckpt"
    torch.save({"kind": "vq", "config": {"out": "state_dict"}, "model_config": {}, "model": {}}, ours)
    kind = write(tmp_path / "kind.ckpt", random_weights(vq_shapes()), hyper_parameters={"kind": "vq"})
    assert taming.recognizes(kind)
    assert not taming.recognizes(ours) and not taming.recognizes(tmp_path) and not taming.recognizes("none")


# Sampling


def test_the_order_of_an_unconditional_model_is_read_and_others_are_refused(monkeypatch):
    p, states = ORDERINGS["subsample"](4, 4), both_stages()
    order, longer = "permuter.forward_shuffle_idx", {"transformer.pos_emb": torch.zeros(1, 32, 128)}
    for changes, expected in (({}, list(range(16))), ({order: p}, p.tolist())):
        replace_read(monkeypatch, states | changes)
        assert taming.writing_order("x.ckpt").tolist() == expected
    for changes, sentence in (
            ({"cond_stage_model.weight": torch.zeros(1)}, r"a conditional model \(cond_stage_model\); only"),
            (longer, "32 positions for 32 codes"), (longer | {order: p}, "32 positions for 16 codes"),
            ({order: torch.ones(16).long()}, f"a {order} that is not a permutation"),
            ({order: p + (p == 15)}, f"a {order} that is not a permutation"),
            ({order: p.view(4, 4)}, f"a {order} that is not a permutation")):
        replace_read(monkeypatch, states | changes)
        with pytest.raises(ValueError, match=rf"^x.ckpt has {sentence}[^\n]*$"):
            taming.writing_order("x.ckpt")


@pytest.mark.parametrize("order", [None, "subsample"])
def test_an_unconditional_file_is_sampled_in_its_order_as_theirs_samples(tmp_path, order):
    """If the likeliest code is taken always, from the start token 0 on."""
    import sample
    states, p = both_stages(seed=1), torch.arange(16)
    if order:
        p = ORDERINGS[order](4, 4)
        states |= {"permuter.forward_shuffle_idx": p, "permuter.backward_shuffle_idx": p.argsort()}
    path, out = write(tmp_path / "checkpoint.pt", states), tmp_path / "samples"
    flags = ["--out", f"{out}/", "--count", "2", "--top-k", "1", "--device", "cpu"]
    sample.main(["--checkpoint", str(path), *flags])
    gpt, vq = ({key.removeprefix(group): weight for key, weight in states.items()}
               for group in ("transformer.", "first_stage_model."))
    tokens, codes = torch.zeros(1, 1).long(), torch.zeros(1, 16).long()
    for _ in p:
        tokens = torch.cat([tokens, theirs_logits(gpt, tokens, 2, 2)[:, -1:].argmax(2)], 1)
    codes[:, p] = tokens[:, 1:]
    expected = theirs_decode(vq, codes.view(1, 4, 4))[0].clamp(-1, 1).permute(1, 2, 0) * 127.5 + 127.5
    assert expected.std() > 20
    for i in range(2):
        assert np.abs(np.asarray(Image.open(out / f"{i:06d}.png")) - expected.numpy()).max() <= 1.5
