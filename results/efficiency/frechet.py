"""A Fréchet distance of pictures in the 64 features of a CIFAR-10 ResNet-20. Not FID, whose network is another.

    python results/efficiency/frechet.py WEIGHTS CIFAR SAMPLES [SAMPLES ...]

WEIGHTS: state dict of a public CIFAR ResNet-20 (He et al., option A), pixels in [0, 1] less ImageNet's mean over
its deviation. CIFAR: folder of CIFAR-10. SAMPLES: folders that `sample.py --count N --out` has written. Prints the
network's accuracy on the test pictures (91.7 %), and distances to the test pictures: of as many training pictures
as the first folder has samples, which is the floor, and of each folder.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data

MEAN, DEVIATION = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def features(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """images (B, 3, 32, 32) uint8 → (B, 64)."""
    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=1)
        return F.batch_norm(x, *(weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = F.relu(conv((images / 255 - MEAN) / DEVIATION, "conv1", "bn1"))
    for layer in (1, 2, 3):
        for block in range(3):
            stride, name = 2 if layer > 1 and block == 0 else 1, f"layer{layer}.{block}"
            y = F.relu(conv(x, f"{name}.conv1", f"{name}.bn1", stride))
            y = conv(y, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:  # option A: every second pixel, new channels 0
                more = y.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
            x = F.relu(x + y)
    return x.mean((2, 3))


@torch.no_grad()
def all_features(weights: dict[str, Tensor], images: np.ndarray) -> np.ndarray:
    batches = torch.from_numpy(images).split(500)
    return torch.cat([features(weights, batch) for batch in batches]).double().numpy()


def classify(weights: dict[str, Tensor], features: np.ndarray) -> np.ndarray:
    """The network's classes of features (N, 64): (N,)."""
    logits = features @ weights["linear.weight"].double().numpy().T + weights["linear.bias"].double().numpy()
    return logits.argmax(1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2·(Σa Σb)^½) of two sets of features (N, D)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # Σa^½; Σa Σb has the eigenvalues of Σa^½ Σb Σa^½
    between = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * between)


def main():
    path, directory, *folders = sys.argv[1:]
    weights = torch.load(path, weights_only=True)
    test = data.Cifar10("val", Path(directory), data.Preparation(32))
    train = data.Cifar10("train", Path(directory), data.Preparation(32))
    images = test.images.reshape(-1, 3, 32, 32)
    real = all_features(weights, images)
    print(f"accuracy on {len(images):,} test pictures: {(classify(weights, real) == test.labels).mean():.2%}")
    count = len(list(Path(folders[0]).glob("[0-9]*[0-9].png"))) if folders else 5000
    some = train.images[np.random.default_rng(0).permutation(len(train))[:count]].reshape(-1, 3, 32, 32)
    print(f"{count:,} training pictures: {frechet(all_features(weights, some), real):.3f}")
    for folder in folders:
        files = sorted(Path(folder).glob("[0-9]*[0-9].png"))
        pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).transpose(0, 3, 1, 2)
        print(f"{len(files):,} in {folder}: {frechet(all_features(weights, pictures), real):.3f}")


if __name__ == "__main__":
    main()
