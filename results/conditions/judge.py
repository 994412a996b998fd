"""A judge of drawn scenes: what does a picture show, by a network that was trained on the drawings themselves?

    python results/conditions/judge.py          trains it, about 10 minutes on one core, into runs/judge.pt

One small U-Net reads from a picture (B, 3, 32, 32) the label of each pixel, its depth, the key points of the person
and the class. `Judge.load()` is what measure.py uses, here and in ../multiscale.
"""
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import scenes

PATH, SIZE, STEPS, BATCH = Path("runs/judge.pt"), 32, 4000, 32
S, J, C = len(scenes.SEGMENTS), len(scenes.KEYPOINTS), len(scenes.CLASSES)


class Truth(NamedTuple):
    """What the drawing knows of N scenes."""
    images: Tensor  # (N, 3, 32, 32) in [−1, 1]
    segmentation: Tensor  # (N, 32, 32) int64
    depth: Tensor  # (N, 32, 32) in [−1, 1]
    keypoints: Tensor  # (N, J, 2) in pixels
    labels: Tensor  # (N,)


def draw(split: str, count: int) -> Truth:
    drawn = [scenes.draw_scene(split, index, SIZE) for index in range(count)]
    arrays = [np.stack([np.asarray(scene[field]) for scene in drawn]) for field in (0, 2, 3, 4, 1)]
    images, segmentation, depth, keypoints, labels = map(torch.from_numpy, arrays)
    return Truth(images.permute(0, 3, 1, 2).float() / 127.5 - 1, segmentation.long(), depth, keypoints, labels.long())


def block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU(),
                         nn.Conv2d(out_channels, out_channels, 3, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU())


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([block(3, 32), block(32, 64), block(64, 96), block(96, 128)])  # 32, 16, 8, 4
        self.up = nn.ModuleList([block(128 + 96, 96), block(96 + 64, 64), block(64 + 32, 32)])
        self.maps = nn.Conv2d(32, S + 1 + J, 1)
        self.classes = nn.Linear(128, C)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, 32, 32) → logits of labels (B, S, 32, 32), depth (B, 32, 32), key points (B, J, 2), classes (B, C)."""
        x, kept = images, []
        for i, layer in enumerate(self.down):
            x = layer(F.avg_pool2d(x, 2) if i else x)
            kept.append(x)
        classes = self.classes(x.amax((2, 3)))
        for layer, skip in zip(self.up, reversed(kept[:-1])):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        labels, depth, heat = self.maps(x).split([S, 1, J], 1)
        weights = heat.flatten(2).softmax(2).unflatten(2, heat.shape[2:])  # (B, J, 32, 32)
        centres = torch.arange(SIZE) + 0.5
        points = torch.stack([(weights.sum(2) * centres).sum(2), (weights.sum(3) * centres).sum(2)], 2)
        return labels, depth[:, 0], points, classes

    @classmethod
    def load(cls) -> "Judge":
        judge = cls()
        judge.load_state_dict(torch.load(PATH, weights_only=True))
        return judge.eval()

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels (N, 32, 32), depth, key points and classes (N,) of pictures (N, 3, 32, 32)."""
        labels, depth, points, classes = map(torch.cat, zip(*map(self, images.clamp(-1, 1).split(100))))
        return labels.argmax(1), depth, points, classes.argmax(1)


def main():
    torch.manual_seed(0)
    truth, judge = draw("train", 12_000), Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (STEPS - step) / STEPS * 1.5)
        images, segmentation, depth, points, labels = (x[torch.randint(len(x), (BATCH,), generator=torch.Generator()
                                                       .manual_seed(step))] for x in truth)
        softened = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)  # as first stages blur
        images = torch.lerp(images, softened, 0.7 * torch.rand(BATCH, 1, 1, 1)) + 0.05 * torch.randn_like(images)
        found = judge(images)
        loss = (F.cross_entropy(found[0], segmentation) + F.mse_loss(found[1], depth)
                + 0.05 * (found[2] - points).abs().mean() + 0.3 * F.cross_entropy(found[3], labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 499:
            print(f"step {step + 1}/{STEPS} · loss {loss.item():.4f}", flush=True)
    PATH.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), PATH)
    held = draw("val", 1000)
    labels, depth, points, classes = judge.eval().look(held.images)
    print(f"on 1,000 drawn pictures: {(labels == held.segmentation).float().mean():.4f} of labels, "
          f"{(classes == held.labels).float().mean():.4f} of classes right, key points "
          f"{(points - held.keypoints).norm(dim=2).mean():.3f} pixels off, depth {(depth - held.depth).abs().mean():.4f}")


if __name__ == "__main__":
    main()
