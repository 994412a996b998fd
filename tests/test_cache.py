"""The code cache. Oracles: pictures and an encoder whose codes can be written down; files, counted."""
import dataclasses
import itertools
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import train_gpt
from cache import cached_codes
from helpers import ALONE
from picture_files import opened, save


class Numbers:
    """Picture i is filled with i, in view n of seed s with i + 50 + 50 n + s; its class is i mod 3."""

    def __init__(self, count: int, name: str = "numbers"):
        self.count, self.name = count, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item) -> dict:
        index, key = item
        pixels = np.full((3, 4, 4), index + (0 if key is None else 50 + 50 * key[1] + key[0]), np.uint8)
        return {"image": pixels, "class": np.int64(index % 3)}

    def fingerprint(self) -> str:
        return self.name


class Encoder:
    """Stands for a first stage: codes are the upper left quarter of a picture times 250; counts them."""

    side = 2

    def __init__(self, name: str = "hash"):
        self.name, self.pictures = name, 0

    def hash(self) -> str:
        return self.name

    def encode(self, values: Tensor) -> Tensor:
        self.pictures += len(values)
        return values[:, 0, :2, :2].long() * 250


def cache(directory: Path, dataset, encoder, views: int = 1, seed: int = 0, split: str = "train",
          **others) -> np.ndarray:
    config = dataclasses.replace(train_gpt.PRESETS["demo"], codes_dir=str(directory), seed=seed, views=views)
    codes = cached_codes(config, split, dataset, {"image": encoder} | others, ALONE)
    return codes["image"].arrays[0] if not others and views == 1 else codes


def test_a_cache_holds_what_encoding_gives_of_all_fields_and_views(tmp_path):
    dataset = Numbers(70)
    codes = cache(tmp_path / "new" / "folder", dataset, Encoder(), views=3, seed=5, **{"class": None})
    assert len(codes["image"]) == 210 and codes["image"][[209, 3]].shape == (2, 2, 2)
    assert codes["image"][[0]].dtype == np.uint16
    for view, index in itertools.product(range(3), range(70)):
        item = dataset[index, None if view == 0 else (5, view)]
        image, label = (codes[field][[70 * view + index]][0] for field in ("image", "class"))
        assert (image == 250 * item["image"][0, :2, :2].astype(int)).all() and label == index % 3
    assert codes["image"].arrays[2].max() > 2**15  # 16 bits without a sign
    assert len(cache(tmp_path, dataset, Encoder(), views=3, split="val")["image"]) == 70  # has one view


def test_a_cache_is_computed_once_and_is_another_for_whatever_changes_its_codes(tmp_path):
    encoder, count = Encoder(), 1
    first = cache(tmp_path, Numbers(6), encoder)
    second = cache(tmp_path, Numbers(6), encoder, seed=9)  # the plain view alone does not depend on the seed
    assert encoder.pictures == 6 and np.array_equal(first, second)
    for codes in (first, second):
        with pytest.raises(ValueError, match="read-only"):
            codes[0, 0] = 1
    for change, new in [({}, 0), ({"encoder": Encoder("other")}, 1), ({"dataset": Numbers(6, "other")}, 1),
                        ({"views": 2}, 1), ({"views": 4}, 2), ({"views": 2, "seed": 1}, 1)]:
        for expected in (new, 0):  # views that are there already are not encoded again
            one = change.get("encoder", encoder)
            one.pictures = 0
            cache(tmp_path, **{"dataset": Numbers(6), "encoder": one} | change)
            assert one.pictures == 6 * expected
        count += new
        assert len(list(tmp_path.glob("codes-*.npy"))) == count == len(list(tmp_path.iterdir()))
    encoder.pictures = 0
    cache(tmp_path, Numbers(6), encoder, **{"class": None})  # only what is missing is computed
    assert encoder.pictures == 0 and len(list(tmp_path.iterdir())) == count + 1


def test_an_interrupted_cache_is_never_read_and_a_damaged_one_is_named(tmp_path):
    class Interrupted(Encoder):
        def encode(self, values: Tensor) -> Tensor:
            if values.max() > 64:  # in the second batch
                raise KeyboardInterrupt
            return super().encode(values)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, Numbers(70), Interrupted())
    assert not list(tmp_path.iterdir())
    assert cache(tmp_path, Numbers(70), Encoder())[:, 1, 1].tolist() == [250 * i for i in range(70)]
    path = next(tmp_path.glob("*.npy"))
    whole = path.read_bytes()
    others = []
    for shape, dtype in (((70, 2, 2), float), ((69, 2, 2), np.uint16)):
        np.save(tmp_path / "other.npy", np.zeros(shape, dtype))
        others.append((tmp_path / "other.npy").read_bytes())
    for content in (whole[:-9], whole[:20], b"", *others):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*: remove it, and the codes are"):
            cache(tmp_path, Numbers(70), Encoder())


def encode_slowly(directory: Path, name: str, started, go_on):
    """Another run, which waits in the middle of its cache."""
    class Waiting(Encoder):
        def encode(self, values: Tensor) -> Tensor:
            started.set()
            go_on.wait(30)
            return super().encode(values)

    cache(directory, Numbers(5, name), Waiting())


def test_the_unfinished_file_of_a_killed_run_is_removed_but_never_that_of_a_living_one(tmp_path):
    fork = multiprocessing.get_context("fork")
    for kill in (False, True):
        started, go_on = fork.Event(), fork.Event()
        other = fork.Process(target=encode_slowly, args=(tmp_path, f"other {kill}", started, go_on))
        other.start()
        assert started.wait(30)
        part, = tmp_path.glob("*.part")
        cache(tmp_path, Numbers(6, f"here {kill}"), Encoder())
        assert part.exists()
        other.kill() if kill else go_on.set()  # an event that a dead process waits for cannot be set
        other.join()
        assert list(tmp_path.glob("*.part")) == [part] * kill
    cache(tmp_path, Numbers(6, "next"), Encoder())
    assert not part.exists()
    assert sorted(len(np.load(file)) for file in tmp_path.iterdir()) == [5, 6, 6, 6]


def test_a_full_disk_is_noticed_before_anything_is_encoded(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    encoder = Encoder()
    with pytest.raises(OSError, match=r"\(No space left on device\): make room, or name .* --codes-dir"):
        cache(tmp_path, Numbers(5), encoder)
    assert encoder.pictures == 0 and list(tmp_path.iterdir()) == []


def test_unreadable_training_pictures_are_named_and_replaced_and_in_validation_end_the_run(tmp_path, capsys):
    for split in ("train", "val"):
        for i in range(6):
            save(tmp_path / split / f"{i}.png", (i, 0, 0))
        (tmp_path / split / "2.png").write_bytes(b"no picture")
    codes = cache(tmp_path / "codes", opened(tmp_path, split="train"), Encoder(), views=3)
    assert codes["image"][range(18)][:, 0, 0].tolist() == [0, 250, 750, 750, 1000, 1250] * 3
    assert capsys.readouterr().out.count("skipped in training, 1 of 6 so far: ") == 1
    with pytest.raises(ValueError, match="val/2.png cannot be read as a picture"):
        cache(tmp_path / "codes", opened(tmp_path), Encoder(), split="val")
