"""Checkpoints of the authors' later release, taming-transformers: read safely, converted to our names.

Such a file is torch.save of a PyTorch Lightning dict: the weights in "state_dict", and beside them the
optimizer's state and objects of the trainer, because of which plain `weights_only=True` refuses it. Here an
empty placeholder replaces every such object: no code in the file is run, and Lightning and omegaconf are not
needed. The file is memory-mapped, so that the optimizer's state is never read.

A Net2NetTransformer's file has the GPT under `transformer.` and the VQ model under `first_stage_model.`; a
VQModel's has the latter alone, with no prefix. *Ours* are the names in vq.py and gpt.py, *theirs* the file's.
"""
import math
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

GROUPS = ("transformer.", "first_stage_model.", "cond_stage_model.", "permuter.")  # of a Net2NetTransformer
IGNORED = {  # in each group beside the network: the losses, colors of segmentation maps; causal masks
    "first_stage_model.": r"loss\..+|colorize",
    "transformer.": r"blocks\.\d+\.attn\.mask",
}
# The shapes do not tell the number of heads. Heads are 64 wide in most released files, but not in FFHQ's,
# CelebA-HQ's, COCO-Stuff's and those of the two scene models: (n_layer, n_embd) → n_head.
RELEASED_HEADS = {(24, 1664): 16, (32, 1280): 16, (36, 1536): 16, (40, 1408): 16}
LEVELS, BLOCKS, LAYERS = r"encoder\.down\.(\d+)\.", r"encoder\.down\.0\.block\.(\d+)\.", r"blocks\.(\d+)\."
# Parts of our names of weights → theirs, replaced in this order, after the numbered layers of `vq_layers`.
VQ_NAMES = {"quantizer.codebook": "quantize.embedding.weight", ".out.": ".proj_out.",
            ".layers.0.": ".norm1.", ".layers.2.": ".conv1.",
            ".layers.3.": ".norm2.", ".layers.5.": ".conv2.", ".shortcut.": ".nin_shortcut."}
GPT_NAMES = {"token_embedding.weight": "tok_emb.weight", "position_embedding.weight": "pos_emb",
             "norm.": "ln_f.", ".norm_1.": ".ln1.", ".norm_2.": ".ln2.",
             ".attention.out.": ".attn.proj.", ".attention.qkv.": ".attn.qkv."}
# The full names of the trainer's classes and functions. A file that imports any other is refused.
TRAINER = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics|fsspec|omegaconf|taming"
    r"|numpy|collections|typing|argparse|pathlib|datetime|enum|uuid|torch\.optim|torch\.nn)\..+"
    r"|builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple)")


class Placeholder:
    """Replaces an object of the trainer: accepts its constructor's arguments and its state, keeps nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class PlaceholderDict:
    """Replaces a subclass of dict by an OrderedDict: torch sets the items of those only."""

    def __new__(cls, *args):
        return OrderedDict()


def recognizes(path: str | Path) -> bool:
    """Whether a file is theirs: it has a "state_dict", and not our "kind" and "model_config".

    The pickle is disassembled, not run. False for a file that cannot be read, whose reader will say why.
    """
    try:
        with zipfile.ZipFile(path) as file:
            pickled = next(name for name in file.namelist() if name.endswith("/data.pkl"))
            words = {argument for _, argument, _ in pickletools.genops(file.read(pickled))}
    except Exception:  # damaged bytes can raise anything
        return False
    return "state_dict" in words and not {"kind", "model_config"} <= words


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by their names; mapped from the disk, so the file must not change meanwhile.

    Raises FileNotFoundError; ValueError for a file of another kind, or one that imports anything but tensors
    and the trainer's classes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; name a file of taming-transformers")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in names if not TRAINER.fullmatch(name))
        placeholders = [(PlaceholderDict if name.lower().endswith("dict") else Placeholder, name)
                        for name in names]
        if not refused:
            with torch.serialization.safe_globals(placeholders):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged, or was not written by torch.save of version 1.6 or later "
                         f"({type(error).__name__})") from None
    if refused:
        raise ValueError(f"{path} was not opened: it imports {refused[0]}, which no file of "
                         "taming-transformers does; nothing in it was run")
    # Methods are called on dict and Tensor, since a file can shadow those of its objects.
    weights = dict.get(content, "state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not dict.__len__(weights):
        raise ValueError(f'{path} has no "state_dict": it is not a file of taming-transformers')
    for key, weight in dict.items(weights):
        if (not isinstance(key, str) or type(weight) not in (Tensor, torch.nn.Parameter)
                or weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized
                or weight.is_complex()):
            raise ValueError(f"{path} has {key!r} in its state_dict, which is not a tensor with a name")
        if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
            raise ValueError(f"{path} has too few numbers for the shape {tuple(weight.shape)} of {key!r}")
    return {key: Tensor.detach(weight) for key, weight in dict.items(weights)}


def network(path: str | Path, group: str) -> dict[str, Tensor]:
    """The weights of one network, without the prefix of its group. Raises ValueError; otherwise as `read`."""
    weights = read(path)
    if any(key.startswith(GROUPS) for key in weights):
        for key in weights:
            if not key.startswith(GROUPS):
                raise ValueError(f"{path} has {key} beside {', '.join(GROUPS)}; this is not a file of "
                                 "taming-transformers' Net2NetTransformer")
        weights = {key.removeprefix(group): value for key, value in weights.items() if key.startswith(group)}
    return {key: value for key, value in weights.items() if not re.fullmatch(IGNORED[group], key)}


def shape(weights: dict[str, Tensor], key: str, dimensions: int, what: str) -> tuple[int, ...]:
    """The shape of one of the weights. Raises ValueError if it is missing, empty or of other dimensions."""
    if key not in weights or weights[key].ndim != dimensions or weights[key].numel() == 0:
        raise ValueError(f"{what} in it: {key} with {dimensions} dimensions is missing")
    return tuple(weights[key].shape)


def count(weights: dict[str, Tensor], pattern: str) -> int:
    """The number of different matches of the (\\d+) in a pattern: of levels, blocks or layers."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))})


def vq_sizes(path: str | Path) -> dict:
    """The arguments of VQConfig for the first stage in a file. ValueError for another architecture."""
    weights, what = network(path, "first_stage_model."), f"{path} has no VQ model of taming-transformers"
    base_channels, image_channels, *_ = shape(weights, "encoder.conv_in.weight", 4, what)
    levels = count(weights, LEVELS)
    widths = [shape(weights, f"encoder.down.{level}.block.0.conv1.weight", 4, what)[0]
              for level in range(levels)]
    codebook_size, code_width = shape(weights, "quantize.embedding.weight", 2, what)
    z_channels = shape(weights, "quant_conv.weight", 4, what)[1]
    if base_channels % 32 or any(width % base_channels for width in widths):
        raise ValueError(f"{path} has {base_channels} channels at first and then {widths} per resolution; "
                         "only multiples of 32, and of the first number, can be read")
    if z_channels != code_width:
        raise ValueError(f"{path} has {z_channels} channels before the projection to codes of {code_width} "
                         "(z_channels, embed_dim); only models where the two are equal can be read")
    attention = {int(level) for key in weights
                 for level in re.findall(r"^(?:encoder\.down|decoder\.up)\.(\d+)\.attn\.", key)}
    if attention != {levels - 1}:
        raise ValueError(f"{path} has attention at the resolutions {sorted(attention)} of {levels}; only "
                         "models with attention at the last, the coarsest, and nowhere else can be read")
    return {"image_channels": image_channels, "base_channels": base_channels,
            "channel_multipliers": ",".join(str(width // base_channels) for width in widths),
            "residual_blocks": count(weights, BLOCKS),
            "codebook_size": codebook_size, "code_width": code_width,
            "group_channels": base_channels // 32}  # theirs: always 32 groups


def gpt_sizes(path: str | Path, n_head: int = 0) -> dict:
    """The arguments of GPTConfig for the transformer in a file. ValueError for another architecture."""
    weights, what = network(path, "transformer."), f"{path} has no transformer of taming-transformers"
    vocab_size, n_embd = shape(weights, "tok_emb.weight", 2, what)
    block_size = shape(weights, "pos_emb", 3, what)[1]
    n_layer = count(weights, LAYERS)
    for key, mask in read(path).items():
        if key.endswith(".attn.mask") and (mask.ndim < 2 or not mask.equal(torch.ones_like(mask).tril())):
            raise ValueError(f"{path} has a {key} that is not causal (n_unmasked); only causal transformers "
                             "can be read")
    if n_head == 0 and n_embd % 64:
        raise ValueError(f"{path} has a transformer {n_embd} wide, which is no multiple of heads 64 wide; "
                         "pass their number, n_head")
    return {"vocab_size": vocab_size, "block_size": block_size, "n_layer": n_layer, "n_embd": n_embd,
            "n_head": n_head or RELEASED_HEADS.get((n_layer, n_embd), n_embd // 64), "gelu": "none"}


def vq_layers(levels: int, blocks: int) -> dict[str, str]:
    """Our numbers of the layers of encoder and decoder → their names: "encoder.0." → "encoder.conv_in."."""
    def resolution(name: str, level: int, blocks: int) -> list[str]:
        kinds = ("block", "attn") if level == levels - 1 else ("block",)  # attention at the coarsest only
        layers = [f"{name}.{level}.{kind}.{i}" for i in range(blocks) for kind in kinds]
        return [*layers, f"{name}.{level}.{name}sample"]

    down, up = [], []
    for level in range(levels):  # from the finest to the coarsest
        down = down + resolution("down", level, blocks)
        up = resolution("up", level, blocks + 1) + up
    middle, last = ["mid.block_1", "mid.attn_1", "mid.block_2"], ["norm_out", "SiLU", "conv_out"]
    encoder = ["conv_in", *down[:-1], *middle, *last]  # the coarsest level is not downsampled,
    decoder = ["conv_in", *middle, *up[:-1], *last]  # the finest not upsampled
    return ({f"encoder.{i}.": f"encoder.{layer}." for i, layer in enumerate(encoder)}
            | {f"encoder.{len(encoder)}.": "quant_conv.", "decoder.0.": "post_quant_conv."}
            | {f"decoder.{i}.": f"decoder.{layer}." for i, layer in enumerate(decoder, 1)})


def vq_weights(path: str | Path, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first stage in a file, under the names in `ours`, its state_dict. Raises as `gather`."""
    weights = network(path, "first_stage_model.")
    names = vq_layers(count(weights, LEVELS), count(weights, BLOCKS)) | VQ_NAMES
    return gather(path, weights, ours, names, ("q", "k", "v"))


def gpt_weights(path: str | Path, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer in a file, under the names in `ours`, its state_dict. Raises as `gather`."""
    weights = network(path, "transformer.")
    weights["pos_emb"] = weights["pos_emb"].squeeze(0)  # (1, block_size, n_embd) → (block_size, n_embd)
    return gather(path, weights, ours, GPT_NAMES, ("query", "key", "value"))


def gather(path: str | Path, weights: dict[str, Tensor], ours: dict[str, Tensor], names: dict[str, str],
           qkv: tuple[str, str, str]) -> dict[str, Tensor]:
    """Each of our weights from the file: `names` translates parts of its name, `qkv` splits our joint qkv.

    Raises ValueError if one is missing, left over, of another shape than ours, or not finite.
    """
    gathered = {}
    for name, weight in ours.items():
        theirs = name
        for own, other in names.items():
            theirs = theirs.replace(own, other)
        keys = [theirs.replace("qkv", part) for part in qkv] if "qkv" in theirs else [theirs]
        rows, *columns = weight.shape
        wanted = (rows // len(keys), *columns)
        for key in keys:
            if key not in weights:
                raise ValueError(f"{path} has no {key}; the file is incomplete, or of a network unlike ours")
            if weights[key].shape != wanted:
                raise ValueError(f"{path} has a {key} of {tuple(weights[key].shape)}, where the network's "
                                 f"other sizes ask for {wanted}")
            if not weights[key].float().isfinite().all():
                raise ValueError(f"{path} has NaN or infinite values in {key}: its training has diverged")
        parts = [weights.pop(key) for key in keys]
        gathered[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if weights:
        raise ValueError(f"{path} has {min(weights)}, for which there is no place in our network")
    return gathered


def writing_order(path: str | Path) -> Tensor:
    """The permutation (T,) of the square code grid of an unconditional model; row-major if the file has none.

    Raises ValueError for a conditional model: one with weights under cond_stage_model, or with more positions
    than codes. A class-conditional one has neither: it passes, and as the start token is 0, samples class 0.
    """
    weights, positions = read(path), gpt_sizes(path, n_head=1)["block_size"]
    order = weights.get("permuter.forward_shuffle_idx", torch.arange(positions))  # (T,)
    if not torch.equal(order.sort().values, torch.arange(order.numel())):
        raise ValueError(f"{path} has a permuter.forward_shuffle_idx that is not a permutation")
    cells = len(order)
    if any(key.startswith("cond_stage_model.") for key in weights):
        raise ValueError(f"{path} has a conditional model (cond_stage_model); only unconditional models of "
                         "taming-transformers can be sampled")
    if cells != positions or math.isqrt(cells) ** 2 != cells:
        raise ValueError(f"{path} has {positions} positions for {cells} codes; only unconditional models, "
                         "with one position for each code of a square grid, can be sampled")
    return order
