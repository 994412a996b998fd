"""Draw new pictures from a trained model: one checkpoint in, pictures out.

    python sample.py --checkpoint runs/gpt-demo-scenes-spiral/checkpoint.pt   one picture, a grid of samples
    python sample.py --checkpoint … --class ball,tent --guidance 3            a row for each class
    python sample.py --checkpoint … --condition masks/                        samples beside masks, Figs. 8–9
    python sample.py --checkpoint … --complete photo.jpg --keep 0.5           half of its codes kept
    python sample.py --checkpoint … --scales-from photo.jpg                   its coarser scales kept, Fig. 3
    python sample.py --checkpoint … --size 64x128                             larger than in training
    python sample.py --checkpoint … --count 50000 --out pictures/             numbered files, for FID and such
    python sample.py --checkpoint … --animate samples.gif                     the grid filled code by code
    python sample.py --checkpoint … --benchmark                               tokens and pictures per second

Without --class or --condition a conditional model takes the validation split's (--complete, --scales-from:
none). Unconditional files of the authors' taming-transformers are sampled too.
"""
import difflib
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
import run
import taming
import train_gpt
from benchmark import benchmark_sampling
from files import FIELDS, MASK_FOLDERS, PICTURES, list_files
from gpt import Sampling
from outputs import duration, picture_grid, save_picture, to_pixels, writing
from stages import Prior


@dataclass(frozen=True)
class SampleConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    checkpoint: str = "runs/gpt-paper-folder-row/checkpoint.pt"  # by train_gpt.py, or by the authors' code
    n_head: int = 0  # attention heads in a file of the authors', which does not store them; 0: as released
    out: str = "samples.png"  # a picture's name: all samples in one grid; else a folder for numbered files
    animate: str = ""  # also write this .gif of the first samples being filled code by code
    benchmark: bool = False  # only measure speed; of random weights if the preset's checkpoint is missing

    class_: str = ""  # comma-separated names (or indices, unless names are numbers): a row of samples each
    condition: str = ""  # mask, depth map, pose or key points, or a folder of them: a row of samples each
    data_dir: str = ""  # where validation conditions come from, if none is named; empty: as in training
    complete: str = ""  # picture or folder; first codes kept, a row each; with one condition or one each
    keep: float = 0.5  # share of the codes that --complete keeps, in the model's own order
    hide: bool = False  # grey out the part to be completed before encoding: else the kept codes leak it
    scales_from: str = ""  # picture or folder whose 0, 1, 2, … coarsest scales are kept: a row each, §3

    count: int = 0  # samples per named class or file (0: 4); if none is named, in all, in whole rows (0: 64)
    size: str = ""  # HEIGHTxWIDTH in pixels, larger than in training, by a sliding window
    batch_size: int = 64  # samples drawn at a time
    seed: int = 0  # of the samples
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one
    temperature: float = 1.0  # below 1 less varied, above 1 more, §A.1
    top_k: int = 100  # most probable codes that are sampled from, §A.1; 0: all
    top_p: float = 1.0  # sample from the most probable codes that hold this share of the probability; 1: all
    guidance: float = 1.0  # above 1 closer to the condition, for models trained with --condition-dropout

    def __post_init__(self):
        run.check_at_least(self, 1, "batch_size")
        run.check_at_least(self, 0, "n_head", "count")
        self.sampling  # raises ValueError for values out of range
        for name, end in (("keep", 1), ("seed", 2**63 - 1)):
            if not 0 <= getattr(self, name) <= end:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, {end}]")
        if self.animate and not self.animate.lower().endswith(".gif"):
            raise ValueError(f"animate is {self.animate!r}; it must name a .gif file")
        if self.size and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size):
            raise ValueError(f"size is {self.size!r}; it must be like 64x128, height and width in pixels")
        if sum(map(bool, (self.complete, self.scales_from, self.size))) > 1 or self.size and self.animate:
            raise ValueError("complete, scales_from and size exclude each other, so do size and animate; "
                             "choose one")

    def without_effect(self) -> list[tuple[bool, str, str]]:
        """Flags that do nothing if the first value is true, and why."""
        return [(not self.complete, "keep hide", "it belongs to --complete"),
                (any((self.class_, self.condition, self.complete, self.scales_from)), "data_dir",
                 "no conditions of the validation split are taken"),
                (self.benchmark, "out animate class_ condition data_dir complete scales_from count size",
                 "a benchmark draws no pictures")]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.guidance)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width in pixels; None: as in training."""
        return tuple(map(int, self.size.split("x"))) if self.size else None

    @property
    def one_file(self) -> bool:
        return Path(self.out).suffix.lower() in PICTURES


PRESETS = {name: SampleConfig(preset=name, checkpoint=str(trained.folder / "checkpoint.pt"))
           for name, trained in train_gpt.PRESETS.items()}


class Row(NamedTuple):
    """What a row of samples is conditioned on, and what is shown or saved beside it; None: nothing."""
    condition: Tensor | None = None  # (1,) label, or (1, h, w) codes of a map
    given: Tensor = torch.zeros(1, 0, dtype=torch.int64)  # (1, G) first image tokens
    beside: Tensor | None = None  # (1, 1 or 3, H, W), shown: the map, or the picture that is completed
    record: Tensor | None = None  # the condition's field as `data.load` gives it, to be written


def main(argv: list[str] | None = None):
    """Sample as the command line says."""
    config, _ = run.configure(PRESETS, argv)
    device = run.start(config).device
    default = PRESETS[config.preset].checkpoint
    if config.benchmark and config.checkpoint == default and not Path(default).exists():
        print(f"{default} does not exist yet: a model of its size with random weights", flush=True)
        prior = train_gpt.untrained_prior(config.preset).to(device)
    else:
        prior = Prior.load(config.checkpoint, device, config.n_head)
    if config.n_head and not taming.recognizes(config.checkpoint):
        raise run.UsageError("--n-head has no effect here: only the authors' files do not store it")
    if config.benchmark:
        return benchmark_sampling(prior, config.batch_size, config.sampling)
    rows, columns, total = plan(prior, config)
    out, shown, pictures, done, began = Path(config.out), [], [], 0, time.perf_counter()
    if out.is_dir() and (config.one_file or any(out.iterdir())):
        raise run.UsageError(f"{out} is a folder, not empty or named like a picture; name another --out")

    for batch, images, tokens in draw(prior, rows, columns, config):  # files at once, a grid at the end
        if config.animate and not done:
            save_animation(prior, tokens[:16], Path(config.animate))
        if config.one_file:
            pictures.append(images.cpu())
            shown += batch
        else:
            for i, (row, pixels) in enumerate(zip(batch, to_pixels(images)), done):
                save_picture(Image.fromarray(pixels.squeeze()), out / f"{i:06d}.png")
                save_condition(prior, row, out, i)
        done += len(batch)
        seconds = time.perf_counter() - began
        if seconds > 5:
            print(f"{done} of {total} samples · eta {duration(seconds * (total / done - 1))}", flush=True)
    if config.one_file:
        save_picture(arrange(shown, torch.cat(pictures), columns), out)
    print(f"{done} samples in {out}" + (f", {columns} for each validation condition" if done < total else ""))
    if config.animate:
        print(f"an animation of the first samples in {config.animate}")


def plan(prior: Prior, config: SampleConfig) -> tuple[Iterable[Row], int, int]:
    """The rows that the flags ask for, the samples in each, and those in all. Raises UsageError."""
    f, layout, stage = prior.image.vq.config.downsampling, prior.layout, prior.stages.get(prior.condition)
    flag = "condition" if stage else prior.condition  # --class or --condition names its conditions; or None
    named = [name for name, value in (("class", config.class_), ("condition", config.condition)) if value]
    for name in named:
        if name != flag:
            raise run.UsageError(f"--{name} does not fit {config.checkpoint}, which was trained with "
                                 f"--condition {prior.condition or 'none'}")
    if config.data_dir and not flag:
        raise run.UsageError("--data-dir has no effect here: this model has no condition")
    if config.size and not all(side % f == 0 and side // f >= trained for side, trained in
                               zip(config.shape, (layout.height, layout.width))):
        raise run.UsageError(f"size is {config.size}; both must be multiples of {f}, and at least "
                             f"{layout.height * f}x{layout.width * f}, as in training")
    if config.size and stage and stage.side != layout.height:
        raise run.UsageError(f"--size needs maps of as many codes as the pictures: this model's have "
                             f"{stage.side}×{stage.side}, its pictures {layout.height}×{layout.width}")
    if config.size and stage and not named:
        raise run.UsageError("--size needs a --condition of that size")
    if config.scales_from or config.complete:
        if not named and not layout.null_token:  # a model without a condition has one
            raise run.UsageError(f"this model needs a condition ({prior.condition}); name one with --{flag}")
        rows = list(list_completions(prior, config, list_conditions(prior, config) if named else [Row()]))
    elif named:
        rows = list(list_conditions(prior, config))
    else:  # `count` samples in all; in a grid, four per condition of the validation split
        columns = 4 if flag and config.one_file else 1
        count = math.ceil((config.count or 64) / columns)
        rounds = count if config.count or not flag else 1  # with --count, cycle through the conditions
        rows = (row for _ in range(rounds) for row in (list_conditions(prior, config) if flag else [Row()]))
        return itertools.islice(rows, count), columns, count * columns
    columns = config.count or 4
    return rows, columns, len(rows) * columns


def list_conditions(prior: Prior, config: SampleConfig) -> Iterator[Row]:
    """The conditions named on the command line, else those of the validation split, in order."""
    stage = prior.stages[prior.condition]
    if config.class_:
        whole = [config.class_] if config.class_ in prior.classes else []  # a name may have commas
        names = whole or map(str.strip, config.class_.split(","))
        values = (torch.tensor([find_class(name, prior.classes)]) for name in names)
    elif config.condition:
        values = (data.read_field(path, stage.field, stage.preparation, config.shape)
                  for path in list_inputs(config.condition, stage.field))
    else:
        preparation = replace((stage or prior.image).preparation, fields=(prior.condition,))
        directory = config.data_dir or prior.trained_on["data_dir"]
        dataset = data.open_dataset(prior.trained_on["data"], directory, "val", preparation)
        if list(dataset.classes) != prior.classes:
            raise ValueError(f"{directory} has other classes than this model was trained with; name some of "
                             "the model's with --class, or a folder with the same classes with --data-dir")
        values = (torch.as_tensor(dataset[i, None][prior.condition])[None] for i in range(len(dataset)))
    for value in values:
        if stage:
            inputs = data.as_input(value, stage.field, stage.vq.config.image_channels)
            yield Row(stage.encode(value), beside=data.as_pictures(inputs, stage.field), record=value)
        else:
            yield Row(condition=value, record=value)


def list_inputs(name: str, field: str) -> list[Path]:
    """The file of that name, or all files of a field in that folder, which may be a data set's."""
    folder, others = Path(name), MASK_FOLDERS if field == "image" else {"images", *FIELDS} - {field}
    if folder.is_file():
        return [folder]
    paths = [path for path in list_files(folder, field)
             if others.isdisjoint(part.lower() for part in path.relative_to(folder).parts[:-1])]
    if not paths:
        raise run.UsageError(f"{name} holds no files of {field}; name a file, or a folder that has some")
    return paths


def find_class(name: str, classes: list[str]) -> int:
    """The label of a class by name, or by number if no name is one. UsageError tells the nearest names."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes) and not any(map(str.isdecimal, classes)):
        return int(name)
    near = difflib.get_close_matches(name, classes, n=3, cutoff=0.4) or classes[:10]
    raise run.UsageError(f"there is no class {name!r} among the {len(classes)} of this model; "
                         f"did you mean {', '.join(near)}?")


def list_completions(prior: Prior, config: SampleConfig, conditions: Iterable[Row]) -> Iterator[Row]:
    """A row for each named picture, or each number of its scales: the tokens that are kept, and a condition.

    One condition serves all pictures; of several, the first belongs to the first picture, and so on. Raises
    UsageError if their numbers differ, or if their names contradict that order.
    """
    image, layout = prior.image, prior.layout
    if config.scales_from and not layout.scales:
        raise run.UsageError(f"--scales-from needs a model of several scales, unlike {config.checkpoint}; "
                             "train one with --multiscale")
    if config.hide and layout.scales:
        raise run.UsageError("--hide needs a model of one scale: the coarser grids, which are kept, would "
                             "show the grey")
    paths = list_inputs(config.complete or config.scales_from, "image")
    maps = list_inputs(config.condition, prior.condition) if config.condition else []
    unlike = [f"{path} and {other}" for path, other in zip(paths, maps) if path.stem != other.stem]
    shared = {path.stem for path in paths} & {path.stem for path in maps}
    if unlike and shared and len(maps) == len(paths) > 1:
        raise run.UsageError(f"some pictures and conditions have the same name, but {unlike[0]} would be a "
                             "pair: rename or remove those without a partner")
    conditions = list(conditions)  # encoded only now
    if len(conditions) not in (1, len(paths)):
        raise run.UsageError(f"the number of conditions is {len(conditions)}, that of pictures {len(paths)}: "
                             "name one condition for all pictures, or one for each, in order")
    T = sum(layout.lengths)
    kept = round(config.keep * T)
    for path, row in zip(paths, itertools.cycle(conditions)):
        values = data.read_field(path, "image", image.preparation)  # (1, 3, S, S)
        if config.hide:
            rank = layout.grids(torch.arange(T)[None])[-1]  # (1, h, w)
            known = F.interpolate((rank < kept)[None].float(), size=values.shape[2:], mode="nearest") > 0
            values = values.where(known, 127)
        tokens = layout.image_tokens(image.pyramid(image.encode(values), layout.scales))  # (1, T)
        for count in [kept] if config.complete else [0, *itertools.accumulate(layout.lengths)]:
            yield row._replace(given=tokens[:, :count], beside=data.as_input(values, "image", 3))


def draw(prior: Prior, rows: Iterable[Row], columns: int,
         config: SampleConfig) -> Iterator[tuple[list[Row], Tensor, Tensor | None]]:
    """Samples of each row, `columns` times, in batches, of which all have equally many given tokens.

    Yields the rows, pictures (B, C, H, W), and image tokens (B, T), None for another size than in training.
    """
    generator = torch.Generator(prior.device).manual_seed(config.seed)
    repeated = (row for row in rows for _ in range(columns))
    for _, group in itertools.groupby(repeated, key=lambda row: row.given.shape[1]):
        while batch := list(itertools.islice(group, config.batch_size)):
            condition = None if batch[0].condition is None else torch.cat([row.condition for row in batch])
            if config.size:
                height, width = (side // prior.image.vq.config.downsampling for side in config.shape)
                codes = prior.sample_window(len(batch), height, width, condition, config.sampling, generator)
                yield batch, prior.image.decode(codes), None
            else:
                given = torch.cat([row.given for row in batch])  # (B, G)
                tokens = prior.sample(len(batch), condition, given, config.sampling, generator)
                yield batch, prior.pictures(tokens), tokens


def save_condition(prior: Prior, row: Row, folder: Path, number: int):
    """A sample's condition beside it: labels of a mask as they are, depth in 16 bits, a class by its name."""
    if row.record is None:
        return
    value = row.record[0].numpy()
    if prior.condition == "class":
        names, advice = folder / "classes.txt", "make room, or name another --out"
        with writing(names, advice), names.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{number:06d} {prior.classes[value]}\n")  # any bytes that a folder's name may hold
        return
    if value.dtype == np.float32:  # depth
        value = np.round((value + 1) * 32767.5).astype(np.uint16)
    picture = Image.fromarray(value.transpose(1, 2, 0) if value.ndim == 3 else value)
    save_picture(picture, folder / f"{number:06d}-condition.png")


def arrange(rows: list[Row], pictures: Tensor, columns: int) -> Image.Image:
    """All samples (N, C, H, W) in one grid: a square, or rows, each behind what it has to show."""
    if rows[0].beside is None:
        square = rows[0].record is None
        return picture_grid(pictures, math.isqrt(len(pictures)) if square else columns)
    beside = torch.cat([row.beside.expand(-1, 3, -1, -1) for row in rows[::columns]])  # (R, 3, H, W)
    both = torch.cat([beside[:, None], pictures.unflatten(0, (-1, columns))], 1)  # (R, 1 + columns, 3, H, W)
    return picture_grid(both.flatten(0, 1), columns + 1)


def save_animation(prior: Prior, tokens: Tensor, path: Path):
    """A GIF in which the cells of image tokens (N, T) appear step by step, on grey or the coarser scale."""
    T = tokens.shape[1]
    ranks = prior.layout.grids(torch.arange(T, device=tokens.device)[None])  # steps of cells, (1, h, w)
    scales = [prior.image.decode(codes) for codes in prior.layout.grids(tokens)]  # (N, C, H, W) each
    size, frames, stride = scales[-1].shape[2:], [], math.ceil(T / 64)
    for step in range(0, T + stride, stride):
        shown = torch.zeros_like(scales[-1])
        for picture, rank in zip(scales, ranks):
            visited = F.interpolate((rank < step)[None].float(), size) > 0  # (1, 1, H, W)
            shown = torch.where(visited, F.interpolate(picture, size), shown)
        frames.append(picture_grid(shown, columns=4, side=64))
    both = Image.fromarray(np.concatenate([np.asarray(frames[0]), np.asarray(frames[-1])]))
    palette = both.quantize(256)  # one for all frames: a palette for each would flicker
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [3000 // len(frames)] * (len(frames) - 1) + [1500]  # ms: three seconds, then a pause
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], loop=0, duration=times)


if __name__ == "__main__":
    run.command_line(main)
