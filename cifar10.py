"""CIFAR-10: the official binary archive, found or fetched, as arrays (§2)."""
import hashlib
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
from numpy import ndarray

from outputs import writing

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def read_cifar10(directory: Path, split: str) -> ndarray:
    """The records of a split, (N, 1 + 3·32·32) uint8: a label and its picture; N is 50,000 or 10,000.

    Raises FileNotFoundError or ValueError if they are not there, and cannot be fetched, or are damaged.
    """
    folder, parts = find_folder(directory), []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]:
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != 10_000 * 3073:
            raise ValueError(f"{file} has {size:,} bytes instead of 30,730,000: remove "
                             f"{folder / 'test_batch.bin'}, and the archive is unpacked again, or fetched")
        parts.append(np.fromfile(file, np.uint8).reshape(10_000, 3073))
    return np.concatenate(parts)


def find_folder(directory: Path) -> Path:
    """The folder cifar-10-batches-bin at or below `directory`, downloaded and unpacked if need be."""
    name = "cifar-10-batches-bin"
    for folder in (directory, directory / name):
        if (folder / "test_batch.bin").is_file():
            return folder
    archive = directory / "cifar-10-binary.tar.gz"
    if not archive.is_file():
        print(f"fetching {URL} (170 MB)", flush=True)
        part = archive.with_suffix(".part")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(URL, part)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise FileNotFoundError(f"CIFAR-10 is not in {directory} and could not be fetched ({error}): put "
                                    f"{archive.name} from {URL} there, or name its folder with --data-dir"
                                    ) from None
        part.replace(archive)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    if digest != MD5:
        raise ValueError(f"{archive} has the md5 sum {digest} instead of {MD5}: remove it to fetch it again")
    advice = "make room, and remove the unfinished folder"
    with writing(directory / name, advice), tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / name
