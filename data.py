"""What comes in: the data sets, endless reproducible batches of them, and the cache of their codes.

A data set is an object with `len()`, `dataset[index, key]` and `fingerprint()`. Its items are dicts of the
fields that it was opened for: image and pose (3, S, S) uint8, segmentation (S, S) uint8, 255 where a pixel
has no label, depth (S, S) float32 in [−1, 1]; and "label", if the picture's class is known. Training batch
number n is a pure function of the seed and n: a run that was interrupted goes on with the batch it would have
seen, whatever the number of worker processes.

Symbols: B batch, C channels, H×W pixels, h×w code grid, N pictures, S = image_size.
"""
import colorsys
import hashlib
import inspect
import json
import os
import signal
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import scenes
from layouts import ADE20K_SEGMENTS, FIELDS, LAYOUTS, VALIDATION_SHARE
from pictures import (NO_LABEL, choose_window, cut_out, draw_keypoints, open_depth, open_labels, open_picture,
                      open_pose)

DATASETS = ("scenes", "cifar10", *LAYOUTS)
OFFERED = {"scenes": FIELDS, "cifar10": ("image",), "folder": FIELDS, "imagenet": ("image", "depth"),
           "restricted-imagenet": ("image", "depth"), "ade20k": ("image", "segmentation"),
           "deepfashion": ("image", "pose")}
SCENES = {"train": 16_000, "val": 1000}  # pictures in each split; any number could be drawn
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

# What distinguishes one look at a picture from another, for random crops and flips; None: validation's look.
Key = tuple[int, ...] | None


class Scenes:
    """The drawn data set of scenes.py at S×S pixels. Pictures of up to 64 pixels, once drawn, are kept."""

    def __init__(self, split: str, size: int, fields: tuple[str, ...] = ("image",)):
        self.split, self.size, self.fields = split, size, fields
        self.drawn = {}

    def __len__(self) -> int:
        return SCENES[self.split]

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, _ = item
        if index in self.drawn:
            return self.drawn[index]
        scene = scenes.draw_scene(self.split, index, self.size)
        known = scene._asdict() | {"image": scene.image.transpose(2, 0, 1)}  # (S, S, 3) → (3, S, S)
        if "pose" in self.fields:  # drawn at four times the size, for smooth edges
            pose = draw_keypoints(4 * scene.keypoints, (4 * self.size, 4 * self.size), scenes.LIMBS).reduce(4)
            known["pose"] = np.array(pose).transpose(2, 0, 1)  # (S, S, 3) → (3, S, S)
        known = {field: known[field] for field in (*self.fields, "label")}
        if self.size <= 64:
            self.drawn[index] = known
        return known

    def segments(self) -> int:
        return len(scenes.SEGMENTS)

    def fingerprint(self) -> str:
        parts = (scenes, draw_keypoints) if "pose" in self.fields else (scenes,)
        program = "".join(map(inspect.getsource, parts))  # it may draw other pictures one day
        program = hashlib.sha256(program.encode()).hexdigest()
        return f"scenes {self.split} {self.size} {self.fields} {len(self)} {program}"


class Cifar10:
    """The official binary archive: 50,000 training, 10,000 test pictures of 32×32 with ten classes (§2)."""

    def __init__(self, split: str, directory: Path, flip: bool):
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        self.files = [cifar10_folder(directory) / name for name in names]
        self.flip = flip and split == "train"
        records = []
        for file in self.files:
            if file.stat().st_size != 10_000 * 3073:
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes instead of 30,730,000: "
                                 "fetch the archive again")
            records.append(np.fromfile(file, np.uint8).reshape(10_000, 3073))
        records = np.concatenate(records)
        self.labels = records[:, 0].astype(np.int64)
        self.images = records[:, 1:].reshape(-1, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, key = item
        image = self.images[index]  # (3, 32, 32)
        if self.flip and key is not None and look(key, index).random() < 0.5:
            image = np.ascontiguousarray(image[:, :, ::-1])
        return {"image": image, "label": self.labels[index]}

    def fingerprint(self) -> str:
        return f"cifar10 {self.flip} {stamp(self.files)}"


class Files:
    """The `split` of one of the `LAYOUTS`, in S×S pixels: random crops in training, else the centre.

    Raises FileNotFoundError or ValueError, which say what is missing.
    """

    def __init__(self, layout: str, split: str, directory: Path, size: int, flip: bool, upscale: bool,
                 fields: tuple[str, ...] = ("image",), void_label: int = NO_LABEL):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no folder; name your folder of pictures with --data-dir")
        self.records = LAYOUTS[layout](directory, split, fields)
        if not self.records:
            raise FileNotFoundError(f"{directory} has no {split} pictures; without train/ and val/ one in "
                                    f"{VALIDATION_SHARE} is for validation: put more there")
        self.layout, self.size, self.train, self.flip, self.upscale = (
            layout, size, split == "train", flip, upscale)
        self.fields, self.void_label = fields, void_label

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, key = item
        record = self.records[index]
        pictures = [self.open(field, record) for field in self.fields]
        (width, height), name = pictures[0].size, record.get("image", record[self.fields[0]])
        if min(width, height) < self.size and not self.upscale:
            raise ValueError(f"{name} has {width}×{height} pixels, too few for "
                             f"an image_size of {self.size}: remove it, or train the first stage with "
                             "--upscale or a lower --image-size")
        for field, picture in zip(self.fields, pictures):
            pixel = 1 / min(width, height, *picture.size)  # by which small ones are rounded
            if abs(width / height * picture.height / picture.width - 1) > 0.02 + pixel:
                raise ValueError(f"{record[field]} has {picture.width}×{picture.height} pixels but {name} "
                                 f"{width}×{height}: both must show the same, upright, at any resolution")
        random = look(key, index) if self.train and key is not None else None
        window = choose_window(width, height, self.size, self.flip, random)
        known = {field: cut_out(picture, window, field) for field, picture in zip(self.fields, pictures)}
        return known | ({"label": np.int64(record["label"])} if "label" in record else {})

    def open(self, field: str, record: dict) -> Image.Image:
        if field == "image":
            return open_picture(record["image"], self.size)
        if field == "segmentation":
            return open_labels(record["segmentation"], self.void_label)
        if field == "depth":
            return open_depth(record["depth"])
        return open_pose(record["pose"], record.get("image"), self.size)

    def segments(self) -> int:
        """Labels of the masks: one more than the largest, for which all are read."""
        if self.layout == "ade20k":
            return ADE20K_SEGMENTS
        masks = (np.asarray(self.open("segmentation", record)) for record in self.records)
        return 1 + max(int(labels.max(initial=0, where=labels != NO_LABEL)) for labels in masks)

    def fingerprint(self) -> str:
        values = [value for record in self.records for value in record.values()]
        files = [value for value in values if isinstance(value, Path)]
        others = b"".join(np.asarray(value).tobytes() for value in values if not isinstance(value, Path))
        return (f"{self.layout} {self.size} {self.train} {self.flip} {self.upscale} {self.fields} "
                f"{self.void_label} {stamp(files)} {hashlib.sha256(others).hexdigest()}")


def look(key: Key, index: int) -> np.random.Generator:
    """Random numbers of one look at one picture; the 1 keeps them apart from those that shuffle the epoch."""
    return np.random.default_rng((*key, index, 1))


def check_offered(name: str, field: str):
    """Raises ValueError if a data set does not have a field."""
    if field not in OFFERED[name]:
        raise ValueError(f"{name} has no {field!r}; it has {', '.join(OFFERED[name])}")


def open_dataset(name: str, directory: str, split: str, size: int, flip: bool = False, upscale: bool = False,
                 fields: tuple[str, ...] = ("image",), void_label: int = NO_LABEL):
    """The `split` ("train" or "val") of S×S pictures. ValueError or FileNotFoundError say what is missing.

    `void_label` is what pixels without a label have in the masks, apart from 255.
    """
    assert name in DATASETS and set(fields) <= set(OFFERED[name]), (name, fields)
    if name == "scenes":
        return Scenes(split, size, fields)
    if name == "cifar10":
        if size != 32:
            raise ValueError(f"CIFAR-10 has pictures of 32×32; image_size is {size}")
        return Cifar10(split, Path(directory), flip)
    return Files(name, split, Path(directory), size, flip, upscale, fields, void_label)


def stamp(files: list[Path]) -> str:
    """Changes when a file is added, removed, resized or written anew."""
    lines = (f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cifar10_folder(directory: Path) -> Path:
    """The folder cifar-10-batches-bin at or below `directory`, fetched and unpacked there if need be."""
    name = "cifar-10-batches-bin"
    for folder in (directory, directory / name):
        if (folder / "test_batch.bin").is_file():
            return folder
    archive = directory / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        print(f"fetching {CIFAR10_URL} (170 MB)", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        part = archive.with_suffix(".part")
        try:
            urllib.request.urlretrieve(CIFAR10_URL, part)
        except OSError as error:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {directory} and could not be fetched ({error}): put {archive.name} from "
                f"{CIFAR10_URL} there, or name the folder that has it with --data-dir") from None
        part.replace(archive)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    if digest != CIFAR10_MD5:
        raise ValueError(f"{archive} has the md5 sum {digest} instead of {CIFAR10_MD5}: "
                         "remove it to fetch it again")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / name


def training_order(count: int, batch_size: int, seed: int, start: int = 0, rank: int = 0,
                   world: int = 1) -> Iterator[list[tuple[int, Key]]]:
    """Batches of (index, key) without end, from batch number `start` on: a new permutation for each epoch.

    Of each batch of `batch_size`, process `rank` of `world` gets every world-th element.
    """
    epoch, order = -1, np.empty(0, np.int64)
    for n in range(start * batch_size, 2**62, batch_size):
        batch = []
        for position in range(n, n + batch_size):
            if position // count != epoch:
                epoch = position // count
                order = np.random.default_rng((seed, epoch)).permutation(count)
            batch.append((int(order[position % count]), (seed, epoch)))
        yield batch[rank::world]


def fixed_order(count: int, batch_size: int, key: Key = None, rank: int = 0,
                world: int = 1) -> list[list[tuple[int, Key]]]:
    """Each picture once, in order, in batches of up to `batch_size`: for validation and the code cache."""
    mine = range(rank, count, world)
    return [[(index, key) for index in mine[i:i + batch_size]] for i in range(0, len(mine), batch_size)]


def load(dataset, order: Iterable[list[tuple[int, Key]]], device: torch.device, workers: int,
         field: str = "image", channels: int = 3) -> Iterator[Tensor]:
    """What a first stage sees of each batch of an order: (B, C, H, W) on the device; see `as_input`."""
    batches = DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=device.type == "cuda",
                         worker_init_fn=leave_interrupts_to_the_run,
                         generator=torch.Generator())  # its own: must not advance the run's random state
    for batch in batches:
        values = batch[field]
        if field == "segmentation":
            largest = int(values.masked_fill(values == NO_LABEL, 0).max())
            if largest >= channels:
                raise ValueError(f"a mask has the label {largest}, but segments is {channels}: "
                                 "raise --segments, or name the label of no class with --void-label")
        yield as_input(values.to(device, non_blocking=True), field, channels)


def as_input(values: Tensor, field: str, channels: int) -> Tensor:
    """A field of a batch for a first stage, (B, C, H, W) float32: in [−1, 1], but masks as one-hot (§A.1).

    Pixels without a label are 0 in all channels of that.
    """
    if field == "segmentation":
        labels = torch.arange(channels, device=values.device)[:, None, None]
        return (values[:, None] == labels).float()  # (B, H, W) → (B, C, H, W)
    return values[:, None] if field == "depth" else values.float() / 127.5 - 1


def as_pictures(inputs: Tensor, field: str) -> Tensor:
    """Inputs or outputs (B, C, H, W) to look at, in [−1, 1]: a colour for each label, black for none."""
    if field != "segmentation":
        return inputs
    # Neighbouring labels get hues far apart: the golden angle.
    colours = torch.tensor([colorsys.hsv_to_rgb(0.381966 * i % 1, 0.4 + 0.2 * (i % 4), 1 - 0.15 * (i % 3))
                            for i in range(inputs.shape[1])], device=inputs.device)  # (C, 3)
    pictures = 2 * colours[inputs.argmax(1)].permute(0, 3, 1, 2) - 1  # (B, H, W) → (B, 3, H, W)
    return torch.where(inputs.any(1, keepdim=True), pictures, -1.0)


def leave_interrupts_to_the_run(worker: int):
    """Ctrl-C reaches all processes: the run decides when to stop, its workers go on until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_count(asked: int, name: str) -> int:
    """Processes that prepare pictures. −1 asked: none for data in memory or drawn, else one per core, ≤ 8."""
    return min(8, os.cpu_count() or 1) if asked < 0 and name in LAYOUTS else max(asked, 0)


@torch.no_grad()
def code_cache(directory: Path, dataset, views: int, seed: int, first_stage: str,
               encode: Callable[[Tensor], Tensor], grid: tuple[int, int], batch_size: int,
               device: torch.device, workers: int, rank: int, world: int) -> ndarray:
    """Codes of each picture of a data set, (views, N, h, w) uint16 as a read-only memory map of a file.

    View 0 is the plain picture, the others are cropped and flipped at random. The file's name is the hash of
    all that its codes depend on: `first_stage` (the hash of its weights), the pictures and the views. So a
    stale file is never read, and runs of all orders share one. `encode` takes images (B, C, H, W) to codes
    (B, h, w); with several processes each encodes its share.
    """
    text = json.dumps([first_stage, dataset.fingerprint(), views, seed if views > 1 else None])
    path = directory / f"codes-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    missing = [None if path.is_file() else os.getpid()]
    if world > 1:
        torch.distributed.broadcast_object_list(missing, device=device)  # all agree, and on one part file
    if missing[0] is not None:
        part = path.with_suffix(f".{missing[0]}.part")
        if rank == 0:
            print(f"encoding {views * len(dataset):,} pictures into {path}", flush=True)
            directory.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", np.uint16, (views, len(dataset), *grid)).flush()
            if hasattr(os, "posix_fallocate"):  # a full disk: an error here, not a crash later
                with part.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        wait_for_all(world)
        codes = np.lib.format.open_memmap(part, "r+")  # (views, N, h, w)
        for view in range(views):
            order = fixed_order(len(dataset), batch_size, None if view == 0 else (seed, view), rank, world)
            for batch, images in zip(order, load(dataset, order, device, workers)):
                codes[view, [index for index, _ in batch]] = encode(images).cpu().numpy().astype(np.uint16)
        codes.flush()
        wait_for_all(world)
        if rank == 0:
            part.replace(path)
        wait_for_all(world)
    return np.load(path, mmap_mode="r")


def wait_for_all(world: int):
    if world > 1:
        torch.distributed.barrier()
