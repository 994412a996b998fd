"""The first stage: a convolutional autoencoder with a vector-quantized latent grid (VQVAE, §2, §A.1).

    images (B, C, H, W) → encoder → latents (B, D, h, w) → nearest of K codes → decoder → images (B, C, H, W)

The paper's network maps 256×256×3 to 16×16×256 with 1,024 codes; its CIFAR-10 network downsamples once, 32×32
to 16×16. Images are float32 in [−1, 1]; masks are one-hot channels going in and logits coming out.
`Palette` has the same interface for the pixel baseline: no network, each pixel is one of 512 colours (§2).

Symbols: B batch, C channels, H×W pixels, h×w code grid, K codes, D code width, N = B·h·w vectors.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import taming
from codebook import assign_codes, embed_codes, kmeans


@dataclass(frozen=True)
class VQConfig:
    """All that is needed to rebuild the network. Raises ValueError for sizes that do not fit together."""
    image_channels: int = 3
    base_channels: int = 128  # channels at full resolution; this and the next two as in the authors' model
    channel_multipliers: str = "1,1,2,2,4"  # of base_channels, for each resolution: 256 down to 16, §A.1
    residual_blocks: int = 2  # per resolution in the encoder, one more in the decoder
    codebook_size: int = 1024  # K, §A.1
    code_width: int = 256  # D, §A.1
    commitment_weight: float = 0.25  # β, §A.1
    group_channels: int = 4  # minimum channels per group of a GroupNorm, which has at most 32 groups

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
                raise ValueError(f"{width} channels do not split into {groups} groups for normalization; "
                                 "choose base_channels × channel_multipliers that are multiples of 32")
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
    """Groups of a GroupNorm: 32, as the authors have; fewer where a group would have too few channels."""
    return min(32, max(1, channels // group_channels))


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)


def conv(channels: int, out_channels: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, size, padding=size // 2)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with a zero-initialized last convolution."""

    gradient_checkpointing = False  # recompute the activations of `layers` in the backward pass

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
    """Single-head self-attention over all cells of the grid, with a zero-initialized output projection.

    §A.1 does not name it: it is in the authors' release.
    """

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
    """quantized latents (B, D, h, w) → images (B, C, H, W): the encoder mirrored (§A.1)."""
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
    """Vector quantization with a learned codebook (§2, [8]). Computes in float32, under autocast too.

    codebook.py sets `codebook` (K, D) by k-means and reinitializes dead codes; skip both to keep it fixed.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.commitment_weight = config.commitment_weight
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_width))
        # Overwritten by codebook.py before they are first used, and where codes are dead:
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents (B, D, h, w) → quantized (B, D, h, w), codes (B, h, w) int64, scalar loss.

        loss = |sg[z] − e|² + β·|z − sg[e]|², means over all elements: the first term trains the codebook,
        the second the encoder. `quantized` passes its gradient straight through to `latents`.
        """
        latents = latents.float()
        codes = assign_codes(latents, self.codebook)  # (B, h, w)
        chosen = embed_codes(codes, self.codebook)  # (B, D, h, w)
        loss = (F.mse_loss(chosen, latents.detach())
                + self.commitment_weight * F.mse_loss(latents, chosen.detach()))
        quantized = chosen.detach() + (latents - latents.detach())  # the bracket is 0, with gradient 1
        return quantized, codes, loss


def memory_format(device: torch.device, trained_row: int = 0) -> torch.memory_format:
    """Convolutions' memory format: channels last on a CPU (results/speed), else row-major (results/gpu).

    In training row-major on a CPU too if a row of pixels, `trained_row` bytes over all channels, is large
    beside its L1 cache: with channels last, weights' gradients can then take several times as long.
    """
    return torch.channels_last if device.type == "cpu" and trained_row <= 8192 else torch.preserve_format


class VQ(nn.Module):
    """The autoencoder: `forward` for training, `encode` and `decode` between images and codes after it."""

    def __init__(self, config: VQConfig, gradient_checkpointing: bool = False, compiled: bool = False):
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
        # Functions are assigned: a compiled module would be registered as a submodule, and enter state_dict.
        # The last layer stays eager: λ needs the gradient at its weight (losses.py).
        if compiled:
            encode, body, last = self.encoder[:], self.decoder[:-1], self.decoder[-1]  # the same layers
            self.encoder.forward = torch.compile(encode.forward, dynamic=False)
            decode = torch.compile(body.forward, dynamic=False)
            self.decoder.forward = lambda quantized: last(decode(quantized))

    @classmethod
    def from_taming(cls, path: str | Path) -> "VQ":
        """The first stage in a file of the authors' taming-transformers: a VQ model's, or a transformer's.

        β, which only further training reads, is not in the file and stays the default (theirs weighted the
        commitment term by 1, the codebook term by 0.25). Raises FileNotFoundError; ValueError for another
        kind of file or another architecture.
        """
        vq = cls(VQConfig(**taming.vq_sizes(path)))
        vq.load_state_dict(taming.vq_weights(path, vq.state_dict()))
        return vq

    def forward(self, images: Tensor, quantize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, C, H, W) → reconstructions (B, C, H, W), codes (B, h, w) int64, quantization loss ().

        Without `quantize` the latents themselves are decoded, and the loss is 0.
        """
        latents = self.latents(images)
        quantized, codes, loss = self.quantizer(latents)
        if not quantize:  # the codebook's gradient is 0, not None, as DistributedDataParallel needs
            quantized, loss = latents.float(), 0 * loss
        return self.decoder(quantized).float(), codes, loss

    def latents(self, images: Tensor) -> Tensor:
        """Encoder outputs, not yet quantized: images (B, C, H, W) → (B, D, h, w).

        Raises ValueError for another number of channels, or sides that `downsampling` does not divide.
        """
        channels, f = self.config.image_channels, self.config.downsampling
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images are {tuple(images.shape)}; this first stage needs "
                             f"(B, {channels}, H, W) with H and W divisible by {f}")
        return self.encoder(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) float32 in [−1, 1] → codes (B, h, w) int64 in [0, K)."""
        return assign_codes(self.latents(images), self.quantizer.codebook)

    def embed(self, codes: Tensor) -> Tensor:
        """The codebook rows of codes (B, h, w): (B, D, h, w) float32."""
        return embed_codes(codes, self.quantizer.codebook)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 in [0, K) → images (B, C, H, W), near [−1, 1] but not clamped to it."""
        return self.decoder(self.embed(codes)).float()

    @torch.no_grad()
    def requantize(self, codes: Tensor, size: int) -> Tensor:
        """Codes (B, h, w) → embeddings → average-pooled → codes (B, size, size), a coarser scale (§3)."""
        h, w = codes.shape[1:]
        if size < 1 or h % size or w % size:
            raise ValueError(f"size is {size}; it must be at least 1 and divide both sides of {h}×{w} codes")
        if h == w == size:
            return codes  # a lookup would replace codes by the first of equal rows
        pooled = F.avg_pool2d(self.embed(codes), (h // size, w // size))  # (B, D, size, size)
        return assign_codes(pooled, self.quantizer.codebook)


class Palette(nn.Module):
    """First stage of the pixel baseline (§2): each pixel's code is the nearest of colours (K, C), [−1, 1]."""

    def __init__(self, colours: Tensor):
        super().__init__()
        K, C = colours.shape
        self.config = VQConfig(C, channel_multipliers="1", codebook_size=K, code_width=C)
        self.colours = nn.Parameter(colours, requires_grad=False)

    @classmethod
    def fit(cls, pixels: Tensor, count: int) -> "Palette":
        """`count` K-means centres of training pixels (N, C) float32, or of a random 250,000 of them."""
        sample = torch.randperm(len(pixels), device=pixels.device)[:250_000]
        return cls(kmeans(pixels[sample], count))

    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) → codes (B, H, W) int64 in [0, K). Raises ValueError for another C."""
        if images.ndim != 4 or images.shape[1] != self.colours.shape[1]:
            raise ValueError(f"images are {tuple(images.shape)}, not (B, {self.colours.shape[1]}, H, W)")
        return assign_codes(images, self.colours)

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, H, W) int64 in [0, K) → images (B, C, H, W) of their colours."""
        return embed_codes(codes, self.colours)

    embed = decode  # the colours are the embedding
