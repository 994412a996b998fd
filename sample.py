"""Draw new pictures from a trained model: one checkpoint in, pictures out.

    python sample.py --checkpoint runs/gpt-demo-scenes-spiral/checkpoint.pt   one picture, a grid of samples
    python sample.py --checkpoint … --count 50000 --out pictures/             numbered files, for FID and such
    python sample.py --checkpoint … --animate samples.gif                     the grid filled code by code

Files of the authors' taming-transformers are sampled too, if they are unconditional. A class-conditional one
cannot be told from those: its pictures are all of class 0.
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
import taming
from gpt import GPT, GPTConfig, check_sampling
from orderings import ORDERINGS, ranks, roll_up
from vq import VQ, VQConfig


@dataclass(frozen=True)
class SampleConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    checkpoint: str = "runs/gpt-paper-folder-row/checkpoint.pt"  # by train_gpt.py, or by the authors' code
    n_head: int = 0  # heads in a file of the authors', which does not tell; 0: as in the model they released
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
        run.check_at_least(self, 0, "seed", "n_head")
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
    gpt, vq, p, grid, start_token = open_model(config, device)
    generator = torch.Generator(device).manual_seed(config.seed)

    pictures = Path(config.out)
    one_file = pictures.suffix.lower() == ".png"
    samples, first = [], None
    for start in range(0, config.count, config.batch_size):
        count = min(config.batch_size, config.count - start)
        prefix = torch.full((count, 1), start_token, device=device)
        tokens = gpt.generate(prefix, len(p), config.temperature, config.top_k, generator, config.top_p,
                              sampled_tokens=vq.config.codebook_size)  # (B, 1 + T)
        images = vq.decode(roll_up(tokens[:, 1:], p, *grid))  # (B, C, H, W)
        first = images[:16] if first is None else first
        if one_file:
            samples.append(images.cpu())
        else:
            for i, pixels in enumerate(run.to_pixels(images), start):
                run.save_picture(Image.fromarray(pixels.squeeze()), pictures / f"{i:06d}.png")
    if one_file:
        columns = max(1, math.isqrt(config.count))
        run.save_picture(run.picture_grid(torch.cat(samples), columns=columns), pictures)
    print(f"{config.count} samples in {pictures}")
    if config.animate:
        frames = filling(first, ranks(p.cpu(), *grid))
        duration = [3000 // len(frames)] * (len(frames) - 1) + [1500]  # ms: three seconds, then a pause
        run.save_picture(frames[0], Path(config.animate), save_all=True, append_images=frames[1:], loop=0,
                         duration=duration)
        print(f"the same being filled code by code in {config.animate}")


def open_model(config: SampleConfig, device: torch.device) -> tuple[GPT, VQ, Tensor, tuple[int, int], int]:
    """The GPT, the first stage, the order of the codes (T,), the grid's height and width, the start token."""
    if taming.recognizes(config.checkpoint):
        p = taming.writing_order(config.checkpoint)
        gpt, vq = GPT.from_taming(config.checkpoint, config.n_head), VQ.from_taming(config.checkpoint)
        grid, start_token = (math.isqrt(len(p)), math.isqrt(len(p))), 0  # theirs is a code as well
    else:
        checkpoint = run.load_checkpoint(config.checkpoint, "gpt")
        gpt = GPT(GPTConfig(**checkpoint["model_config"]))
        gpt.load_state_dict(checkpoint["model"])
        vq = VQ(VQConfig(**checkpoint["first_stage"]["model_config"]))
        vq.load_state_dict(checkpoint["first_stage"]["model"])
        grid, start_token = tuple(checkpoint["grid"]), gpt.config.vocab_size - 1
        p = ORDERINGS[checkpoint["config"]["order"]](*grid)
    return gpt.to(device), vq.to(device), p.to(device), grid, start_token


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
