"""Time other tile shapes on this GPU: the shortest lines belong into `tiles`, `FEW` and `MANY` of the kernel files.

    python results/kernels/tiles.py        needs a GPU
"""
import itertools
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from kernels import causal_attention_triton, nearest_code_triton  # noqa: E402

lookup, attention = sys.modules["kernels.nearest_code"], sys.modules["kernels.causal_attention"]


def milliseconds(call) -> float:
    """Median; infinite for a shape that this GPU has no room for."""
    try:
        return triton.testing.do_bench(call, warmup=50, rep=100, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def print_sorted(title: str, times: dict):
    print(title)
    for tile, time in sorted(times.items(), key=lambda item: item[1])[:8]:
        print(f"  {1e3 * time:9.1f} µs  {tile}", flush=True)


def main():
    if not torch.cuda.is_available():
        sys.exit("tiles.py times kernels: it needs a GPU")
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    codebook = torch.randn(1024, 256, device="cuda")
    for N in (3072, 65536, 2 ** 20):
        vectors, times = torch.randn(N, 256, device="cuda"), {}
        for tile in itertools.product((64, 128), (64, 128), (16, 32), (4, 8), (2, 3, 4)):
            names = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages")
            lookup.FEW = lookup.MANY = dict(zip(names, tile))
            times[tile] = milliseconds(lambda: nearest_code_triton(vectors, codebook))
        print_sorted(f"nearest_code, N = {N:,}: {', '.join(names)}", times)

    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    shipped = attention.tiles(torch.bfloat16, 64)
    for T in (256, 341, 512, 1024):
        q, k, v = (torch.randn(32, T, 16, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        output, logsumexp = attention.forward_op(q, k, v)
        delta, gradients = torch.empty_like(logsumexp), [attention.empty_like_linear(x) for x in (q, k, v)]
        calls = {
            "forward": (attention.forward_kernel, "BLOCK_Q", q, k, v, output, logsumexp),
            "dQ": (attention.query_gradient_kernel, "BLOCK_Q", q, k, v, output, output, logsumexp, gradients[0], delta),
            "dK, dV": (attention.key_value_gradient_kernel, "BLOCK_K", q, k, v, output, logsumexp, delta, *gradients[1:]),
        }
        for name, call in calls.items():
            times = {}
            for tile in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                attention.tiles = lambda dtype, width: dict(zip(names, tile))
                times[tile] = milliseconds(lambda: attention.launch(*call))
            print_sorted(f"{name}, T = {T}: {', '.join(names)} (shipped: {tuple(shipped.values())})", times)


if __name__ == "__main__":
    main()
