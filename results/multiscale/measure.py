"""How close do samples come to a picture of which the first scales, or the first half of the codes, are kept? (§3, Figs. 3, 7: the scales)

    python results/multiscale/measure.py CHECKPOINT [CHECKPOINT …]

Four samples for each of 200 validation scenes: L1 to the picture as the first stage reconstructs it, the standard deviation
between the four, and mIoU with the picture's mask (by ../conditions/judge.py). A model of several scales is given 0, 1, 2, … of
them. A model of one scale is given half of the codes: of the whole picture, whose codes know of the other half (group
normalization and attention see all pixels), or of one whose other half is hidden before encoding: greyed, or where the known
half is a rectangle, repeated from its edge or mirrored there.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

for folder in (Path(__file__).resolve().parents[2], Path(__file__).resolve().parents[1] / "conditions"):
    sys.path.insert(0, str(folder))

from judge import Judge, draw
from measure import mean_iou
from stages import Prior

COUNT, EACH = 200, 4


def hide(images: Tensor, known: Tensor, fill: str) -> Tensor:
    """images (N, 3, H, W) with the pixels outside known (H, W) bool replaced."""
    if fill == "grey":
        return images.where(known, torch.zeros(()))
    y, x = (known.any(dim).nonzero()[[0, -1], 0].tolist() for dim in (1, 0))  # first and last row, column
    inside = [torch.arange(side) for side in known.shape]
    if fill == "edge":
        rows, columns = (i.clamp(*ends) for i, ends in zip(inside, (y, x)))
    else:  # mirror: back and forth between the first and the last
        rows, columns = (ends[0] + reflect(i - ends[0], ends[1] - ends[0]) for i, ends in zip(inside, (y, x)))
    return images.where(known, images[:, :, rows][:, :, :, columns])


def reflect(i: Tensor, last: int) -> Tensor:
    i = i.abs() % (2 * last + 1)
    return torch.minimum(i, 2 * last + 1 - i)


@torch.no_grad()
def measure(prior: Prior, images: Tensor, given: int, truth, judge: Judge) -> str:
    """A row of the table: the first `given` tokens are those of images (N, 3, 32, 32)."""
    stage, layout = prior.image, prior.layout
    codes = stage.vq.encode(images)
    tokens = layout.image_tokens(stage.pyramid(codes, layout.scales))[:, :given]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([prior.pictures(prior.sample(COUNT, None, tokens, generator=generator)) for _ in range(EACH)])
    target = stage.decode(stage.vq.encode(truth.images))
    labels = judge.look(drawn[0])[0]
    return (f"L1 {(drawn.clamp(-1, 1) - target).abs().mean():.3f} · spread {drawn.std(0).mean():.3f} · "
            f"mIoU {mean_iou(labels, truth.segmentation):.3f}")


def main():
    judge, truth = Judge.load(), draw("val", COUNT)
    for path in sys.argv[1:]:
        prior = Prior.load(path, torch.device("cpu"))
        layout, T = prior.layout, sum(prior.layout.lengths)
        print(f"{layout.order}, {T} tokens", flush=True)
        if layout.scales:
            for n in range(len(layout.lengths) + 1):
                print(f"  {n} scales: {measure(prior, truth.images, sum(layout.lengths[:n]), truth, judge)}", flush=True)
            continue
        known = (layout.grids(torch.arange(T)[None])[0] < T // 2)[None].float()  # (1, 1, h, w)
        known = F.interpolate(known, size=truth.images.shape[2:])[0, 0] > 0
        print(f"  half of the whole picture's codes: {measure(prior, truth.images, T // 2, truth, judge)}", flush=True)
        rectangle = known.any(1).sum() * known.any(0).sum() == known.sum()
        for fill in ("grey", "edge", "mirror") if rectangle else ("grey",):
            hidden = hide(truth.images, known, fill)
            print(f"  half, the rest {fill}: {measure(prior, hidden, T // 2, truth, judge)}", flush=True)


if __name__ == "__main__":
    main()
