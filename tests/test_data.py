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
from data import (Cifar10, Scenes, as_input, as_pictures, code_cache, fixed_order, load, open_dataset,
                  training_order, worker_count)
from picture_files import assert_colour, noise, pictures, save, splits
from layouts import FIELDS
from scenes import draw_scene

CPU = torch.device("cpu")
ORANGE = (240, 130, 20)
RECORD = 3073  # one label and 3·32·32 pixels


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
    dataset, scene = open_dataset("scenes", "nowhere", "val", 24, fields=FIELDS), draw_scene("val", 3, 24)
    item = dataset[3, None]
    assert set(item) == {*FIELDS, "label"}
    assert item["image"].shape == (3, 24, 24) and item["image"].dtype == np.uint8
    assert np.array_equal(item["image"].transpose(1, 2, 0), scene.image)
    assert item["label"] == scene.label and dataset.segments() == 8
    for name in ("segmentation", "depth"):
        assert np.array_equal(item[name], getattr(scene, name)) and item[name].dtype == getattr(scene, name).dtype
    assert set(open_dataset("scenes", "nowhere", "val", 24)[3, None]) == {"image", "label"}


def test_the_pose_of_a_scene_is_drawn_where_its_key_points_are():
    dataset = open_dataset("scenes", "nowhere", "val", 64, fields=("pose",))
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
    sets = [Scenes("train", 16), Scenes("val", 16), Scenes("train", 32), Scenes("train", 32, ("depth",))]
    assert [len(dataset) for dataset in sets] == [16000, 1000, 16000, 16000]
    prints = {dataset.fingerprint() for dataset in sets}
    assert len(prints) == 4
    assert Scenes("val", 16).fingerprint() in prints
    monkeypatch.setitem(data.SCENES, "val", 16000)
    assert Scenes("val", 16).fingerprint() not in prints


@pytest.mark.parametrize("field, told", [("pose", True), ("depth", False)])
def test_the_fingerprint_of_drawn_poses_tells_of_how_points_are_drawn(monkeypatch, field, told):
    before = Scenes("val", 16, (field,)).fingerprint()
    monkeypatch.setattr(data, "draw_keypoints", lambda points, size, limbs: None)
    assert (Scenes("val", 16, (field,)).fingerprint() != before) == told


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
        assert worker_count(-1, "folder") == worker_count(-1, "ade20k") == expected
        assert worker_count(-1, "scenes") == worker_count(-1, "cifar10") == 0
        assert worker_count(0, "folder") == 0
        assert worker_count(5, "folder") == worker_count(5, "scenes") == 5


# fields

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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_beyond_the_channels_is_named(tmp_path, workers):
    for split in ("train", "val"):
        save(tmp_path / split / "segmentation" / "a.png", 7, mode="L")
    dataset = open_dataset("folder", str(tmp_path), "val", 32, fields=("segmentation",))
    batch = next(load(dataset, fixed_order(1, 1), CPU, workers, "segmentation", 8))
    assert batch.shape == (1, 8, 32, 32) and batch[:, 7].min() == 1
    with pytest.raises(ValueError, match="a mask has the label 7, but segments is 7: raise --segments, or name"):
        next(load(dataset, fixed_order(1, 1), CPU, workers, "segmentation", 7))
    void = open_dataset("folder", str(tmp_path), "val", 32, fields=("segmentation",), void_label=7)
    assert next(load(void, fixed_order(1, 1), CPU, workers, "segmentation", 7)).max() == 0


def test_labels_are_counted_up_to_the_largest_of_all_masks_without_void_pixels(tmp_path):
    for split in ("train", "val"):
        for name, label in (("a", 255), ("b", 3 if split == "train" else 255), ("c", 7), ("d", 0)):
            save(tmp_path / split / "segmentation" / f"{name}.png", label, mode="L")
    for split, void_label, expected in (("train", 255, 8), ("train", 7, 4), ("val", 7, 1)):
        dataset = open_dataset("folder", str(tmp_path), split, 32, fields=("segmentation",),
                               void_label=void_label)
        assert dataset.segments() == expected


def test_each_label_gets_a_colour_of_its_own_and_none_is_black():
    one_hot = torch.eye(20).view(20, 20, 1, 1)  # a pixel of each label
    pictures = as_pictures(torch.cat([one_hot, torch.zeros(1, 20, 1, 1)]), "segmentation")  # (21, 3, 1, 1)
    colours = pictures.flatten(1)
    assert colours.shape == (21, 3) and colours.abs().max() <= 1 and colours[20].tolist() == [-1, -1, -1]
    assert torch.cdist(colours, colours)[~torch.eye(21, dtype=torch.bool)].min() > 0.15
    assert colours[0].tolist() == pytest.approx([1, 0.2, 0.2])  # red, two fifths saturated
    logits = 5 * one_hot - 2
    assert torch.equal(as_pictures(logits, "segmentation"), pictures[:20])
    images = torch.rand(2, 3, 4, 4)
    assert as_pictures(images, "image") is images


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
