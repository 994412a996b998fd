"""How time and memory grow with the sizes, for the kernels and for torch's forms: a log-log picture.

    python results/kernels/growth.py        writes growth-<device>.png beside this file

On a GPU: replayed CUDA graphs, the memory of a call beside its inputs, bfloat16 for attention. Without one
smaller sizes, the references in place of the kernels, float32, and no memory.
"""
import math
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import kernels  # noqa: E402
from kernels.backend import describe_device, triton  # noqa: E402
from kernels.causal_attention import causal_attention_torch  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
COLOURS = ["#d62728", "#1f77b4", "#2ca02c", "#7f7f7f"]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 360, 70, 30, 20, 40  # of a panel, and its margins, in pixels


def seconds(function) -> float:
    if torch.cuda.is_available():
        return triton.testing.do_bench_cudagraph(function, return_mode="median") / 1e3
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.05).median


def mebibytes(function) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def lookups(vectors: int, codes: int) -> dict:
    x, codebook = (torch.randn(size, 256, device=DEVICE) for size in (vectors, codes))
    return {"nearest_code": lambda: kernels.nearest_code(x, codebook),
            "cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
            "addmm + argmin": lambda: codebook.square().sum(1).addmm(x, codebook.T, alpha=-2).argmin(1)}


def attentions(batch: int, length: int) -> dict:
    """Forward and backward, 16 heads of 64 (4 without a GPU)."""
    dtype, heads = (torch.bfloat16, 16) if ON_GPU else (torch.float32, 4)
    *inputs, gradient = [torch.randn(batch, length, heads, 64, device=DEVICE, dtype=dtype).transpose(1, 2)
                         .requires_grad_() for _ in range(4)]
    forms = {"torch's fused": causal_attention_torch, "plain form": kernels.causal_attention_reference}
    if ON_GPU:  # elsewhere it is torch's
        forms = {"causal_attention": kernels.causal_attention} | forms
    return {name: partial(lambda form: torch.autograd.grad(form(*inputs), inputs, gradient), form)
            for name, form in forms.items()}


def sweep(title: str, make, sizes) -> dict:
    """→ {form: [(size, seconds, mebibytes or 0), …]}; a form ends where its memory does not suffice."""
    curves = {}
    for size in sizes:
        for name, function in make(size).items():
            try:
                function()
                point = (size, seconds(function), mebibytes(function) if ON_GPU else 0.0)
            except torch.OutOfMemoryError:
                continue
            curves.setdefault(name, []).append(point)
            print(f"{title:36} {size:8,} {name:18} {1e3 * point[1]:9.3f} ms {point[2]:8.1f} MiB", flush=True)
    return curves


def draw_panel(draw, x0: int, y0: int, title: str, curves: dict, value: int, unit: str):
    """One pair of logarithmic axes; `value` says which number of a point goes upwards."""
    points = [point for curve in curves.values() for point in curve]
    low, high = (math.log10(pick(point[value] for point in points)) for pick in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    first, last = (math.log2(pick(point[0] for point in points)) for pick in (min, max))

    def place(size: float, number: float) -> tuple[float, float]:
        across, up = (math.log2(size) - first) / (last - first), (math.log10(number) - low) / (high - low)
        return (x0 + LEFT + across * (WIDTH - LEFT - RIGHT),
                y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))

    draw.text((x0 + LEFT, y0 + 8), f"{title}, {unit}", "black")
    for power in range(low, high + 1):
        draw.line([place(2 ** first, 10.0 ** power), place(2 ** last, 10.0 ** power)], "#dddddd")
        draw.text((x0 + 12, place(2 ** first, 10.0 ** power)[1] - 6), f"{10.0 ** power:g}", "black")
    for size in sorted({point[0] for point in points}):
        draw.text((place(size, 10.0 ** low)[0] - 12, y0 + HEIGHT - BOTTOM + 6), f"{size:,}", "black")
    for i, (name, curve) in enumerate(curves.items()):
        draw.line([place(point[0], point[value]) for point in curve], COLOURS[i], width=2)
        draw.text((x0 + LEFT + 10, y0 + TOP + 4 + 14 * i), name, COLOURS[i])


def main():
    describe_device()
    batch, length, vectors = (8, 512, 65536) if ON_GPU else (1, 256, 3072)
    sweeps = {
        "lookup over N, K = 1,024": (lambda N: lookups(N, 1024), range(10, 23 if ON_GPU else 17, 2)),
        f"lookup over K, N = {vectors:,}": (lambda K: lookups(vectors, K), range(6, 15, 2)),
        f"attention over T, batch {batch}": (lambda T: attentions(batch, T), range(6, 13 if ON_GPU else 12)),
        f"attention over batch, T = {length}": (lambda B: attentions(B, length), range(8 if ON_GPU else 5)),
    }
    image = Image.new("RGB", (2 * WIDTH, (4 if ON_GPU else 2) * HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i, (title, (make, powers)) in enumerate(sweeps.items()):
        curves = sweep(title, make, [2 ** power for power in powers])
        draw_panel(draw, i % 2 * WIDTH, i // 2 * HEIGHT, title, curves, 1, "seconds")
        if ON_GPU:
            draw_panel(draw, i % 2 * WIDTH, (2 + i // 2) * HEIGHT, title, curves, 2, "MiB")
    image.save(Path(__file__).parent / f"growth-{DEVICE.type}.png")


if __name__ == "__main__":
    main()
