"""Two choices on a CPU, by libraries: few rows of a linear layer, and the memory format of the first stage.

    python results/speed/layers.py

Linear: the 48 linear layers of GPT2-small's blocks for one row (sampling), two (guidance) and 16, by `nn.Linear`, with weights
transposed in memory, as W @ xᵀ, and by oneDNN. First stage: the demo's training step of 8 pictures and encoding of 64, `cifar10`'s
of 8, and the `paper` preset's of one picture of 128×128, row-major or with channels last (`vq.memory_format`); then what decides
between the two, the gradient of a convolution's weights, 64 channels of pictures of growing size. Medians of alternating rounds.
"""
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_vq
from rounds import alternate
from vq import VQ

ROUNDS = 15


def compare(title: str, forms: dict[str, Callable[[], object]], rounds: int = ROUNDS):
    """Print each form's time in ms, and as a ratio to the first one's."""
    medians = {name: statistics.median(each) for name, each in alternate(forms, rounds, warm_up=2).items()}
    first = next(iter(medians.values()))
    print(f"{title}: " + ", ".join(f"{name} {1e3 * each:.1f} ms ({each / first:.2f})" for name, each in medians.items()))


def training_step(vq: VQ, images: Tensor):
    optimizer = torch.optim.Adam(vq.parameters(), 1e-3, fused=True)

    def step():
        reconstructions, _, loss = vq(images)
        optimizer.zero_grad()
        (F.l1_loss(reconstructions, images) + loss).backward()
        optimizer.step()
    return step


def main():
    torch.manual_seed(0)
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
    layers = [(torch.randn(shape), torch.randn(shape[0])) for shape in shapes]
    with torch.no_grad():
        for rows in (1, 2, 16):
            inputs = [torch.randn(rows, columns) for _, columns in shapes]
            each = list(zip(inputs, layers))
            turned = [(x, w.T.contiguous().T, b) for x, (w, b) in each]
            compare(f"linear layers, {rows} row(s)", {
                "nn.Linear": lambda: [F.linear(x, w, b) for x, (w, b) in each],
                "transposed": lambda: [F.linear(x, w, b) for x, w, b in turned],
                "W @ xᵀ": lambda: [(w @ x.T).T + b for x, (w, b) in each],
                "oneDNN": lambda: [torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "") for x, (w, b) in each]})
    for preset, size, encoded, trained, rounds in (("demo", 32, 64, 8, ROUNDS), ("cifar10", 32, 8, 8, 5), ("paper", 128, 1, 1, 3)):
        config, images = train_vq.PRESETS[preset].model(), torch.rand(encoded, 3, size, size) * 2 - 1
        networks = {"row-major": VQ(config), "channels last": VQ(config).to(memory_format=torch.channels_last)}
        compare(f"{preset} network, encoding {encoded} of {size}×{size}",
                {name: lambda vq=vq: vq.encode(images) for name, vq in networks.items()}, rounds)
        compare(f"{preset} network, training step of {trained}",
                {name: training_step(vq, images[:trained]) for name, vq in networks.items()}, rounds)
    for side in (16, 32, 64, 128, 256):
        maps = [torch.randn(max(1, 256 // side), 64, side, side) for _ in range(2)]
        formats = {"row-major": maps, "channels last": [each.to(memory_format=torch.channels_last) for each in maps]}
        compare(f"weights' gradient, {side // 4} KB a row of pixels",
                {name: lambda x=x, g=g: conv2d_weight(x, (64, 64, 3, 3), g, padding=1) for name, (x, g) in formats.items()})


if __name__ == "__main__":
    main()
