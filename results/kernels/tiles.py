"""Time a few tile shapes on this GPU: the fastest belong into `tile` and `tiles` of the kernel files.

    python results/kernels/tiles.py        needs a GPU
"""
import sys
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from kernels import nearest_code_triton  # noqa: E402

lookup, attention = sys.modules["kernels.nearest_code"], sys.modules["kernels.causal_attention"]
LOOKUP = [  # BLOCK_N, BLOCK_K, BLOCK_D, num_warps, num_stages
    (64, 128, 32, 4, 2), (64, 128, 16, 4, 3), (64, 64, 32, 4, 3), (128, 128, 32, 8, 3), (128, 128, 32, 8, 2),
    (128, 128, 16, 8, 3), (128, 64, 32, 8, 3), (64, 128, 16, 8, 3)]
ATTENTION = {  # BLOCK_Q, BLOCK_K, num_warps, num_stages
    attention.forward_kernel: [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2),
                               (128, 128, 8, 2)],
    attention.query_gradient_kernel: [(64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 2)],
    attention.key_value_gradient_kernel: [(32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 4, 2), (32, 128, 8, 3),
                                          (64, 128, 8, 2)],
}


def print_time(title: str, tile: dict, call):
    try:
        time = f"{1e3 * triton.testing.do_bench_cudagraph(call, return_mode='median'):9.1f} µs"
    except triton.runtime.errors.OutOfResources:
        time = "does not fit"
    print(f"{title:40} {time:>12}  {tile}", flush=True)


def main():
    if not torch.cuda.is_available():
        sys.exit("tiles.py times kernels: it needs a GPU")
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    codebook = torch.randn(1024, 256, device="cuda")
    for N in (3072, 65536, 2 ** 20):
        vectors = torch.randn(N, 256, device="cuda")
        for numbers in LOOKUP:
            tile = dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages"), numbers))
            lookup.tile = lambda _: tile
            print_time(f"nearest_code, N = {N:,}", tile, lambda: nearest_code_triton(vectors, codebook))
    for T in (256, 341, 512, 1024):
        q, k, v = (torch.randn(32, T, 16, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                   for _ in range(3))
        output, logsumexp = attention.forward(q, k, v)
        delta, gradients = torch.empty_like(logsumexp), [attention.empty_like_linear(x) for x in (q, k, v)]
        arguments = {
            attention.forward_kernel: (q, k, v, output, logsumexp),
            attention.query_gradient_kernel: (q, k, v, output, output, logsumexp, gradients[0], delta),
            attention.key_value_gradient_kernel: (q, k, v, output, logsumexp, delta, *gradients[1:]),
        }
        for kernel, tiles in ATTENTION.items():
            for numbers in tiles:
                tile = dict(zip(("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"), numbers))
                attention.tiles = lambda *_: tile
                print_time(f"{kernel.__name__}, T = {T}", tile,
                           lambda: attention.launch(kernel, *arguments[kernel]))


if __name__ == "__main__":
    main()
