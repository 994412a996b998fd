"""The first stage's losses beside L1 (§A.1): perceptual distance, patch discriminator, and its weight λ.

    nll = |x − x̂| + LPIPS(x, x̂)      g = −mean D(x̂)      λ = ‖∇nll‖ / (‖∇g‖ + 1e-4)
    the autoencoder minimizes nll + quantization loss + 0.8·λ·g, the discriminator D the hinge loss

The paper refers to a VQGAN's losses; the numbers here are those of the authors' released model. Unlike there,
D trains a little before the autoencoder hears it, and gains its weight little by little.

Symbols: B batch, C channels, H×W pixels, h'×w' patches.
"""
import hashlib
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Layers whose outputs LPIPS compares, all of them ReLUs, and the channels there: torchvision's numbering.
TAPS = {"vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
        "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}}
SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels along a side that leave one value in the deepest layer
TOLERANCE = 1e-3  # of a real picture's range, for rounding
OVERSHOOT = 20  # a decoder's output is not clamped; beyond this it has diverged

# Backbone (torchvision) and heads (the LPIPS release): file name in torch.hub's cache, where from, sha256.
LPIPS_RELEASE = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
                 "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1")
PLACES = {
    "vgg16": (
        ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
         "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        ("lpips-v0.1-vgg.pth", f"{LPIPS_RELEASE}/vgg.pth",
         "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")),
    "alexnet": (
        ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
         "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"),
        ("lpips-v0.1-alex.pth", f"{LPIPS_RELEASE}/alex.pth",
         "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")),
}
ADVICE = ("name a file of LPIPS weights with train_vq.py --perceptual-weights, "
          "or leave LPIPS out with --perceptual none")


def backbone_layers(backbone: str) -> nn.Sequential:
    """The convolutional part of an ImageNet classifier up to its last tap: images → (B, channels, h, w)."""
    layers, channels = [], 3
    if backbone == "vgg16":
        for block, convolutions in enumerate((2, 2, 3, 3, 3)):
            if block > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                width = min(64 * 2**block, 512)
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
    else:
        layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
                  nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
                  nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
                  nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
                  nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PerceptualLoss(nn.Module):
    """LPIPS v0.1: how different two pictures look, from 0, by the features of an ImageNet classifier.

    `weights_path` is a plain state dict with the classifier's `features.N.weight/bias` and the heads
    `linI.model.1.weight`; "" fetches both from their public places. Raises ValueError for a backbone or file
    that does not fit, FileNotFoundError for weights that are nowhere. Frozen, and always in eval mode.
    """

    def __init__(self, weights_path: str | Path, backbone: str = "vgg16"):
        super().__init__()
        if backbone not in TAPS:
            raise ValueError(f"backbone is {backbone!r}; choose one of {', '.join(TAPS)}")
        self.backbone = backbone
        with torch.device("meta"):  # nothing drawn at random: weights come from files
            self.features = backbone_layers(backbone)
            self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in TAPS[backbone].values())
        # ImageNet's mean and deviation, (.485, .456, .406) and (.229, .224, .225), for [−1, 1]: LPIPS v0.1.
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        files = [Path(weights_path)] if weights_path else [fetched(*place) for place in PLACES[backbone]]
        weights = {name: weight for file in files for name, weight in read_weights(file).items()}
        self.load_state_dict(matched(weights, self.state_dict(), files, backbone), assign=True)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """A measure has no training mode: the authors' model, which could be switched, had dropout in it."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor, unclamped: bool = False) -> Tensor:
        """Two batches of pictures (B, 1 or 3, H, W) float32 in [−1, 1] → their distances (B,). Symmetric.

        `unclamped`: the others are a decoder's output, which may overshoot, up to ±20. Raises ValueError for
        pictures beyond, or of sizes that do not fit.
        """
        self.check(images, others, unclamped)
        distance = torch.zeros(len(images), device=images.device)  # (B,)
        for head, a, b in zip(self.heads, self.taps(images), self.taps(others)):  # (B, channels, h, w) each
            distance = distance + (head * (a - b).square()).sum(1).mean((1, 2))
        return distance

    def taps(self, images: Tensor) -> list[Tensor]:
        """Features of the five taps, each of unit length along its channels: (B, channels, h, w)."""
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale  # grey: three equal channels
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS[self.backbone]:
                found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return found

    def check(self, images: Tensor, others: Tensor, unclamped: bool):
        smallest = SMALLEST[self.backbone]
        if (images.shape != others.shape or images.ndim != 4 or images.shape[1] not in (1, 3)
                or min(images.shape[2:]) < smallest):
            raise ValueError(
                f"pictures are {tuple(images.shape)} and {tuple(others.shape)}; LPIPS with {self.backbone} "
                f"needs two equal shapes (B, 1 or 3, H, W) of at least {smallest}×{smallest} pixels")
        if not (images.is_floating_point() and others.is_floating_point()):
            raise ValueError(f"pictures are {images.dtype} and {others.dtype}, not float32 in [−1, 1]")
        largest, other = torch.stack([images.detach().abs().amax(), others.detach().abs().amax()]).tolist()
        # Not a number passes: the run's log reports it as the loss that it becomes.
        if largest > 1 + TOLERANCE or other > 1 + TOLERANCE and not unclamped:
            raise ValueError(f"pictures reach ±{largest:.4g} and ±{other:.4g}; LPIPS needs them in [−1, 1], "
                             "not in [0, 255]")
        if other > OVERSHOOT:
            raise ValueError(f"reconstructions reach ±{other:.4g} instead of ±1, so the decoder diverges: "
                             "go on from the last checkpoint with --resume and a lower --lr")


def fetched(name: str, url: str, sha256: str) -> Path:
    """The file `name` in torch.hub's cache, fetched there if need be.

    Raises FileNotFoundError if it cannot be fetched, ValueError if it is another file.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        print(f"fetching {url} into {path.parent}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{name} is not in {path.parent} and could not be fetched from {url} "
                                    f"({error}): put it there, {ADVICE}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{path} has the sha256 sum {digest} instead of {sha256}: "
                         "remove it to fetch it again")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """A plain state dict, on the CPU. Raises FileNotFoundError, or ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {ADVICE}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged, or holds more than numbers, strings and tensors "
                         f"({type(error).__name__}); {ADVICE}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{path} is not a plain dict of tensors; {ADVICE}")
    return weights


def matched(weights: dict[str, Tensor], expected: dict[str, Tensor], files: list[Path],
            backbone: str) -> dict[str, Tensor]:
    """The weights under our names, in float32, each there and none left over. ValueError: it is not so."""
    names = {re.sub(r"heads\.(\d)", r"lin\1.model.1.weight", ours): ours for ours in expected}
    problems = [f"there is no {name}" for name in names if name not in weights]
    for name, weight in weights.items():
        shape = tuple(expected[names[name]].shape) if name in names else None
        if shape is not None and weight.shape != shape:
            problems.append(f"{name} is {tuple(weight.shape)} instead of {shape}")
        elif shape is None and not name.startswith("classifier."):  # the rest of torchvision's networks
            problems.append(f"{name} is not expected")
    if problems:
        raise ValueError(f"{' and '.join(map(str, files))} cannot be the LPIPS weights of {backbone}: "
                         f"{problems[0]} ({len(problems)} such problems); {ADVICE}")
    return {ours: weights[name].float() for name, ours in names.items()}


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture how real it looks: pix2pix's, patches of 70×70 pixels with 3 layers."""

    def __init__(self, image_channels: int = 3, base_channels: int = 64, layers: int = 3):
        super().__init__()
        self.image_channels, self.smallest = image_channels, 3 * 2**layers
        width = base_channels
        main = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer in range(1, layers + 1):
            wider = base_channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            main += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),  # the norm has one
                     nn.BatchNorm2d(wider), nn.LeakyReLU(0.2, inplace=True)]
            width = wider
        self.main = nn.Sequential(*main, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.main:  # as in pix2pix
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [−1, 1] → logits (B, 1, h', w'), high for real; h' = H/8 − 2 with 3 layers.

        Raises ValueError for pictures of other channels, or too small for a single patch.
        """
        channels, smallest = self.image_channels, self.smallest
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < smallest:
            raise ValueError(f"images are {tuple(images.shape)}; this discriminator needs (B, {channels}, H, "
                             f"W) of at least {smallest}×{smallest} pixels")
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, scalar, of its logits for real pictures and reconstructions; 1 at zeros."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll: Tensor, generator: Tensor, last_layer: Tensor, world: int = 1) -> Tensor:
    """λ = ‖∇nll‖ / (‖∇generator‖ + 1e-4) in [0, 1e4], scalar, no gradient: both pull equally on the pictures.

    The gradients are those of the decoder's last layer, averaged over the `world` processes of a run, so that
    all get the λ that one process would.
    """
    gradients = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                             for loss in (nll, generator)])  # (2, *last_layer)
    if world > 1:
        torch.distributed.all_reduce(gradients)
    of_nll, of_generator = (gradients / world).flatten(1).norm(dim=1)
    return (of_nll / (of_generator + 1e-4)).clamp(0, 1e4)


class Adversary:
    """The discriminator, its Adam, its weight, and the steps from which it trains, is heard, has it all."""

    def __init__(self, discriminator: PatchDiscriminator, weight: float, betas: tuple[float, float],
                 steps: tuple[int, int, int], world: int = 1):
        self.discriminator, self.weight, self.world = discriminator, weight, world
        self.trains_from, self.heard_from, self.full_from = steps
        self.optimizer = torch.optim.Adam(discriminator.parameters(), betas=betas)

    def weight_at(self, step: int) -> float:
        """0 until it is heard, then evenly more: at once, the two would chase each other off the pictures."""
        share = (step - self.heard_from + 1) / (self.full_from - self.heard_from + 1)
        return self.weight * min(max(share, 0.0), 1.0)

    def generator_loss(self, reconstructions: Tensor) -> Tensor:
        """−mean D(x̂), scalar: its gradient passes through the discriminator and leaves nothing there."""
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(reconstructions).mean()
        self.discriminator.requires_grad_(True)
        return loss

    def backward(self, images: Tensor, reconstructions: Tensor, share: float) -> dict[str, Tensor]:
        """Add the gradients of pictures and their reconstructions (B, C, H, W), a `share` of the step's.

        The two pass apart, so that neither is normalized by the other's statistics. Returns the loss and the
        mean logits, for the log.
        """
        real = self.discriminator(images)  # (B, 1, h', w')
        fake = self.discriminator(reconstructions.detach())
        loss = hinge_loss(real, fake)
        (share * loss).backward()
        return {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def step(self, lr: float):
        """Move the discriminator by the gradients since the last step.

        Several processes average them here: DistributedDataParallel overwrites the norms' buffers in each of
        two passes.
        """
        if self.world > 1:
            for weight in self.discriminator.parameters():
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= self.world
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict(),
                "steps": [self.trains_from, self.heard_from, self.full_from]}

    def load_state_dict(self, state: dict, step: int):
        """Go on after `step`. A longer run's schedule is later; but what has begun does not stop again."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        trains_from, heard_from, full_from = state["steps"]
        if trains_from <= step:
            self.trains_from = trains_from
        if heard_from <= step:
            self.heard_from, self.full_from = heard_from, full_from


def cross_entropy(one_hot: Tensor, logits: Tensor) -> Tensor:
    """Of masks (B, C, H, W), sum over the pixels that have a label, in nats; scalar."""
    return -(one_hot * logits.log_softmax(1)).sum()


def autoencoder_loss(images: Tensor, reconstructions: Tensor, quantization_loss: Tensor,
                     perceptual: PerceptualLoss | None, perceptual_weight: float, adversary: Adversary | None,
                     adversarial_weight: float, last_layer: Tensor,
                     labelled: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """What the autoencoder minimizes, and its parts for the log, all scalar; None or 0 leaves a part out.

    Of images and reconstructions (B, C, H, W), or of masks and their logits: then `labelled` is the number of
    pixels that have a label, in the mean over the parts of a step. `last_layer` is the decoder's last weight.
    """
    x = reconstructions.detach().requires_grad_()  # (B, C, H, W): see `tangent`
    if labelled is None:
        nll = F.l1_loss(images, x)
        parts = {"l1": nll, "vq": quantization_loss}
    else:
        nll = cross_entropy(images, x) / labelled.clamp(min=1)
        parts = {"cross_entropy": nll, "vq": quantization_loss}
    if perceptual and perceptual_weight:
        parts["perceptual"] = perceptual(images, x, unclamped=True).mean()
        nll = nll + perceptual_weight * parts["perceptual"]
    nll = tangent(nll, x, reconstructions)
    loss = nll + quantization_loss
    if adversary and adversarial_weight:
        generator_loss = tangent(adversary.generator_loss(x), x, reconstructions)
        parts["lambda"] = adaptive_weight(nll, generator_loss, last_layer, adversary.world)
        loss = loss + adversarial_weight * parts["lambda"] * generator_loss
    return loss, parts


def tangent(loss: Tensor, x: Tensor, reconstructions: Tensor) -> Tensor:
    """A scalar loss of the leaf x = reconstructions (B, C, H, W) as its tangent there: equal value and slope.

    λ and the step both need the slope. LPIPS and the discriminator are walked back through here, once, and
    what they kept for that is freed.
    """
    slope, = torch.autograd.grad(loss, x)  # (B, C, H, W)
    return loss.detach() + (slope * (reconstructions - x.detach())).sum()


def score_sums(images: Tensor, reconstructions: Tensor, perceptual: PerceptualLoss | None,
               one_hot: bool) -> Tensor:
    """Sums of L1 and of LPIPS (of what can be shown, in [−1, 1]), and the pictures' number: (3,).

    Of masks: sums of nats and of labels that come back, and the number of pixels that have one.
    """
    if one_hot:
        right = (reconstructions.argmax(1) == images.argmax(1)) & images.any(1)  # (B, H, W)
        return torch.stack([cross_entropy(images, reconstructions), right.sum(), images.sum()])
    l1 = (reconstructions - images).abs().mean((1, 2, 3)).sum()
    lpips = perceptual(images, reconstructions.clamp(-1, 1)).sum() if perceptual else torch.zeros_like(l1)
    return torch.stack([l1, lpips, torch.full_like(l1, len(images))])
