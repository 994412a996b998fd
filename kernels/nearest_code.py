"""Nearest code: for each vector the index of the closest row of a codebook (§2, the quantizer; [8] eq. 1).

    argmin_k |x − c_k|²  =  argmin_k ( |c_k|² − 2 x·c_k )

|x|² is the same for every k and is left out, which also rounds less. What the codes have in common is
subtracted from both sides first: distances do not change, but an offset no longer costs the digits in which
two codes differ.

The plain form writes the (N, K) scores to memory and reads them again for the argmin: 8·N·K bytes beside the
4·N·D of the input, eight times as many at K = 1,024 and D = 256. The kernel loops over tiles of the codebook,
keeps for each vector the best score so far and its code, and writes 12 bytes a vector.

It is bound by arithmetic. Tensor cores round float32 to TF32, 11 significant bits of 24, and two codes may
differ by less. So x' = x − offset and c' = −2(c_k − offset) are each split into a high part, which is TF32,
and a low part of at most 12 bits, and three products take the place of one:

    x'·c'  =  x_high·c_high + (x_high·c_low + x_low·c_high) + x_low·c_low

The last is left out: at most 2⁻²² |x'_d c'_d|, and TF32 drops one bit of each low part, 2⁻²³ |x'_d c'_d|
twice: all in all 2⁻²¹ Σ_d |x'_d c'_d|, a few roundings of float32. A few dimensions at a time are multiplied,
bracketed terms first, whose digits a large sum would lose. The codebook is split once per call, the
vectors as they are read.

    python -m kernels.nearest_code    checks the kernels and prints a table (without a GPU: of the reference)

Limits: float32, float16 or bfloat16, all compared in float32; any N, D, K < 2³¹, strides and offset; TF32,
that is NVIDIA GPUs since Ampere (others get the reference). Symbols: N vectors, K codes, D code width.
"""
import torch
from torch import Tensor

from kernels.backend import cdiv, compare, describe_device, generation, has_tf32, multiprocessors, tl, triton

ROWS = 65536  # vectors the reference compares at a time: bounds its (rows, K) scores to 256 MiB at K = 1,024


def nearest_code_reference(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in plain torch: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Computes in float32, or in float64 if an input is. Equal scores go to the lowest index. A code whose
    squared norm overflows is never nearest. Raises ValueError for other shapes.
    """
    check_shapes(vectors, codebook)
    dtype = torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)
    offset = common_offset(codebook.to(dtype))  # (D,)
    centred = codebook.to(dtype) - offset  # (K, D)
    squared_norms = centred.square().sum(1)  # (K,)
    infinite = ~squared_norms.isfinite()  # NaN would be taken for the least score
    squared_norms.masked_fill_(infinite, torch.inf)
    centred.masked_fill_(infinite[:, None], 0)
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), ROWS):
        rows = vectors[start:start + ROWS].to(dtype) - offset  # (≤ROWS, D)
        with torch.autocast(rows.device.type, enabled=False):  # it would round the product to bfloat16
            scores = torch.addmm(squared_norms, rows, centred.T, alpha=-2)  # (≤ROWS, K)
        nearest[start:start + ROWS] = scores.argmin(1)
    return nearest


def common_offset(codebook: Tensor) -> Tensor:
    """The mean of a codebook (K, D), each component rounded to a multiple of the power of two above the
    largest deviation of a code: (D,). Subtracting it is exact on integers: ties between them remain."""
    mean = codebook.mean(0)  # (D,)
    spread = torch.maximum(codebook.amax(0) - mean, mean - codebook.amin(0))  # (D,)
    spread = spread.maximum(mean.abs() * torch.finfo(codebook.dtype).eps)
    exponent = torch.frexp(spread.cpu() if spread.device.type == "mps" else spread).exponent  # mps has none
    step = torch.ldexp(torch.ones_like(spread), exponent.to(spread.device))  # (D,)
    offset = (mean / step + 0.5).floor() * step
    return torch.where(offset.isfinite(), offset, 0)


def check_shapes(vectors: Tensor, codebook: Tensor):
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code needs vectors (N, D) and a codebook (K, D) with K ≥ 1, "
                         f"not {tuple(vectors.shape)} and {tuple(codebook.shape)}")


@triton.jit
def load_tile(ptr, strides, rows, columns, height, width):
    """rows (R,), columns (C,) of a (height, width) matrix → (R, C) float32, with zeros beyond its ends."""
    where = rows[:, None].to(tl.int64) * strides[0] + columns[None, :].to(tl.int64) * strides[1]
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(ptr + where, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def split(x):
    """float32 → (high, low): x rounded to TF32's 11 bits (half away from zero), and what that left."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def common_offset_kernel(
    codebook_ptr, codebook_strides,  # (K, D); strides in elements
    offset_ptr,  # (width,) float32, written; zeros beyond D
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
        c = load_tile(codebook_ptr, codebook_strides, codes, dims, K, D)  # (BLOCK_K, BLOCK_D)
        total += tl.sum(c, 0)
        low = tl.minimum(low, tl.min(tl.where(codes[:, None] < K, c, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(codes[:, None] < K, c, float("-inf")), 0))
    mean = tl.div_rn(total, tl.cast(K, tl.float32))  # `/` is not rounded correctly on a GPU
    spread = tl.maximum(tl.maximum(high - mean, mean - low), tl.abs(mean) * 1.1920929e-07)  # float32's eps
    # The exponent's bits alone are the power of two below the spread.
    step = 2 * (spread.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    offset = tl.floor(mean / step + 0.5) * step
    offset = tl.where(tl.abs(offset) < float("inf"), offset, 0.0)  # also where a spread of 0 has divided
    tl.store(offset_ptr + dims, offset)


@triton.jit
def prepare_codebook_kernel(
    codebook_ptr, codebook_strides,  # (K, D)
    offset_ptr,  # (width,) float32
    high_ptr, low_ptr,  # (height, width) float32, written: both parts of −2(c − offset)
    norms_ptr,  # (height,) float32, written: |c − offset|², infinite beyond K so that no padding is nearest
    K, D, width,
    BLOCK_K: tl.constexpr,  # codes per program; divides height
    BLOCK_D: tl.constexpr,  # divides width
):
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    norms = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, width, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        c = load_tile(codebook_ptr, codebook_strides, codes, dims, K, D) - tl.load(offset_ptr + dims)[None, :]
        high, low = split(-2 * c)  # (BLOCK_K, BLOCK_D)
        where = codes[:, None].to(tl.int64) * width + dims[None, :]
        tl.store(high_ptr + where, high)
        tl.store(low_ptr + where, low)
        norms += tl.sum(c * c, 1)
    tl.store(norms_ptr + codes, tl.where(codes < K, norms, float("inf")))


@triton.jit
def nearest_code_kernel(
    vectors_ptr, vectors_strides,  # (N, D); strides in elements
    offset_ptr, high_ptr, low_ptr, norms_ptr,  # the prepared codebook
    scores_ptr, nearest_ptr,  # (splits, N) float32 and int64, written: the least score and its code
    N, K, D, width,
    codes_per_program,  # a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,  # vectors per program
    BLOCK_K: tl.constexpr,  # codes compared at a time
    BLOCK_D: tl.constexpr,  # dimensions multiplied at a time
):
    """The nearest of some of the codes for one block of vectors."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    within = column[:, None] * width + tl.arange(0, BLOCK_D)[None, :]  # a tile of the prepared codebook
    first = tl.program_id(1) * codes_per_program
    best_score = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_code = tl.zeros((BLOCK_N,), tl.int32) + first
    for start in range(first, tl.minimum(first + codes_per_program, K), BLOCK_K):
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start_d in range(0, D, BLOCK_D):
            dims = start_d + tl.arange(0, BLOCK_D)
            x = load_tile(vectors_ptr, vectors_strides, rows, dims, N, D)  # (BLOCK_N, BLOCK_D)
            x_high, x_low = split(x - tl.load(offset_ptr + dims)[None, :])
            where = tl.cast(start, tl.int64) * width + start_d + within
            c_high, c_low = tl.trans(tl.load(high_ptr + where)), tl.trans(tl.load(low_ptr + where))
            step = tl.dot(x_low, c_high, input_precision="tf32")
            step = tl.dot(x_high, c_low, step, input_precision="tf32")
            # Added here, it has been waited for. As the accumulator of `dot` it would not be, and on Hopper
            # the next step would overwrite the registers of x while they are multiplied (triton #9433).
            products += tl.dot(x_high, c_high, step, input_precision="tf32")
        scores = products + tl.load(norms_ptr + start + column)[None, :]  # (BLOCK_N, BLOCK_K)
        score = tl.min(scores, 1)  # skips NaN
        code = start + tl.min(tl.where(scores == score[:, None], column[None, :], BLOCK_K), 1)  # the lowest
        better = score < best_score  # not ≤: of equal scores the first stays
        best_score = tl.where(better, score, best_score)
        best_code = tl.where(better, code, best_code)
    place = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(scores_ptr + place, best_score, mask=rows < N)
    tl.store(nearest_ptr + place, best_code, mask=rows < N)


def tile(device: torch.device) -> dict[str, int]:
    """Tile shape and schedule (results/kernels). BLOCK_K must be a multiple of 32 and BLOCK_D divide 64:
    `prepare_codebook` pads the codebook to both."""
    if generation(device) == 9:  # Hopper's tensor cores need no registers for the codebook
        return dict(BLOCK_N=64, BLOCK_K=128, BLOCK_D=32, num_warps=4, num_stages=2)
    return dict(BLOCK_N=64, BLOCK_K=128, BLOCK_D=16, num_warps=8, num_stages=3)


def prepare_codebook(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(K, D) → offset (width,), high, low (height, width), norms (height,): float32, padded to tiles."""
    (K, D), device = codebook.shape, codebook.device
    shape = tile(device)
    block = shape["BLOCK_K"]
    assert block % 32 == 0 == 64 % shape["BLOCK_D"], shape
    height, width = cdiv(K, block) * block, cdiv(D, 64) * 64
    offset, norms = (torch.empty(length, dtype=torch.float32, device=device) for length in (width, height))
    high, low = torch.empty(2, height, width, dtype=torch.float32, device=device)
    common_offset_kernel[(width // 8,)](
        codebook, codebook.stride(), offset, K, D, BLOCK_K=1024, BLOCK_D=8, num_warps=8)
    prepare_codebook_kernel[(height // 32,)](
        codebook, codebook.stride(), offset, high, low, norms, K, D, width, BLOCK_K=32, BLOCK_D=64)
    return offset, high, low, norms


def nearest_code_triton(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The kernels, on whatever device the tensors are: (N, D), (K, D) → (N,) int64 in [0, K).

    Equal scores go to the lowest index. A code whose squared norm overflows is never nearest.
    Raises ValueError for other shapes, dtypes other than float32, float16 and bfloat16, or two devices.
    """
    check_shapes(vectors, codebook)
    if ({vectors.dtype, codebook.dtype} - {torch.float32, torch.float16, torch.bfloat16}
            or vectors.device != codebook.device):
        raise ValueError("the nearest_code kernel takes float32, float16 or bfloat16 on one device, not "
                         f"{vectors.dtype} on {vectors.device} and {codebook.dtype} on {codebook.device}")
    (N, D), K, device = vectors.shape, len(codebook), vectors.device
    shape = tile(device)
    row_blocks, code_blocks = cdiv(N, shape["BLOCK_N"]), cdiv(K, shape["BLOCK_K"])
    # Few vectors: several programs share the codes, until each multiprocessor has four to run.
    blocks_per_program = cdiv(code_blocks, cdiv(4 * multiprocessors(device), max(row_blocks, 1)))
    splits = cdiv(code_blocks, blocks_per_program)
    scores, nearest = (torch.empty(splits, N, dtype=dtype, device=device)
                       for dtype in (torch.float32, torch.int64))
    with torch.cuda.device_of(vectors):
        offset, high, low, norms = prepare_codebook(codebook)
        nearest_code_kernel[(row_blocks, splits)](
            vectors, vectors.stride(), offset, high, low, norms, scores, nearest, N, K, D, high.shape[1],
            blocks_per_program * shape["BLOCK_K"], **shape)
    return nearest.gather(0, scores.argmin(0, keepdim=True))[0]  # of equal scores the first program's


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: vectors (N, D), codebook (K, D), floating point → (N,) int64 in [0, K).

    Equal scores |c|² − 2x·c go to the lowest index; equal codes may score differently on a CPU, whose BLAS
    rounds by column, unless arithmetic is exact. Not differentiable. Raises ValueError for other shapes.
    """
    search = nearest_code_triton if has_tf32(vectors.device) else nearest_code_reference
    return search(vectors.detach(), codebook.detach())


def main():
    """Check the kernels on the real sizes, then time them beside the plain forms."""
    device = describe_device()
    codebook = torch.randn(1024, 256, device=device)  # §A.1's K and D
    for N in (3072, 65536, 2 ** 20) if device.type == "cuda" else (3072, 65536):
        x = torch.randn(N, 256, device=device)
        for rows, codes in zip(x.split(ROWS), nearest_code(x, codebook).split(ROWS)):
            distances = torch.cdist(rows.double(), codebook.double())  # (≤ROWS, K)
            excess = distances.gather(1, codes[:, None])[:, 0] - distances.amin(1)
            assert excess.max() < 1e-5, f"a code is {excess.max():.1e} farther than the nearest"
        forms = {
            "nearest_code": lambda: nearest_code(x, codebook),
            "torch.cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
            "addmm + argmin": lambda: codebook.square().sum(1).addmm(x, codebook.T, alpha=-2).argmin(1),
        }
        compare(f"N = {N:,}, K = 1,024, D = 256", forms, flops=2 * N * 1024 * 256,
                bytes_moved=4 * 256 * (N + 1024) + 8 * N, tensor_cores="3xTF32")


if __name__ == "__main__":
    main()
