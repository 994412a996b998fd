"""Nearest code: for each vector the index of the closest row of a codebook (§2, the quantizer; [8] eq. 1).

    argmin_k |x − c_k|²  =  argmin_k ( |c_k|² − 2 x·c_k )

|x|² is the same for every k and is left out, which also rounds less. The mean of the codebook is subtracted from both sides
first: distances do not change, but a common offset no longer eats the digits that tell two codes apart.

Symbols: N vectors, K codes, D code width.
"""
import torch
from torch import Tensor

ROWS = 65536  # vectors compared at a time: bounds the (rows, K) score matrix to 256 MiB for 1,024 codes


def nearest_code_reference(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in plain torch: vectors (N, D), codebook (K, D) → (N,) int64 in [0, K).

    Computes in float32, or in float64 if both inputs are. Ties go to the lowest index. Raises ValueError for other shapes.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1] or len(codebook) == 0:
        raise ValueError(f"nearest_code needs vectors (N, D) and a codebook (K, D) with K ≥ 1, "
                         f"not {tuple(vectors.shape)} and {tuple(codebook.shape)}")
    dtype = torch.promote_types(torch.promote_types(vectors.dtype, codebook.dtype), torch.float32)
    mean = codebook.to(dtype).mean(0)  # (D,)
    centred = codebook.to(dtype) - mean  # (K, D)
    squared_norms = centred.square().sum(1)  # (K,)
    nearest = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for start in range(0, len(vectors), ROWS):
        rows = vectors[start:start + ROWS].to(dtype) - mean  # (≤ROWS, D)
        scores = torch.addmm(squared_norms, rows, centred.T, alpha=-2)  # (≤ROWS, K)
        nearest[start:start + ROWS] = scores.argmin(1)
    return nearest


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: vectors (N, D), codebook (K, D) → (N,) int64; ties go to the lowest index. Not differentiable."""
    return nearest_code_reference(vectors.detach(), codebook.detach())
