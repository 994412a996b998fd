"""Claims about layouts.py, through data.open_dataset.

Oracles: which files were made, and what each layout's official description says of them.
"""
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import layouts
from data import Files, check_offered, open_dataset
from picture_files import assert_colour, files, many_pictures, pictures, save, splits

# folders: which pictures

def test_train_and_val_folders_are_the_splits(tmp_path):
    save(tmp_path / "train" / "a" / "b" / "deep.PNG", (1, 2, 3))
    save(tmp_path / "train" / "flat.jpeg")
    save(tmp_path / "val" / "c" / "other.webp")
    save(tmp_path / "outside.png")
    (tmp_path / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "folder.png").mkdir()
    assert [path.name for path in files(pictures(tmp_path, "train"))] == ["deep.PNG", "flat.jpeg"]
    assert [path.name for path in files(pictures(tmp_path, "val"))] == ["other.webp"]
    assert_colour(pictures(tmp_path, "train")[0, None]["image"], (1, 2, 3))


def test_without_those_folders_one_picture_in_20_is_kept_for_validation(tmp_path):
    made = many_pictures(tmp_path, 400)
    training, validation = pictures(tmp_path, "train", 4), pictures(tmp_path, "val", 4)
    assert set(files(training)) | set(files(validation)) == set(made)
    assert not set(files(training)) & set(files(validation))
    assert len(training) + len(validation) == 400
    assert 8 <= len(validation) <= 36
    assert files(training) == sorted(files(training))


def test_the_smallest_folders_keep_one_picture_for_validation(tmp_path):
    for i in range(12):
        save(tmp_path / f"{i}.png", size=(4, 4))
        if i:
            training, validation = pictures(tmp_path, "train", 4), pictures(tmp_path, "val", 4)
            assert len(training) + len(validation) == i + 1 and len(validation) >= 1


def test_a_lone_train_folder_is_split_like_any_other(tmp_path):
    for i in range(60):
        save(tmp_path / "train" / f"{i}.png", size=(4, 4))
    training, validation = pictures(tmp_path, "train", 4), pictures(tmp_path, "val", 4)
    assert len(training) + len(validation) == 60 and len(validation) < 15


def test_adding_pictures_moves_no_other_between_the_splits(tmp_path):
    many_pictures(tmp_path)
    before = {split: set(files(pictures(tmp_path, split, 4))) for split in ("train", "val")}
    for i in range(40):
        save(tmp_path / "new" / f"{i}.png", size=(4, 4))
    for split in ("train", "val"):
        assert before[split] < set(files(pictures(tmp_path, split, 4)))


def test_the_same_pictures_are_kept_for_validation_in_every_process(tmp_path):
    for i in range(100):
        save(tmp_path / "birds" / f"{i}.png", size=(4, 4))
    kept = ["18.png", "23.png", "37.png", "59.png", "67.png"]
    assert sorted(path.name for path in files(pictures(tmp_path, "val", 4))) == sorted(kept)


def test_the_split_depends_on_the_name_below_the_folder_not_on_where_it_lies(tmp_path):
    for place in ("here", "there"):
        many_pictures(tmp_path / place)
    here, there = ([path.relative_to(tmp_path / place) for path in files(pictures(tmp_path / place, "val", 4))]
                   for place in ("here", "there"))
    assert here == there


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; .*--data-dir"):
        pictures(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no pictures (.jpg")):
        pictures(tmp_path, "val")
    save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no train pictures; without train/")):
        pictures(tmp_path, "train")
    splits(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'val'} has no pictures (.jpg")):
        pictures(tmp_path, "val")


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.png is no folder"):
        pictures(save(tmp_path / "a.png"))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="images"):
        open_dataset("images", str(tmp_path), "val", 32)
    with pytest.raises(AssertionError, match="depth"):
        open_dataset("cifar10", str(tmp_path), "val", 32, fields=("depth",))
    with pytest.raises(ValueError, match="ade20k has no 'pose'; it has image, segmentation"):
        check_offered("ade20k", "pose")


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


# folders: what lies beside a picture

def with_masks(folder: Path, count: int = 3, split: str = "train") -> Path:
    """images/i.jpg with masks of the labels 0 and i + 1, in train/ and val/."""
    for name in {split, "val"}:
        for i in range(count):
            save(folder / name / "images" / "sub" / f"{i}.jpg", (50 * i, 0, 0))
            mask = np.zeros((40, 40), np.uint8)
            mask[10:20] = i + 1
            (folder / name / "segmentation" / "sub").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / name / "segmentation" / "sub" / f"{i}.png")
    return folder


def fields_of(folder: Path, *fields: str, split: str = "val", name: str = "folder", size: int = 40) -> Files:
    return open_dataset(name, str(folder), split, size, fields=fields)


def test_a_mask_belongs_to_the_picture_of_its_name_and_is_not_one_of_the_pictures(tmp_path):
    with_masks(tmp_path)
    assert [path.suffix for path in files(pictures(tmp_path))] == [".jpg"] * 3
    dataset = fields_of(tmp_path, "image", "segmentation")
    for i in range(3):
        item = dataset[i, None]
        assert set(item) == {"image", "segmentation"}
        assert item["segmentation"].max() == i + 1 and abs(int(item["image"][0].mean()) - 50 * i) < 3
    assert set(fields_of(tmp_path, "segmentation")[0, None]) == {"segmentation"}
    assert dataset.segments() == 4


def test_a_folder_called_images_alone_is_like_any_other(tmp_path):
    for place in ("images", "more"):
        save(tmp_path / "val" / place / "a.png")
    save(tmp_path / "train" / "a.png")
    assert len(pictures(tmp_path)) == 2


def test_a_folder_called_depth_without_images_is_like_any_other(tmp_path):
    save(tmp_path / "train" / "a.png")
    for place in ("depth", "more"):
        save(tmp_path / "val" / place / "a.png")
    assert len(pictures(tmp_path)) == 2


def test_masks_need_no_images_unless_both_are_asked_for(tmp_path):
    with_masks(tmp_path)
    for path in sorted((tmp_path / "val" / "images").rglob("*.jpg"))[1:]:
        path.unlink()
    assert len(fields_of(tmp_path, "segmentation")) == 3
    mask = tmp_path / "val" / "segmentation" / "sub" / "1"
    sentence = f"{mask} (segmentation) has no partner in {tmp_path / 'val' / 'images'} (image); 2 files are alone"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        fields_of(tmp_path, "image", "segmentation")


def test_an_image_without_a_mask_and_a_missing_folder_are_named(tmp_path):
    with_masks(tmp_path)
    save(tmp_path / "val" / "images" / "new.jpg")
    sentence = f"{tmp_path / 'val' / 'images' / 'new'} (image) has no partner in"
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        fields_of(tmp_path, "image", "segmentation")
    with pytest.raises(FileNotFoundError, match=r"val/depth is no folder; depth files are expected there"):
        fields_of(tmp_path, "depth")


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])  # of .gif, Pillow numbers the colours anew
def test_a_mask_whose_format_may_change_its_numbers_is_none(tmp_path, suffix):
    save(tmp_path / "train" / "segmentation" / f"a{suffix}")
    save(tmp_path / "val" / "segmentation" / f"a{suffix}")
    with pytest.raises(FileNotFoundError, match=r"has no pictures \(.png .bmp .tif .tiff\)"):
        fields_of(tmp_path, "segmentation")


def test_without_train_and_val_images_and_masks_are_split_alike(tmp_path):
    for i in range(100):
        save(tmp_path / "images" / f"{i}.jpg", size=(4, 4))
        save(tmp_path / "segmentation" / f"{i}.png", i, (4, 4), "L")
    both, masks = (fields_of(tmp_path, *fields, size=4) for fields in (("image", "segmentation"),
                                                                       ("segmentation",)))
    names = [path.stem for path in files(both)]
    assert names == [path.stem for path in files(both, "segmentation")]
    assert names == [path.stem for path in files(masks, "segmentation")] and 0 < len(names) < 15


def test_hidden_files_and_folders_hold_no_pictures(tmp_path):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png")
    (tmp_path / "val" / "._a.png").write_bytes(b"resource fork")  # a Mac's
    save(tmp_path / "val" / ".ipynb_checkpoints" / "a-checkpoint.png")
    assert files(pictures(tmp_path)) == [tmp_path / "val" / "a.png"]


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    """Also a folder that is linked twice, as whoever counts a class double may wish."""
    splits(tmp_path)
    save(tmp_path / "elsewhere" / "sub" / "a.png")
    save(tmp_path / "val" / "b.png")
    for name, target in (("here", "elsewhere"), ("twice", "elsewhere"), ("elsewhere/sub/circle", "elsewhere"),
                         ("itself", "val")):
        link = tmp_path / (name if "/" in name else f"val/{name}")
        link.symlink_to(tmp_path / target, target_is_directory=True)
    found = [path.relative_to(tmp_path / "val").as_posix() for path in files(pictures(tmp_path))]
    assert found == ["b.png", "here/sub/a.png", "twice/sub/a.png"]


def test_two_files_for_one_picture_are_named_where_partners_are_sought(tmp_path):
    for doubled in ("images", "segmentation"):
        with_masks(tmp_path / doubled)
        save(tmp_path / doubled / "val" / doubled / "sub" / "1.bmp", mode="RGB" if doubled == "images" else "L",
             colour=(0, 0, 0) if doubled == "images" else 0)
        with pytest.raises(ValueError, match=r"sub/1\.(bmp|jpg|png) and 1\.(bmp|jpg|png) belong to one picture"):
            fields_of(tmp_path / doubled, "image", "segmentation")
        assert len(fields_of(tmp_path / doubled, "image" if doubled == "images" else "segmentation")) == 4


@pytest.mark.parametrize("suffix", [".npy", ".NPY"])
def test_key_points_in_a_file_bring_their_image_along_for_its_size(tmp_path, suffix):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.jpg")
        (tmp_path / split / "pose").mkdir()
        with (tmp_path / split / "pose" / f"a{suffix}").open("wb") as file:
            np.save(file, np.array([[20.0, 20.0]]))
    pose = fields_of(tmp_path, "pose")[0, None]["pose"]
    assert pose.shape == (3, 40, 40) and pose[:, 20, 20].tolist() == [255, 0, 0] and pose[:, 5, 5].max() == 0
    (tmp_path / "val" / "images" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="has no partner"):
        fields_of(tmp_path, "pose")


@pytest.mark.parametrize("change", ["mask", "fields", "void", "points", "image of points"])
def test_the_fingerprint_tells_of_all_that_an_item_depends_on(tmp_path, change):
    with_masks(tmp_path)
    (tmp_path / "val" / "pose").mkdir()
    for i in range(3):
        (tmp_path / "val" / "pose" / "sub").mkdir(exist_ok=True)
        np.save(tmp_path / "val" / "pose" / "sub" / f"{i}.npy", np.ones((2, 2)))
    fields = ("pose",) if "points" in change else ("image", "segmentation")

    def fingerprint(*fields: str, void_label: int = 255) -> str:
        return open_dataset("folder", str(tmp_path), "val", 40, fields=fields,
                            void_label=void_label).fingerprint()

    before = fingerprint(*fields)
    assert fingerprint(*fields) == before
    if change == "mask":
        save(tmp_path / "val" / "segmentation" / "sub" / "0.png", 7, mode="L")
    elif change == "points":
        np.save(tmp_path / "val" / "pose" / "sub" / "0.npy", np.ones((20, 2)))
    elif change == "image of points":
        save(tmp_path / "val" / "images" / "sub" / "0.jpg", size=(80, 80))
    options = {"void_label": 1} if change == "void" else {}
    assert fingerprint(*(("segmentation",) if change == "fields" else fields), **options) != before


# ImageNet

def imagenet(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        for split in ("train", "val"):
            save(folder / split / name / f"{name}_{i}.JPEG", (i, 0, 0))
    return folder


def test_an_imagenet_label_is_the_place_of_its_folder(tmp_path):
    imagenet(tmp_path, ["n02", "n01", "n10", "n03"])
    (tmp_path / "train" / "n04").mkdir()  # no pictures, but a class
    (tmp_path / "train" / "devkit.txt").write_text("no class")
    for split in ("train", "val"):
        dataset = fields_of(tmp_path, "image", split=split, name="imagenet", size=8)
        found = {files(dataset)[i].parent.name: int(dataset[i, None]["label"]) for i in range(len(dataset))}
        assert found == {"n01": 0, "n02": 1, "n03": 2, "n10": 4}
    assert dataset[0, None]["label"].dtype == np.int64


def test_imagenets_depth_maps_lie_in_a_tree_of_their_own(tmp_path):
    imagenet(tmp_path, ["n01", "n02"])
    for path in files(fields_of(tmp_path, "image", name="imagenet", size=8)):
        target = tmp_path / "depth" / path.relative_to(tmp_path).with_suffix(".png")
        target.parent.mkdir(parents=True)
        Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(target)
    for fields in (("image", "depth"), ("depth",)):
        item = fields_of(tmp_path, *fields, name="imagenet", size=8)[1, None]
        assert set(item) == {*fields, "label"} and item["label"] == 1
        assert item["depth"].shape == (8, 8) and item["depth"][0, 0] < -0.8 and item["depth"][-1, -1] > 0.8
    with pytest.raises(FileNotFoundError, match="depth/train is no folder; depth files are expected there"):
        fields_of(tmp_path, "depth", split="train", name="imagenet")


def test_the_flat_validation_folder_of_the_archive_is_refused(tmp_path):
    imagenet(tmp_path, ["n01"])
    save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    sentence = "ILSVRC2012_val_00000001.JPEG is in no folder that is named like a class folder in .*train"
    with pytest.raises(FileNotFoundError, match=sentence):
        fields_of(tmp_path, "image", name="imagenet")


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
    dataset = fields_of(tmp_path, "image", name="restricted-imagenet", size=8)
    found = {int(path.parent.name[1:]): int(dataset[i, None]["label"]) for i, path in enumerate(files(dataset))}
    assert found == expected
    (tmp_path / "train" / "n00000500").rmdir()
    with pytest.raises(FileNotFoundError, match="train has 999 class folders; restricted-imagenet counts"):
        fields_of(tmp_path, "image", name="restricted-imagenet")
    assert list(layouts.RESTRICTED) == ["dog", "cat", "frog", "turtle", "bird", "primate", "fish", "crab",
                                        "insect"]


# ADE20K

def test_ade20k_has_its_own_names_of_the_splits_and_151_labels(tmp_path):
    for i, split in enumerate(("training", "validation")):
        save(tmp_path / "images" / split / f"ADE_{split}.jpg", (10 * i, 0, 0))
        save(tmp_path / "annotations" / split / f"ADE_{split}.png", 100 + i, mode="L")
    for i, split in enumerate(("train", "val")):
        dataset = fields_of(tmp_path, "image", "segmentation", split=split, name="ade20k")
        item = dataset[0, None]
        assert len(dataset) == 1 and np.unique(item["segmentation"]).tolist() == [100 + i]
        assert dataset.segments() == 151
    with pytest.raises(FileNotFoundError, match="images/training is no folder"):
        fields_of(tmp_path / "images", "image", split="train", name="ade20k")


# DeepFashion

def deepfashion(folder: Path, anno: str, evaluation: str, img: str) -> Path:
    """Five pictures of 40×40, with landmarks of the three kinds of clothes."""
    names = [f"img/WOMEN/Dresses/id_0000000{i}/02_{i}_front.jpg" for i in range(5)]
    for name in names:
        save(folder / img / name)
    rows = [f"{names[0]}  1 1 0 001 002 0 003 004 1 005 006 2 007 008 0 009 010 0 011 012",  # upper body
            f"{names[1]}  2 1 0 001 002 0 003 004 1 005 006 2 000 000",  # lower body
            f"{names[2]}  3 4 " + " ".join(f"0 {x:03d} {x + 1:03d}" for x in range(1, 17, 2)),  # full body
            f"{names[3]}  2 1 0 001 002 0 003 004 0 005 006 0 007 008",
            f"{names[4]}  2 1 0 001 002 0 003 004 0 005 006 0 007 008"]
    (folder / anno).mkdir(exist_ok=True)
    (folder / anno / "list_landmarks_inshop.txt").write_text(
        "5\nimage_name clothes_type variation_type landmark_visibility_1 …\n" + "\n".join(rows) + "\n")
    if evaluation != "none":
        status = ["train", "query", "gallery", "train", "train"]
        lines = [f"{name} id_0000000{i} {status[i]}" for i, name in enumerate(names)]
        (folder / evaluation).mkdir(exist_ok=True)
        (folder / evaluation / "list_eval_partition.txt").write_text(
            "5\nimage_name item_id evaluation_status\n" + "\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("places", [("Anno", "Eval", "Img"), (".", ".", ".")])
def test_deepfashions_landmarks_are_eight_points_of_which_some_are_unknown(tmp_path, places):
    deepfashion(tmp_path, *places)
    train = fields_of(tmp_path, "image", "pose", split="train", name="deepfashion")
    assert [path.name for path in files(train)] == ["02_0_front.jpg", "02_3_front.jpg", "02_4_front.jpg"]
    collars_sleeves_hems = train.records[0]["pose"]
    assert collars_sleeves_hems.tolist() == [[1, 2, 1], [3, 4, 1], [5, 6, 1], [7, 8, 0],  # the last cut off
                                             [0, 0, 0], [0, 0, 0], [9, 10, 1], [11, 12, 1]]
    lower, full = (record["pose"] for record in fields_of(
        tmp_path, "image", "pose", name="deepfashion").records)
    assert lower.tolist() == [[0, 0, 0]] * 4 + [[1, 2, 1], [3, 4, 1], [5, 6, 1], [0, 0, 0]]
    assert full[:, 2].tolist() == [1] * 8 and full[7].tolist() == [15, 16, 1]
    item = train[0, None]
    assert item["image"].shape == item["pose"].shape == (3, 40, 40)
    alone = fields_of(tmp_path, "pose", split="train", name="deepfashion")
    assert np.array_equal(alone[0, None]["pose"], item["pose"]) and item["pose"].max() == 255
    with pytest.raises(ValueError, match="02_0_front.jpg has 40×40 pixels, too few"):
        fields_of(tmp_path, "pose", split="train", name="deepfashion", size=41)[0, None]
    before = alone.fingerprint()
    list_file = tmp_path / places[0] / "list_landmarks_inshop.txt"
    list_file.write_text(list_file.read_text().replace("001 002", "020 020"))
    assert fields_of(tmp_path, "pose", split="train", name="deepfashion").fingerprint() != before


def test_deepfashion_without_its_partition_is_split_by_name_and_missing_parts_are_named(tmp_path):
    deepfashion(tmp_path, "Anno", "none", "Img")
    assert len(fields_of(tmp_path, "image", split="train", name="deepfashion")) == 5
    with pytest.raises(FileNotFoundError, match="has no val pictures"):
        fields_of(tmp_path, "image", name="deepfashion")
    (tmp_path / "Img").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="has no Img/img/, nor that without Img/"):
        fields_of(tmp_path, "image", name="deepfashion")
    (tmp_path / "Anno" / "list_landmarks_inshop.txt").unlink()
    with pytest.raises(FileNotFoundError, match="has no Anno/list_landmarks_inshop.txt, nor that without Anno"):
        fields_of(tmp_path, "image", name="deepfashion")


def test_deepfashions_pictures_that_its_partition_does_not_name_are_split_by_name(tmp_path):
    """As without a partition: of 60 names, those that kept_for_validation has always kept."""
    names = [f"img/MEN/{i}.jpg" for i in range(60)]
    (tmp_path / "img").mkdir()
    for name, first, rows in (("landmarks_inshop", "60", [f"{name} 2 1 " + "0 1 2 " * 4 for name in names]),
                              ("eval_partition", "1", ["img/MEN/0.jpg id_0 query"])):
        (tmp_path / f"list_{name}.txt").write_text("\n".join([first, "heading", *rows, "", ""]))
    expected = {name for name in names if layouts.kept_for_validation(Path(name))} | {names[0]}
    assert 1 < len(expected) < 12
    found = files(fields_of(tmp_path, "image", name="deepfashion"))
    assert {path.relative_to(tmp_path).as_posix() for path in found} == expected


@pytest.mark.parametrize("change", [("  1 1 ", "  4 1 "), ("  1 1 ", "  2 1 "), (" 011 012", " 011"),
                                    ("001", "x"),
                                    ("  1 1 0 001 002 0 003 004 1 005 006 2 007 008 0 009 010 0 011 012", "")])
def test_a_list_of_landmarks_unlike_the_official_one_is_named(tmp_path, change):
    deepfashion(tmp_path, "Anno", "Eval", "Img")
    file = tmp_path / "Anno" / "list_landmarks_inshop.txt"
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(ValueError, match="list_landmarks_inshop.txt has a line for img/.*02_0_front.jpg"):
        fields_of(tmp_path, "pose", split="train", name="deepfashion")
