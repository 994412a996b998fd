"""Claims about data.py.

Oracles: slices of the bytes of a CIFAR-10 file and of a picture's pixels, the numbers that a picture was made
of, and set identities of the orders (permutations, disjoint shares that together are everything).
"""
import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

import cifar10 as cifar10_module
import data
import files
import scenes
from data import (Cifar10, Preparation, Scenes, as_input, as_pictures, check_offered, fixed_batches, load,
                  open_dataset, prepare, read_field, training_batches)
from files import FIELDS
from picture_files import noise, opened, save, write
from scenes import draw_scene

CPU = torch.device("cpu")
RECORD = 3073  # one label and 3·32·32 pixels


class Numbers:
    """A data set whose picture i is filled with i; its class is i, or 1 in a process that ignores signals."""

    def __init__(self, count: int, signals: bool = False):
        self.count, self.signals = count, signals

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item) -> dict[str, ndarray]:
        ignored = {signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        value = ignored == {signal.SIG_IGN} if self.signals else item[0]
        return {"image": np.full((3, 4, 4), item[0], np.uint8), "class": np.int64(value)}


# Scenes

def test_scenes_are_the_drawn_scenes_with_channels_first():
    for size in (24, 65):  # kept and drawn anew
        dataset = open_dataset("scenes", "nowhere", "val", Preparation(size, (*FIELDS, "class")))
        scene = draw_scene("val", 3, size)
        for key in (None, (0, 1)):
            item = dataset[3, key]
            assert set(item) == {*FIELDS, "class"} and item["class"] == scene.label
            assert np.array_equal(item["image"].transpose(1, 2, 0), scene.image)
            assert np.array_equal(item["segmentation"], scene.segmentation)
            assert np.array_equal(item["depth"], scene.depth) and item["depth"].dtype == np.float32
        assert not np.array_equal(item["image"], dataset[4, None]["image"])
    assert dataset.segments() == len(scenes.SEGMENTS) and dataset.classes == scenes.CLASSES
    plain = open_dataset("scenes", "nowhere", "train", Preparation(24))
    assert set(plain[3, None]) == {"image"} and plain.classes == ()
    assert {"train": len(plain), "val": len(dataset)} == data.SCENES
    with pytest.raises(ValueError, match=f"masks of scenes have {dataset.segments()} labels, but"):
        few = dataset.segments() - 1
        open_dataset("scenes", "nowhere", "val", Preparation(24, ("segmentation",), segments=few))


def test_small_scenes_are_drawn_once_for_all_openings_and_no_user_can_change_them():
    data.draw_once.cache_clear()
    for fields in (("image",), ("depth", "class")):
        for _ in range(2):
            item = Scenes("train", Preparation(20, fields))[7, None]
            assert item[fields[0]].any()
            item[fields[0]][:] = 0
    assert data.draw_once.cache_info().misses == 1
    Scenes("train", Preparation(65))[7, None]
    assert data.draw_once.cache_info().misses == 1  # large ones would fill the memory


def test_the_pose_of_a_scene_is_drawn_where_its_key_points_are():
    dataset = open_dataset("scenes", "nowhere", "val", Preparation(64, ("pose",)))
    for index in range(8):
        pose, points = dataset[index, None]["pose"], draw_scene("val", index, 64).keypoints
        assert pose.shape == (3, 64, 64) and pose.dtype == np.uint8
        inside = points[((points >= 1) & (points < 63)).all(1)]
        assert len(inside) >= 6
        for x, y in inside:
            assert pose[:, int(y), int(x)].max() > 150
        for a, b in ((1, 2), (3, 4), (9, 10)):  # neck to hip, left elbow to hand, right knee to foot
            x, y = (points[a] + points[b]) / 2
            assert not (0 <= x < 64 and 0 <= y < 64) or pose[:, int(y), int(x)].max() > 100
        assert (pose.max(0) > 0).mean() < 0.15


def test_the_fingerprint_of_scenes_tells_of_split_size_count_fields_and_drawing(monkeypatch):
    def prints(fields: tuple = ("pose",)) -> str:
        return Scenes("val", Preparation(65, fields)).fingerprint()

    seen = {prints(), prints(("image",)), Scenes("train", Preparation(65, ("pose",))).fingerprint(),
            Scenes("val", Preparation(66, ("pose",))).fingerprint()}
    assert len(seen) == 4 and prints() in seen
    for module, name, value in ((data, "SCENES", {"val": 900}), (scenes, "SKIN", (0, 0, 0)),
                                (scenes, "draw_keypoints", lambda points, size, limbs: Image.new("RGB", size))):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            seen |= {prints(), prints(("image",))}
    assert len(seen) == 4 + 2 + 1 + 1  # the skin is not in the pose, nor the pose in the image


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


def test_cifar10_records_are_a_label_and_three_planes_of_pixels(cifar10, cifar10_bytes):
    for directory in (cifar10, cifar10 / "cifar-10-batches-bin"):
        dataset = open_dataset("cifar10", str(directory), "val", Preparation(32, ("image", "class")))
        assert len(dataset) == 10_000 and dataset.classes[3] == "cat"
        for index in (0, 5, 4321, 9999):
            record = cifar10_bytes[index * RECORD:(index + 1) * RECORD]
            item = dataset[index, None]
            assert item["class"] == record[0] == index % 10 and item["class"].dtype == np.int64
            assert item["image"].shape == (3, 32, 32) and item["image"].tobytes() == record[1:]
            item["image"][:] = 0
            assert dataset[index, None]["image"].tobytes() == record[1:]


def test_cifar10_trains_on_five_files_in_order_and_flips_half_of_the_training_pictures(cifar10):
    plain, flipped, validation = (open_dataset("cifar10", str(cifar10), split, Preparation(32, flip=flip))
                                  for split, flip in (("train", False), ("train", True), ("val", True)))
    assert len(plain) == len(flipped) == 50_000
    assert [plain[10_000 * i, None]["image"][2, 31, 31] for i in range(5)] == [1, 2, 3, 4, 5]
    original, turned = plain[4321, None]["image"], 0
    assert np.array_equal(flipped[4321, None]["image"], original)
    for epoch in range(100):
        for dataset in (plain, validation):
            assert np.array_equal(dataset[4321, (0, epoch)]["image"], original)
        image = flipped[4321, (0, epoch)]["image"]
        assert np.array_equal(image, flipped[4321, (0, epoch)]["image"])
        if not np.array_equal(image, original):
            assert np.array_equal(image, original[:, :, ::-1])
            turned += 1
    assert 30 < turned < 70
    sides = {np.array_equal(flipped[i, (0, 0)]["image"], plain[i, None]["image"]) for i in range(8)}
    assert sides == {True, False}  # not all pictures of an epoch the same way
    assert flipped.fingerprint() != plain.fingerprint() and flipped.digest() == plain.digest()


def cifar10_validation(directory: Path) -> Cifar10:
    return open_dataset("cifar10", str(directory), "val", Preparation(32))


def test_cifar10_files_of_another_size_and_other_picture_sizes_are_refused(tmp_path, cifar10_bytes):
    (tmp_path / "test_batch.bin").write_bytes(cifar10_bytes[:-1])
    wrong = "test_batch.bin has 30,729,999 bytes instead of 30,730,000: remove .*test_batch.bin, and"
    with pytest.raises(ValueError, match=wrong):
        cifar10_validation(tmp_path)
    with pytest.raises(ValueError, match="pictures of 32×32; image_size is 64"):
        open_dataset("cifar10", str(tmp_path), "val", Preparation(64))


def test_cifar10_without_files_or_with_a_broken_download_says_which_file_to_put_where(tmp_path, monkeypatch):
    def breaks_off(url, path):
        Path(path).write_bytes(b"half")
        raise urllib.error.ContentTooShortError("half", None)

    monkeypatch.setattr(urllib.request, "urlretrieve", breaks_off)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="could not be fetched .*half") as error:
            cifar10_validation(tmp_path / "new")
        for part in (str(tmp_path / "new"), "cifar-10-binary.tar.gz", cifar10_module.URL, "--data-dir"):
            assert part in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("fetched", [False, True])
def test_cifar10_archive_in_the_folder_or_fetched_is_unpacked(tmp_path, monkeypatch, cifar10, fetched):
    source, directory = tmp_path / "source.tar.gz", tmp_path / "data"
    with tarfile.open(source, "w:gz", compresslevel=1) as tar:
        tar.add(cifar10 / "cifar-10-batches-bin" / "test_batch.bin", "cifar-10-batches-bin/test_batch.bin")
    monkeypatch.setattr(cifar10_module, "MD5", hashlib.md5(source.read_bytes()).hexdigest())
    fetches = []

    def fetch(url, path):
        fetches.append(url)
        Path(path).write_bytes(source.read_bytes())

    monkeypatch.setattr(urllib.request, "urlretrieve", fetch)
    if not fetched:
        directory.mkdir()
        source.rename(directory / "cifar-10-binary.tar.gz")
    for _ in range(2):
        dataset = cifar10_validation(directory)
        assert np.array_equal(dataset.images, cifar10_validation(cifar10).images)
    assert fetches == ([cifar10_module.URL] if fetched else [])
    assert not list(directory.glob("*.part"))
    (directory / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    (directory / "cifar-10-binary.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=hashlib.md5(b"something else").hexdigest()):
        cifar10_validation(directory)


# Files: cropping

def centers(pixels: ndarray, size: int, field: str = "image") -> ndarray:
    """The crop of validation by Pillow alone: (H, W, ...) → (S, S, ...)."""
    height, width = pixels.shape[:2]
    resampling = Image.Resampling.NEAREST if field == "segmentation" else Image.Resampling.BICUBIC
    scale = size / min(width, height)
    resized = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), resampling)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized)[top:top + size, left:left + size]


def test_validation_crop_is_the_center_of_the_picture_with_its_shorter_side_resized(tmp_path):
    for size in ((96, 64), (64, 96), (33, 32), (32, 75), (500, 33), (32, 32), (7, 9), (101, 67)):
        path = noise(tmp_path / "a.png", size)
        image = read_field(path, "image", Preparation(32, upscale=True))
        expected = centers(np.asarray(Image.open(path)), 32).transpose(2, 0, 1).astype(int)
        assert image.shape == (1, 3, 32, 32) and image.dtype == torch.uint8
        assert np.abs(image[0].numpy() - expected).mean() < (0.5 if min(size) != 32 else 1e-9)


def test_shrinking_averages_pictures_mixes_no_labels_and_keeps_depth_in_its_range(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[::2] = 255
    for field, pixels in (("image", np.stack([stripes] * 3, 2)), ("pose", np.stack([stripes] * 3, 2)),
                          ("depth", stripes)):
        values = read_field(write(tmp_path / "a.png", pixels), field, Preparation(32)).float()
        assert (values - (0 if field == "depth" else 127)).abs().max() < (0.1 if field == "depth" else 12)
    pose = np.stack([stripes.repeat(4, 0)[:256]] * 3, 2)  # a larger size than in training needs their detail
    values = read_field(write(tmp_path / "a.jpg", pose), "pose", Preparation(32), (256, 256))
    assert np.abs(values[0].numpy().transpose(1, 2, 0) - pose.astype(float)).mean() < 12
    labels = np.random.default_rng(0).choice([3, 90, 255], (50, 60)).astype(np.uint8)
    depth = write(tmp_path / "b.npy", labels > 89)
    for size in (20, 75):
        mask = read_field(write(tmp_path / "c.png", labels), "segmentation", Preparation(size, upscale=True))
        assert mask.shape == (1, size, size) and set(mask.unique().tolist()) == {3, 90, 255}
        values = read_field(depth, "depth", Preparation(size, upscale=True))
        assert values.dtype == torch.float32 and -1 <= values.min() < values.max() <= 1


def test_training_crops_reach_every_place_and_stay_inside(tmp_path):
    pixels = np.arange(36 * 34).reshape(34, 36)
    pixels = np.stack([pixels // 256, pixels % 256, 0 * pixels], 2).astype(np.uint8)  # each pixel is unique
    for array in (pixels, pixels.transpose(1, 0, 2)):  # two columns or lines of 36 are spare
        record = {"image": write(tmp_path / "a.png", array)}
        crops = [prepare(record, Preparation(34), np.random.default_rng(seed))["image"] for seed in range(60)]
        assert {int(image[1, 0, 0]) for image in crops} == {0, 1, 2}


def test_augmentations_differ_between_epochs_pictures_and_seeds_and_are_reproducible(tmp_path):
    for name in ("train/a", "train/b", "val/a"):  # the same picture
        noise(tmp_path / f"{name}.png", (128, 32))
    training, flipped, validation = (opened(tmp_path, split=split, flip=flip)
                                     for split, flip in (("train", False), ("train", True), ("val", True)))
    crops = {(seed, epoch, index): training[index, (seed, epoch)]["image"].tobytes()
             for seed in (7, 8) for epoch in range(3) for index in (0, 1)}
    assert len(set(crops.values())) >= 10  # of 12: 97 places to cut at, so two may agree
    again = opened(tmp_path, split="train")
    for (seed, epoch, index), crop in reversed(crops.items()):
        assert again[index, (seed, epoch)]["image"].tobytes() == crop
    pixels = np.asarray(Image.open(tmp_path / "val" / "a.png")).transpose(2, 0, 1)
    for dataset, key in ((training, None), (flipped, None), (validation, (0, 0)), (validation, (0, 1))):
        assert np.array_equal(dataset[0, key]["image"], pixels[:, :, 48:80])
    windows = {pixels[:, :, i:i + 32].tobytes(): False for i in range(97)}
    windows |= {pixels[:, :, i:i + 32][:, :, ::-1].tobytes(): True for i in range(97)}
    mirrored = [windows[flipped[0, (0, epoch)]["image"].tobytes()] for epoch in range(60)]
    assert 15 < sum(mirrored) < 45
    assert not any(windows[training[0, (0, epoch)]["image"].tobytes()] for epoch in range(20))


@pytest.mark.parametrize("times", [1, 3])
def test_all_fields_are_cut_alike_at_any_resolution(tmp_path, times):
    """Squares whose colour, label, depth and drawn pose are one number; the others `times` as large."""
    numbers = np.random.default_rng(0).permutation(48).reshape(6, 8).astype(np.uint8)
    blocks = np.kron(numbers, np.ones((10, 10), np.uint8))  # (60, 80)
    finer = np.kron(blocks, np.ones((times, times), np.uint8))
    for split in ("train", "val"):
        write(tmp_path / split / "images" / "a.png", np.stack([5 * blocks] * 3, 2))
        write(tmp_path / split / "segmentation" / "a.png", finer)
        write(tmp_path / split / "depth" / "a.npy", finer)
        write(tmp_path / split / "pose" / "a.png", np.stack([5 * finer] * 3, 2))
    dataset = opened(tmp_path, "pose", "image", "segmentation", "depth", split="train", size=30, flip=True)
    seen = set()
    for epoch in range(12):
        item = dataset[0, (0, epoch)]
        labels = item["segmentation"].astype(float)
        seen.add(item["segmentation"].tobytes())
        inner = np.ones((30, 30), bool)  # away from the squares' borders, where colours mix
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                inner &= np.roll(labels, shift, axis) == labels
        inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = False
        assert inner.sum() > 20
        assert np.abs(item["image"][0] / 5 - labels)[inner].max() < 1.5
        assert np.abs(item["pose"][0] / 5 - labels)[inner].max() < 1.5
        assert np.abs((item["depth"] + 1) / 2 * 47 - labels)[inner].max() < 1.5
    assert len(seen) > 8


def test_sizes_must_agree_up_to_rounding_and_small_files_are_refused_unless_upscaled(tmp_path):
    """The decoder halves 257×264 to 33×33, which is another shape by 1/33."""
    for i, (suffix, size, mask_size, wanted, match) in enumerate((
            ("png", (1000, 750), (1000, 750), 16, ""), ("png", (1000, 750), (1000, 740), 16, ""),
            ("png", (1000, 750), (500, 375), 16, ""), ("jpg", (257, 264), (257, 264), 16, ""),
            ("png", (80, 60), (40, 30), 60, ""), ("png", (32, 32), (32, 32), 32, ""),
            ("png", (1000, 750), (1000, 700), 16, "both must show the same"),
            ("png", (80, 60), (60, 80), 30, "segmentation/a.png has another aspect ratio than .*images/a.png"),
            ("png", (31, 40), (31, 40), 32, "images/a.png has 31×40 pixels, too few"))):
        for split in ("train", "val"):
            save(tmp_path / str(i) / split / "images" / f"a.{suffix}", size=size)
            save(tmp_path / str(i) / split / "segmentation" / "a.png", 1, mask_size, "L")
        if match:
            with pytest.raises(ValueError, match=match):
                opened(tmp_path / str(i), "image", "segmentation", size=wanted)[0, None]
        else:
            item = opened(tmp_path / str(i), "image", "segmentation", size=wanted)[0, None]
            assert item["segmentation"].tolist() == [[1] * wanted] * wanted
    assert opened(tmp_path / "8", upscale=True)[0, None]["image"].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="segmentation/a.png has 40×30 pixels, too few"):
        opened(tmp_path / "4", "segmentation", size=60)[0, None]
    mask = tmp_path / "5" / "val" / "segmentation" / "a.png"  # of 32×32
    assert data.read_field(mask, "segmentation", Preparation(32), (32, 64)).shape == (1, 32, 64)  # is enlarged


def test_points_follow_the_crop_and_the_mirror_of_their_image(tmp_path):
    """A white square in the image, the only key point in the middle of it."""
    random = np.random.default_rng(0)
    for i in range(12):
        x, y = random.integers(30, 50), random.integers(20, 40)
        pixels = np.zeros((60, 90, 3), np.uint8)
        pixels[y - 6:y + 7, x - 6:x + 7] = 255
        for split in ("train", "val"):
            write(tmp_path / split / "images" / f"{i}.png", pixels)
            write(tmp_path / split / "pose" / f"{i}.npy", np.array([[x, y]]))
    dataset = opened(tmp_path, "image", "pose", split="train", size=40, flip=True)
    compared = 0
    for i in range(12):
        item = dataset[i, (0, 0)]
        squares, discs = np.argwhere(item["image"][0] > 128), np.argwhere(item["pose"][0] > 128)
        whole = len(squares) > 60 and squares.min() > 0 and squares.max() < 39
        if whole:
            compared += 1
            assert np.abs(squares.mean(0) - discs.mean(0)).max() < 0.8
    assert compared > 5


def test_key_points_alone_are_pixels_of_the_square_and_refused_if_they_are_not(tmp_path):
    path = write(tmp_path / "a.npy", np.array([[20.0, 10, 1], [30, 30, 0]]))
    pose = read_field(path, "pose", Preparation(48, ("image", "pose")))
    assert pose.shape == (1, 3, 48, 48) and pose[0, :, 10, 20].max() == 255
    rows, columns = np.nonzero(pose[0].amax(0).numpy() > 128)
    assert np.abs([rows.mean() - 9.5, columns.mean() - 19.5]).max() < 0.6 and np.ptp(rows) < 6
    with pytest.raises(ValueError, match="a.npy has key points up to 30; without an image .* of 24×24"):
        read_field(path, "pose", Preparation(24))
    wide = read_field(path, "pose", Preparation(24), (31, 64))  # of another shape they are that one's pixels
    assert wide.shape == (1, 3, 31, 64) and wide[0, :, 10, 20].max() > 200 and wide[0, :, :, 32:].max() == 0
    with pytest.raises(ValueError, match="a.npy has key points up to 30; without an image .* of 64×29"):
        read_field(path, "pose", Preparation(24), (29, 64))


def test_a_file_is_read_as_validation_sees_it(tmp_path):
    """Whatever the fields of the preparation, and whether it flips."""
    for split in ("train", "val"):
        noise(tmp_path / split / "images" / "a.png", (50, 40))
        labels = np.random.default_rng(0).integers(0, 9, (40, 50), np.uint8)
        write(tmp_path / split / "segmentation" / "a.png", labels)
        write(tmp_path / split / "depth" / "a.npy", np.random.default_rng(1).random((40, 50)))
    dataset = opened(tmp_path, "image", "segmentation", "depth", flip=True)
    batch, = load(dataset, fixed_batches(1, 1), CPU, 0)
    for field, file in dataset.records[0].items():
        values = read_field(file, field, dataset.preparation)
        assert torch.equal(values, batch[field]) and values.dtype == batch[field].dtype
    with pytest.raises(ValueError, match="a.png has the label 8, but"):
        read_field(dataset.records[0]["segmentation"], "segmentation", Preparation(32, segments=8))


# Files: what they depend on

def test_the_fingerprint_tells_of_all_that_an_item_depends_on_and_the_digest_of_names(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    for split in ("train", "val"):
        for i in range(3):
            save(folder / split / "images" / f"{i}.png")
            save(folder / split / "segmentation" / f"{i}.png", 1, mode="L")
            write(folder / split / "pose" / f"{i}.npy", np.ones((2, 2)))
    prints, digests = set(), set()

    def note(*fields: str, folder: Path = folder, **options) -> tuple[int, int]:
        dataset = opened(folder, *fields, **options)
        prints.add(dataset.fingerprint())
        digests.add(dataset.digest())
        return len(prints), len(digests)

    assert note() == note() == (1, 1)
    assert note(size=16) == (2, 1) and note(flip=True) == (3, 1) and note(upscale=True) == (4, 1)
    assert note("segmentation") == (5, 2) and note("segmentation", void_label=1) == (6, 2)
    assert note("pose") == (7, 3)  # the image, too
    os.utime(folder / "val" / "images" / "0.png", ns=(0, 12345))
    assert note("pose") == (8, 3) and note() == (9, 3)
    monkeypatch.setattr(data, "READER_VERSION", files.READER_VERSION + 1)
    assert note() == (10, 3)
    (folder / "val" / "images" / "0.png").open("ab").write(b"\0")
    assert note() == (11, 4)
    save(folder / "val" / "images" / "3.png")
    assert note() == (12, 5)
    folder.rename(tmp_path / "there")
    assert note(folder=tmp_path / "there")[1] == 5
    monkeypatch.chdir(tmp_path / "there")
    assert note(folder=Path("."))[1] == 5


def test_labels_are_counted_up_to_the_largest_of_all_masks_without_void_pixels(tmp_path):
    for split in ("train", "val"):
        for name, label in (("a", 255), ("b", 3 if split == "train" else 255), ("c", 7), ("d", 0)):
            save(tmp_path / split / "segmentation" / f"{name}.png", label, mode="L")
    for split, void_label, expected in (("train", 255, 8), ("train", 7, 4), ("val", 7, 1)):
        assert opened(tmp_path, "segmentation", split=split, void_label=void_label).segments() == expected


def test_shades_of_grey_instead_of_labels_are_warned_of(tmp_path, capsys):
    for split in ("train", "val"):
        for name, label in (("a", 0), ("b", 128), ("c", 255)):
            save(tmp_path / split / "segmentation" / f"{name}.png", label, mode="L")
        assert opened(tmp_path, "segmentation", split=split).segments() == 129
    assert capsys.readouterr().out.count("warning: 2 labels up to 128 in the masks of") == 1
    save(tmp_path / "train" / "segmentation" / "b.png", 1, mode="L")
    assert opened(tmp_path, "segmentation", split="train").segments() == 2
    for name in "ab":
        save(tmp_path / "train" / "segmentation" / f"{name}.png", 255, mode="L")
    assert opened(tmp_path, "segmentation", split="train").segments() == 1  # no pixel has a label
    assert capsys.readouterr().out == ""


def test_fields_that_a_data_set_does_not_have_are_named():
    with pytest.raises(ValueError, match="ade20k has no 'pose'; it has image, segmentation"):
        check_offered("ade20k", "pose")
    with pytest.raises(ValueError, match="cifar10 has no 'depth'"):
        open_dataset("cifar10", "nowhere", "val", Preparation(32, ("depth",)))
    with pytest.raises(ValueError, match="split is 'test'; choose one of train, val"):
        open_dataset("scenes", "nowhere", "test", Preparation(32))


# Orders

def take(batches, count: int) -> list:
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("count, batch_size", [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_each_epoch_is_another_permutation_and_batches_cross_its_border(count, batch_size):
    batches = take(training_batches(count, batch_size, seed=3), 6 * count)
    assert all(len(batch) == batch_size for batch in batches)
    items = [item for batch in batches for item in batch]
    epochs = [items[i:i + count] for i in range(0, len(items) - count, count)]
    for epoch, group in enumerate(epochs):
        assert sorted(index for index, _ in group) == list(range(count))
        assert {key for _, key in group} == {(3, epoch)}
    if count > 5:
        orders = {tuple(index for index, _ in group) for group in epochs}
        assert len(orders) == len(epochs)
        assert not orders & {tuple(index for index, _ in next(training_batches(count, count, seed=4)))}


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_each_training_batch_wherever_the_run_started(world):
    whole = take(training_batches(10, 12, seed=1), 7)[2:]
    shares = [take(training_batches(10, 12, 1, 2, rank, world), 5) for rank in range(world)]
    for n, batch in enumerate(whole):
        assert all(len(share[n]) == 12 // world for share in shares)
        assert [shares[position % world][n][position // world] for position in range(12)] == batch


@pytest.mark.parametrize("count, batch_size, world", [
    (10, 3, 1), (10, 3, 3), (2, 5, 4), (12, 4, 3), (0, 4, 2)])
def test_fixed_batches_hold_each_picture_once_over_all_processes(count, batch_size, world):
    shares = [fixed_batches(count, batch_size, (1, 2), rank, world) for rank in range(world)]
    items = [item for share in shares for batch in share for item in batch]
    assert sorted(items) == [(index, (1, 2)) for index in range(count)]
    for share in shares:
        indices = [index for batch in share for index, _ in batch]
        assert indices == sorted(indices)
        assert all(len(batch) == batch_size for batch in share[:-1])
        assert all(0 < len(batch) <= batch_size for batch in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert fixed_batches(3, 2) == [[(0, None), (1, None)], [(2, None)]]


# Loading

@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_all_fields_as_they_are_and_loading_leaves_the_random_state_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = load(Numbers(256), [[(0, None), (51, None)], [(255, None)]], CPU, workers)
    assert first["image"].dtype == torch.uint8 and first["image"][:, 2, 3, 3].tolist() == [0, 51]
    assert second["class"].dtype == torch.int64 and second["class"].tolist() == [255]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing(tmp_path):
    for i in range(6):
        noise(tmp_path / "train" / f"{i}.png", (50, 40), seed=i)
    noise(tmp_path / "val" / "a.png")
    dataset = opened(tmp_path, split="train", flip=True)

    def batches(workers: int) -> Tensor:
        loaded = load(dataset, training_batches(len(dataset), 4, 3, start=1), CPU, workers)
        return torch.stack([batch["image"] for batch in take(loaded, 4)])

    assert torch.equal(batches(0), batches(2))
    expected = np.stack([dataset[item]["image"] for item in take(training_batches(len(dataset), 4, 3), 2)[1]])
    assert torch.equal(batches(0)[0], torch.from_numpy(expected))


def test_a_damaged_picture_and_a_label_too_large_are_named_from_a_worker_too(tmp_path):
    save(tmp_path / "a.png", 7, mode="L")
    (tmp_path / "b.png").write_bytes(b"no picture")
    for workers in (0, 1):
        for file, field, match in (("b.png", "image", "b.png cannot be read as a picture"),
                                   ("a.png", "segmentation", "a.png has the label 7, but")):
            dataset = opened(tmp_path)
            dataset.preparation = Preparation(32, (field,), segments=7)
            dataset.records = [{field: tmp_path / file}]
            with pytest.raises(ValueError, match=match):
                list(load(dataset, fixed_batches(1, 1), CPU, workers))
            assert not multiprocessing.active_children()  # else the garbage collector waits for them later


def break_files(*paths: Path):
    """Damage pictures in several ways: cut off, empty, no picture."""
    for i, path in enumerate(paths):
        path.write_bytes((path.read_bytes()[:-40], b"", b"no picture")[i % 3])


def test_in_training_the_next_picture_stands_in_for_an_unreadable_one_which_is_named_once(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")  # each process names those that it reads
    for i in range(12):
        noise(tmp_path / "train" / f"{i:02d}.png", (50, 40), seed=i)
    save(tmp_path / "val" / "a.png")
    whole = opened(tmp_path, split="train", flip=True)
    expected = whole[5, (0, 0)]["image"]
    record, random = whole.records[5], data.augmentation_rng((0, 0), 3)
    stands_in = prepare(record, whole.preparation, random)["image"]  # with the augmentation of number 3
    break_files(*(tmp_path / "train" / f"{i:02d}.png" for i in (3, 4, 11)))
    for workers in (0, 2):
        dataset = opened(tmp_path, split="train", flip=True)
        for _ in range(2):
            batches = list(load(dataset, fixed_batches(12, 6, (0, 0)), CPU, workers))
            assert [set(batch) for batch in batches] == [{"image"}] * 2
            images = torch.cat([batch["image"] for batch in batches]).numpy()
            assert np.array_equal(images[5], expected) and np.array_equal(images[3], stands_in)
            assert not np.array_equal(images[4], images[3])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("(")[0] for line in lines] == [
            f"skipped in training, {n} of 12 so far: {tmp_path}/train/{name}.png cannot be read as a picture "
            for n, name in ((1, "03"), (2, "04"), (3, "11"))]
    break_files(*(tmp_path / "train" / f"{i:02d}.png" for i in (0, 1, 9)))
    with pytest.raises(ValueError, match="^6 of 12 training pictures cannot be read, .* at most 5 may be"):
        list(load(opened(tmp_path, split="train"), fixed_batches(12, 4), CPU, 0))
    break_files(*tmp_path.glob("train/*.png"))
    with pytest.raises(files.UnreadableError, match="01.png cannot be read"):  # no picture can stand in
        opened(tmp_path, split="train")[1, None]


def test_one_training_picture_in_a_hundred_may_be_unreadable_but_none_may_be_wrong(tmp_path):
    for i in range(700):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{i}.png").touch()
    save(tmp_path / "val" / "a.png")
    dataset = opened(tmp_path, split="train")
    dataset.report({i: "a sentence" for i in range(7)})
    with pytest.raises(ValueError, match="^8 of 700 training pictures cannot be read, .* at most 7 may be"):
        dataset.report({7: "a sentence"})
    save(dataset.records[0]["image"], size=(9, 9))  # is a picture
    with pytest.raises(ValueError, match="has 9×9 pixels, too few") as error:
        dataset[0, None]
    assert error.type is ValueError
    for split in ("train", "val"):
        save(tmp_path / "masks" / split / "segmentation" / "a.png", 2, mode="L")
        (tmp_path / "masks" / split / "segmentation" / "b.png").touch()
        assert opened(tmp_path / "masks", "segmentation", split=split).segments() == 3


def test_workers_leave_signals_to_the_run_and_do_not_outlive_it():
    """A run that ends with a loader still referenced: at exit nothing may wait for its workers."""
    before = signal.getsignal(signal.SIGTERM)
    for workers in (0, 1):
        batch, = load(Numbers(1, signals=True), fixed_batches(1, 1), CPU, workers)
        assert batch["class"].item() == workers
    assert signal.getsignal(signal.SIGTERM) is before
    program = """if True:
        import data, os, sys, time, torch
        forks, fork = iter(sys.argv[1]), os.fork
        os.fork = lambda: fork() if next(forks) == "1" else time.sleep(1) or sys.exit(3)
        dataset = data.open_dataset("scenes", "", "val", data.Preparation(8))
        batches = data.load(dataset, [[(0, None)]] * 9, torch.device("cpu"), len(sys.argv[1]))
        next(batches)"""
    cases = ("1", 0), ("10", 3)  # one worker, which starts; two, of which the second does not
    runs = [subprocess.Popen([sys.executable, "-c", program, forks], cwd=Path(data.__file__).parent,
                             stderr=subprocess.PIPE, text=True) for forks, _ in cases]
    try:
        for (_, status), process in zip(cases, runs):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == status and (status or errors == "")
    finally:
        for process in runs:
            process.kill()


def test_files_are_prepared_by_a_worker_per_core_unless_a_number_is_asked_for(tmp_path, monkeypatch):
    for split in ("train", "val"):
        save(tmp_path / split / "a.png")
    asked = []

    def stands_in(dataset, num_workers, **others):
        asked.append(num_workers)
        raise LookupError  # before any worker starts

    monkeypatch.setattr(data, "DataLoader", stands_in)
    for cores, expected in ((2, 2), (64, 8), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda: 1000 if cores else None)
        if cores:  # that this process may use
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
        else:  # a system that tells nothing
            monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        for workers in (-1, 0, 5):
            for dataset in (opened(tmp_path), Scenes("val", Preparation(8))):
                with pytest.raises(LookupError):
                    next(load(dataset, [], CPU, workers))
        assert asked == [expected, 0, 0, 0, 5, 5]
        asked.clear()


# Fields

def test_a_mask_is_one_hot_and_nowhere_hot_without_a_label():
    labels = torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8)
    one_hot = as_input(labels, "segmentation", 3)
    assert one_hot.dtype == torch.float32 and one_hot.shape == (1, 3, 2, 2)
    assert one_hot[0].permute(1, 2, 0).tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]]


def test_depth_has_one_channel_and_a_pose_is_a_picture():
    depth = torch.linspace(-1, 1, 8).view(2, 2, 2)
    assert torch.equal(as_input(depth, "depth", 1), depth.view(2, 1, 2, 2))
    pose = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert as_input(pose, "pose", 3).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_each_label_gets_a_colour_of_its_own_and_none_is_black():
    one_hot = torch.eye(20).view(20, 20, 1, 1)  # a pixel of each label
    pictures = as_pictures(torch.cat([one_hot, torch.zeros(1, 20, 1, 1)]), "segmentation")  # (21, 3, 1, 1)
    colours = pictures.flatten(1)
    assert colours.shape == (21, 3) and colours.abs().max() <= 1 and colours[20].tolist() == [-1, -1, -1]
    assert torch.cdist(colours, colours)[~torch.eye(21, dtype=torch.bool)].min() > 0.15
    assert torch.equal(as_pictures(5 * one_hot - 2, "segmentation"), pictures[:20])  # logits
    images = torch.rand(2, 3, 4, 4)
    assert as_pictures(images, "image") is images
