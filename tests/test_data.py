"""Claims about data.py.

Oracles: slices of the bytes of a CIFAR-10 file, the colours that a picture was made of, set identities of the
orders (permutations, disjoint shares that together are everything), and encoding directly what the code cache
holds.
"""
import hashlib
import itertools
import os
import re
import signal
import tarfile
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

import data
from data import (Cifar10, Folder, Scenes, code_cache, crop, fixed_order, load, open_dataset, open_picture,
                  training_order, worker_count)
from scenes import draw_scene

CPU = torch.device("cpu")
ORANGE = (240, 130, 20)
RECORD = 3073  # one label and 3·32·32 pixels


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
             upscale: bool = False) -> Folder:
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


class Numbers:
    """A data set whose picture i is filled with i; looks at it with a key, with i + 50 and more."""

    def __init__(self, count: int, name: str = "numbers"):
        self.count, self.name = count, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item) -> dict[str, ndarray]:
        index, key = item
        return {"image": np.full((3, 4, 4), index + (0 if key is None else 50 + 50 * key[1]), np.uint8)}

    def fingerprint(self) -> str:
        return self.name


# scenes

def test_scenes_are_the_drawn_scenes_with_channels_first():
    dataset, scene = open_dataset("scenes", "nowhere", "val", 24), draw_scene("val", 3, 24)
    item = dataset[3, None]
    assert item["image"].shape == (3, 24, 24) and item["image"].dtype == np.uint8
    assert np.array_equal(item["image"].transpose(1, 2, 0), scene.image)
    assert item["label"] == scene.label
    for name in ("segmentation", "depth", "keypoints"):
        assert np.array_equal(item[name], getattr(scene, name))


def test_scenes_are_drawn_once_if_small_and_the_same_whatever_the_key(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return draw_scene(*arguments)

    monkeypatch.setattr(data.scenes, "draw_scene", counted)
    small, large = Scenes("train", 64), Scenes("train", 65)
    for dataset in (small, large):
        first, again = dataset[2, None]["image"], dataset[2, (0, 1)]["image"]
        assert np.array_equal(first, again)
        assert not np.array_equal(first, dataset[4, None]["image"])
    assert calls == [("train", 2, 64), ("train", 4, 64), ("train", 2, 65), ("train", 2, 65), ("train", 4, 65)]


def test_scenes_have_16000_training_and_1000_validation_pictures_and_distinct_fingerprints(monkeypatch):
    sets = [Scenes("train", 16), Scenes("val", 16), Scenes("train", 32)]
    assert [len(dataset) for dataset in sets] == [16000, 1000, 16000]
    prints = {dataset.fingerprint() for dataset in sets}
    assert len(prints) == 3
    assert Scenes("val", 16).fingerprint() in prints
    monkeypatch.setitem(data.SCENES, "val", 16000)
    assert Scenes("val", 16).fingerprint() not in prints


# CIFAR-10

@pytest.fixture(scope="session")
def cifar10_bytes() -> bytes:
    """10,000 records; random where the tests look."""
    records = np.zeros((10_000, RECORD), np.uint8)
    chosen = [0, 1, 2, 3, 4, 5, 6, 7, 4321, 9999]
    records[chosen] = np.random.default_rng(0).integers(0, 256, (len(chosen), RECORD), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    return records.tobytes()


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory, cifar10_bytes) -> Path:
    """A folder with the official layout; batch i has its number in the last byte of record 0."""
    directory = tmp_path_factory.mktemp("cifar10")
    folder = directory / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "test_batch.bin").write_bytes(cifar10_bytes)
    for i in range(1, 6):
        content = cifar10_bytes[:RECORD - 1] + bytes([i]) + cifar10_bytes[RECORD:]
        (folder / f"data_batch_{i}.bin").write_bytes(content)
    return directory


@pytest.mark.parametrize("below", [False, True])
def test_cifar10_records_are_a_label_and_three_planes_of_pixels(cifar10, cifar10_bytes, below):
    dataset = open_dataset("cifar10", str(cifar10 / "cifar-10-batches-bin" if below else cifar10), "val", 32)
    assert len(dataset) == 10_000
    for index in (0, 5, 4321, 9999):
        record = cifar10_bytes[index * RECORD:(index + 1) * RECORD]
        item = dataset[index, None]
        assert item["label"] == record[0] == index % 10
        assert item["image"].shape == (3, 32, 32) and item["image"].dtype == np.uint8
        for channel, row, column in ((0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 2, 3), (2, 30, 31), (2, 31, 31)):
            assert item["image"][channel, row, column] == record[1 + channel * 1024 + row * 32 + column]


def test_cifar10_trains_on_five_files_in_order_and_flips_half_of_the_looks(cifar10, cifar10_bytes):
    plain, flipped = (open_dataset("cifar10", str(cifar10), "train", 32, flip) for flip in (False, True))
    assert len(plain) == len(flipped) == 50_000
    assert [plain[10_000 * i, None]["image"][2, 31, 31] for i in range(5)] == [1, 2, 3, 4, 5]
    original = plain[4321, None]["image"]
    assert np.array_equal(plain[4321, (0, 0)]["image"], original)
    assert np.array_equal(flipped[4321, None]["image"], original)
    turned = 0
    for epoch in range(100):
        image = flipped[4321, (0, epoch)]["image"]
        assert np.array_equal(image, flipped[4321, (0, epoch)]["image"])
        if not np.array_equal(image, original):
            assert np.array_equal(image, original[:, :, ::-1])
            turned += 1
    assert 30 < turned < 70
    sides = {np.array_equal(flipped[i, (0, 0)]["image"], plain[i, None]["image"]) for i in range(8)}
    assert sides == {True, False}  # not all pictures of an epoch the same way
    assert flipped.fingerprint() != plain.fingerprint()


def test_cifar10_validation_is_never_flipped(cifar10):
    dataset = Cifar10("val", cifar10, flip=True)
    original = dataset[4321, None]["image"]
    assert all(np.array_equal(dataset[4321, (0, epoch)]["image"], original) for epoch in range(20))
    assert dataset.fingerprint() == Cifar10("val", cifar10, flip=False).fingerprint()


def test_cifar10_file_of_another_size_is_refused(tmp_path, cifar10_bytes):
    (tmp_path / "test_batch.bin").write_bytes(cifar10_bytes[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin has 30,729,999 bytes instead of 30,730,000"):
        Cifar10("val", tmp_path, flip=False)


def test_cifar10_has_no_other_size_than_32(tmp_path):
    with pytest.raises(ValueError, match="pictures of 32×32; image_size is 64"):
        open_dataset("cifar10", str(tmp_path), "val", 64)


def test_cifar10_without_files_or_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    def no_network(url, path):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlretrieve", no_network)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(FileNotFoundError) as error:
            open_dataset("cifar10", str(directory), "train", 32)
        for part in (str(directory), "no network", "cifar-10-binary.tar.gz", data.CIFAR10_URL, "--data-dir"):
            assert part in str(error.value)
    assert not list(tmp_path.rglob("*.tar.gz"))


def test_cifar10_download_that_breaks_off_is_not_taken_for_the_archive(tmp_path, monkeypatch):
    def breaks_off(url, path):
        Path(path).write_bytes(b"half")
        raise urllib.error.ContentTooShortError("half", None)

    monkeypatch.setattr(urllib.request, "urlretrieve", breaks_off)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            Cifar10("val", tmp_path, flip=False)
    assert not (tmp_path / "cifar-10-binary.tar.gz").exists()


def test_cifar10_archive_of_another_md5_is_refused_and_not_unpacked(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=hashlib.md5(b"something else").hexdigest()) as error:
        Cifar10("val", tmp_path, flip=False)
    assert data.CIFAR10_MD5 in str(error.value) and "cifar-10-binary.tar.gz" in str(error.value)
    assert os.listdir(tmp_path) == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("fetched", [False, True])
def test_cifar10_archive_in_the_folder_or_fetched_is_unpacked(tmp_path, monkeypatch, cifar10, fetched):
    source, directory = tmp_path / "source.tar.gz", tmp_path / "data"
    with tarfile.open(source, "w:gz", compresslevel=1) as tar:
        tar.add(cifar10 / "cifar-10-batches-bin" / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(source.read_bytes()).hexdigest())
    fetches = []

    def fetch(url, path):
        fetches.append(url)
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(urllib.request, "urlretrieve", fetch)
    if not fetched:
        directory.mkdir()
        source.rename(directory / "cifar-10-binary.tar.gz")
    for _ in range(2):
        dataset = Cifar10("val", directory, flip=False)
        assert np.array_equal(dataset.images, Cifar10("val", cifar10, flip=False).images)
    assert fetches == ([data.CIFAR10_URL] if fetched else [])
    assert not list(directory.glob("*.part"))


# folders: which pictures

def test_train_and_val_folders_are_the_splits(tmp_path):
    save(tmp_path / "train" / "a" / "b" / "deep.PNG", (1, 2, 3))
    save(tmp_path / "train" / "flat.jpeg")
    save(tmp_path / "val" / "c" / "other.webp")
    save(tmp_path / "outside.png")
    (tmp_path / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "folder.png").mkdir()
    assert [path.name for path in pictures(tmp_path, "train").files] == ["deep.PNG", "flat.jpeg"]
    assert [path.name for path in pictures(tmp_path, "val").files] == ["other.webp"]
    assert_colour(pictures(tmp_path, "train")[0, None]["image"], (1, 2, 3))


def test_without_those_folders_one_picture_in_20_is_kept_for_validation(tmp_path):
    files = many_pictures(tmp_path, 400)
    training, validation = pictures(tmp_path, "train", 4), pictures(tmp_path, "val", 4)
    assert set(training.files) | set(validation.files) == set(files)
    assert not set(training.files) & set(validation.files)
    assert len(training) + len(validation) == 400
    assert 8 <= len(validation) <= 36
    assert training.files == sorted(training.files)


def test_a_lone_train_folder_is_split_like_any_other(tmp_path):
    for i in range(60):
        save(tmp_path / "train" / f"{i}.png", size=(4, 4))
    training, validation = pictures(tmp_path, "train", 4), pictures(tmp_path, "val", 4)
    assert len(training) + len(validation) == 60 and len(validation) < 15


def test_adding_pictures_moves_no_other_between_the_splits(tmp_path):
    many_pictures(tmp_path)
    before = {split: set(pictures(tmp_path, split, 4).files) for split in ("train", "val")}
    for i in range(40):
        save(tmp_path / "new" / f"{i}.png", size=(4, 4))
    for split in ("train", "val"):
        assert before[split] < set(pictures(tmp_path, split, 4).files)


def test_the_same_pictures_are_kept_for_validation_in_every_process(tmp_path):
    for i in range(100):
        save(tmp_path / "birds" / f"{i}.png", size=(4, 4))
    kept = ["49.png", "91.png", "98.png"]
    assert sorted(path.name for path in pictures(tmp_path, "val", 4).files) == sorted(kept)


def test_the_split_depends_on_the_name_below_the_folder_not_on_where_it_lies(tmp_path):
    for place in ("here", "there"):
        many_pictures(tmp_path / place)
    here, there = ([path.relative_to(tmp_path / place) for path in pictures(tmp_path / place, "val", 4).files]
                   for place in ("here", "there"))
    assert here == there


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; .*--data-dir"):
        pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no val pictures (.jpg")):
        pictures(tmp_path, "val")
    splits(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'val'} has no pictures (.jpg")):
        pictures(tmp_path, "val")


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.png is no folder"):
        pictures(save(tmp_path / "a.png"))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="imagenet"):
        open_dataset("imagenet", str(tmp_path), "val", 32)


def test_folder_fingerprint_tells_of_files_and_looks(tmp_path):
    splits(tmp_path)
    file = save(tmp_path / "val" / "a.png")
    first = pictures(tmp_path).fingerprint()
    assert pictures(tmp_path).fingerprint() == first
    found = {first, pictures(tmp_path, size=16).fingerprint(), pictures(tmp_path, flip=True).fingerprint(),
             pictures(tmp_path, upscale=True).fingerprint(), pictures(tmp_path, "train").fingerprint()}
    os.utime(file, ns=(0, 12345))
    found.add(pictures(tmp_path).fingerprint())
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(0, 12345))
    found.add(pictures(tmp_path).fingerprint())
    save(tmp_path / "val" / "b.png")
    found.add(pictures(tmp_path).fingerprint())
    file.unlink()
    found.add(pictures(tmp_path).fingerprint())
    assert len(found) == 9


# folders: what becomes of a picture

@pytest.mark.parametrize("name", [
    "a.png", "a.jpg", "A.JPEG", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.ppm", "a.gif"])
def test_formats_keep_their_colour(tmp_path, name):
    splits(tmp_path)
    save(tmp_path / "val" / name)
    assert_colour(only_picture(tmp_path), ORANGE, 4)


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)),
    ("RGBA", (*ORANGE, 255), ORANGE), ("RGBA", (*ORANGE, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
    ("LA", (77, 255), (77, 77, 77)), ("LA", (0, 0), (255, 255, 255)), ("LA", (0, 102), (153, 153, 153))])
def test_grey_and_transparent_pictures_become_rgb_on_white(tmp_path, mode, colour, expected):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", colour, mode=mode)
    assert_colour(only_picture(tmp_path), expected, 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path, name):
    splits(tmp_path)
    save(tmp_path / "val" / name, (0, 255, 255, 0), mode="CMYK")
    assert_colour(only_picture(tmp_path), (255, 0, 0), 6)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path, name, transparent):
    splits(tmp_path)
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(0, (0, 0, 16, 32))
    picture.save(tmp_path / "val" / name, **({"transparency": 0} if transparent else {}))
    image = only_picture(tmp_path)
    assert_colour(image[:, :, :16], (255, 255, 255) if transparent else (10, 20, 30))
    assert_colour(image[:, :, 16:], (200, 100, 50))


def test_rgb_png_with_a_transparent_colour_is_white_there(tmp_path):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", transparency=ORANGE)
    assert_colour(only_picture(tmp_path), (255, 255, 255))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    splits(tmp_path)
    levels = np.repeat(np.arange(32, dtype=np.uint16)[None] * 2000, 32, 0)
    Image.fromarray(levels).save(tmp_path / "val" / name)
    expected = np.broadcast_to(levels / 257, (3, 32, 32))
    assert np.abs(only_picture(tmp_path) - expected).max() <= 0.51


def test_dark_16_bit_grey_stays_dark(tmp_path):
    splits(tmp_path)
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "val" / "a.png")
    assert_colour(only_picture(tmp_path), (1, 1, 1))


@pytest.mark.parametrize("largest, expected", [(51400, 200), (200, 200)])
def test_32_bit_grey_is_taken_for_16_bit_if_it_does_not_fit_into_8(tmp_path, largest, expected):
    splits(tmp_path)
    Image.fromarray(np.full((32, 32), largest, np.int32)).save(tmp_path / "val" / "a.tif")
    assert_colour(only_picture(tmp_path), (expected,) * 3)


@pytest.mark.parametrize("orientation, corner", [
    (1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_are_turned_upright(tmp_path, orientation, corner, suffix):
    """`corner` is the quarter, (row, column), where the first stored pixel belongs, by the EXIF standard."""
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    splits(tmp_path)
    picture.save(tmp_path / "val" / f"a.{suffix}", exif=exif)
    image = only_picture(tmp_path)
    quarters = image.reshape(3, 2, 16, 2, 16)[:, :, 4:12, :, 4:12].mean((0, 2, 4))
    assert np.argwhere(quarters > 128).tolist() == [list(corner)]
    assert quarters.max() > 250 and np.sort(quarters.flatten())[2] < 5


def test_turning_upright_comes_before_the_crop(tmp_path):
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("red", (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png", 32).size == (32, 96)


def test_large_jpegs_are_decoded_at_reduced_size_but_not_below_what_is_needed(tmp_path):
    save(tmp_path / "a.jpg", size=(1600, 1200))
    width, height = open_picture(tmp_path / "a.jpg", 32).size
    assert 64 <= height < 1200 and width / height == pytest.approx(4 / 3, rel=0.02)
    save(tmp_path / "b.jpg", size=(100, 90))
    assert open_picture(tmp_path / "b.jpg", 64).size == (100, 90)


@pytest.mark.parametrize("damage", [
    "truncated.png", "truncated.jpg", "truncated.webp", "truncated.gif", "truncated.bmp",
    "empty.png", "empty.jpg", "text.png", "text.jpg", "text.gif"])
def test_damaged_files_are_named(tmp_path, damage):
    splits(tmp_path)
    file = noise(tmp_path / "val" / damage)
    if damage.startswith("truncated"):
        content = file.read_bytes()
        file.write_bytes(content[:len(content) // 2])
    else:
        file.write_bytes(b"no picture at all" if damage.startswith("text") else b"")
    sentence = re.escape(f"{file} cannot be read as a picture") + r" \(.+\): remove or replace it"
    with pytest.raises(ValueError, match=sentence):
        pictures(tmp_path)[0, None]


def test_picture_that_vanished_is_named(tmp_path):
    splits(tmp_path)
    file = save(tmp_path / "val" / "a.png")
    dataset = pictures(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="a.png cannot be read"):
        dataset[0, None]


def test_bomb_of_pixels_is_refused(tmp_path, monkeypatch):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        pictures(tmp_path)[0, None]


@pytest.mark.parametrize("size", [(31, 40), (40, 31), (1, 1)])
def test_small_pictures_are_refused_unless_upscaled(tmp_path, size):
    splits(tmp_path)
    file = save(tmp_path / "val" / "a.png", size=size)
    with pytest.raises(ValueError) as error:
        pictures(tmp_path)[0, None]
    for part in (str(file), f"{size[0]}×{size[1]} pixels", "image_size of 32", "--image-size", "--upscale"):
        assert part in str(error.value)
    assert_colour(pictures(tmp_path, upscale=True)[0, None]["image"], ORANGE)


def test_picture_of_exactly_the_size_is_unchanged(tmp_path):
    splits(tmp_path)
    file = noise(tmp_path / "val" / "a.png", (32, 32))
    assert np.array_equal(only_picture(tmp_path), np.asarray(Image.open(file)).transpose(2, 0, 1))


# crops

@pytest.mark.parametrize("width, height", [
    (96, 64), (64, 96), (33, 32), (32, 75), (500, 33), (32, 32), (7, 9), (101, 67)])
def test_validation_crop_is_the_centre_of_the_picture_with_its_shorter_side_resized(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scale = 32 / min(width, height)
    resized = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)),
                                             Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized)[top:top + 32, left:left + 32].transpose(2, 0, 1).astype(int)
    found = crop(Image.fromarray(pixels), 32, flip=True, random=None)
    assert found.shape == (3, 32, 32) and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found - expected).mean() < 0.5


def test_shrinking_averages_instead_of_picking_pixels():
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[::2] = 255  # fine stripes
    image = crop(Image.fromarray(pixels), 32, flip=False, random=None)
    assert np.abs(image.astype(int) - 127).max() < 12


def test_training_crops_reach_every_place_and_stay_inside():
    pixels = np.arange(36 * 34, dtype=np.float32).reshape(34, 36)
    pixels = np.stack([pixels // 256, pixels % 256, 0 * pixels], 2).astype(np.uint8)  # each pixel is unique

    def corners(pixels: ndarray) -> set[int]:
        """The second channel of the upper left pixel, in 60 crops of 34×34: two lines of 36 are spare."""
        crops = [crop(Image.fromarray(pixels), 34, False, np.random.default_rng(seed)) for seed in range(60)]
        return {int(image[1, 0, 0]) for image in crops}

    assert corners(pixels) == {0, 1, 2}
    assert corners(pixels.transpose(1, 0, 2)) == {0, 1, 2}


def test_training_crops_differ_between_epochs_pictures_and_seeds_and_are_reproducible(tmp_path):
    splits(tmp_path)
    (tmp_path / "train" / "plain.png").unlink()
    for name in ("a", "b"):  # the same picture twice
        noise(tmp_path / "train" / f"{name}.png", (128, 32))
    dataset = pictures(tmp_path, "train")
    looks = {(seed, epoch, index): dataset[index, (seed, epoch)]["image"].tobytes()
             for seed in (7, 8) for epoch in range(3) for index in (0, 1)}
    assert len(set(looks.values())) >= 10  # of 12: 97 places to cut at, so two may agree
    again = pictures(tmp_path, "train")
    for (seed, epoch, index), look in reversed(looks.items()):
        assert again[index, (seed, epoch)]["image"].tobytes() == look


def test_training_picture_without_a_key_and_validation_with_one_are_the_centre(tmp_path):
    for split in ("train", "val"):
        noise(tmp_path / split / "a.png", (128, 32))
    centre = np.asarray(Image.open(tmp_path / "val" / "a.png"))[:, 48:80].transpose(2, 0, 1)
    assert np.array_equal(pictures(tmp_path, "train", flip=True)[0, None]["image"], centre)
    for epoch in range(8):
        assert np.array_equal(pictures(tmp_path, "val", flip=True)[0, (0, epoch)]["image"], centre)


def test_pictures_are_mirrored_only_with_flip(tmp_path):
    splits(tmp_path)
    (tmp_path / "train" / "plain.png").unlink()
    file = noise(tmp_path / "train" / "a.png", (32, 32))
    original = np.asarray(Image.open(file)).transpose(2, 0, 1)
    plain, flipped = pictures(tmp_path, "train"), pictures(tmp_path, "train", flip=True)
    turned = 0
    for epoch in range(60):
        assert np.array_equal(plain[0, (0, epoch)]["image"], original)
        image = flipped[0, (0, epoch)]["image"]
        if not np.array_equal(image, original):
            assert np.array_equal(image, original[:, :, ::-1])
            turned += 1
    assert 15 < turned < 45


# orders

def take(order, count: int) -> list:
    return list(itertools.islice(order, count))


@pytest.mark.parametrize("count, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_each_epoch_is_another_permutation_and_batches_cross_its_border(count, batch_size):
    batches = take(training_order(count, batch_size, seed=3), 6 * count)
    assert all(len(batch) == batch_size for batch in batches)
    items = [item for batch in batches for item in batch]
    epochs = [items[i:i + count] for i in range(0, len(items) - count, count)]
    for epoch, group in enumerate(epochs):
        assert sorted(index for index, _ in group) == list(range(count))
        assert {key for _, key in group} == {(3, epoch)}
    if count > 5:
        assert len({tuple(index for index, _ in group) for group in epochs}) == len(epochs)


def test_another_seed_is_another_order():
    orders = {tuple(index for index, _ in next(training_order(50, 50, seed))) for seed in range(5)}
    assert len(orders) == 5
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize("start", [1, 2, 5, 23])
def test_batch_does_not_depend_on_where_the_run_started(start):
    expected = take(training_order(7, 3, seed=1), start + 8)[start:]
    assert take(training_order(7, 3, seed=1, start=start), 8) == expected


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_each_training_batch(world):
    whole = take(training_order(10, 12, seed=1, start=2), 5)
    shares = [take(training_order(10, 12, 1, 2, rank, world), 5) for rank in range(world)]
    for n, batch in enumerate(whole):
        assert all(len(share[n]) == 12 // world for share in shares)
        assert [shares[position % world][n][position // world] for position in range(12)] == batch


@pytest.mark.parametrize("count, batch_size, world", [
    (10, 3, 1), (10, 3, 3), (2, 5, 4), (12, 4, 3), (0, 4, 2)])
def test_fixed_order_sees_each_picture_once_over_all_processes(count, batch_size, world):
    shares = [fixed_order(count, batch_size, (1, 2), rank, world) for rank in range(world)]
    items = [item for share in shares for batch in share for item in batch]
    assert sorted(items) == [(index, (1, 2)) for index in range(count)]
    for share in shares:
        indices = [index for batch in share for index, _ in batch]
        assert indices == sorted(indices)
        assert all(len(batch) == batch_size for batch in share[:-1])
        assert all(0 < len(batch) <= batch_size for batch in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fixed_order_looks_plainly_unless_told_otherwise():
    assert fixed_order(3, 2) == [[(0, None), (1, None)], [(2, None)]]


# loading

@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_float32_between_minus_one_and_one(workers):
    order = [[(0, None), (51, None)], [(255, None)]]
    first, second = load(Numbers(256), order, CPU, workers)
    assert first.shape == (2, 3, 4, 4) and first.dtype == torch.float32
    assert (first[0] == -1).all() and (second[0] == 1).all()
    assert torch.allclose(first[1], torch.tensor(-0.6))


def test_workers_change_nothing(tmp_path):
    splits(tmp_path)
    for i in range(5):
        noise(tmp_path / "train" / f"{i}.png", (50, 40), seed=i)
    dataset = pictures(tmp_path, "train", flip=True)

    def batches(workers: int) -> list[Tensor]:
        return take(load(dataset, training_order(len(dataset), 4, 3, start=1), CPU, workers), 4)

    assert torch.equal(torch.stack(batches(0)), torch.stack(batches(2)))
    expected = np.stack([dataset[item]["image"] for item in take(training_order(len(dataset), 4, 3), 2)[1]])
    assert torch.equal(batches(0)[0], torch.from_numpy(expected).float() / 127.5 - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_state_of_the_run_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        assert len(take(load(Numbers(9), training_order(9, 2, 0), CPU, workers), 3)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_damaged_picture_is_named_from_a_worker_too(tmp_path):
    splits(tmp_path)
    (tmp_path / "val" / "bad.png").write_bytes(b"no picture")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="bad.png cannot be read as a picture") as error:
            list(load(pictures(tmp_path), fixed_order(1, 1), CPU, workers))
        traceback.clear_frames(error.tb)  # or the loader, kept in a cycle, waits 5 s for its worker later


class Interrupts(Numbers):
    """Pictures are filled with 1 where they are made by a process that ignores Ctrl-C."""

    def __getitem__(self, item) -> dict[str, ndarray]:
        return {"image": np.full((3, 4, 4), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, np.uint8)}


def test_workers_leave_interrupts_to_the_run():
    before = signal.getsignal(signal.SIGINT)
    for workers in (0, 1):
        batch, = load(Interrupts(1), fixed_order(1, 1), CPU, workers)
        assert torch.equal(batch, torch.full((1, 3, 4, 4), float(workers)) / 127.5 - 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_worker_count(monkeypatch):
    for cores, expected in ((2, 2), (64, 8), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert worker_count(-1, "folder") == expected
        assert worker_count(-1, "scenes") == worker_count(-1, "cifar10") == 0
        assert worker_count(0, "folder") == 0
        assert worker_count(5, "folder") == worker_count(5, "scenes") == 5


# the code cache

class Encoder:
    """Codes are the upper left quarter of the first channel times `factor`; counts its pictures."""

    def __init__(self, factor: int = 1):
        self.factor, self.pictures = factor, 0

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32 and not torch.is_grad_enabled()
        self.pictures += len(images)
        return ((images[:, 0, :2, :2] + 1) * 127.5).round().long() * self.factor


def cache(directory: Path, dataset, encode, views: int = 1, seed: int = 0, first_stage: str = "hash",
          rank: int = 0, world: int = 1, batch_size: int = 4) -> ndarray:
    return code_cache(directory, dataset, views, seed, first_stage, encode, (2, 2), batch_size, CPU,
                      workers=0, rank=rank, world=world)


def test_cache_holds_what_encoding_directly_gives(tmp_path):
    dataset, encode = Numbers(11), Encoder(250)
    codes = cache(tmp_path / "new" / "folder", dataset, encode, views=3, seed=5)
    assert codes.shape == (3, 11, 2, 2) and codes.dtype == np.uint16
    for view in range(3):
        for index in range(11):
            image = dataset[index, None if view == 0 else (5, view)]["image"]
            assert (codes[view, index] == 250 * image[0, :2, :2].astype(int)).all()
    assert codes.max() > 2**15  # 16 bits without a sign


def test_cache_is_computed_once_and_read_only(tmp_path):
    encode = Encoder()
    first = cache(tmp_path, Numbers(6), encode)
    assert encode.pictures == 6
    second = cache(tmp_path, Numbers(6), encode, batch_size=3)
    assert encode.pictures == 6
    assert np.array_equal(first, second)
    for codes in (first, second):
        assert isinstance(codes, np.memmap)
        with pytest.raises(ValueError):
            codes[0, 0] = 1
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_is_another_for_another_first_stage_other_pictures_or_views(tmp_path):
    encode = Encoder()
    looks = [{}, {"first_stage": "other"}, {"views": 2}, {"views": 2, "seed": 1}, {"views": 3}]
    for n, look in enumerate(looks):
        encode.pictures = 0
        cache(tmp_path, Numbers(6), encode, **look)
        assert encode.pictures == 6 * look.get("views", 1)
        assert len(list(tmp_path.glob("codes-*.npy"))) == n + 1
    encode.pictures = 0
    cache(tmp_path, Numbers(6, "other pictures"), encode)
    assert encode.pictures == 6
    cache(tmp_path, Numbers(6), encode, seed=9)  # the plain view alone does not depend on the seed
    assert encode.pictures == 6


def test_cache_is_made_anew_when_a_picture_changes(tmp_path):
    folder, encode = tmp_path / "pictures", Encoder()
    splits(folder)
    for i in range(3):
        save(folder / "val" / f"{i}.png", (i, 0, 0))
    assert cache(tmp_path / "codes", pictures(folder), encode)[0, :, 0, 0].tolist() == [0, 1, 2]
    save(folder / "val" / "1.png", (9, 0, 0))
    os.utime(folder / "val" / "1.png", ns=(0, 1))  # clocks may be coarse
    assert cache(tmp_path / "codes", pictures(folder), encode)[0, :, 0, 0].tolist() == [0, 9, 2]
    os.utime(folder / "val" / "1.png", ns=(0, 2))
    cache(tmp_path / "codes", pictures(folder), encode)
    assert encode.pictures == 9


def test_interrupted_cache_is_never_read(tmp_path):
    def interrupted(images: Tensor) -> Tensor:
        if images.max() > -1 + 4.5 / 127.5:  # in the second batch
            raise KeyboardInterrupt
        return Encoder()(images)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, Numbers(11), interrupted)
    assert not list(tmp_path.glob("*.npy")) and len(list(tmp_path.glob("*.part"))) == 1
    codes = cache(tmp_path, Numbers(11), Encoder())
    assert codes[0, :, 1, 1].tolist() == list(range(11))


def test_leftover_of_another_process_is_neither_read_nor_in_the_way(tmp_path):
    name = Path(cache(tmp_path / "once", Numbers(5), Encoder()).filename).name
    for leftover in (name.replace(".npy", ".part"), name.replace(".npy", ".1.part"),
                     name.replace(".npy", f".{os.getpid()}.part")):
        (tmp_path / leftover).write_bytes(b"half a file")
    encode = Encoder()
    assert cache(tmp_path, Numbers(5), encode)[0, :, 0, 0].tolist() == list(range(5))
    assert encode.pictures == 5


def test_processes_each_encode_their_share_into_one_file(tmp_path, monkeypatch):
    """Rank 1 runs from start to end inside the barrier where rank 0, with its share encoded, waits for it."""
    dataset, encoders, waits = Numbers(7), [Encoder(), Encoder()], []

    def broadcast(values: list, device: torch.device):
        values[0] = 4242  # process number of rank 0, which both put into the name of the temporary file

    def barrier():
        waits.append([path.name.split(".", 1)[1] for path in tmp_path.iterdir()])
        if len(waits) == 2:
            with pytest.raises(FileNotFoundError):  # it opens the file, which rank 0 has not renamed yet
                cache(tmp_path, dataset, encoders[1], rank=1, world=2)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "barrier", barrier)
    codes = cache(tmp_path, dataset, encoders[0], rank=0, world=2)
    assert [encoder.pictures for encoder in encoders] == [4, 3]
    assert codes[0, :, 0, 0].tolist() == list(range(7))
    assert waits == 5 * [["4242.part"]] + [["npy"]]  # rank 1 renames nothing
