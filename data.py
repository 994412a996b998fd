"""What comes in: the data sets, and reproducible batches of them.

`dataset[index, key]` is a dict of the fields that a data set was opened for: image and pose (3, S, S) uint8,
segmentation (S, S) uint8, 255 where a pixel has no label, depth (S, S) float32 in [−1, 1], class int64. It
has `len()`, `classes` (names, if "class" was asked for), `segments()` (labels of the masks), `fingerprint()`
(of all that the arrays depend on) and `digest()` (of the files, in whatever folder). Training batch number n
is a pure function of the seed and n, whatever the number of worker processes and interruptions. In training
an unreadable file is reported ("unreadable" in the dict) and replaced by the next picture; in validation it
ends the run.

Symbols: B batch, C channels, H×W pixels, N pictures, S = size.
"""
import atexit
import colorsys
import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import cifar10
import run
import scenes
from files import (ADE20K_SEGMENTS, FIELDS, LAYOUTS, NO_LABEL, READER_VERSION, VALIDATION_SHARE, Preparation,
                   Record, UnreadableError, open_field, open_labels)
from outputs import announce, printable

OFFERED = {"scenes": (*FIELDS, "class"), "cifar10": ("image", "class"), "folder": (*FIELDS, "class"),
           "imagenet": ("image", "depth", "class"), "restricted-imagenet": ("image", "depth", "class"),
           "ade20k": ("image", "segmentation"), "deepfashion": ("image", "pose")}
SCENES = {"train": 16_000, "val": 1000}  # pictures in each split; any number could be drawn
# A label is never a mixture of two, and depth stays in [−1, 1], which bicubic would leave.
RESAMPLING = {"image": Image.Resampling.BICUBIC, "segmentation": Image.Resampling.NEAREST,
              "depth": Image.Resampling.BILINEAR, "pose": Image.Resampling.BILINEAR}

Key = tuple[int, ...] | None  # seed and epoch of an augmentation; None: center crop, not mirrored

# Small scenes are kept for the next epoch, and for a second stage that encodes what the first was trained on.
draw_once = functools.cache(scenes.draw_scene)


class Scenes:
    """The drawn data set of scenes.py at S×S pixels, neither cropped nor mirrored."""

    def __init__(self, split: str, preparation: Preparation):
        self.split, self.size, self.fields = split, preparation.size, preparation.fields
        self.classes = scenes.CLASSES if "class" in self.fields else ()
        if 0 < preparation.segments < self.segments():
            raise ValueError(f"the masks of scenes have {self.segments()} labels, but segments is "
                             f"{preparation.segments}: name a first stage that was trained on scenes")

    def __len__(self) -> int:
        return SCENES[self.split]

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, _ = item
        scene = (draw_once if self.size <= 64 else scenes.draw_scene)(self.split, index, self.size)
        known = {"image": scene.image.transpose(2, 0, 1),  # (S, S, 3) → (3, S, S)
                 "segmentation": scene.segmentation, "depth": scene.depth, "class": np.int64(scene.label)}
        if "pose" in self.fields:  # drawn at four times the size, for smooth edges
            pose = scenes.draw_keypoints(4 * scene.keypoints, (4 * self.size,) * 2, scenes.LIMBS).reduce(4)
            known["pose"] = np.array(pose).transpose(2, 0, 1)  # (S, S, 3) → (3, S, S)
        return {field: known[field].copy() for field in self.fields}  # scenes are kept: copies

    def segments(self, most: int | None = None) -> int:
        return len(scenes.SEGMENTS)

    def fingerprint(self) -> str:
        # Of some pictures, for the program may draw others one day.
        drawn = b"".join(values.tobytes() for i in range(64) for values in self[i, None].values())
        return f"{self.digest()} {self.size} {self.fields} {hashlib.sha256(drawn).hexdigest()}"

    def digest(self) -> str:
        return f"scenes {self.split} {len(self)}"


class Cifar10:
    """CIFAR-10's 50,000 training or 10,000 test pictures of 32×32 with ten classes (§2)."""

    def __init__(self, split: str, directory: Path, preparation: Preparation):
        if preparation.size != 32:
            raise ValueError(f"CIFAR-10 has pictures of 32×32; image_size is {preparation.size}")
        self.values = cifar10.read_cifar10(directory, split)  # (N, 3073)
        self.labels, self.images = self.values[:, 0], self.values[:, 1:].reshape(-1, 3, 32, 32)
        self.fields, self.flip = preparation.fields, preparation.flip and split == "train"
        self.classes = cifar10.CLASSES if "class" in self.fields else ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, key = item
        image = self.images[index]  # (3, 32, 32)
        if self.flip and key is not None and augmentation_rng(key, index).random() < 0.5:
            image = image[:, :, ::-1]
        known = {"image": image.copy(), "class": np.int64(self.labels[index])}
        return {field: known[field] for field in self.fields}

    def fingerprint(self) -> str:
        return f"cifar10 {self.flip} {self.fields} {self.digest()}"

    def digest(self) -> str:
        return hashlib.sha256(self.values).hexdigest()


class Files:
    """The `split` of one of the `LAYOUTS`, in S×S pixels: random crops in training, else the center."""

    def __init__(self, layout: str, split: str, directory: Path, preparation: Preparation):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no folder; name yours with --data-dir")
        self.layout, self.directory, self.train = layout, directory, split == "train"
        self.preparation = preparation
        records, classes = LAYOUTS[layout](directory, split, preparation.fields)
        self.records = list(records.values())
        self.classes = classes if "class" in preparation.fields else ()
        if not self.records:
            raise FileNotFoundError(f"{directory} has no {split} pictures; without val/ one in "
                                    f"{VALIDATION_SHARE} is for validation: put more there")
        self.unreadable = set()  # indices of those that this process has named
        self.tolerated = max(5, len(self.records) // 100)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        """The fields; in training, if files were skipped, also "unreadable": {index: error message}."""
        index, key = item
        random = augmentation_rng(key, index) if self.train and key is not None else None
        unreadable = {}
        for i in range(index, index + self.tolerated + 1):
            try:
                fields = prepare(self.records[i % len(self)], self.preparation, random)
                return fields | ({"unreadable": unreadable} if unreadable else {})
            except UnreadableError as error:
                if not self.train:
                    raise
                unreadable[i % len(self)] = str(error)
        raise UnreadableError(f"{len(unreadable)} pictures in a row cannot be read; {unreadable[index]}")

    def report(self, unreadable: dict[int, str]):
        """Print each file once, with a running count. ValueError for more than max(5, 1 %) of the files."""
        for index, sentence in unreadable.items():
            if index not in self.unreadable:
                self.unreadable.add(index)
                announce(f"skipped in training, {len(self.unreadable)} of {len(self):,} so far: "
                         f"{printable(sentence)}", from_all=True)
        if len(self.unreadable) > self.tolerated:
            raise ValueError(f"{len(self.unreadable)} of {len(self):,} training pictures cannot be read, and "
                             f"at most {self.tolerated} may be skipped: remove or replace those named above")

    def segments(self, most: int | None = None) -> int:
        """Number of labels: 1 + the largest in all masks, or in the first `most`; 151 for ADE20K."""
        if self.layout == "ade20k":
            return ADE20K_SEGMENTS
        seen, own = np.zeros(NO_LABEL + 1, bool), self.preparation
        for record in self.records[:most]:
            with contextlib.suppress(UnreadableError):  # reported in training, refused in validation
                seen[np.asarray(open_labels(record["segmentation"], own.void_label, own.segments))] = True
        labels = np.flatnonzero(seen[:NO_LABEL])
        if self.train and 0 < 2 * len(labels) <= labels.max(initial=0):
            announce(f"warning: {len(labels)} labels up to {labels[-1]} in the masks of {self.directory}: if "
                     "these are shades of grey, number them 0, 1, 2, …")
        return 1 + int(labels.max(initial=0))

    def fingerprint(self) -> str:
        return (f"{self.layout} {self.train} {self.preparation} {READER_VERSION} {self.directory.resolve()} "
                f"{self.digest(times=True)}")

    def digest(self, times: bool = False) -> str:
        """SHA-256 of names below the folder (bytes, for speed) and sizes; `times`: and when they changed."""
        digest = hashlib.sha256()
        for value in (value for record in self.records for value in record.values()):
            if isinstance(value, Path):
                try:
                    status = value.stat()
                except OSError as error:  # a link to nothing, or a name in a list only
                    raise FileNotFoundError(f"{value} cannot be read ({error.strerror}): remove or replace "
                                            "it") from None
                name = os.fsencode(value).removeprefix(os.fsencode(self.directory)).lstrip(b"/")
                value = (name, status.st_size, status.st_mtime_ns if times else 0)
            digest.update(repr(value.tolist() if isinstance(value, ndarray) else value).encode())
        return digest.hexdigest()


def prepare(record: Record, preparation: Preparation, random: np.random.Generator | None,
            shape: tuple[int, int] | None = None) -> dict[str, ndarray]:
    """Resize a record's fields to cover S×S (or `shape`, (H, W)), and take the same crop and flip of each.

    Random crop (and flip, if `preparation.flip`), or with random=None the center. Raises ValueError.
    """
    fields = [field for field in FIELDS if field in preparation.fields] or ["image"]  # the image first
    H, W = shape or (preparation.size, preparation.size)
    pictures = {field: open_field(field, record, preparation, (W, H)) for field in fields}
    (width, height), size = pictures[fields[0]].size, preparation.size
    name = record["image" if "image" in record else fields[0]]
    if min(width, height) < size and not preparation.upscale:
        raise ValueError(f"{name} has {width}×{height} pixels, too few for an image_size of {size}: remove "
                         "it, or train the first stage with --upscale or a lower --image-size")
    for field, picture in pictures.items():
        pixel = 1 / min(width, height, *picture.size)  # rounding error of a small picture's sides
        if abs(width / height * picture.height / picture.width - 1) > 0.02 + pixel:
            raise ValueError(f"{record[field]} has another aspect ratio than {name}: both must show the "
                             "same, upright, at any resolution")
    scale = max(W / width, H / height)
    width, height = round(width * scale), round(height * scale)
    left, top, mirrored = (width - W) // 2, (height - H) // 2, False
    if random:
        left, top = random.integers(width - W + 1), random.integers(height - H + 1)
        mirrored = preparation.flip and random.random() < 0.5
    known = {"class": np.int64(record["class"])} if "class" in record else {}
    for field, picture in pictures.items():
        pixels = np.asarray(picture.resize((width, height), RESAMPLING[field], reducing_gap=3.0))
        pixels = pixels[top:top + H, left:left + W][:, ::-1 if mirrored else 1]
        known[field] = np.array(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels, order="C")
    return {field: known[field] for field in preparation.fields}


def read_field(path: Path, field: str, preparation: Preparation,
               shape: tuple[int, int] | None = None) -> Tensor:
    """One file, prepared as in validation: the field as a batch of one (dtypes: see top). Raises ValueError.

    `shape` (H, W) replaces S×S. Key points (.npy) are in pixels of the output, as there is no image whose
    pixels they could be in.
    """
    values = prepare({field: path}, replace(preparation, fields=(field,)), None, shape)[field]
    return torch.from_numpy(values)[None]


def augmentation_rng(key: Key, index: int) -> np.random.Generator:
    """Random numbers for a picture's augmentation; the 1 separates them from an epoch's shuffle."""
    return np.random.default_rng((*key, index, 1))


def check_offered(name: str, field: str):
    """Raises ValueError if there is no such data set, or if it does not have the field."""
    run.check_choice("data", name, OFFERED)
    if field not in OFFERED[name]:
        raise ValueError(f"{name} has no {field!r}; it has {', '.join(OFFERED[name])}")


def open_dataset(name: str, directory: str, split: str, preparation: Preparation) -> Scenes | Cifar10 | Files:
    """The `split` ("train" or "val") of a data set. ValueError or FileNotFoundError say what is missing."""
    run.check_choice("split", split, ("train", "val"))
    for field in preparation.fields:
        check_offered(name, field)
    if name == "scenes":
        return Scenes(split, preparation)
    if name == "cifar10":
        return Cifar10(split, Path(directory), preparation)
    return Files(name, split, Path(directory), preparation)


def training_batches(count: int, batch_size: int, seed: int, start: int = 0, rank: int = 0,
                     world: int = 1) -> Iterator[list[tuple[int, Key]]]:
    """Batches of (index, key) without end, from batch number `start` on: a new permutation for each epoch.

    `batch_size` is the total; process `rank` of `world` gets every world-th element of each batch.
    """
    first, position = divmod(start * batch_size, count)  # epoch, and position in it
    items = ((int(index), (seed, epoch)) for epoch in itertools.count(first)
             for index in np.random.default_rng((seed, epoch)).permutation(count))
    items = itertools.islice(items, position, None)
    while True:
        yield list(itertools.islice(items, batch_size))[rank::world]


def name_batch(dataset, views: int, batch_size: int, seed: int, step: int) -> str:
    """Which pictures a training step was made of: their files, or their numbers if they have none."""
    N = len(dataset)
    index = [i % N for i, _ in next(training_batches(views * N, batch_size, seed, step - 1))]
    if not isinstance(dataset, Files):
        return f"the pictures number {', '.join(map(str, index))}"
    files = [next(iter(dataset.records[i].values())).relative_to(dataset.directory) for i in index]
    return ", ".join(map(str, files))


def fixed_batches(count: int, batch_size: int, key: Key = None, rank: int = 0,
                  world: int = 1) -> list[list[tuple[int, Key]]]:
    """Each picture once, in order: a process's share, in batches of up to `batch_size` per process."""
    mine = range(rank, count, world)
    return [[(index, key) for index in mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]


def load(dataset, items: Iterable[list[tuple[int, Key]]], device: torch.device,
         workers: int) -> Iterator[dict[str, Tensor]]:
    """The fields of each batch of items on the device, (B, ...), still of the data set's types."""
    if workers < 0:  # one per core of this process to read files, none for data in memory or drawn
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(8, cores) if isinstance(dataset, Files) else 0
    if workers:  # before they start, for that may fail midway
        atexit.unregister(run.kill_workers)
        atexit.register(run.kill_workers)
    batches = iter(DataLoader(dataset, batch_sampler=items, num_workers=workers, collate_fn=collate,
                              pin_memory=device.type == "cuda", worker_init_fn=run.ignore_signals,
                              generator=torch.Generator()))  # not the run's own
    try:
        for batch, unreadable in batches:
            if unreadable:
                dataset.report(unreadable)
            yield {field: values.to(device, non_blocking=True) for field, values in batch.items()}
    finally:
        if workers:  # after their present batches; the garbage collector would wait ten seconds for each
            batches._shutdown_workers()


def collate(items: list[dict]) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The batch, and {index: error message} of the unreadable files that it skipped."""
    unreadable = {i: text for item in items for i, text in item.pop("unreadable", {}).items()}
    return default_collate(items), unreadable


def check_files(dataset, rank: int, world: int, workers: int):
    """Read a validation set of files before a run begins, so that a bad one (ValueError) ends it at once."""
    if isinstance(dataset, Files):
        items = fixed_batches(len(dataset), 64, None, rank, world)
        for _ in load(dataset, items, torch.device("cpu"), workers):
            pass


def as_input(values: Tensor, field: str, channels: int) -> Tensor:
    """A field of a batch → first-stage input (B, C, H, W) float32 in [−1, 1]; float pictures pass through.

    Masks (B, H, W) become one-hot, 0 or 1; pixels without a label are 0 in all channels.
    """
    if field == "segmentation":
        labels = torch.arange(channels, device=values.device)[:, None, None]
        return (values[:, None] == labels).float()  # (B, H, W) → (B, C, H, W)
    values = values[:, None] if field == "depth" and values.ndim == 3 else values
    return values.float() if values.is_floating_point() else values / 127.5 - 1


def as_pictures(inputs: Tensor, field: str) -> Tensor:
    """Inputs or outputs (B, C, H, W) → (B, 1 or 3, H, W) to show: a colour per label, black for none."""
    if field != "segmentation":
        return inputs
    colours = torch.tensor([colorsys.hsv_to_rgb(0.381966 * i % 1, 0.4 + 0.2 * (i % 4), 1 - 0.15 * (i % 3))
                            for i in range(inputs.shape[1])], device=inputs.device)  # (C, 3)
    pictures = 2 * colours[inputs.argmax(1)].permute(0, 3, 1, 2) - 1  # (B, H, W) → (B, 3, H, W)
    return torch.where(inputs.any(1, keepdim=True), pictures, -1.0)
