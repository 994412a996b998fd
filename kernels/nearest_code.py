"""Nearest code: for each vector the index of the closest row of a codebook (§2, the quantizer; [8] eq. 1).

    argmin_k |x − c_k|²  =  argmin_k ( |c_k|² − 2 x·c_k )

|x|² is the same for every k and is left out, which also rounds less. What the codes have in common is
subtracted from both sides first: distances do not change, but an offset no longer eats the digits that tell
two codes apart.

The plain form multiplies two matrices, writes the (N, K) scores to memory and reads them again for the
argmin: 8·N·K bytes beside the 4·N·D of the input, eight times as many at K = 1,024 and D = 256. The kernel
walks over the codebook tile by tile, keeps for each of its vectors only the best score so far and the code
that had it, and writes 8·N bytes. It is bound by arithmetic: 2·N·K·D flops, three times that for 3xTF32. When
there are few vectors, several programs share the codes for the same ones; an atomic minimum joins them.

    python -m kernels.nearest_code    checks the kernel and prints a table (without a GPU: of the reference)

Limits: float32, float16 or bfloat16, all compared in float32; any N, D, K < 2³¹, strides and offset.
Symbols: N vectors, K codes, D code width.
"""
import torch
from torch import Tensor

from kernels.backend import compare, describe_device, float32_precision, multiprocessors, tl, triton

ROWS = 65536  # vectors the reference compares at a time: bounds its (rows, K) scores to 256 MiB at K = 1,024
FEW = dict(BLOCK_N=64, BLOCK_K=64, BLOCK_D=32, num_warps=4, num_stages=3)
MANY = dict(BLOCK_N=128, BLOCK_K=128, BLOCK_D=16, num_warps=8, num_stages=3)  # reads memory half as often


def nearest_code_reference(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in plain torch: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Computes in float32, or in float64 if an input is. Ties go to the lowest index.
    Raises ValueError for other shapes.
    """
    check_shapes(vectors, codebook)
    dtype = torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)
    offset = common_offset(codebook.to(dtype))  # (D,)
    centred = codebook.to(dtype) - offset  # (K, D)
    squared_norms = centred.square().sum(1)  # (K,)
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), ROWS):
        rows = vectors[start:start + ROWS].to(dtype) - offset  # (≤ROWS, D)
        with torch.autocast(rows.device.type, enabled=False):  # it would round the product to bfloat16
            scores = torch.addmm(squared_norms, rows, centred.T, alpha=-2)  # (≤ROWS, K)
        nearest[start:start + ROWS] = scores.argmin(1)
    return nearest


def common_offset(codebook: Tensor) -> Tensor:
    """The mean of a codebook (K, D), rounded: (D,).

    To a multiple of the power of two above the codes' largest distance to it, dimension by dimension. So
    coarse an offset subtracts without rounding, and codes that were equally near stay so.
    """
    mean = codebook.mean(0)  # (D,)
    spread = torch.maximum(codebook.amax(0) - mean, mean - codebook.amin(0))  # (D,)
    spread = torch.maximum(spread, mean.abs() * torch.finfo(codebook.dtype).eps)
    step = torch.ldexp(torch.ones_like(spread), torch.frexp(spread).exponent)  # (D,)
    offset = (mean / step + 0.5).floor() * step
    return torch.where(offset.isfinite(), offset, 0)


def check_shapes(vectors: Tensor, codebook: Tensor):
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code needs vectors (N, D) and a codebook (K, D) with K ≥ 1, "
                         f"not {tuple(vectors.shape)} and {tuple(codebook.shape)}")


@triton.jit
def load_tile(ptr, strides, rows, columns, height, width):
    """rows (R,), columns (C,) of a (height, width) matrix → (R, C), with zeros beyond its ends."""
    where = rows[:, None].to(tl.int64) * strides[0] + columns[None, :].to(tl.int64) * strides[1]
    return tl.load(ptr + where, mask=(rows[:, None] < height) & (columns[None, :] < width), other=0.0)


@triton.jit
def common_offset_kernel(
    codebook_ptr, codebook_strides,  # (K, D); strides in elements
    offset_ptr,  # (D,) float32, written
    K, D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,  # dimensions per program
):
    """`common_offset` in one pass over the codebook."""
    dims = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    low = tl.full((BLOCK_D,), float("inf"), tl.float32)
    high = tl.full((BLOCK_D,), float("-inf"), tl.float32)
    for start in range(0, K, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        inside = (codes[:, None] < K) & (dims[None, :] < D)  # (BLOCK_K, BLOCK_D)
        c = load_tile(codebook_ptr, codebook_strides, codes, dims, K, D).to(tl.float32)
        total += tl.sum(c, 0)
        low = tl.minimum(low, tl.min(tl.where(inside, c, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(inside, c, float("-inf")), 0))
    mean = total / K
    spread = tl.maximum(high - mean, mean - low)
    spread = tl.maximum(spread, tl.abs(mean) * 1.1920929e-07)  # eps of float32
    # The exponent's bits alone are the power of two below the spread.
    step = 2 * (spread.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    offset = tl.floor(mean / step + 0.5) * step
    offset = tl.where(tl.abs(offset) < float("inf"), offset, 0.0)  # also where a spread of 0 has divided
    tl.store(offset_ptr + dims, offset, mask=dims < D)


@triton.jit
def nearest_code_kernel(
    vectors_ptr, vectors_strides,  # (N, D); strides in elements
    codebook_ptr, codebook_strides,  # (K, D)
    offset_ptr,  # (D,) float32, subtracted from both
    result_ptr,  # (N,) int64: the indices; or, if SPLIT, score and index as one number to be minimized
    N, K, D,
    codes_per_program,  # a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,  # vectors per program
    BLOCK_K: tl.constexpr,  # codes compared at a time
    BLOCK_D: tl.constexpr,  # dimensions multiplied at a time
    PRECISION: tl.constexpr,  # of the products: "tf32x3" or "ieee"
    SPLIT: tl.constexpr,  # other programs look at other codes for the same vectors
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * codes_per_program
    last = tl.minimum(first + codes_per_program, K)
    best_score = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_code = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(first, last, BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)  # x·c
        norms = tl.zeros((BLOCK_K,), tl.float32)  # |c|²
        for start_d in range(0, D, BLOCK_D):
            dims = start_d + tl.arange(0, BLOCK_D)
            offset = tl.load(offset_ptr + dims, mask=dims < D, other=0.0)[None, :]
            x = load_tile(vectors_ptr, vectors_strides, rows, dims, N, D).to(tl.float32) - offset
            c = load_tile(codebook_ptr, codebook_strides, codes, dims, K, D).to(tl.float32) - offset
            products = tl.dot(x, tl.trans(c), products, input_precision=PRECISION)
            norms += tl.sum(c * c, 1)
        scores = norms[None, :] - 2 * products  # (BLOCK_N, BLOCK_K)
        real = (codes[None, :] < K) & (scores == scores)  # neither padding nor NaN
        scores = tl.where(real, scores, float("inf"))
        score, column = tl.min(scores, 1, return_indices=True, return_indices_tie_break_left=True)
        better = score < best_score  # not ≤: of equal scores the first stays
        best_score = tl.where(better, score, best_score)
        best_code = tl.where(better, start + column, best_code)
    if SPLIT:
        # A float's bits, read as an integer, order positive floats; with all but the sign flipped, the rest.
        bits = best_score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = (bits.to(tl.int64) << 32) | best_code.to(tl.int64)  # of equal scores the lowest index is least
        tl.atomic_min(result_ptr + rows, key, mask=rows < N)
    else:
        tl.store(result_ptr + rows, best_code.to(tl.int64), mask=rows < N)


def nearest_code_triton(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The kernel, on whatever device the tensors are: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Ties go to the lowest index. A code whose squared norm overflows is never nearest.
    Raises ValueError for other shapes, dtypes other than float32, float16 and bfloat16, or two devices.
    """
    check_shapes(vectors, codebook)
    dtypes = {vectors.dtype, codebook.dtype}
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16} or vectors.device != codebook.device:
        raise ValueError("the nearest_code kernel takes float32, float16 or bfloat16 on one device, not "
                         f"{vectors.dtype} on {vectors.device} and {codebook.dtype} on {codebook.device}")
    (N, D), K, device = vectors.shape, len(codebook), vectors.device
    if N == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    enough = 2 * multiprocessors(device)  # programs, to keep the GPU busy
    tiles = MANY if triton.cdiv(N, MANY["BLOCK_N"]) >= enough else FEW
    row_blocks, code_blocks = triton.cdiv(N, tiles["BLOCK_N"]), triton.cdiv(K, tiles["BLOCK_K"])
    blocks_per_program = triton.cdiv(code_blocks, triton.cdiv(enough, row_blocks))
    splits = triton.cdiv(code_blocks, blocks_per_program)  # programs that share the codes of one row block
    offset = torch.zeros(D, dtype=torch.float32, device=device)
    result = torch.full((N,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    with torch.cuda.device_of(vectors):
        common_offset_kernel[(triton.cdiv(D, 16),)](
            codebook, codebook.stride(), offset, K, D, BLOCK_K=128, BLOCK_D=16)
        nearest_code_kernel[(row_blocks, splits)](
            vectors, vectors.stride(), codebook, codebook.stride(), offset, result, N, K, D,
            blocks_per_program * tiles["BLOCK_K"], **tiles, PRECISION=float32_precision(device),
            SPLIT=splits > 1)
    return result & 0xFFFFFFFF if splits > 1 else result


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Ties go to the lowest index. Not differentiable.
    """
    search = nearest_code_triton if vectors.is_cuda else nearest_code_reference
    return search(vectors.detach(), codebook.detach())


def main():
    """Check the kernel on the real sizes, then time it beside the plain forms."""
    device = describe_device()
    codebook = torch.randn(1024, 256, device=device)  # §A.1's K and D
    for N in (3072, 65536, 2 ** 20) if device.type == "cuda" else (3072, 65536):
        x = torch.randn(N, 256, device=device)
        forms = {
            "torch.cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
            "addmm + argmin": lambda: codebook.square().sum(1).addmm(x, codebook.T, alpha=-2).argmin(1),
            "nearest_code_reference": lambda: nearest_code_reference(x, codebook),
        }
        if device.type == "cuda":
            ours, double = nearest_code_triton(x, codebook), codebook.double()
            for rows, codes in zip(x.split(ROWS), ours.split(ROWS)):
                distances = torch.cdist(rows.double(), double)  # (≤ROWS, K)
                excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)
                assert excess.max() < 1e-5, f"a code is {excess.max():.1e} farther than the nearest"
            forms["nearest_code_triton"] = lambda: nearest_code_triton(x, codebook)
        moved = 4 * 256 * (N + 1024) + 8 * N  # bytes
        compare(f"N = {N:,}, K = 1,024, D = 256", forms, 2 * N * 1024 * 256, moved, "tf32x3")


if __name__ == "__main__":
    main()
