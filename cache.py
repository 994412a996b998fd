"""The codes of a data set, computed once by the frozen first stages and kept on the disk for every run (§2).

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
from outputs import announce, describe_data, writing
from stages import Stages

try:
    import fcntl
except ImportError:  # Windows: there unfinished files of killed runs stay
    fcntl = None


@dataclass(frozen=True)
class Views:
    """Codes of N pictures in several views, memory maps (N, …), indexed as if one array (views · N, …)."""
    arrays: list[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def __getitem__(self, index: list[int]) -> np.ndarray:
        N = len(self.arrays[0])
        return np.stack([self.arrays[i // N][i % N] for i in index])


@dataclass(frozen=True)
class CodeCache:
    """Where the codes of data sets are kept, and how many augmented encodings of each training picture.

    A file for each field and view. Its name is the hash of all that its codes depend on: network, pictures,
    augmentation. So a stale file is never read, runs of all orders share one, and more views add files.
    """
    directory: Path
    seed: int
    views: int  # per training picture; the first is not augmented

    def codes(self, split: str, dataset, stages: Stages, process: run.Process,
              workers: int) -> dict[str, Views]:
        """Codes of each field of a data set, each view (N, h, w) uint16; of a class (N,).

        All fields are read and encoded in one pass, by all processes of the run. Each file is complete or
        absent. Raises OSError for a full disk, ValueError for a damaged file.
        """
        N, keys = len(dataset), [None]  # of the augmentation of each view
        if split == "train":
            keys += [(self.seed, view) for view in range(1, self.views)]
        shapes = {field: (N, stage.side, stage.side) if stage else (N,) for field, stage in stages.items()}
        paths = self.name_files(dataset, stages, keys)
        # The first process decides, and names the files: all write the same.
        missing = [name for name, path in paths.items() if not path.is_file()]
        identity, missing = process.agree([os.urandom(4).hex(), missing])
        parts = {name: paths[name].with_suffix(f".{identity}.part") for name in missing}
        with contextlib.ExitStack() as reserved:
            if missing and process.rank == 0:
                remove_abandoned(self.directory)
                for (_, field), part in parts.items():
                    reserved.enter_context(reserve(part, shapes[field]))
            process.wait_for_all()
            for view, key in enumerate(keys):
                files = {field: parts[view, field] for field in stages if (view, field) in parts}
                if files:
                    announce(f"encoding {N:,} pictures ({' and '.join(files)}) into {self.directory}"
                             + (f", view {view + 1} of {len(keys)}" if len(keys) > 1 else ""))
                    encode(dataset, key, stages, files, process, workers)
                    process.wait_for_all()
                    if process.rank == 0:
                        for field, part in files.items():
                            part.replace(paths[view, field])
        process.wait_for_all()
        return {field: Views([read_codes(paths[view, field], shapes[field]) for view in range(len(keys))])
                for field in stages}

    def name_files(self, dataset, stages: Stages, keys: list[data.Key]) -> dict[tuple[int, str], Path]:
        """The file of each view and field."""
        fingerprint, paths = dataset.fingerprint(), {}
        for field, stage in stages.items():
            network = stage and stage.hash()
            for view, key in enumerate(keys):
                digest = hashlib.sha256(json.dumps([field, network, fingerprint, key]).encode()).hexdigest()
                paths[view, field] = self.directory / f"codes-{digest[:16]}.npy"
        return paths


def encode(dataset, key: data.Key, stages: Stages, files: dict[str, Path], process: run.Process,
           workers: int):
    """Write this process's share of the codes of one view into the reserved file of each field."""
    arrays = {field: np.lib.format.open_memmap(file, "r+") for field, file in files.items()}
    order = data.fixed_order(len(dataset), 64, key, process.rank, process.world)
    for batch, values in zip(order, data.load(dataset, order, process.device, workers)):
        for field, array in arrays.items():
            stage = stages[field]
            codes = stage.encode(values[field]) if stage else values[field]
            array[[i for i, _ in batch]] = codes.cpu().numpy().astype(np.uint16)
    for array in arrays.values():
        array.flush()


@contextlib.contextmanager
def reserve(path: Path, shape: tuple[int, ...]) -> Iterator[None]:
    """A file for codes of that shape, locked while it is written, and removed if it was not renamed then.

    Raises OSError if the disk is too full, rather than a crash later.
    """
    try:
        with writing(path, "make room, or name another folder with --codes-dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_locked(path)
            np.lib.format.open_memmap(path, "w+", np.uint16, shape).flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        with file:
            yield
    finally:
        path.unlink(missing_ok=True)


def open_locked(path: Path) -> BinaryIO:
    """A new file that nobody else has locked until it is closed, whatever becomes of the process."""
    while True:
        file = path.open("wb")
        with contextlib.suppress(OSError):  # a file system may have no locks
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # else another run has just taken it for an abandoned one
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
        assert codes.shape == shape and codes.dtype == np.uint16, (codes.shape, codes.dtype)
    except (ValueError, EOFError, AssertionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the codes are recomputed") from None
    return codes


def encode_pictures(config: Any, stages: Stages, checkpoint: dict | None,
                    process: run.Process) -> tuple[dict[str, Views], dict[str, np.ndarray], dict]:
    """Codes of training and validation pictures by field, (N, h, w) uint16 or labels (N,); see CodeCache.

    Also a description of the data set. Image and condition are read together: crop and flip agree.
    """
    image, condition = stages["image"], stages.get(config.condition)
    preparation = replace(image.preparation, fields=tuple(stages))
    if condition:
        own = condition.preparation
        if own.size != preparation.size:
            raise ValueError(f"the first stage of images was trained at {preparation.size} pixels, that of "
                             f"{config.condition} at {own.size}; they must agree")
        preparation = replace(preparation, void_label=own.void_label, segments=own.segments)
    cache = CodeCache(Path(config.codes_dir), config.seed, config.views)
    with process.first_alone():  # it may have to download
        datasets = {split: data.open_dataset(config.data, config.data_dir, split, preparation)
                    for split in ("train", "val")}
    trained_on = describe_data(config, datasets["train"], checkpoint)
    workers = data.worker_count(config.workers, config.data)
    validation, training = (cache.codes(split, datasets[split], stages, process, workers)
                            for split in ("val", "train"))  # an unreadable file of validation is found first
    return training, {field: views.arrays[0] for field, views in validation.items()}, trained_on
