"""Small picture files for the tests."""
import os
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from data import Files, Preparation, open_dataset

ORANGE = (240, 130, 20)


def save(path: Path, colour=ORANGE, size: tuple[int, int] = (40, 40), mode: str = "RGB", **options) -> Path:
    """A picture of one colour, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def write(path: Path, pixels: ndarray) -> Path:
    """An array as a picture, or as it is in a .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:
            np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(path)
    return path


def noise(path: Path, size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    """A picture that looks different wherever it is cut."""
    return write(path, np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def opened(folder: Path, *fields: str, split: str = "val", size: int = 32, name: str = "folder",
           flip: bool = False, upscale: bool = False, void_label: int = 255) -> Files:
    preparation = Preparation(size, fields or ("image",), flip, upscale, void_label)
    return open_dataset(name, str(folder), split, preparation)


def names(dataset: Files, field: str = "image") -> list[str]:
    """Where the files of a data set lie below its folder."""
    return [os.path.relpath(record[field], dataset.directory) for record in dataset.records]
