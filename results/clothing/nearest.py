"""Are samples copies? The nearest training picture, by LPIPS, beside a sample of each class.

    python results/clothing/nearest.py CHECKPOINT PHOTOS LPIPS OUT.png      LPIPS: weights of its AlexNet

Also the nearest of a validation picture of each class: samples that are no copies are no nearer than those.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
from losses import PerceptualLoss
from outputs import picture_grid, save_picture
from stages import Prior, Sampling


@torch.no_grad()
def nearest(image: Tensor, pictures: Tensor, perceptual: PerceptualLoss) -> tuple[float, int]:
    """Distance and index of the nearest of pictures (N, 3, H, W), each also mirrored, to an image (3, H, W)."""
    distances = torch.cat([torch.minimum(*(perceptual(x, image.expand_as(x)) for x in (batch, batch.flip(3))))
                           for batch in pictures.split(128)])
    return distances.min().item(), int(distances.argmin())


def main():
    checkpoint, directory, weights, out = sys.argv[1:]
    prior = Prior.load(checkpoint, torch.device("cpu"))
    perceptual = PerceptualLoss(weights, "alexnet")
    preparation = data.Preparation(prior.image.preparation.size, ("image", "class"), upscale=True)
    train, val = (data.open_dataset("folder", directory, split, preparation) for split in ("train", "val"))
    pictures = torch.stack([data.as_input(torch.from_numpy(train[i, None]["image"]), "image", 3) for i in range(len(train))])
    labels = torch.arange(len(prior.classes))
    tokens = prior.sample(len(labels), labels, None, Sampling(guidance=2.0), torch.Generator().manual_seed(1))
    seen = {int(val[i, None]["class"]): val[i, None]["image"] for i in range(len(val))}
    real = torch.stack([data.as_input(torch.from_numpy(seen[int(label)]), "image", 3) for label in labels])
    shown = []
    for label, sample, photo in zip(labels, prior.pictures(tokens).clamp(-1, 1), real):
        (of_sample, index), (of_photo, _) = (nearest(x, pictures, perceptual) for x in (sample, photo))
        print(f"{prior.classes[label]}: sample {of_sample:.3f}, validation picture {of_photo:.3f} from the nearest "
              "training picture", flush=True)
        shown += [sample, pictures[index]]
    save_picture(picture_grid(torch.stack(shown), 10), Path(out))


if __name__ == "__main__":
    main()
