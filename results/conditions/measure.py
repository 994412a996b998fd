"""Do samples follow their condition? Judged by the drawing's own truth (judge.py, which must have been trained).

    python results/conditions/measure.py CHECKPOINT [GUIDANCE …]

One sample for each of 1,000 validation conditions, beside two controls: the *ceiling*, the validation pictures as the first
stage reconstructs them, and the *shuffled* samples, each held against the condition of the next. Of an unconditional model
1,000 samples: how many are well-formed, with one sun, one person and one or two objects?
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
import scenes
from judge import Judge, Truth, draw
from stages import Prior, Sampling

COUNT = 1000


def scores(found: tuple, truth: Truth, condition: str | None) -> dict[str, float]:
    labels, depth, points, classes = found
    if condition is None:
        suns, people, *objects = (count_parts(labels == i) for i in (2, 7, 3, 4, 5, 6))
        right = {"one sun": suns == 1, "one person": people == 1, "one or two objects": (sum(objects) - 1.5).abs() < 1}
        return {name: each.float().mean().item() for name, each in (right | {"all": sum(right.values()) == 3}).items()}
    if condition == "segmentation":
        object_pixels = (truth.segmentation >= 3) & (truth.segmentation <= 6)  # ball, house, tree, tent
        return {"mIoU": mean_iou(labels, truth.segmentation),
                "object pixels": (labels == truth.segmentation)[object_pixels].float().mean().item()}
    if condition == "depth":  # sky and ground alone correlate: their mean is taken away
        a, b = (x - truth.depth.mean(0) for x in (depth, truth.depth))
        return {"correlation": ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item()}
    if condition == "pose":
        inside = ((truth.keypoints > 0) & (truth.keypoints < 32)).all(2)
        error = (points - truth.keypoints).norm(dim=2)[inside]
        return {"PCK@2": (error <= 2).float().mean().item(), "error, pixels": error.mean().item()}
    return {"accuracy": (classes == truth.labels).float().mean().item()}


def mean_iou(labels: Tensor, truth: Tensor) -> float:
    """Mean over the labels of intersection over union, over all pictures together."""
    pairs = [((labels == i) & (truth == i), (labels == i) | (truth == i)) for i in range(len(scenes.SEGMENTS))]
    return sum((a.sum() / b.sum().clamp(min=1)).item() for a, b in pairs) / len(pairs)


def count_parts(mask: Tensor, least: int = 6) -> Tensor:
    """Connected parts of at least `least` pixels in each mask (N, H, W) bool: (N,)."""
    number = torch.arange(1.0, mask[0].numel() + 1).view(mask.shape[1:]) * mask  # a number for each pixel inside
    while not torch.equal(number, grown := F.max_pool2d(number[:, None], 3, 1, 1)[:, 0] * mask):
        number = grown  # in the end the largest of the part
    return torch.tensor([(each[each > 0].unique(return_counts=True)[1] >= least).sum() for each in number])


def main():
    path, *guidances = sys.argv[1:]
    prior, judge, truth = Prior.load(path, torch.device("cpu")), Judge.load(), draw("val", COUNT)
    if prior.condition:
        stage = prior.stages[prior.condition]
        dataset = data.open_dataset("scenes", "", "val", data.Preparation(32, (prior.condition,)))
        values = torch.stack([torch.as_tensor(dataset[i, None][prior.condition]) for i in range(COUNT)])
        conditions = torch.cat([stage.encode(part) for part in values.split(100)]) if stage else values
    codes = torch.cat([prior.image.vq.encode(part) for part in truth.images.split(100)])
    ceiling = judge.look(torch.cat([prior.image.decode(part) for part in codes.split(100)]))
    rolled = Truth(*(x.roll(-1, 0) for x in truth))
    print("ceiling", {k: round(v, 3) for k, v in scores(ceiling, truth, prior.condition).items()}, flush=True)
    for guidance in map(float, guidances or ["1"]):
        generator = torch.Generator().manual_seed(0)
        parts = conditions.split(100) if prior.condition else [None] * (COUNT // 100)
        pictures = torch.cat([prior.pictures(prior.sample(100, part, None, Sampling(guidance=guidance), generator))
                              for part in parts])
        found = judge.look(pictures)
        # Standard deviation between samples of one class, or of all, at each pixel.
        groups = [pictures[truth.labels == i] for i in range(4)] if prior.condition == "class" else [pictures]
        spread = sum(group.std(0).mean().item() for group in groups) / len(groups)
        for name, held_against in (("samples", truth), ("shuffled", rolled))[:2 if prior.condition else 1]:
            numbers = scores(found, held_against, prior.condition) | {"spread": spread}
            print(f"guidance {guidance} {name}", {k: round(v, 3) for k, v in numbers.items()}, flush=True)


if __name__ == "__main__":
    main()
