"""Do samples show their class? A CIFAR-10 ResNet-20 says, beside the test pictures as the first stage reconstructs them.

    python results/cifar10/judge.py WEIGHTS CIFAR CHECKPOINT [GUIDANCE …]

WEIGHTS and CIFAR: see ../efficiency/frechet.py. 100 samples of each class for each guidance, and their Fréchet distance to
the test pictures, in the same network's features: no FID, and not to be compared with one of 5,000 samples.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

for folder in ("", "results/efficiency"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

import data
from frechet import all_features, classify, frechet
from outputs import to_pixels
from stages import Prior, Sampling


def main():
    weights_path, directory, path, *guidances = sys.argv[1:]
    weights, prior = torch.load(weights_path, weights_only=True), Prior.load(path, torch.device("cpu"))
    test = data.Cifar10("val", Path(directory), data.Preparation(32))
    real = all_features(weights, test.images)

    def report(name: str, pictures: Tensor, labels: np.ndarray):
        found = all_features(weights, to_pixels(pictures).transpose(0, 3, 1, 2))  # (N, 64)
        right = classify(weights, found) == labels
        each = " ".join(f"{prior.classes[i]} {right[labels == i].mean():.2f}" for i in range(10))
        print(f"{name}: {right.mean():.3f} of classes right ({each}), Fréchet distance {frechet(found, real):.2f}", flush=True)

    codes = [prior.image.encode(part) for part in torch.from_numpy(test.images[:1000]).split(100)]
    report("reconstructions", torch.cat([prior.image.decode(part) for part in codes]), test.labels[:1000])
    labels = torch.arange(10).repeat(100)
    for guidance in map(float, guidances or ["1"]):
        generator = torch.Generator().manual_seed(0)
        tokens = [prior.sample(100, part, None, Sampling(guidance=guidance), generator) for part in labels.split(100)]
        report(f"guidance {guidance}", torch.cat([prior.pictures(part) for part in tokens]), labels.numpy())


if __name__ == "__main__":
    main()
