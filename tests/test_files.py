"""Claims about files.py, many through data.open_dataset.

Oracles: which files were made, what each layout's official description says of them, and the colours, labels,
depths and points that a file was made of.
"""
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import files
import run
from data import fixed_batches, load
from files import open_depth, open_labels, open_pose, open_rgb, path_hash
from picture_files import ORANGE, names, noise, opened, save, write
from scenes import draw_keypoints


def colours(path: Path) -> set[tuple]:
    """The colours of a picture after reading."""
    return set(map(tuple, np.asarray(open_rgb(path, 32)).reshape(-1, 3).tolist()))


# Folders: which pictures

def test_train_and_validation_folders_are_the_splits(tmp_path):
    """test/ is for validation if nothing else is, and for nothing if there is."""
    for i, (validation, others) in enumerate((("val", ["test"]), ("valid", []), ("validation", ["test"]),
                                              ("test", []), ("Val", ["extra"]))):
        for place in ("train/a/b/deep.PNG", "train/flat.jpeg", f"{validation}/c/other.webp", "outside.png",
                      *(f"{name}/unused.png" for name in others)):
            save(tmp_path / str(i) / place, size=(4, 4))
        (tmp_path / str(i) / "train" / "notes.txt").write_text("no picture")
        (tmp_path / str(i) / "train" / "folder.png").mkdir()
        assert names(opened(tmp_path / str(i), split="train")) == ["train/a/b/deep.PNG", "train/flat.jpeg"]
        assert names(opened(tmp_path / str(i))) == [f"{validation}/c/other.webp"]


@pytest.mark.parametrize("places", [("train", "val", "validation"), ("val",), ("training", "validation"),
                                    ("test",), ("images", "masks"), ("images", "other"),
                                    ("photos", "segmentation"), ("photos", "Masks"),
                                    ("train/images", "train/labels", "val/images"),
                                    ("images/training", "images/validation", "annotations/training"),
                                    ("images/train", "images/val"), ("train/train", "train/val", "val")])
def test_folders_whose_meaning_cannot_be_told_are_named(tmp_path, places):
    """Held-out pictures and masks must never be trained as pictures silently."""
    for place in places:
        save(tmp_path / place / "a.png")
    with pytest.raises(ValueError) as error:
        opened(tmp_path, split="train")
    folder, listed = str(error.value).split(": ")[0].split(" has the folders ")
    assert sorted(listed.split(", ")) == sorted(os.listdir(folder)) and "cannot be told" in str(error.value)


def test_masks_and_splits_are_found_at_any_depth(tmp_path):
    """As in an archive whose one folder was unpacked into another."""
    for i, (places, named) in enumerate(((("photos/a", "photos/masks"), "photos/masks"),
                                         (("x/train/images", "x/val/images", "x/val/Labels"),
                                          "x/val/Labels, x/train, x/val"))):
        for place in places:
            save(tmp_path / str(i) / place / "a.png")
        with pytest.raises(ValueError) as error:
            opened(tmp_path / str(i), split="train")
        assert str(error.value).startswith(f"{tmp_path / str(i)} has the folders {named}: ")


def test_one_class_may_be_named_like_a_split_and_masks_alone_like_masks(tmp_path):
    for place in ("train/bus/test", "val/bus/test", "masks/segmentation/labels"):
        save(tmp_path / place / "a.png", 1, mode="L")
        save(tmp_path / place / "b.png", 1, mode="L")
    assert names(opened(tmp_path, split="train")) == ["train/bus/test/a.png", "train/bus/test/b.png"]
    assert len(opened(tmp_path / "masks", "segmentation")) == 1


def test_images_alone_and_fields_beside_them_are_understood(tmp_path):
    save(tmp_path / "alone" / "images" / "a.png")
    assert len(opened(tmp_path / "alone")) == 1
    for place in ("images/a.jpg", "depth/a.png", "notes/b.png"):
        save(tmp_path / "beside" / place)
    assert names(opened(tmp_path / "beside")) == ["images/a.jpg"]
    assert len(opened(tmp_path / "alone" / "images")) == 1
    save(tmp_path / "masks" / "segmentation" / "a.png", 1, mode="L")
    assert len(opened(tmp_path / "masks", "segmentation")) == 1


def test_without_validation_folders_one_picture_in_20_is_kept_whatever_is_added(tmp_path):
    for place in ("plain", "train"):  # a lone train/ is split like any other folder
        folder = tmp_path / place / ("train" if place == "train" else "")
        (folder / "birds").mkdir(parents=True)
        for i in range(400):
            (folder / "birds" / f"{i}.png").touch()
    training, validation = (set(names(opened(tmp_path / "plain", split=split))) for split in ("train", "val"))
    assert not training & validation and len(training | validation) == 400 and 8 <= len(validation) <= 36
    kept = [18, 23, 37, 59, 67]  # of the first hundred, in every process and version
    assert validation & {f"birds/{i}.png" for i in range(100)} == {f"birds/{i}.png" for i in kept}
    assert {f"train/{name}" for name in validation} == set(names(opened(tmp_path / "train")))
    for i in range(40):
        (tmp_path / "plain" / f"new{i}.png").touch()
    assert training < set(names(opened(tmp_path / "plain", split="train")))
    assert validation <= set(names(opened(tmp_path / "plain")))


def test_the_smallest_folders_keep_one_picture_for_validation_and_one_picture_is_too_few(tmp_path):
    save(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match="has no train pictures"):
        opened(tmp_path, split="train")
    for i in range(1, 12):
        save(tmp_path / f"{i}.png")
        training, validation = opened(tmp_path, split="train"), opened(tmp_path)
        assert len(training) + len(validation) == i + 1 and len(validation) >= 1


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", save(tmp_path / "a.png"), tmp_path / "empty"):
        with pytest.raises(FileNotFoundError) as error:
            opened(folder)
        assert str(folder) in str(error.value) and "--data-dir" in str(error.value)


def test_hidden_files_hold_no_pictures_and_links_are_followed_once(tmp_path):
    save(tmp_path / "train" / "a.png")
    for place in ("val/b.png", "elsewhere/sub/a.png", "val/.ipynb_checkpoints/b.png", "val/._b.png"):
        save(tmp_path / place)
    for link, target in (("val/here", "elsewhere"), ("val/twice", "elsewhere"), ("val/itself", "val"),
                         ("elsewhere/sub/circle", "elsewhere")):
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    assert names(opened(tmp_path)) == ["val/b.png", "val/here/sub/a.png"]


def test_a_link_to_nothing_is_named(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "a.png")
    (tmp_path / "val" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="gone.png cannot be read .*: remove or replace it"):
        opened(tmp_path).digest()


def test_any_file_name_can_be_listed_hashed_and_named_in_one_line(tmp_path, capsys):
    """Names of bytes that are no UTF-8, and of two lines, also of a file that is skipped in training."""
    for name in (b"caf\xe9", b"two\nlines"):
        place = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.join(place, b"val"))
        folder = Path(os.fsdecode(place))
        save(folder / "train" / "a.png")
        (folder / "val" / os.fsdecode(name + b".png")).write_bytes(b"no picture")
        dataset = opened(folder)
        assert len(dataset.fingerprint()) > 64 and len(dataset.digest()) == 64
        for fails in (lambda: dataset[0, None], lambda: opened(folder, "depth"),
                      lambda: list(load(dataset, fixed_batches(1, 1), torch.device("cpu"), 1))):
            with pytest.raises(SystemExit):
                run.command_line(fails)
            line = capsys.readouterr().err
            assert line.count("\n") == 1 and line.encode() and str(tmp_path) in line
        dataset.report({0: f"{folder} cannot be read"})
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and line.encode() and str(tmp_path) in line


# Folders: classes

def test_class_folders_are_the_classes_of_both_splits(tmp_path):
    for place in ("train/cat", "train/ant/deep", "train/bee", "val/bee", "val/cat"):
        save(tmp_path / place / "a.png", size=(32, 32))
    (tmp_path / "train" / "empty").mkdir()
    training, validation = (opened(tmp_path, "image", "class", split=split) for split in ("train", "val"))
    assert training.classes == validation.classes == ("ant", "bee", "cat") and opened(tmp_path).classes == ()
    assert [int(training[i, None]["class"]) for i in range(3)] == [0, 1, 2]
    assert [int(validation[i, None]["class"]) for i in range(2)] == [1, 2]
    assert training[0, None]["class"].dtype == np.int64 and set(opened(tmp_path)[0, None]) == {"image"}
    if not (tmp_path / "TRAIN").exists():  # on macOS and Windows it does
        save(tmp_path / "train" / "Cat" / "a.png")
        assert opened(tmp_path, "image", "class").classes == ("Cat", "ant", "bee", "cat")
        shutil.rmtree(tmp_path / "train" / "Cat")
    save(tmp_path / "val" / "dog" / "a.png")
    sentence = r"dog/a.png is in no class folder of training \(ant, bee, cat\):"
    with pytest.raises(FileNotFoundError, match=sentence):
        opened(tmp_path, "image", "class")
    with pytest.raises(FileNotFoundError, match=r"a.png is in no class folder .*\(there is none\):"):
        opened(tmp_path / "train" / "bee", "image", "class")


def test_classes_lie_in_images_if_fields_lie_beside_and_are_split_by_name_without_val(tmp_path):
    for i in range(60):
        for field in ("images", "segmentation"):
            save(tmp_path / field / f"class{i % 2}" / f"{i}.png", 0, (4, 4), "L")
    for split in ("train", "val"):
        dataset = opened(tmp_path, "image", "segmentation", "class", split=split, size=4)
        assert dataset.classes == ("class0", "class1")
        for i, name in enumerate(names(dataset, "segmentation")):
            assert name.startswith(f"segmentation/class{dataset[i, None]['class']}/")


# Folders: what lies beside a picture

def with_masks(folder: Path) -> Path:
    """images/sub/i.jpg with masks of the labels 0 and i + 1, in train/ and val/."""
    for split in ("train", "val"):
        for i in range(3):
            save(folder / split / "images" / "sub" / f"{i}.jpg", (50 * i, 0, 0))
            mask = np.zeros((40, 40), np.uint8)
            mask[10:20] = i + 1
            write(folder / split / "segmentation" / "sub" / f"{i}.png", mask)
    return folder


def test_a_mask_belongs_to_the_picture_of_its_name_and_is_not_one_of_the_pictures(tmp_path):
    with_masks(tmp_path)
    assert [Path(name).suffix for name in names(opened(tmp_path))] == [".jpg"] * 3
    dataset = opened(tmp_path, "image", "segmentation")
    for i in range(3):
        item = dataset[i, None]
        assert set(item) == {"image", "segmentation"}
        assert item["segmentation"].max() == i + 1 and abs(int(item["image"][0].mean()) - 50 * i) < 3
    assert set(opened(tmp_path, "segmentation")[0, None]) == {"segmentation"} and dataset.segments() == 4


def test_files_without_partner_doubled_ones_and_missing_folders_are_named(tmp_path):
    for case, change, match in (
            ("mask", lambda val: (val / "images/sub/1.jpg").unlink(), "sub/1 .segmentation. has no partner"),
            ("image", lambda val: save(val / "images/new.jpg"), "images/new .image. has no partner"),
            ("twice", lambda val: save(val / "segmentation/sub/1.bmp", 0, mode="L"),
             r"sub/1\.(bmp|png) and 1\.(bmp|png) belong to one picture"),
            ("lossy", lambda val: (val / "segmentation/sub/1.png").rename(val / "segmentation/sub/1.gif"),
             "sub/1 .image. has no partner")):  # of a GIF, Pillow numbers the colours anew
        change(with_masks(tmp_path / case) / "val")
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            opened(tmp_path / case, "image", "segmentation")
        assert len(opened(tmp_path / case)) == {"mask": 2, "image": 4}.get(case, 3)  # each alone is fine
        assert len(opened(tmp_path / case, "segmentation")) == {"twice": 4, "lossy": 2}.get(case, 3)
    for field in ("depth", "pose"):
        sentence = f"val/{field} is no folder; {field} files are expected there"
        with pytest.raises(FileNotFoundError, match=sentence):
            opened(tmp_path / "mask", field)


@pytest.mark.parametrize("suffix", [".npy", ".NPY"])
def test_key_points_in_a_file_bring_their_image_along_for_its_size(tmp_path, suffix):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.jpg")
        write(tmp_path / split / "pose" / f"a{suffix}", np.array([[20.0, 20.0]]))
    pose = opened(tmp_path, "pose", size=40)[0, None]["pose"]
    assert pose.shape == (3, 40, 40) and pose[:, 20, 20].max() == 255 and pose[:, 5, 5].max() == 0
    (tmp_path / "val" / "images" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="has no partner"):
        opened(tmp_path, "pose")


# Official layouts

def test_an_imagenet_label_is_the_place_of_its_folder(tmp_path):
    depth = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    for name in ("n02", "n01", "n10", "n03"):
        for split in ("train", "val"):
            save(tmp_path / split / name / "a.JPEG")
            write(tmp_path / "depth" / split / name / "a.png", depth)
    (tmp_path / "train" / "n04").mkdir()  # no pictures, but a class
    (tmp_path / "train" / "devkit.txt").write_text("no class")
    for split in ("train", "val"):
        for fields in (("image", "class"), ("image", "depth", "class"), ("depth", "class")):
            dataset = opened(tmp_path, *fields, split=split, name="imagenet", size=8)
            assert dataset.classes == ("n01", "n02", "n03", "n04", "n10")
            assert set(dataset[0, None]) == set(fields)
            labels = {Path(name).parent.name: int(dataset[i, None]["class"])
                      for i, name in enumerate(names(dataset, fields[0]))}
            assert labels == {"n01": 0, "n02": 1, "n03": 2, "n10": 4}
    assert opened(tmp_path, name="imagenet").classes == ()
    assert dataset[0, None]["depth"][0, 0] < -0.8 and dataset[0, None]["depth"][-1, -1] > 0.8
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")  # the flat validation folder of the archive
    with pytest.raises(FileNotFoundError, match="val_00000001.JPEG is in no class folder of training .n01,"):
        opened(tmp_path, name="imagenet")


def test_restricted_imagenet_is_nine_ranges_of_the_sorted_classes(tmp_path):
    """The ends of each range, and their neighbours outside."""
    for label in range(1000):
        (tmp_path / "train" / f"n{label:08d}").mkdir(parents=True)
    expected = {}
    for group, (first, last) in enumerate([(151, 268), (281, 285), (30, 32), (33, 37), (80, 100), (365, 382),
                                           (389, 397), (118, 121), (300, 319)]):
        expected |= {first: group, last: group}
    outside = {150, 269, 280, 286, 29, 38, 79, 101, 364, 383, 388, 398, 117, 122, 299, 320, 0, 999}
    for label in {*expected, *outside}:
        save(tmp_path / "val" / f"n{label:08d}" / "a.JPEG", size=(8, 8))
    dataset = opened(tmp_path, "image", "class", name="restricted-imagenet", size=8)
    labels = {int(Path(name).parent.name[1:]): int(dataset[i, None]["class"])
              for i, name in enumerate(names(dataset))}
    assert labels == expected
    assert dataset.classes == ("dog", "cat", "frog", "turtle", "bird", "primate", "fish", "crab", "insect")
    (tmp_path / "train" / "n00000500").rmdir()
    with pytest.raises(FileNotFoundError, match="train has 999 class folders; restricted-imagenet counts"):
        opened(tmp_path, name="restricted-imagenet")


def test_ade20k_has_its_own_names_of_the_splits_and_151_labels(tmp_path):
    for i, split in enumerate(("training", "validation")):
        save(tmp_path / "images" / split / f"ADE_{split}.jpg", (10 * i, 0, 0))
        save(tmp_path / "annotations" / split / f"ADE_{split}.png", 100 + i, mode="L")
    for i, split in enumerate(("train", "val")):
        dataset = opened(tmp_path, "image", "segmentation", split=split, name="ade20k")
        assert len(dataset) == 1 and np.unique(dataset[0, None]["segmentation"]).tolist() == [100 + i]
        assert dataset.segments() == 151
    with pytest.raises(FileNotFoundError, match="images/training is no folder"):
        opened(tmp_path / "images", split="train", name="ade20k")


def deepfashion(folder: Path, places: tuple = ("Anno", "Eval", "Img"), headings: bool = True) -> Path:
    """Five pictures of 40×40, with landmarks of the three kinds of clothes."""
    pictures = [f"img/WOMEN/Dresses/id_0000000{i}/02_{i}_front.jpg" for i in range(5)]
    for name in pictures:
        save(folder / places[2] / name)
    rows = ["1 1 0 001 002 0 003 004 1 005 006 2 007 008 0 009 010 0 011 012",  # upper body
            "2 1 0 001 002 0 003 004 1 005 006 2 000 000",  # lower body
            "3 4 " + " ".join(f"0 {x:03d} {x + 1:03d}" for x in range(1, 17, 2)),  # full body
            "2 1 0 001 002 0 003 004 0 005 006 0 007 008", "2 1 0 001 002 0 003 004 0 005 006 0 007 008"]
    states = ["id_1 train", "id_1 query", "id_2 gallery", "id_3 train", "id_4 train"]
    for place, name, lines in ((places[0], "list_landmarks_inshop.txt", rows),
                               (places[1], "list_eval_partition.txt", states)):
        lines = [f"{picture}  {line}" for picture, line in zip(pictures, lines)]
        (folder / place).mkdir(exist_ok=True)
        heading = ["5", "image_name clothes_type variation_type …"] if headings else []
        (folder / place / name).write_text("\n".join([*heading, *lines, "", ""]))
    return folder


@pytest.mark.parametrize("places, headings", [(("Anno", "Eval", "Img"), True), ((".", ".", "."), False)])
def test_deepfashions_landmarks_are_eight_points_of_which_some_are_unknown(tmp_path, places, headings):
    deepfashion(tmp_path, places, headings)
    train = opened(tmp_path, "image", "pose", split="train", name="deepfashion", size=40)
    assert [Path(name).name for name in names(train)] == [f"02_{i}_front.jpg" for i in (0, 3, 4)]
    assert train.records[0]["pose"].tolist() == [[1, 2, 1], [3, 4, 1], [5, 6, 1], [7, 8, 0],  # it is cut off
                                                 [0, 0, 0], [0, 0, 0], [9, 10, 1], [11, 12, 1]]
    lower, full = (record["pose"] for record in opened(tmp_path, "image", "pose", name="deepfashion").records)
    assert lower.tolist() == [[0, 0, 0]] * 4 + [[1, 2, 1], [3, 4, 1], [5, 6, 1], [0, 0, 0]]
    assert full[:, 2].tolist() == [1] * 8 and full[7].tolist() == [15, 16, 1]
    item, alone = train[0, None], opened(tmp_path, "pose", split="train", name="deepfashion", size=40)
    assert item["image"].shape == item["pose"].shape == (3, 40, 40)
    assert np.array_equal(alone[0, None]["pose"], item["pose"]) and item["pose"].max() == 255
    with pytest.raises(ValueError, match="02_0_front.jpg has 40×40 pixels, too few"):
        opened(tmp_path, "pose", split="train", name="deepfashion", size=41)[0, None]
    before, file = alone.fingerprint(), tmp_path / places[0] / "list_landmarks_inshop.txt"
    file.write_text(file.read_text().replace("001 002", "020 020"))
    assert opened(tmp_path, "pose", split="train", name="deepfashion", size=40).fingerprint() != before


def test_deepfashions_pictures_without_partition_are_split_by_name_and_missing_parts_are_named(tmp_path):
    deepfashion(tmp_path)
    partition = tmp_path / "Eval" / "list_eval_partition.txt"
    partition.write_text("\n".join(partition.read_text().split("\n")[:3]))  # names one picture, for training
    pictures = [f"img/WOMEN/Dresses/id_0000000{i}/02_{i}_front.jpg" for i in range(5)]
    kept = [name for name in pictures[1:] if path_hash(Path(name)) % 20 == 0]
    assert len(opened(tmp_path, split="train", name="deepfashion")) == 5 - len(kept)
    for place, match in (("Img", "has no Img/img, nor that without Img/"),
                         ("Anno", "has no Anno/list_landmarks_inshop.txt, nor that without Anno/")):
        (tmp_path / place).rename(tmp_path / f"no{place}")
        with pytest.raises(FileNotFoundError, match=match):
            opened(tmp_path, name="deepfashion")


@pytest.mark.parametrize("old, new", [
    (b"  1 1 ", b"  4 1 "), (b"  1 1 ", b"  2 1 "), (b" 011 012", b" 011"), (b"001", b"\xff\xfe"),
    (b"  1 1 0 001 002 0 003 004 1 005 006 2 007 008 0 009 010 0 011 012", b""),
    (b" id_1 train", b""), (b" id_1 train", b" id_1 trai")])
def test_a_list_unlike_deepfashions_official_one_is_named(tmp_path, old, new):
    deepfashion(tmp_path)
    for file in tmp_path.glob("*/list_*.txt"):
        file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match="have a line for img/.*02_0_front.jpg"):
        opened(tmp_path, "pose", split="train", name="deepfashion")


# Pictures

def test_formats_and_modes_become_rgb_on_white(tmp_path):
    for name in ("a.png", "a.jpg", "A.JPEG", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.ppm", "a.gif"):
        found = np.array(list(colours(save(tmp_path / name))))
        assert np.abs(found - ORANGE).max() <= 4, name
    for mode, colour, expected in (
            ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)),
            ("RGBA", (*ORANGE, 255), ORANGE), ("RGBA", (*ORANGE, 0), (255, 255, 255)),
            ("RGBA", (0, 100, 200, 51), (204, 224, 244)), ("LA", (77, 255), (77, 77, 77)),
            ("LA", (0, 0), (255, 255, 255)), ("LA", (0, 102), (153, 153, 153))):
        found = np.array(list(colours(save(tmp_path / "a.png", colour, mode=mode))))
        assert np.abs(found - expected).max() <= 1, (mode, colour)
    for name in ("a.jpg", "a.tif"):
        found = np.array(list(colours(save(tmp_path / name, (0, 255, 255, 0), mode="CMYK"))))
        assert np.abs(found - (255, 0, 0)).max() <= 6, name
    assert colours(save(tmp_path / "a.png", transparency=ORANGE)) == {(255, 255, 255)}


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path, name, transparent):
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(0, (0, 0, 16, 32))
    picture.save(tmp_path / name, **({"transparency": 0} if transparent else {}))
    image = np.asarray(open_rgb(tmp_path / name, 32))
    assert (image[:, :16] == ((255, 255, 255) if transparent else (10, 20, 30))).all()
    assert (image[:, 16:] == (200, 100, 50)).all()


def test_16_and_32_bit_grey_is_scaled_not_clipped(tmp_path):
    """32 bits hold 16-bit grey if the values do not fit into 8; floats go up to 1, 255 or 65,535."""
    for name, dtype, values, expected in (
            ("a.png", np.uint16, [0, 2000, 62_000], [0, 8, 241]),
            ("a.tif", np.uint16, [0, 2000, 62_000], [0, 8, 241]),
            ("b.png", np.uint16, [200] * 3, [1] * 3), ("b.tif", np.int32, [51_400] * 3, [200] * 3),
            ("c.tif", np.int32, [200] * 3, [200] * 3), ("d.tif", np.float32, [0, 0.25, 1], [0, 64, 255]),
            ("d.tif", np.float32, [0, 1, 200], [0, 1, 200]), ("c.tif", np.int32, [0, 1, 1], [0, 1, 1]),
            ("d.tif", np.float32, [0, 514, 51_400], [0, 2, 200])):
        image = np.asarray(open_rgb(write(tmp_path / name, np.array([values], dtype)), 32))
        assert image.tolist() == [[[value] * 3 for value in expected]], name


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_are_turned_upright(tmp_path, suffix):
    """`corner` is the quarter, (row, column), where the first stored pixel belongs, by the EXIF standard."""
    for orientation, corner in enumerate([(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)], 1):
        picture, exif = Image.new("RGB", (64, 32), "black"), Image.Exif()
        picture.paste("white", (0, 0, 32, 16))
        exif[0x0112] = orientation
        picture.save(tmp_path / f"a.{suffix}", exif=exif)
        image = np.asarray(open_rgb(tmp_path / f"a.{suffix}", 64).convert("L")).astype(int)
        height, width = image.shape
        assert (width, height) == ((64, 32) if orientation < 5 else (32, 64))
        quarters = image.reshape(2, height // 2, 2, width // 2)[:, 4:-4, :, 4:-4].mean((1, 3))
        assert np.argwhere(quarters > 128).tolist() == [list(corner)]


def test_large_jpegs_are_decoded_at_reduced_size_but_not_below_what_is_needed(tmp_path):
    width, height = open_rgb(save(tmp_path / "a.jpg", size=(1600, 1200)), 32).size
    assert 64 <= height < 1200 and width / height == pytest.approx(4 / 3, rel=0.02)
    assert open_rgb(save(tmp_path / "b.jpg", size=(100, 90)), 64).size == (100, 90)
    assert open_rgb(save(tmp_path / "c.jpg", size=(400, 300)), 100).size == (400, 300)  # 150 lines: too few


def test_damaged_vanished_and_huge_files_are_named(tmp_path, monkeypatch):
    for suffix in ("png", "jpg", "webp", "gif", "bmp"):
        file = noise(tmp_path / f"a.{suffix}")
        for content in (file.read_bytes()[:file.stat().st_size // 2], b"", b"no picture at all"):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a.{suffix} cannot be read as a picture \(.+\): remove"):
                open_rgb(file, 32)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "b.HEIC").touch()
    assert names(opened(tmp_path / "phone", split="val")) == ["b.HEIC"]  # not left out silently
    for missing in (tmp_path / "b.png", tmp_path / "phone" / "b.HEIC"):
        with pytest.raises(ValueError, match=f"{missing.name} cannot be read as a picture"):
            open_rgb(missing, 32)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="c.png cannot be read as a picture"):
        open_rgb(save(tmp_path / "c.png"), 32)


def test_what_is_read_has_not_changed_since_the_reader_version_was_raised(tmp_path):
    """Cached codes are found under READER_VERSION: raise it, and note the new digest, when a file becomes
    something else. Only lossless formats, and nothing resampled but by NEAREST, so that Pillow may change."""
    pixels = np.random.default_rng(0).integers(0, 200, (6, 8, 4), np.uint8)
    grey = pixels[..., 0]
    arrays = [np.asarray(open_rgb(write(tmp_path / name, array), 6)) for name, array in (
        ("a.png", pixels[..., :3]), ("b.png", 255 * (pixels // 100)), ("c.png", grey),
        ("d.png", 257 * grey.astype(np.uint16)), ("f.tif", np.float32(grey / 255)))]
    depth = write(tmp_path / "e.npy", np.array([[1, 2], [3, 5]]))
    arrays += [np.asarray(open_labels(tmp_path / "c.png", void_label=3)), np.asarray(open_depth(depth))]
    for folder, array in (("images", pixels[..., :3]), ("segmentation", grey)):
        for split in ("train", "val"):
            write(tmp_path / split / folder / "a.png", array)
    for key in range(4):  # of six lines: cut and mirrored, not resampled
        item = opened(tmp_path, "image", "segmentation", split="train", size=6, flip=True)[0, (0, key)]
        arrays += [item["image"], item["segmentation"]]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert (files.READER_VERSION, digest[:16]) == (3, "3dce72b742fd5644")


# Masks

@pytest.mark.parametrize("mode, dtype", [("L", np.uint8), ("P", np.uint8), ("I;16", np.uint16), ("1", bool)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_holds_the_number_in_each_pixel_whatever_its_format(tmp_path, mode, dtype, suffix):
    labels = np.random.default_rng(0).integers(0, 2 if mode == "1" else 255, (5, 7)).astype(dtype)
    picture = Image.fromarray(labels)
    if mode == "P":
        picture.putpalette([255 - i // 3 for i in range(768)])  # entry i is not the colour i
    picture.save(tmp_path / f"a{suffix}")
    found = open_labels(tmp_path / f"a{suffix}")
    assert found.mode == "L" and np.array_equal(np.asarray(found), labels)


def test_pixels_of_the_void_label_have_none_and_255_never_has(tmp_path):
    file = write(tmp_path / "a.png", np.array([[0, 11, 255, 3]], np.uint8))
    for void_label, segments, expected in ((11, 4, [0, 255, 255, 3]), (0, 12, [255, 11, 255, 3]),
                                           (255, 0, [0, 11, 255, 3])):
        assert np.asarray(open_labels(file, void_label, segments)).tolist() == [expected]
    wide = write(tmp_path / "b.png", np.array([[0, 65535]], np.uint16))
    assert np.asarray(open_labels(wide, void_label=65535)).tolist() == [[0, 255]]


@pytest.mark.parametrize("name, pixels, match", [
    ("a.png", np.zeros((4, 4, 3), np.uint8), r"a.png is a picture in colours \(RGB\)"),
    ("a.png", np.zeros((4, 4, 2), np.uint8), r"a.png is a picture in colours \(LA\)"),
    ("a.tif", np.zeros((4, 4), np.float32), r"a.tif is a picture in colours \(F\)"),
    ("a.png", np.full((4, 4), 256, np.uint16), "a.png has the label 256, but labels go from 0 to 6"),
    ("a.tif", np.full((4, 4), -1, np.int32), "a.tif has the label -1,"),
    ("a.png", np.full((4, 4), 7, np.uint8), "a.png has the label 7, but labels go from 0 to 6")])
def test_what_is_no_mask_of_seven_labels_is_named(tmp_path, name, pixels, match):
    with pytest.raises(ValueError, match=match):
        open_labels(write(tmp_path / name, pixels), segments=7)
    if pixels.max() == 7:
        assert np.asarray(open_labels(tmp_path / name, segments=8)).tolist() == pixels.tolist()


# Depth maps

@pytest.mark.parametrize("name, dtype, low, high", [
    ("a.png", np.uint8, 10, 200), ("a.png", np.uint16, 500, 60_000), ("a.tif", np.float32, -3.5, 80.25),
    ("a.tif", np.int32, -70_000, 90_000), ("a.npy", np.float64, 0.5, 2.5), ("a.npy", np.float16, -1, 1),
    ("a.NPY", np.int64, 2**31, 2**31 + 9)])  # float32 cannot tell these apart
def test_a_depth_map_is_scaled_from_its_own_range(tmp_path, name, dtype, low, high):
    depth = np.linspace(low, high, 48).reshape(6, 8).astype(dtype)
    found = open_depth(write(tmp_path / name, depth))
    spread = depth.astype(np.float64)
    expected = 2 * (spread - spread.min()) / (spread.max() - spread.min()) - 1
    assert found.mode == "F" and found.size == (8, 6)
    assert (np.asarray(found).min(), np.asarray(found).max()) == (-1, 1)
    assert np.abs(np.asarray(found) - expected).max() < 1e-5
    for shape in ((1, 6, 8), (6, 8, 1)):
        assert open_depth(write(tmp_path / "a.npy", np.arange(48.0).reshape(shape))).size == (8, 6)
    assert np.asarray(open_depth(write(tmp_path / "a.npy", np.full((2, 2), 3.0)))).tolist() == [[0, 0]] * 2


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("value, match", [
    (np.array([[0, np.nan], [1, 2]]), "infinite or not a number"),
    (np.array([[0, np.inf], [1, 2]]), "infinite"),
    (np.zeros((4, 4, 3)), r"the shape \(4, 4, 3\); a depth map has one"), (np.zeros(4), r"shape \(4,\)"),
    (np.array([Malicious()], dtype=object), "cannot be read as an array .*Object arrays"),
    (np.array([["near", "far"]]), r"cannot be read as an array \(of <U4, not of numbers\): remove"),
    (np.zeros((4, 4), "f4, f4"), "cannot be read as an array .*not of numbers"),
    (b"PK\3\4" + bytes(99), "cannot be read as an array"), (b"", "cannot be read as an array")])
def test_what_is_no_depth_map_is_named_and_nothing_in_it_runs(tmp_path, value, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(value, bytes):
        (tmp_path / "a.npy").write_bytes(value)
    else:
        np.save(tmp_path / "a.npy", value)
    with pytest.raises(ValueError, match=f"a.npy .*{match}"):
        open_depth(tmp_path / "a.npy")
    assert not (tmp_path / "touched").exists()


def test_a_depth_map_in_colours_is_refused_with_a_palette_too(tmp_path):
    save(tmp_path / "a.png")
    Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40)).convert("P").save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):  # else the numbers of the palette's colours would be taken for depths
        with pytest.raises(ValueError, match=rf"{name} has the shape \(40, 40, 3\); a depth map"):
            open_depth(tmp_path / name)


# Poses

def test_key_points_are_discs_of_their_own_hues_joined_by_limbs_and_unknown_ones_are_not_drawn():
    points = np.array([[10.0, 20, 1], [40, 20, 1], [70, 20, 0], [np.nan, 20, 1], [70, 50, 1]])
    drawn = np.asarray(draw_keypoints(points, (80, 60)))
    assert drawn.shape == (60, 80, 3) and drawn.dtype == np.uint8
    hues = {tuple(drawn[y, x].tolist()) for x, y in ((10, 20), (40, 20), (70, 50))}
    assert len(hues) == 3 and all(max(hue) == 255 and min(hue) == 0 for hue in hues)
    assert drawn[20, 70].max() == 0 and drawn[40].max() == 0
    assert drawn[20, 12].max() == 255 and drawn[20, 15].max() == 0  # discs of radius 2.5
    joined = np.asarray(draw_keypoints(points, (80, 60), ((0, 1), (1, 2))))
    assert np.array_equal(joined[20, 25], drawn[20, 40])  # in the hue of the second
    assert joined[20, 55].max() == 0  # one end is unknown


def test_points_are_pixels_of_the_whole_image_however_small_it_is_asked_for(tmp_path):
    image = save(tmp_path / "a.jpg", size=(800, 600))
    drawn = np.asarray(open_pose(np.array([[700, 500]]), image, (32, 32)))
    assert drawn.shape == (600, 800, 3) and drawn[500, 700].max() == 255 and drawn[300, 400].max() == 0
    for shape in ((4,), (4, 4), (1, 4, 2)):
        with pytest.raises(ValueError, match=r"a.npy has the shape \(.*\); key points are \(J, 2\)"):
            open_pose(write(tmp_path / "a.npy", np.zeros(shape)), image, (32, 32))
    shares = np.array([[0.5, 1.02], [0, 0.1]])
    for points, named in ((write(tmp_path / "a.npy", shares), None), (shares, image)):
        with pytest.raises(ValueError, match=r"a\.(npy|jpg) go up to 1: multiply by its sides"):
            open_pose(points, named, (32, 32))
    assert np.asarray(open_pose(np.zeros((2, 3)), image, (32, 32))).max() == 0  # none is known
    assert open_pose(save(tmp_path / "a.png", (1, 2, 3)), None, (32, 32)).getpixel((0, 0)) == (1, 2, 3)  # is drawn
