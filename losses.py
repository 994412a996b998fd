"""The losses of the first stage (§A.1): L1 + LPIPS and an adversarial one, or the cross-entropy of masks.

    nll = |x − x̂| + LPIPS(x, x̂)      g = −mean D(x̂)      λ = ‖∇nll‖ / (‖∇g‖ + 1e-4)
    the autoencoder minimizes nll + quantization loss + 0.8·λ·g, the discriminator D the hinge loss

The paper refers to VQGAN's losses; the numbers here are those of the authors' released model. Unlike there,
the weight 0.8 is reached by a linear ramp from the step in which D starts to train.

Symbols: B batch, C channels, H×W pixels, h'×w' patches, x images, x̂ reconstructions.
"""
import hashlib
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# The layers whose features LPIPS compares, all of them ReLUs: index in torchvision's `features` → channels.
TAPS = {"vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
        "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}}
SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels along a side that leave one value in the deepest layer

# The files of the backbone (torchvision) and of the heads (LPIPS): name in torch.hub's cache, URL, SHA-256.
LPIPS_URL = ("https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/"
             "082bb24f84c091ea94de2867d34c4544f68e0963/lpips/weights/v0.1")
DOWNLOADS = {
    "vgg16": (
        ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth",
         "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        ("lpips-v0.1-vgg.pth", f"{LPIPS_URL}/vgg.pth",
         "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868")),
    "alexnet": (
        ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
         "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"),
        ("lpips-v0.1-alex.pth", f"{LPIPS_URL}/alex.pth",
         "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")),
}
ADVICE = ("name a file of LPIPS weights with train_vq.py --perceptual-weights, "
          "or leave LPIPS out with --perceptual none")


def backbone_layers(backbone: str) -> nn.Sequential:
    """The convolutional layers of an ImageNet classifier: images (B, 3, H, W) → (B, channels, h, w)."""
    if backbone == "vgg16":
        widths = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
        plan, pool = [(width, 3, 1, 1) for width in widths], 2  # channels, size, stride, padding; 0: pooling
    else:
        pooling = (0, 0, 0, 0)
        plan, pool = [(64, 11, 4, 2), pooling, (192, 5, 1, 2), pooling,
                      (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)], 3
    layers, channels = [], 3
    for width, size, stride, padding in plan:
        if width == 0:
            layers.append(nn.MaxPool2d(pool, stride=2))
        else:
            layers += [nn.Conv2d(channels, width, size, stride, padding), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


class PerceptualLoss(nn.Module):
    """LPIPS v0.1: the distance of two images in the features of an ImageNet classifier, 0 for equal ones.

    `weights_path` is a plain state dict with the classifier's `features.N.weight/bias` and the heads
    `linI.model.1.weight`; "" downloads both, once. LPIPS is a fixed metric: frozen, always in eval mode.
    Raises ValueError for a backbone or file that does not fit, FileNotFoundError for one that is not there.
    """

    def __init__(self, weights_path: str | Path, backbone: str = "vgg16"):
        super().__init__()
        if backbone not in TAPS:
            raise ValueError(f"backbone is {backbone!r}; choose one of {', '.join(TAPS)}")
        self.backbone, self.range_checked = backbone, False
        with torch.device("meta"):  # no random initialization: the weights come from files
            self.features = backbone_layers(backbone)
            self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in TAPS[backbone].values())
        # ImageNet's mean and deviation, (.485, .456, .406) and (.229, .224, .225), for [−1, 1]: LPIPS v0.1.
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([.458, .448, .450]).view(1, 3, 1, 1), persistent=False)
        files = [Path(weights_path)] if weights_path else [download(*file) for file in DOWNLOADS[backbone]]
        weights = {name: weight for file in files for name, weight in read_weights(file).items()}
        self.load_state_dict(match_weights(weights, self.state_dict(), files, backbone), assign=True)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor, unclamped: bool = False) -> Tensor:
        """Two batches of images (B, 1 or 3, H, W) float32 in [−1, 1] → their distances (B,). Symmetric.

        Raises ValueError for other sizes, types or values. On a GPU only the first call looks at values, since
        that waits for the GPU. `unclamped`: others are a decoder's output, which may overshoot [−1, 1].
        """
        smallest = SMALLEST[self.backbone]
        if (images.shape != others.shape or images.ndim != 4 or images.shape[1] not in (1, 3)
                or min(images.shape[2:]) < smallest):
            raise ValueError(
                f"images are {tuple(images.shape)} and {tuple(others.shape)}; LPIPS with {self.backbone} "
                f"needs two equal shapes (B, 1 or 3, H, W) of at least {smallest}×{smallest} pixels")
        if images.device.type == "cpu" or not self.range_checked:
            for batch in (images,) if unclamped else (images, others):
                largest = batch.detach().abs().amax()
                if not batch.is_floating_point() or largest > 1.001:  # 0.001 for rounding; NaN passes
                    raise ValueError(f"images are {batch.dtype} up to ±{largest.item():.4g}; LPIPS needs "
                                     "float32 in [−1, 1], not [0, 255]")
            self.range_checked = True
        distance = torch.zeros(len(images), device=images.device)  # (B,)
        for head, a, b in zip(self.heads, self.taps(images), self.taps(others)):  # (B, channels, h, w) each
            distance = distance + (head * (a - b).square()).sum(1).mean((1, 2))
        return distance

    def taps(self, images: Tensor) -> list[Tensor]:
        """The features that are compared, each of unit length along its channels: (B, channels, h, w)."""
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale  # grey: three equal channels
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS[self.backbone]:
                taps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return taps


def download(name: str, url: str, sha256: str) -> Path:
    """The file `name` in torch.hub's cache, downloaded if it is not there.

    Raises FileNotFoundError if that fails, ValueError if the file has another checksum.
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
        raise ValueError(f"{path} has the SHA-256 checksum {digest} instead of {sha256}: "
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


def match_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], files: list[Path],
                  backbone: str) -> dict[str, Tensor]:
    """The weights under our names, in float32. ValueError: one is missing, misshapen or left over."""
    names = {re.sub(r"heads\.(\d)", r"lin\1.model.1.weight", ours): ours for ours in expected}
    problems = [f"there is no {name}" for name in names if name not in weights]
    for name, weight in weights.items():
        if name not in names:
            if not str(name).startswith("classifier."):  # the rest of torchvision's networks
                problems.append(f"{name} is not expected")
        elif weight.shape != (shape := expected[names[name]].shape):
            problems.append(f"{name} is {tuple(weight.shape)} instead of {tuple(shape)}")
    if problems:
        raise ValueError(f"{' and '.join(map(str, files))} cannot be the LPIPS weights of {backbone}: "
                         f"{problems[0]} ({len(problems)} such problems); {ADVICE}")
    return {ours: weights[name].float() for name, ours in names.items()}


class PatchDiscriminator(nn.Module):
    """A logit for each patch of an image, high for real: pix2pix's, with 3 layers patches of 70×70 pixels."""

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
        """images (B, C, H, W) in [−1, 1] → logits (B, 1, h', w'); h' = H/8 − 2 with 3 layers.

        Raises ValueError for other channels, or images smaller than a patch.
        """
        channels, smallest = self.image_channels, self.smallest
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < smallest:
            raise ValueError(f"images are {tuple(images.shape)}; this discriminator needs (B, {channels}, H, "
                             f"W) of at least {smallest}×{smallest} pixels")
        return self.main(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, scalar, of its logits for images and for reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(nll: Tensor, generator_loss: Tensor, last_layer: Tensor, world: int = 1) -> Tensor:
    """λ = ‖∇nll‖ / (‖∇generator_loss‖ + 1e-4) in [0, 1e4], scalar, no gradient: equalizes the two norms.

    ∇ is the gradient at the decoder's last weight, averaged over the `world` processes of a run: all have the
    λ that one process would have.
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
    """nll = L1 + perceptual_weight · LPIPS of images (B, C, H, W), and both parts for the log, all scalar.

    LPIPS is left out if it is None or its weight is 0.
    """
    x = reconstructions.detach().requires_grad_()
    nll = F.l1_loss(images, x)
    parts = {"l1": nll.detach()}
    if perceptual and perceptual_weight:
        distance = perceptual(images, x, unclamped=True).mean()
        parts["perceptual"] = distance.detach()
        nll = nll + perceptual_weight * distance
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
        """Whether D takes part in this step."""
        return step >= self.start

    def weight_at(self, step: int) -> float:
        """0 before `start`, weight/ramp in it, `weight` from step start + ramp − 1 on."""
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
        """One optimizer step of D on images and reconstructions (B, C, H, W); loss and mean logits, for the log.

        Two passes, as in VQGAN: neither batch is normalized by the other's statistics. They are why gradients
        are averaged here: DistributedDataParallel overwrites the buffers of the norms in each pass.
        """
        real = self.discriminator(images)  # (B, 1, h', w')
        fake = self.discriminator(reconstructions.detach())
        loss = hinge_loss(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1:
            for weight in self.discriminator.parameters():
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= self.world
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"discriminator": loss.detach(), "logits_real": real.detach().mean(),
                "logits_fake": fake.detach().mean()}

    def state_dict(self) -> dict:
        return {"discriminator": self.discriminator.state_dict(), "optimizer": self.optimizer.state_dict(),
                "start": self.start, "ramp": self.ramp}

    def load_state_dict(self, state: dict, step: int):
        """Resume after `step`. A longer run may have a later schedule, but one that has begun is kept."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["start"] <= step:
            self.start, self.ramp = state["start"], state["ramp"]
        else:
            self.start = max(self.start, step + 1)


def cross_entropy(one_hot: Tensor, logits: Tensor) -> Tensor:
    """Of masks (B, C, H, W): sum over the labelled pixels, in nats; scalar. Unlabelled ones are all 0."""
    return -(one_hot * logits.log_softmax(1)).sum()


def mask_loss(one_hot: Tensor, logits: Tensor, labelled: Tensor) -> Tensor:
    """Cross-entropy of masks (B, C, H, W) in nats per labelled pixel, scalar; 0 if no pixel has a label.

    `labelled` (): labelled pixels per process, in the mean over all processes: as their gradients are
    averaged, each label weighs alike.
    """
    return cross_entropy(one_hot, logits) / labelled.clamp(min=1e-6)


def score_images(images: Tensor, reconstructions: Tensor, perceptual: PerceptualLoss | None) -> Tensor:
    """Sum of L1, sum of LPIPS (clamped to [−1, 1]; 0 without) and number of images (B, C, H, W): (3,)."""
    l1 = (reconstructions - images).abs().mean((1, 2, 3)).sum()
    lpips = perceptual(images, reconstructions.clamp(-1, 1)).sum() if perceptual else torch.zeros_like(l1)
    return torch.stack([l1, lpips, torch.full_like(l1, len(images))])


def score_masks(one_hot: Tensor, logits: Tensor) -> Tensor:
    """Sum of nats, number of right labels and number of labelled pixels of masks (B, C, H, W): (3,)."""
    right = (logits.argmax(1) == one_hot.argmax(1)) & one_hot.any(1)  # (B, H, W)
    return torch.stack([cross_entropy(one_hot, logits), right.sum(), one_hot.sum()])
