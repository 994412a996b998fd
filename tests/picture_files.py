"""Small picture files for the tests."""
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from data import Files, open_dataset

ORANGE = (240, 130, 20)


def save(path: Path, colour=ORANGE, size: tuple[int, int] = (40, 40), mode: str = "RGB", **options) -> Path:
    """A picture of one colour, (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def noise(path: Path, size: tuple[int, int] = (40, 40), seed: int = 0) -> Path:
    """A picture that looks different wherever it is cut."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def many_pictures(folder: Path, count: int = 100) -> list[Path]:
    return [save(folder / f"{i % 3}" / f"{i}.png", (i, 0, 0), (4, 4)) for i in range(count)]


def pictures(folder: Path, split: str = "val", size: int = 32, flip: bool = False,
             upscale: bool = False) -> Files:
    return open_dataset("folder", str(folder), split, size, flip, upscale)


def splits(folder: Path):
    """Make train/ and val/, so that each picture put there is used."""
    save(folder / "train" / "plain.png")
    (folder / "val").mkdir()


def only_picture(folder: Path) -> ndarray:
    """The picture of val/ as the data set gives it, (3, 32, 32)."""
    dataset = pictures(folder)
    assert len(dataset) == 1
    image = dataset[0, None]["image"]
    assert image.shape == (3, 32, 32) and image.dtype == np.uint8
    return image


def assert_colour(image: ndarray, colour: tuple, tolerance: int = 0):
    assert np.abs(image.astype(int) - np.array(colour)[:, None, None]).max() <= tolerance


def files(dataset: Files, field: str = "image") -> list[Path]:
    return [record[field] for record in dataset.records]
