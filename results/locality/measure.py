"""How local are the codes of a first stage? The share that changes when a distant part of the picture does.

    python results/locality/measure.py CHECKPOINT …

In each of 1,000 validation pictures one quarter is replaced by that of the picture before. Counted are the codes whose cells neither lie
in that quarter nor touch it. Mean over the four quarters.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
from stages import FirstStage

COUNT = 1000


@torch.no_grad()
def share_changed(stage: FirstStage) -> float:
    dataset = data.open_dataset(stage.trained_on["data"], stage.trained_on["data_dir"], "val", stage.preparation)
    images = next(data.load(dataset, data.fixed_batches(COUNT, COUNT), torch.device("cpu"), 0))["image"]  # (N, 3, S, S)
    others, codes = images.roll(1, 0), stage.encode(images)  # codes: (N, h, w)
    half, cells = images.shape[2] // 2, codes.shape[1] // 2
    shares = []
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        quarter = (..., slice(y * half, (y + 1) * half), slice(x * half, (x + 1) * half))
        changed = images.clone()
        changed[quarter] = others[quarter]
        far = torch.ones(2 * cells, 2 * cells, dtype=torch.bool)
        far[max(0, y * cells - 1):(y + 1) * cells + 1, max(0, x * cells - 1):(x + 1) * cells + 1] = False
        shares.append((stage.encode(changed) != codes)[:, far].float().mean().item())
    return sum(shares) / len(shares)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"{path}: {share_changed(FirstStage.load(Path(path))):.1%} of the distant codes change")
