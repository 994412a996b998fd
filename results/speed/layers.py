"""Two choices on a CPU, by libraries: few rows of a linear layer, and the memory format of the first stage.

    python results/speed/layers.py

Linear: the 48 linear layers of GPT2-small's blocks for one row (sampling) and for two (guidance), by `nn.Linear`, as W @ xᵀ, and
by oneDNN. First stage: the demo's training step of 8 pictures and encoding of 64, weights as they are or with channels
last (`run.memory_format`). Medians of alternating rounds.
"""
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import train_vq
from rounds import alternate
from vq import VQ

ROUNDS = 15


def compare(title: str, forms: dict[str, Callable[[], object]]):
    """Print each form's time in ms, and as a ratio to the first one's."""
    medians = {name: statistics.median(each) for name, each in alternate(forms, ROUNDS, warm_up=2).items()}
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
        for rows in (1, 2):
            inputs = [torch.randn(rows, columns) for _, columns in shapes]
            each = list(zip(inputs, layers))
            compare(f"linear layers, {rows} row(s)", {
                "nn.Linear": lambda: [F.linear(x, w, b) for x, (w, b) in each],
                "W @ xᵀ": lambda: [(w @ x.T).T + b for x, (w, b) in each],
                "oneDNN": lambda: [torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "") for x, (w, b) in each]})
    networks = {"as they are": VQ(train_vq.PRESETS["demo"].model())}
    networks["channels last"] = VQ(train_vq.PRESETS["demo"].model()).to(memory_format=torch.channels_last)
    images = torch.rand(64, 3, 32, 32) * 2 - 1
    compare("encoding 64", {name: lambda vq=vq: vq.encode(images) for name, vq in networks.items()})
    compare("training step of 8", {name: training_step(vq, images[:8]) for name, vq in networks.items()})


if __name__ == "__main__":
    main()
