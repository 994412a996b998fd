"""The codes of a data set, computed once by the frozen first stages and kept on the disk for every run.

Symbols: N pictures, h×w code grid.
"""
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import data
import run
from outputs import announce, describe_data, fcntl, writing
from stages import Stages


@dataclass(frozen=True)
class Views:
    """Codes of N pictures in several views (augmentations), memory maps (N, …); index i: view i // N."""
    dataset: Any  # of these pictures
    arrays: list[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def __getitem__(self, index: list[int]) -> np.ndarray:
        N = len(self.arrays[0])
        return np.stack([self.arrays[i // N][i % N] for i in index])


def cached_codes(config: Any, split: str, dataset, stages: Stages, process: run.Process) -> dict[str, Views]:
    """Codes of each field of a data set, each view (N, h, w) uint16; of a class (N,).

    Training pictures have `config.views` views, the first without augmentation; others have only that one.
    Each view has a file for each field, complete or absent, whose name is the hash of network, pictures and
    augmentation. So runs of all orders share a file, more views add files, and none becomes stale, unless
    this code is changed (README). All fields are encoded in one pass, by all processes of the run.
    Raises OSError for a full disk, ValueError for a damaged file.
    """
    N, keys = len(dataset), [None]  # each view's augmentation key
    if split == "train":
        keys += [(config.seed, view) for view in range(1, config.views)]
    shapes = {field: (N, stage.side, stage.side) if stage else (N,) for field, stage in stages.items()}
    networks = {field: stage and stage.hash() for field, stage in stages.items()}
    directory, fingerprint = Path(config.codes_dir), dataset.fingerprint()
    views = {field: Views(dataset, []) for field in stages}
    for view, key in enumerate(keys, 1):
        names = {field: hashlib.sha256(json.dumps([field, network, fingerprint, key]).encode())
                 for field, network in networks.items()}
        paths = {field: directory / f"codes-{name.hexdigest()[:16]}.npy" for field, name in names.items()}
        # Rank 0 decides what is missing, and names the unfinished files that all ranks write.
        missing = [field for field, path in paths.items() if not path.is_file()]
        identity, missing = process.share((os.urandom(4).hex(), missing))[0]
        if missing:
            announce(f"encoding {N:,} pictures ({' and '.join(missing)}) into {directory}"
                     + (f", view {view} of {len(keys)}" if len(keys) > 1 else ""))
            parts = {field: paths[field].with_suffix(f".{identity}.part") for field in missing}
            with contextlib.ExitStack() as reserved:
                if process.rank == 0:
                    remove_abandoned(directory)
                    for field, part in parts.items():
                        reserved.enter_context(reserve(paths[field], part, shapes[field]))
                process.wait_for_all()
                encode(dataset, key, stages, parts, process, config.workers)
                process.wait_for_all()
            process.wait_for_all()  # until they are renamed
        for field, path in paths.items():
            views[field].arrays.append(read_codes(path, shapes[field]))
    return views


def encode(dataset, key: data.Key, stages: Stages, files: dict[str, Path], process: run.Process,
           workers: int):
    """Write this process's share of the codes of one view into the reserved file of each field."""
    arrays = {field: np.lib.format.open_memmap(file, "r+") for field, file in files.items()}
    items = data.fixed_batches(len(dataset), 64, key, process.rank, process.world)
    for batch, values in zip(items, data.load(dataset, items, process.device, workers)):
        for field, array in arrays.items():
            codes = stages[field].encode(values[field]) if stages[field] else values[field]
            array[[i for i, _ in batch]] = codes.cpu().numpy().astype(np.uint16)
    for array in arrays.values():
        array.flush()


@contextlib.contextmanager
def reserve(path: Path, part: Path, shape: tuple[int, ...]) -> Iterator[None]:
    """A file for codes of that shape: `part`, locked while it is written, which then becomes `path`.

    Raises OSError if the disk is too full, before anything is encoded.
    """
    try:
        with writing(part, "make room, or name another folder with --codes-dir"):
            part.parent.mkdir(parents=True, exist_ok=True)
            file = open_locked(part)
            np.lib.format.open_memmap(part, "w+", np.uint16, shape).flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        with file:
            yield
            if not fcntl:
                file.close()  # Windows renames no open file
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def open_locked(path: Path) -> BinaryIO:
    """Create a file, and lock it until it is closed or the process ends, however that happens."""
    while True:
        file = path.open("wb")
        with contextlib.suppress(OSError):  # a file system may have no locks
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # else another run has just removed it as abandoned
            return file


def remove_abandoned(directory: Path):
    """Remove the unfinished files of killed runs: those that no process, on any machine, has locked."""
    for path in directory.glob("codes-*.part") if fcntl else ():
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def read_codes(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The codes in a file, (N, …). Raises ValueError for another file."""
    try:
        codes = np.load(path, mmap_mode="r")
        if (codes.shape, codes.dtype) != (shape, np.uint16):
            raise ValueError(f"{codes.dtype} of the shape {codes.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the codes are recomputed") from None
    return codes


def encode_pictures(config: Any, stages: Stages, checkpoint: dict | None,
                    process: run.Process) -> tuple[dict[str, Views], dict[str, np.ndarray], dict]:
    """Codes of training and validation pictures by field; see `cached_codes`.

    Also a description of the data set. Image and condition are read together: crop and flip agree.
    """
    image, condition = stages["image"], stages.get(config.condition)
    preparation = replace(image.preparation, fields=tuple(stages))
    if condition:
        own = condition.preparation
        if own.size != preparation.size:
            raise ValueError(f"the first stage of images was trained at {preparation.size} pixels, that of "
                             f"{config.condition} at {own.size}; they must agree: train one with train_vq.py "
                             "--image-size and another --out, and name it with --vq or --condition-vq")
        preparation = replace(preparation, void_label=own.void_label, segments=own.segments)
    with process.first_alone():  # it may have to download
        datasets = {split: data.open_dataset(config.data, config.data_dir, split, preparation)
                    for split in ("train", "val")}
    trained_on = describe_data(config, datasets["train"], checkpoint)
    validation, training = (cached_codes(config, split, datasets[split], stages, process)
                            for split in ("val", "train"))  # an unreadable file of validation is found first
    return training, {field: views.arrays[0] for field, views in validation.items()}, trained_on
