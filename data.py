"""What comes in: the data sets, endless reproducible batches of them, and the cache of their codes.

A data set is an object with `len()`, `dataset[index, key]` and `fingerprint()`. Its items are dicts of
arrays: "image" (C, H, W) uint8 and whatever else is known of the picture. Training batch number n is a pure
function of the seed and n: a run that was interrupted goes on with the batch it would have seen, whatever the
number of worker processes.

Symbols: B batch, C channels, H×W pixels, h×w code grid, N pictures, S = image_size.
"""
import hashlib
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
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

import scenes

DATASETS = ("scenes", "cifar10", "folder")
SCENES = {"train": 16_000, "val": 1000}  # pictures in each split; any number could be drawn
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")  # case does not matter
VALIDATION_SHARE = 20  # one picture in 20 of a folder without train/ and val/

# What distinguishes one look at a picture from another, for random crops and flips; None: validation's look.
Key = tuple[int, ...] | None


class Scenes:
    """The drawn data set of scenes.py at S×S pixels. Pictures of up to 64 pixels, once drawn, are kept."""

    def __init__(self, split: str, size: int):
        self.split, self.size = split, size
        self.drawn = {}

    def __len__(self) -> int:
        return SCENES[self.split]

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, _ = item
        if index in self.drawn:
            return self.drawn[index]
        scene = scenes.draw_scene(self.split, index, self.size)
        fields = scene._asdict() | {"image": scene.image.transpose(2, 0, 1)}  # (S, S, 3) → (3, S, S)
        if self.size <= 64:
            self.drawn[index] = fields
        return fields

    def fingerprint(self) -> str:
        program = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()  # it may draw other pictures
        return f"scenes {self.split} {self.size} {len(self)} {program}"


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


class Folder:
    """Pictures anywhere below a folder, shorter side resized to S; random crops in training, else the centre.

    With train/ and val/ those are the splits; else one file in 20, by its name's hash, is for validation.
    """

    def __init__(self, split: str, directory: Path, size: int, flip: bool, upscale: bool):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no folder; name your folder of pictures with --data-dir")
        splits = [directory / name for name in ("train", "val")]
        given = all(folder.is_dir() for folder in splits)
        root = directory / split if given else directory
        self.files = sorted(path for path in root.rglob("*")
                            if path.suffix.lower() in PICTURES and path.is_file())
        if not given:
            self.files = [path for path in self.files
                          if (split == "val") == kept_for_validation(path.relative_to(root))]
        if not self.files:
            raise FileNotFoundError(
                f"{root} has no {'' if given else split + ' '}pictures ({' '.join(PICTURES)}); "
                f"put at least {1 if given else 2 * VALIDATION_SHARE} there, or name another --data-dir")
        self.size, self.flip, self.upscale, self.train = size, flip, upscale, split == "train"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, Key]) -> dict[str, ndarray]:
        index, key = item
        picture = open_picture(self.files[index], self.size)
        if min(picture.size) < self.size and not self.upscale:
            raise ValueError(f"{self.files[index]} has {picture.width}×{picture.height} pixels, too few for "
                             f"an image_size of {self.size}: remove it, lower --image-size, or add --upscale")
        random = look(key, index) if self.train and key is not None else None
        return {"image": crop(picture, self.size, self.flip, random)}

    def fingerprint(self) -> str:
        return f"folder {self.size} {self.train} {self.flip} {self.upscale} {stamp(self.files)}"


def look(key: Key, index: int) -> np.random.Generator:
    """Random numbers of one look at one picture; the 1 keeps them apart from those that shuffle the epoch."""
    return np.random.default_rng((*key, index, 1))


def open_dataset(name: str, directory: str, split: str, size: int, flip: bool = False, upscale: bool = False):
    """The `split` ("train" or "val") of S×S pictures. ValueError or FileNotFoundError say what is missing."""
    if name == "scenes":
        return Scenes(split, size)
    if name == "cifar10":
        if size != 32:
            raise ValueError(f"CIFAR-10 has pictures of 32×32; image_size is {size}")
        return Cifar10(split, Path(directory), flip)
    assert name == "folder", name
    return Folder(split, Path(directory), size, flip, upscale)


def open_picture(path: Path, size: int) -> Image.Image:
    """Any picture as RGB, upright, transparency laid on white. Raises ValueError for a file that is none.

    Grey, palette, CMYK and 16-bit are converted. `size` lets the JPEG decoder skip detail the resize loses.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove or replace it") from None
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: scale to 8 bits, `convert` would clip
        grey = np.asarray(picture, np.float32)
        scale = 257 if picture.mode.startswith("I;16") or grey.max() > 255 else 1
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def crop(picture: Image.Image, size: int, flip: bool, random: np.random.Generator | None) -> ndarray:
    """Resize the shorter side to S, cut out S×S pixels, (3, S, S) uint8: at random, or if None the centre."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (width - size) // 2, (height - size) // 2
    if random is not None:
        left, top = random.integers(width - size + 1), random.integers(height - size + 1)
    pixels = np.asarray(picture)[top:top + size, left:left + size]  # (S, S, 3)
    if flip and random is not None and random.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (S, S, 3) → (3, S, S)


def kept_for_validation(path: Path) -> bool:
    """A fixed choice by file name: adding pictures moves none of the others."""
    return int(hashlib.sha256(path.as_posix().encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


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


def load(dataset, order: Iterable[list[tuple[int, Key]]], device: torch.device,
         workers: int) -> Iterator[Tensor]:
    """The pictures of each batch of an order: (B, C, H, W) float32 in [−1, 1] on the device."""
    batches = DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=device.type == "cuda",
                         worker_init_fn=leave_interrupts_to_the_run,
                         generator=torch.Generator())  # its own: must not advance the run's random state
    for batch in batches:
        yield batch["image"].to(device, non_blocking=True).float() / 127.5 - 1


def leave_interrupts_to_the_run(worker: int):
    """Ctrl-C reaches all processes: the run decides when to stop, its workers go on until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_count(asked: int, name: str) -> int:
    """Processes that prepare pictures. −1 asked: none for data in memory or drawn, else one per core, ≤ 8."""
    return min(8, os.cpu_count() or 1) if asked < 0 and name == "folder" else max(asked, 0)


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
