"""The share of labels that come back from a first stage of masks, over whole masks instead of square cuts.

    python results/first-stage/whole_masks.py CHECKPOINT DIR     DIR holds val/segmentation

The network is convolutional: each mask passes at its own size, cut to a multiple of what the network halves.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
import run
from losses import score_sums
from pictures import open_labels
from vq import VQ, VQConfig


@torch.no_grad()
def main():
    checkpoint = run.load_checkpoint(sys.argv[1], "vq")
    vq = VQ(VQConfig(**checkpoint["model_config"]))
    vq.load_state_dict(checkpoint["model"])
    f, channels = vq.config.downsampling, vq.config.image_channels
    sums = torch.zeros(3, dtype=torch.float64)
    sizes = set()
    for path in sorted((Path(sys.argv[2]) / "val" / "segmentation").glob("*.png")):
        labels = np.array(open_labels(path, checkpoint["config"]["void_label"]))  # (H, W)
        height, width = (side // f * f for side in labels.shape)
        masks = data.as_input(torch.from_numpy(labels)[None, :height, :width], "segmentation", channels)
        sums += score_sums(masks, vq.decode(vq.encode(masks)), None, one_hot=True)
        sizes.add(f"{width}×{height} in {width // f}×{height // f} codes")
    nats, right, pixels = sums.tolist()
    print(f"{', '.join(sorted(sizes))}: {right / pixels:.2%} of {pixels:,.0f} labels right, "
          f"{nats / pixels:.4f} nats/pixel")


if __name__ == "__main__":
    main()
