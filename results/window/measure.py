"""Do pictures that are wider than those of the training fall apart where the window moves (`sample.py --size`)?

    python results/window/measure.py CHECKPOINT [COUNT]     a model of train_gpt.py in the order row

Of neighbouring codes in a row, the share of pairs that no training picture has, by where they stand; and the
difference of neighbouring pixels across the same border of two codes.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import run
from cache import encode_pictures
from outputs import picture_grid, save_picture
from stages import Prior, Sampling
from train_gpt import TrainConfig


def main():
    path, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 256
    process = run.Process(torch.device("cpu"), 0, 1)
    prior, checkpoint = Prior.load(path, process.device), torch.load(path, weights_only=True)
    training, validation, _ = encode_pictures(TrainConfig(**checkpoint["config"]), prior.stages, None, process)
    K, side, f = prior.layout.codebook_size, prior.layout.width, prior.image.vq.config.downsampling
    known = np.zeros((K, K), bool)
    seen = training["image"].arrays[0]  # (N, h, w)
    known[seen[:, :, :-1].flatten(), seen[:, :, 1:].flatten()] = True

    def report(name: str, codes: Tensor, borders: range | list[int]):
        """`borders`: columns x; the pairs are of the cells x − 1 and x."""
        pairs = np.stack([codes[:, :, [x - 1 for x in borders]].flatten(), codes[:, :, list(borders)].flatten()])
        pictures = prior.image.decode(codes).clamp(-1, 1)
        steps = torch.stack([(pictures[..., x * f] - pictures[..., x * f - 1]).abs().mean() for x in borders])
        print(f"| {name} | {1 - known[pairs[0], pairs[1]].mean():.4f} | {steps.mean():.3f} |", flush=True)

    random = torch.Generator().manual_seed(0)
    print("| pairs of neighbours | never seen in training | step between pixels |\n| --- | --- | --- |")
    inside = range(1, side)
    report("validation pictures", torch.from_numpy(validation["image"][:count].astype(np.int64)), inside)
    report("samples of the training's size", prior.layout.grids(prior.sample(count, None, None, Sampling(), random))[-1], inside)
    wide = prior.sample_window(count, side, 2 * side, None, Sampling(), random)
    first = (side - 1) // 2 + 1
    moving = range(first, first + side)  # cells for which the window has moved by one
    report("twice as wide, where the window stands still", wide, [x for x in range(1, 2 * side) if x not in moving])
    report("twice as wide, where it moves", wide, moving)
    save_picture(picture_grid(prior.image.decode(wide[:12]), 3), Path(__file__).parent / "wide.png")


if __name__ == "__main__":
    main()
