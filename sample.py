"""Draw new pictures from a trained model: one checkpoint in, pictures out.

    python sample.py --checkpoint runs/gpt-demo-scenes-spiral/checkpoint.pt   one picture, a grid of samples
    python sample.py --checkpoint … --count 50000 --out pictures/             numbered files, for FID and such
    python sample.py --checkpoint … --animate samples.gif                     the grid filled code by code
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import run
from gpt import GPT, GPTConfig, check_sampling
from orderings import ORDERINGS, ranks, roll_up
from vq import VQ, VQConfig


@dataclass(frozen=True)
class SampleConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    checkpoint: str = "runs/gpt-paper-folder-row/checkpoint.pt"  # by train_gpt.py; holds all that is needed
    out: str = "samples.png"  # a file ending in .png: one grid of all samples; else a folder: numbered files
    animate: str = ""  # also write this .gif of the first samples being filled code by code
    count: int = 64  # samples
    batch_size: int = 64  # samples drawn at a time
    seed: int = 0  # of the samples
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one
    temperature: float = 1.0  # below 1 safer, above 1 wilder, §A.1
    top_k: int = 100  # likeliest codes that are sampled from, §A.1; 0: all
    top_p: float = 1.0  # sample from the likeliest codes that hold this share of the probability; 1: all

    def __post_init__(self):
        run.check_at_least(self, 1, "count", "batch_size")
        run.check_at_least(self, 0, "seed")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.animate and not self.animate.endswith(".gif"):
            raise ValueError(f"animate is {self.animate!r}; it must name a .gif file")


PRESETS = {
    "demo": SampleConfig(preset="demo", checkpoint="runs/gpt-demo-scenes-row/checkpoint.pt"),
    "cifar10": SampleConfig(preset="cifar10", checkpoint="runs/gpt-cifar10-cifar10-row/checkpoint.pt"),
    "paper": SampleConfig(),
}


def main(argv: list[str] | None = None):
    """Sample as the command line says."""
    config, _ = run.configure(PRESETS, argv)
    device = run.start(config.device, config.seed).device
    checkpoint = run.load_checkpoint(config.checkpoint, "gpt")
    gpt = GPT(GPTConfig(**checkpoint["model_config"])).to(device)
    gpt.load_state_dict(checkpoint["model"])
    vq = VQ(VQConfig(**checkpoint["first_stage"]["model_config"])).to(device)
    vq.load_state_dict(checkpoint["first_stage"]["model"])
    p = ORDERINGS[checkpoint["config"]["order"]](*checkpoint["grid"]).to(device)  # (T,)
    generator = torch.Generator(device).manual_seed(config.seed)

    pictures = Path(config.out)
    one_file = pictures.suffix.lower() == ".png"
    grid, first = [], None
    for start in range(0, config.count, config.batch_size):
        count = min(config.batch_size, config.count - start)
        codes = sample_codes(gpt, p, checkpoint["grid"], count, config, generator)
        images = vq.decode(codes)  # (B, C, H, W)
        first = images[:16] if first is None else first
        if one_file:
            grid.append(images.cpu())
        else:
            for i, pixels in enumerate(run.to_pixels(images), start):
                run.save_picture(Image.fromarray(pixels.squeeze()), pictures / f"{i:06d}.png")
    if one_file:
        columns = max(1, math.isqrt(config.count))
        run.save_picture(run.picture_grid(torch.cat(grid), columns=columns), pictures)
    print(f"{config.count} samples in {pictures}")
    if config.animate:
        height, width = checkpoint["grid"]
        frames = filling(first, ranks(p.cpu(), height, width))
        duration = [3000 // len(frames)] * (len(frames) - 1) + [1500]  # ms: three seconds, then a pause
        run.save_picture(frames[0], Path(config.animate), save_all=True, append_images=frames[1:], loop=0,
                         duration=duration)
        print(f"the same being filled code by code in the order {checkpoint['config']['order']} in "
              f"{config.animate}")


def sample_codes(gpt: GPT, p: Tensor, grid: tuple[int, int], count: int, config: SampleConfig,
                 generator: torch.Generator) -> Tensor:
    """New grids of codes, (count, h, w) int64."""
    start_token = gpt.config.vocab_size - 1
    prefix = torch.full((count, 1), start_token, device=p.device)
    tokens = gpt.generate(prefix, len(p), config.temperature, config.top_k, generator, config.top_p,
                          sampled_tokens=start_token)
    return roll_up(tokens[:, 1:], p, *grid)


def filling(images: Tensor, rank: Tensor) -> list[Image.Image]:
    """Frames in which the cells of pictures (N, C, H, W) appear in order of rank (h, w), grey until then."""
    pixel_rank = F.interpolate(rank[None, None].float(), size=images.shape[2:], mode="nearest")
    pixel_rank = pixel_rank.to(images.device)  # (1, 1, H, W)
    cells = rank.numel()
    frames = [run.picture_grid(torch.where(pixel_rank < n, images, 0.5), columns=4, side=64)
              for n in range(0, cells + 1, math.ceil(cells / 64))]
    if cells % math.ceil(cells / 64):
        frames.append(run.picture_grid(images, columns=4, side=64))
    both = Image.fromarray(np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])]))
    palette = both.quantize(256)  # one for all frames: a palette for each would flicker
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


if __name__ == "__main__":
    run.command_line(main)
