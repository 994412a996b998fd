"""Run one of the scripts with first stages whose encoder normalizes each position by itself.

    python results/locality/position_norm.py train_vq.py --quantize-after 0 --out runs/locality/vq

The encoder's GroupNorms take their statistics over the whole picture. Here a LayerNorm over the channels of each position stands
in for each of them; the decoder, and all else, stays as it is. What is trained so must be sampled and measured through this script,
too: without it the file loads, but with the wrong norm.
"""
import runpy
import sys
from pathlib import Path

import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import vq


class PositionNorm(nn.LayerNorm):
    """(B, C, H, W) → (B, C, H, W): zero mean and unit variance over the channels of each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # by (B, H, W, C)


group_norm, encoder_of_groups = vq.norm, vq.encoder


def encoder(config: vq.VQConfig) -> nn.Sequential:
    vq.norm = lambda channels: PositionNorm(channels, eps=1e-6)
    network = encoder_of_groups(config)
    vq.norm = group_norm  # for the decoder, which is built next
    return network


if __name__ == "__main__":
    vq.encoder = encoder
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
