"""The losses of the first stage: L1 + LPIPS and an adversarial one (§A.1), or the cross-entropy of masks.

    nll = |x − x̂| + LPIPS(x, x̂)      g = −mean D(x̂)      λ = ‖∇nll‖ / (‖∇g‖ + 1e-4)
    the autoencoder minimizes nll + quantization loss + 0.8·λ·g, the discriminator D the hinge loss

§A.1 names LPIPS and a patch discriminator; all else is as in the authors' release (VQGAN). Unlike there,
the weight 0.8 is reached by a linear ramp from the step in which D starts to train, LPIPS has no dropout,
and each pixel of a mask has one label (softmax), where theirs has a yes or no for each.

Symbols: B batch, C channels, H×W pixels, h'×w' patches, x images, x̂ reconstructions.
"""
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# The layers whose features LPIPS compares, all of them ReLUs: index in torchvision's `features` → channels.
TAPS = {"vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
        "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}}
SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels along a side that leave one value in the deepest layer

# The backbone (torchvision) and the heads (LPIPS): URL, SHA-256 and name in torch.hub's cache.
HEADS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
             "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1")
DOWNLOADS = {
    "vgg16": [("https://download.pytorch.org/models/vgg16-397923af.pth",
               "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", "vgg16-397923af.pth"),
              (f"{HEADS_URL}/vgg.pth",
               "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", "lpips-v0.1-vgg.pth")],
    "alexnet": [
        ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
         "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02", "alexnet-owt-7be5be79.pth"),
        (f"{HEADS_URL}/alex.pth",
         "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0", "lpips-v0.1-alex.pth")],
}
ADVICE = "name a file of LPIPS weights with --perceptual-weights, or leave LPIPS out with --perceptual none"


def backbone_layers(backbone: str) -> nn.Sequential:
    """The convolutional layers of an ImageNet classifier: images (B, 3, H, W) → (B, channels, h, w)."""
    if backbone == "vgg16":
        widths = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
        plan, pool = [width and (width, 3, 1, 1) for width in widths], nn.MaxPool2d(2)
    else:
        plan = [(64, 11, 4, 2), 0, (192, 5, 1, 2), 0, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]
        pool = nn.MaxPool2d(3, stride=2)
    layers, channels = [], 3
    for convolution in plan:  # (channels, size, stride, padding), or 0 for pooling
        if convolution:
            layers += [nn.Conv2d(channels, *convolution), nn.ReLU(inplace=True)]
            channels = convolution[0]
        else:
            layers.append(pool)
    return nn.Sequential(*layers)


class PerceptualLoss(nn.Module):
    """LPIPS v0.1: the distance of two images in the features of an ImageNet classifier, 0 for equal ones.

    `weights_path` is a plain state dict with the classifier's `features.N.weight/bias` and the heads
    `linI.model.1.weight`; "" downloads both, once; None takes random numbers, for a benchmark. LPIPS is a
    fixed metric: frozen, always in eval mode. Raises ValueError for a backbone or file that does not fit,
    FileNotFoundError for one that is not there.
    """

    def __init__(self, weights_path: str | Path | None, backbone: str = "vgg16"):
        super().__init__()
        if backbone not in TAPS:
            raise ValueError(f"backbone is {backbone!r}; choose one of {', '.join(TAPS)}")
        self.backbone = backbone
        with torch.device("cpu" if weights_path is None else "meta"):  # meta: the numbers come from files
            self.features = backbone_layers(backbone)
            self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width in TAPS[backbone].values())
        # ImageNet's mean and deviation, (.485, .456, .406) and (.229, .224, .225), for [−1, 1]: LPIPS v0.1.
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        if weights_path is not None:
            files = [Path(weights_path)] if weights_path else [download(*x) for x in DOWNLOADS[backbone]]
            weights = {re.sub(r"^lin(\d)\.model\.1\.weight$", r"heads.\1", str(name)): weight.float()
                       for file in files for name, weight in read_weights(file).items()
                       if not str(name).startswith("classifier.")}  # torchvision's last layers
            try:
                self.load_state_dict(weights, assign=True)
            except RuntimeError as error:  # a title, then a line for each kind of problem
                problem = str(error).split("\n\t")[1].strip(". ")
                raise ValueError(f"{' and '.join(map(str, files))} cannot be the LPIPS weights of "
                                 f"{backbone}: {problem}; {ADVICE}") from None
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """`distance` of images in [−1, 1]. Raises ValueError for sizes, types or values that do not fit."""
        a, b, smallest = tuple(images.shape), tuple(others.shape), SMALLEST[self.backbone]
        if a != b or len(a) != 4 or a[1] not in (1, 3) or min(a[2:]) < smallest:
            raise ValueError(f"images are {a} and {b}; LPIPS with {self.backbone} needs two equal shapes "
                             f"(B, 1 or 3, H, W) of at least {smallest}×{smallest} pixels")
        for batch in (images, others):
            largest = batch.detach().abs().amax().item()
            if batch.dtype != torch.float32 or largest > 1.001:  # 0.001 for rounding; NaN passes
                raise ValueError(f"images are {batch.dtype} up to ±{largest:.4g}; LPIPS needs float32 in "
                                 "[−1, 1], not [0, 255]")
        return self.distance(images, others)

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches of images (B, 1 or 3, H, W) float32 → (B,). Symmetric.

        Nothing is checked, for training: a check of values waits for the GPU, and a decoder may overshoot.
        """
        features = zip(self.heads, self.taps(images), self.taps(others))
        return sum((head * (a - b).square()).sum(1).mean((1, 2)) for head, a, b in features)

    def taps(self, images: Tensor) -> Iterator[Tensor]:
        """The features that are compared, each of unit length along its channels: (B, channels, h, w)."""
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale  # grey: three equal channels
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS[self.backbone]:
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def download(url: str, sha256: str, name: str) -> Path:
    """A file in torch.hub's cache, downloaded if it is not there. Raises FileNotFoundError if that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        print(f"fetching {url} into {path.parent}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{name} is not in {path.parent}, or damaged, and could not be fetched "
                                    f"from {url} ({error}): put it there, {ADVICE}") from None
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


class PatchDiscriminator(nn.Module):
    """pix2pix's: a logit per patch, high for real; 3 layers see patches of 70×70 pixels, and h' = H/8 − 2."""

    def __init__(self, image_channels: int = 3, base_channels: int = 64, layers: int = 3):
        super().__init__()
        self.image_channels, self.smallest = image_channels, 3 * 2**layers
        width = base_channels
        main = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer in range(1, layers + 1):
            channels, width = width, base_channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            main += [nn.Conv2d(channels, width, 4, stride, padding=1, bias=False),  # the norm has a bias
                     nn.BatchNorm2d(width), nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*main, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.main:  # as in the authors' release
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):  # a norm's are around 1
                nn.init.normal_(module.weight, float(not isinstance(module, nn.Conv2d)), 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [−1, 1] → logits (B, 1, h', w'). Raises ValueError for other sizes."""
        channels, smallest = self.image_channels, self.smallest
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < smallest:
            raise ValueError(f"images are {tuple(images.shape)}; this discriminator needs (B, {channels}, H, "
                             f"W) of at least {smallest}×{smallest} pixels")
        return self.main(images)


def adaptive_weight(nll: Tensor, generator_loss: Tensor, last_layer: Tensor, world: int = 1) -> Tensor:
    """λ = ‖∇nll‖ / (‖∇generator_loss‖ + 1e-4) in [0, 1e4], scalar, no gradient: equalizes the two norms.

    ∇ is taken at the decoder's last weight and averaged over the `world` processes, so that they agree on λ.
    """
    gradients = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()
                             for loss in (nll, generator_loss)])  # (2, *last_layer)
    if world > 1:
        torch.distributed.all_reduce(gradients)
    of_nll, of_generator = (gradients / world).flatten(1).norm(dim=1)
    return (of_nll / (of_generator + 1e-4)).clamp(0, 1e4)


def first_order_surrogate(loss: Tensor, x: Tensor, reconstructions: Tensor) -> Tensor:
    """A scalar loss of the leaf x = x̂ (B, C, H, W) → a linear function of x̂ with equal value and gradient.

    λ and the training step both need ∂loss/∂x̂. It is computed here, so that LPIPS and D are backpropagated
    through once, as in a step without λ, and their activations are freed before the decoder's backward pass.
    """
    gradient, = torch.autograd.grad(loss, x)  # (B, C, H, W)
    return loss.detach() + (gradient * (reconstructions - x.detach())).sum()


def image_loss(images: Tensor, reconstructions: Tensor, perceptual: PerceptualLoss | None,
               perceptual_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """nll = L1 + perceptual_weight · LPIPS of images (B, C, H, W), and its parts for the log; all scalar."""
    x = reconstructions.detach().requires_grad_()
    nll = F.l1_loss(images, x)
    parts = {"l1": nll}
    if perceptual and perceptual_weight:
        parts["perceptual"] = perceptual.distance(images, x).mean()
        nll = nll + perceptual_weight * parts["perceptual"]
    return first_order_surrogate(nll, x, reconstructions), parts


class Adversary:
    """The discriminator D with its optimizer, and the schedule of its weight in the autoencoder's loss.

    From step `start` (the first step is 1) D trains, and its weight grows linearly to `weight` over `ramp`
    steps: a sudden start destabilizes training. `world` processes average their gradients.
    """

    def __init__(self, discriminator: PatchDiscriminator, weight: float, betas: tuple[float, float],
                 start: int, ramp: int, world: int = 1):
        self.discriminator, self.weight, self.world = discriminator, weight, world
        self.start, self.ramp = start, ramp
        self.optimizer = torch.optim.Adam(discriminator.parameters(), betas=betas)

    def trains(self, step: int) -> bool:
        return step >= self.start

    def weight_at(self, step: int) -> float:
        """0 before `start`, weight/ramp at it, `weight` from step start + ramp − 1 on."""
        return self.weight * min(max((step - self.start + 1) / max(self.ramp, 1), 0.0), 1.0)

    def generator_loss(self, nll: Tensor, reconstructions: Tensor, last_layer: Tensor,
                       step: int) -> tuple[Tensor, Tensor]:
        """weight_at(step) · λ · g, which is added to nll, and λ, for the log; both scalar.

        `reconstructions` (B, C, H, W) and `nll` depend on the decoder's last weight. D gets no gradient.
        """
        x = reconstructions.detach().requires_grad_()
        g = first_order_surrogate(-self.discriminator(x).mean(), x, reconstructions)
        adaptive = adaptive_weight(nll, g, last_layer, self.world)
        return self.weight_at(step) * adaptive * g, adaptive

    def train_step(self, images: Tensor, reconstructions: Tensor, lr: float) -> dict[str, Tensor]:
        """One step of D on images and reconstructions (B, C, H, W): its loss and mean logits, for the log.

        Two passes, as in VQGAN: neither batch is normalized by the other's statistics. Gradients are averaged
        by hand: DistributedDataParallel by default also broadcasts BatchNorm's buffers before each pass.
        """
        real = self.discriminator(images)  # (B, 1, h', w')
        fake = self.discriminator(reconstructions.detach())
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())  # hinge loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            for weight in self.discriminator.parameters():
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= self.world
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict(),
                "start": self.start, "ramp": self.ramp}

    def load_state_dict(self, state: dict, step: int):
        """Resume after `step`: keep a schedule that had begun, else take the new flags', from step + 1 on."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["start"] <= step:
            self.start, self.ramp = state["start"], state["ramp"]
        else:
            self.start = max(self.start, step + 1)


def mask_loss(one_hot: Tensor, logits: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of masks (B, C, H, W) in nats per labelled pixel, scalar; 0 if no pixel has a label.

    `labelled` (): labelled pixels, averaged over all processes, so that each pixel has equal weight.
    """
    return F.cross_entropy(logits, one_hot, reduction="sum") / labelled.clamp(min=1e-6)


def score_images(images: Tensor, reconstructions: Tensor, perceptual: PerceptualLoss | None) -> Tensor:
    """Of images (B, C, H, W): sum of L1, sum of LPIPS (0 without; x̂ clamped to [−1, 1]), and B: (3,)."""
    l1 = (reconstructions - images).abs().mean((1, 2, 3)).sum()
    lpips = perceptual(images, reconstructions.clamp(-1, 1)).sum() if perceptual else torch.zeros_like(l1)
    return torch.stack([l1, lpips, torch.full_like(l1, len(images))])


def score_masks(one_hot: Tensor, logits: Tensor) -> Tensor:
    """Sum of nats, number of right labels and number of labelled pixels of masks (B, C, H, W): (3,)."""
    right = (logits.argmax(1) == one_hot.argmax(1)) & one_hot.any(1)  # (B, H, W)
    return torch.stack([F.cross_entropy(logits, one_hot, reduction="sum"), right.sum(), one_hot.sum()])
