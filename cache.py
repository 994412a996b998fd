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
from outputs import describe_data, writing
from stages import Stages

try:
    import fcntl
except ImportError:  # Windows: there unfinished files of killed runs stay
    fcntl = None


@dataclass(frozen=True)
class CodeCache:
    """Where the codes of data sets are kept, and how many augmented encodings of each training picture.

    A file's name is the hash of all that its codes depend on: network, pictures, augmentation. So a stale
    file is never read, and runs of all orders share one.
    """
    directory: Path
    seed: int
    views: int  # per training picture; the first is not augmented

    def codes(self, split: str, dataset, stages: Stages, process: run.Process,
              workers: int) -> dict[str, np.ndarray]:
        """Codes of each field of a data set, (views · N, h, w) uint16 memory maps; of a class, (views · N,).

        All fields are read and encoded in one pass, by all processes of the run. Each file is complete or
        absent. Raises OSError for a full disk, ValueError for a damaged file.
        """
        views, N = self.views if split == "train" else 1, len(dataset)
        paths, shapes, fingerprint = {}, {}, dataset.fingerprint()
        for field, stage in stages.items():
            seed = self.seed if views > 1 else None
            text = json.dumps([field, stage and stage.hash(), fingerprint, views, seed])
            paths[field] = self.directory / f"codes-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
            shapes[field] = (views, N, stage.side, stage.side) if stage else (views, N)
        missing = [name for name, path in paths.items() if not path.is_file()]
        identity, fields = process.agree([os.urandom(4).hex(), missing])  # all write the same files
        if fields:
            parts = {field: paths[field].with_suffix(f".{identity}.part") for field in fields}
            with contextlib.ExitStack() as reserved:
                if process.rank == 0:
                    print(f"encoding {views * N:,} pictures ({' and '.join(fields)}) into {self.directory}",
                          flush=True)
                    remove_abandoned(self.directory)
                    for field in fields:
                        reserved.enter_context(reserve(parts[field], shapes[field]))
                process.wait_for_all()
                arrays = {field: np.lib.format.open_memmap(parts[field], "r+") for field in fields}
                for view in range(views):
                    key = None if view == 0 else (self.seed, view)
                    order = data.fixed_order(N, 64, key, process.rank, process.world)
                    for batch, values in zip(order, data.load(dataset, order, process.device, workers)):
                        index = [i for i, _ in batch]
                        for field in fields:
                            stage = stages[field]
                            codes = stage.encode(values[field]) if stage else values[field]
                            arrays[field][view, index] = codes.cpu().numpy().astype(np.uint16)
                for field in fields:
                    arrays[field].flush()
                process.wait_for_all()
                if process.rank == 0:
                    for field in fields:
                        parts[field].replace(paths[field])
            process.wait_for_all()
        return {field: read_codes(path, shapes[field]) for field, path in paths.items()}


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
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def read_codes(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(views, N, …) on the disk → (views · N, …). Raises ValueError for another file."""
    try:
        codes = np.load(path, mmap_mode="r")
        assert codes.shape == shape and codes.dtype == np.uint16, (codes.shape, codes.dtype)
    except (ValueError, EOFError, AssertionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the codes are made anew") from None
    return codes.reshape(-1, *shape[2:])


def encode_pictures(config: Any, stages: Stages, checkpoint: dict | None,
                    process: run.Process) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Codes of all training and validation pictures by field, (N, h, w) uint16 or labels (N,); see CodeCache.

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
    return training, validation, trained_on


def random_codes(config: Any, stages: Stages, checkpoint: dict | None,
                 process: run.Process) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """In place of `encode_pictures`, for a benchmark: a batch of random codes, of 1,000 classes."""
    random = np.random.default_rng(config.seed)
    codes = {field: random.integers(stage.codebook_size, size=(config.batch_size, stage.side, stage.side))
             if stage else random.integers(1000, size=config.batch_size) for field, stage in stages.items()}
    return codes, codes, {"classes": [str(label) for label in range(1000 if "class" in stages else 0)]}
