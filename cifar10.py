"""CIFAR-10: the official binary archive, found or fetched, as arrays (§2)."""
import hashlib
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
from numpy import ndarray

from outputs import replacing, writing

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def read_cifar10(directory: Path, split: str) -> ndarray:
    """The records of a split, (N, 1 + 3·32·32) uint8: a label and its picture; N is 50,000 or 10,000.

    Raises OSError if they are not there and cannot be fetched, ValueError if they are damaged.
    """
    folder, parts = find_folder(directory), []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]:
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size != 10_000 * 3073:
            raise ValueError(f"{file} has {size:,} bytes instead of 30,730,000: fetch the archive again")
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
        with replacing(archive, f"put it there from {URL}, or name its folder with --data-dir") as part:
            urllib.request.urlretrieve(URL, part)
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    if digest != MD5:
        raise ValueError(f"{archive} has the md5 sum {digest} instead of {MD5}: remove it to fetch it again")
    advice = "make room, and remove the unfinished folder"
    with writing(directory / name, advice), tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / name
