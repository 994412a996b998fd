"""The first stage: a convolutional autoencoder whose latent grid is quantized with a codebook (§2; §A.1).

    images (B, C, H, W) → encoder → latents (B, D, h, w) → nearest of K codes → decoder → images (B, C, H, W)

The paper's network takes 256×256×3 to 16×16×256 with 1,024 codes; for CIFAR-10 it halves the picture once,
32×32 to 16×16. Images are float32 in [−1, 1]; masks come as one-hot channels, and back as logits.

Symbols: B batch, C channels, H×W pixels, h×w code grid, K codes, D code width, N = B·h·w vectors.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import taming
from kernels import nearest_code
from losses import PatchDiscriminator, PerceptualLoss  # used only in training, but part of the first stage


@dataclass(frozen=True)
class VQConfig:
    """All that is needed to rebuild the network. Raises ValueError for sizes that do not fit together."""
    image_channels: int = 3
    base_channels: int = 128  # channels at full resolution; this and the next two as in the authors' model
    channel_multipliers: str = "1,1,2,2,4"  # of base_channels, per resolution; commas halve: 256 → 16, §A.1
    residual_blocks: int = 2  # per resolution in the encoder, one more in the decoder
    codebook_size: int = 1024  # K, §A.1
    code_width: int = 256  # D, §A.1
    commitment_weight: float = 0.25  # β, §A.1
    group_channels: int = 4  # at least so many are normalized together, in at most 32 groups

    def __post_init__(self):
        for name in ("image_channels", "base_channels", "residual_blocks", "codebook_size", "code_width",
                     "group_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        parts = self.channel_multipliers.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"channel_multipliers is {self.channel_multipliers!r}; "
                             "it must be whole numbers like 1,1,2,2,4")
        for width in self.widths:
            groups = norm_groups(width, self.group_channels)
            if width % groups:
                raise ValueError(
                    f"{width} channels do not split into {groups} groups for normalization; "
                    "choose base_channels and channel_multipliers whose products are multiples of 32")
        if not self.commitment_weight >= 0:
            raise ValueError(f"commitment_weight is {self.commitment_weight}; it must not be negative")

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, from the finest to the coarsest."""
        return [self.base_channels * int(multiplier) for multiplier in self.channel_multipliers.split(",")]

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side: 16 in the paper's model ("f16"), 2 for CIFAR-10."""
        return 2 ** (len(self.widths) - 1)


def norm_groups(channels: int, group_channels: int = VQConfig.group_channels) -> int:
    """Groups for normalization: the authors' 32, fewer for narrow layers so that each keeps some channels."""
    return min(32, max(1, channels // group_channels))


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)


def conv(channels: int, out_channels: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, size, padding=size // 2)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; starts near the shortcut, which trains faster."""

    gradient_checkpointing = False  # run `layers` again in the backward pass instead of keeping its insides

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.layers = nn.Sequential(norm(channels), nn.SiLU(), conv(channels, out_channels),
                                    norm(out_channels), nn.SiLU(), conv(out_channels, out_channels))
        nn.init.zeros_(self.layers[-1].weight)
        self.shortcut = nn.Identity() if channels == out_channels else conv(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self.shortcut(x) + checkpoint(self.layers, x, use_reentrant=False)
        return self.shortcut(x) + self.layers(x)  # (B, out_channels, H, W)


class AttentionBlock(nn.Module):
    """Single-head attention between all cells of the coarsest grid; starts near the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.out = conv(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, 1, C, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # 3 × (B, 1, h*w, C)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C)
        return x + self.out(mixed.transpose(2, 3).reshape(B, C, h, w))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H, W) → (B, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, H, W) → (B, C, 2H, 2W)


def encoder(config: VQConfig) -> nn.Sequential:
    """images (B, C, H, W) → latents (B, D, h, w)."""
    channels = config.base_channels
    layers = [conv(config.image_channels, channels)]
    for level, width in enumerate(config.widths):
        if level > 0:
            layers.append(Downsample(channels))
        for _ in range(config.residual_blocks):
            layers.append(ResidualBlock(channels, width))
            channels = width
            if level == len(config.widths) - 1:
                layers.append(AttentionBlock(channels))
    layers += [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    layers += [norm(channels), nn.SiLU(), conv(channels, config.code_width),
               conv(config.code_width, config.code_width, 1)]
    return nn.Sequential(*layers)


def decoder(config: VQConfig) -> nn.Sequential:
    """quantized latents (B, D, h, w) → images (B, C, H, W): the encoder reversed (§A.1)."""
    channels = config.widths[-1]
    layers = [conv(config.code_width, config.code_width, 1), conv(config.code_width, channels)]
    layers += [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    for level, width in reversed(list(enumerate(config.widths))):
        for _ in range(config.residual_blocks + 1):
            layers.append(ResidualBlock(channels, width))
            channels = width
            if level == len(config.widths) - 1:
                layers.append(AttentionBlock(channels))
        if level > 0:
            layers.append(Upsample(channels))
    layers += [norm(channels), nn.SiLU(), conv(channels, config.image_channels)]
    return nn.Sequential(*layers)


class Quantizer(nn.Module):
    """Replaces each latent vector by the nearest of K codes (§2, [8]). In float32, under autocast too."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.commitment_weight = config.commitment_weight
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_width))
        # Until `initialize` sees data:
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents (B, D, h, w) → quantized (B, D, h, w), codes (B, h, w) int64, scalar loss.

        loss = |sg[z] − e|² + β·|z − sg[e]|², means over all elements: the first term moves the codes, the
        second the encoder. The gradient of `quantized` is straight-through.
        """
        B, D, h, w = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            vectors = as_vectors(latents.float())  # (N, D)
            codes = nearest_code(vectors, self.codebook)  # (N,)
            chosen = self.codebook[codes]  # (N, D)
            loss = (F.mse_loss(chosen, vectors.detach())
                    + self.commitment_weight * F.mse_loss(vectors, chosen.detach()))
            quantized = vectors + (chosen - vectors).detach()  # value of `chosen`, gradient of `vectors`
        return quantized.view(B, h, w, D).permute(0, 3, 1, 2), codes.view(B, h, w), loss

    @torch.no_grad()
    def initialize(self, vectors: Tensor):
        """Set the codebook to K-means centres of encoder outputs (N, D): codes start where the data is."""
        self.codebook.copy_(kmeans(vectors, len(self.codebook), iterations=10))

    @torch.no_grad()
    def restart(self, dead: Tensor, vectors: Tensor):
        """Move the codes marked in `dead` (K,) bool onto encoder outputs (N, D) that no code is near to."""
        self.codebook[dead] = draw_apart(vectors, int(dead.sum()), self.codebook[~dead])


class VQ(nn.Module):
    """The autoencoder. `encode` and `decode` go from pictures to codes and back; `forward` is to train."""

    def __init__(self, config: VQConfig, gradient_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = decoder(config)
        for layer in self.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.num_groups = norm_groups(layer.num_channels, config.group_channels)
            if isinstance(layer, ResidualBlock):
                layer.gradient_checkpointing = gradient_checkpointing

    @classmethod
    def from_taming(cls, path: str | Path) -> "VQ":
        """The first stage in a file of the authors' taming-transformers: a VQ model's, or a transformer's.

        The file does not tell β. The default is set, which only further training reads: theirs had 1 on the
        commitment term and 0.25 on the codebook's. Raises FileNotFoundError; ValueError for another file, or
        a network unlike ours. Nothing in the file is run.
        """
        vq = cls(VQConfig(**taming.vq_sizes(path)))
        vq.load_state_dict(taming.vq_weights(path, vq.state_dict()))
        return vq

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, C, H, W) → reconstructions (B, C, H, W), codes (B, h, w) int64, quantization loss ()."""
        quantized, codes, loss = self.quantizer(self.latents(images))
        return self.decoder(quantized), codes, loss

    def latents(self, images: Tensor) -> Tensor:
        """What the quantizer sees: images (B, C, H, W) → (B, D, h, w).

        Raises ValueError if the picture does not halve evenly.
        """
        channels, f = self.config.image_channels, self.config.downsampling
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images are {tuple(images.shape)}; this first stage needs "
                             f"(B, {channels}, H, W) with H and W divisible by {f}")
        return self.encoder(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float32 in [−1, 1] → codes (B, h, w) int64 in [0, K)."""
        latents = self.latents(images)  # (B, D, h, w)
        codes = nearest_code(as_vectors(latents.float()), self.quantizer.codebook)  # (N,)
        return codes.view(len(images), *latents.shape[2:])

    def embed(self, codes: Tensor) -> Tensor:
        """The codebook rows of codes (B, h, w): (B, D, h, w) float32."""
        return self.quantizer.codebook[codes].permute(0, 3, 1, 2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 in [0, K) → images (B, C, H, W), near [−1, 1] but not clamped to it."""
        return self.decoder(self.embed(codes)).float()


def as_vectors(latents: Tensor) -> Tensor:
    """(B, D, h, w) → (N, D), in row-major order of the cells."""
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def draw_apart(vectors: Tensor, count: int, taken: Tensor) -> Tensor:
    """`count` of the vectors (N, D), far from those taken (M, D) and from each other: (count, D).

    The seeding of k-means++: each with a probability that grows with the squared distance to the nearest one
    taken before. A plain draw would follow the density and spend half of the codes on shades of an empty sky.
    """
    distance = torch.full((len(vectors),), 1e30, device=vectors.device)  # (N,) squared, to the nearest taken
    if len(taken):
        distance = (vectors - taken[nearest_code(vectors, taken)]).square().sum(1)
    drawn = torch.empty(count, vectors.shape[1], device=vectors.device)
    for i in range(count):
        drawn[i] = vectors[torch.multinomial(distance.clamp(min=1e-12), 1)[0]]
        distance = distance.minimum((vectors - drawn[i]).square().sum(1))
    return drawn


def kmeans(vectors: Tensor, count: int, iterations: int) -> Tensor:
    """Lloyd's algorithm: vectors (N, D) float32 → centres (count, D). An empty cluster keeps its centre."""
    centres = draw_apart(vectors, count, taken=vectors[:0])  # (count, D)
    for _ in range(iterations):
        nearest = nearest_code(vectors, centres)  # (N,)
        sizes = torch.bincount(nearest, minlength=count)[:, None]  # (count, 1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)  # (count, D)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def codebook_use(counts: Tensor) -> tuple[int, float]:
    """From each code's count, (K,): the number of codes in use, and exp(entropy), the perplexity, 1 to K."""
    return int((counts > 0).sum()), math.exp(entropy(counts))


def colours_of_use(counts: Tensor) -> Tensor:
    """A pixel for each code, (K, 3, 1, 1): the larger counts (K,) the brighter, on a log scale; red for 0."""
    shades = 2 * counts.log1p() / counts.max().log1p() - 1  # (K,) in [−1, 1]
    unused = torch.tensor([1.0, -1.0, -1.0], device=counts.device)
    return torch.where(counts[:, None] > 0, shades[:, None], unused)[:, :, None, None]


def entropy(counts: Tensor) -> float:
    """Entropy of counts (K,) in nats: what a model that knows only the codes' frequencies pays per token."""
    p = counts.double() / counts.sum()
    return float(-(p * p.clamp(min=1e-300).log()).sum())
