"""The codebook apart from its gradients: k-means initialization, dead codes, and the use of codes.

Symbols: B batch, h×w code grid, K codes, D code width, N = B·h·w vectors.
"""
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import nearest_code
from outputs import announce, moments


def as_vectors(latents: Tensor) -> Tensor:
    """(B, D, h, w) → (N, D), in row-major order of the cells."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def assign_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code at each cell: latents (B, D, h, w), codebook (K, D) → (B, h, w) int64."""
    B, _, h, w = latents.shape
    return nearest_code(as_vectors(latents.float()), codebook).view(B, h, w)


def embed_codes(codes: Tensor, codebook: Tensor) -> Tensor:
    """The rows of codes: (B, h, w), codebook (K, D) → (B, D, h, w)."""
    # A permuted view would make convolutions compute with channels last, whatever their weights are in.
    return codebook[codes].permute(0, 3, 1, 2).contiguous()


def kmeans_plusplus(vectors: Tensor, count: int, centres: Tensor) -> Tensor:
    """Draw `count` of the vectors (N, D) as further centres beside those given (M, D): (count, D).

    Each with probability proportional to the squared distance to its nearest centre so far. Drawn uniformly,
    most centres would fall where the vectors are dense, in pictures on the shades of an empty sky.
    """
    distance = torch.full((len(vectors),), 1e30, device=vectors.device)  # (N,) squared, to the nearest centre
    if len(centres):
        distance = (vectors - centres[nearest_code(vectors, centres)]).square().sum(1)
    drawn = torch.empty(count, vectors.shape[1], device=vectors.device)
    for i in range(count):
        drawn[i] = vectors[torch.multinomial(distance.clamp(min=1e-12), 1)[0]]
        distance = distance.minimum((vectors - drawn[i]).square().sum(1))
    return drawn


def kmeans(vectors: Tensor, count: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm: vectors (N, D) float32 → centres (count, D). An empty cluster keeps its centre."""
    centres = kmeans_plusplus(vectors, count, centres=vectors[:0])  # (count, D)
    for _ in range(iterations):
        nearest = nearest_code(vectors, centres)[:, None].expand_as(vectors)  # (N, D)
        centres.scatter_reduce_(0, nearest, vectors, "mean", include_self=False)
    return centres


@torch.no_grad()
def initialize_codebook(vq: nn.Module, batches: Iterable[Tensor], process: Any):
    """By k-means over the encoder outputs of batches (B, C, H, W), for most random codes would stay dead."""
    codebook = vq.quantizer.codebook  # (K, D)
    if process.rank == 0:
        vectors = torch.cat([as_vectors(vq.latents(images)) for images in batches])  # (N, D)
        codebook.copy_(kmeans(vectors, len(codebook)))
    if process.world > 1:
        torch.distributed.broadcast(codebook.data, src=0)


@torch.no_grad()
def restart_dead_codes(vq: nn.Module, optimizer: torch.optim.Optimizer, uses: Tensor, images: Tensor,
                       process: Any):
    """Move dead codes, uses (K,) == 0, to encoder outputs far from live ones, and reset their moments."""
    dead, codebook = process.total(uses) == 0, vq.quantizer.codebook  # (K,) and (K, D)
    uses.zero_()
    if dead.any():
        vectors = as_vectors(process.gather(vq.latents(images)))  # (N, D) of all processes
        if vectors.isfinite().all():  # else the run has diverged, and its log says so
            codebook[dead] = kmeans_plusplus(vectors, int(dead.sum()), codebook[~dead])
        if process.world > 1:
            torch.distributed.broadcast(codebook.data, src=0)
        for moment in moments(optimizer, codebook).values():
            moment[dead] = 0


def codebook_use(counts: Tensor) -> tuple[int, float]:
    """Counts of each code (K,) → the number of codes used, and their perplexity exp(entropy), 1 to K.

    Warns if less than 5 % of the codes are used (5 % of the count, if that is below K).
    """
    used = int((counts > 0).sum())
    if used < 0.05 * min(len(counts), int(counts.sum())):
        announce(f"warning: {used} of {len(counts)} codes in use; what helps: --restart-every 25 to 100, "
                 "a smaller --code-width or --codebook-size, a lower --lr")
    return used, math.exp(entropy(counts))


def use_colours(counts: Tensor) -> Tensor:
    """A colour for each code by its count (K,): the larger the brighter, red for 0. (K, 3, 1, 1)."""
    shades = 2 * counts.log1p() / counts.max().log1p() - 1  # (K,) in [−1, 1]
    unused = torch.tensor([1.0, -1.0, -1.0], device=counts.device)
    return torch.where(counts[:, None] > 0, shades[:, None], unused)[:, :, None, None]


def entropy(counts: Tensor) -> float:
    """Entropy of the distribution that counts (K,) give, in nats: the unigram baseline of a prior's loss."""
    return float(torch.special.entr(counts.double() / counts.sum()).sum())
