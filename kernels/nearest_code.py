"""Nearest code: for each vector the index of the closest row of a codebook (§2, the quantizer; [8] eq. 1).

    argmin_k |x − c_k|²  =  argmin_k ( |c_k|² − 2 x·c_k )

|x|² is the same for every k and is left out, which also rounds less. What the codes have in common is
subtracted from both sides first: distances do not change, but an offset no longer eats the digits that tell
two codes apart.

Symbols: N vectors, K codes, D code width.
"""
import torch
from torch import Tensor

ROWS = 65536  # vectors compared at a time: bounds the (rows, K) score matrix to 256 MiB for 1,024 codes


def nearest_code_reference(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in plain torch: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Computes in float32, or in float64 if an input is. Ties go to the lowest index.
    Raises ValueError for other shapes.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code needs vectors (N, D) and a codebook (K, D) with K ≥ 1, "
                         f"not {tuple(vectors.shape)} and {tuple(codebook.shape)}")
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
    """The mean of a codebook (K, D), rounded to a power of two near the codes' largest distance to it: (D,).

    So coarse an offset subtracts without rounding, and codes that were equally near stay so.
    """
    mean = codebook.mean(0)  # (D,)
    limits = torch.finfo(codebook.dtype)
    spread = torch.maximum((codebook - mean).abs().max(), mean.abs().max() * limits.eps)
    spread = spread.clamp(min=limits.tiny)
    step = torch.exp2(spread.log2().ceil())
    return (mean / step).round() * step


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Ties go to the lowest index. Not differentiable.
    """
    return nearest_code_reference(vectors.detach(), codebook.detach())
