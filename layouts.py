"""In which folders the pictures of a data set lie, and what lies beside them (§A.2).

A layout turns a folder into records, one a picture: {"image": file, "segmentation": file, …, "label": class},
with those fields that are asked for. All raise FileNotFoundError or ValueError, which say what is wrong.

    folder               any pictures, or images/x.jpg beside segmentation/x.png, depth/x.png and pose/x.png;
                         within train/ and val/, or else one name in 20 is kept for validation
    imagenet             train/<wnid>/*.JPEG, val/<wnid>/*.JPEG; depth maps in depth/train/<wnid>/, depth/val/
    restricted-imagenet  the same folder; nine groups of its 1,000 classes
    ade20k               images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    deepfashion          in-shop: img/…, list_landmarks_inshop.txt, and if there list_eval_partition.txt
"""
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy import ndarray

Record = dict[str, Path | ndarray | int]

FIELDS = ("image", "segmentation", "depth", "pose")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")  # case does not matter
SUFFIXES = {"image": PICTURES,
            "segmentation": (".png", ".bmp", ".tif", ".tiff"),  # not lossy, nor GIF, which renumbers labels
            "depth": (*PICTURES, ".npy"), "pose": (*PICTURES, ".npy")}
VALIDATION_SHARE = 20  # one picture in 20 of a folder without train/ and val/

ADE20K_SEGMENTS = 151  # 150 classes, and 0 for anything else

# Restricted ImageNet: the first and last of ImageNet's 1,000 sorted classes, counted from 0.
RESTRICTED = {"dog": (151, 268), "cat": (281, 285), "frog": (30, 32), "turtle": (33, 37), "bird": (80, 100),
              "primate": (365, 382), "fish": (389, 397), "crab": (118, 121), "insect": (300, 319)}
# DeepFashion's landmarks of upper-body (1), lower-body (2) and full-body (3) clothes, as places among the
# eight of the last: left and right collar, sleeve, waistline, hem.
LANDMARKS = {"1": (0, 1, 2, 3, 6, 7), "2": (4, 5, 6, 7), "3": (0, 1, 2, 3, 4, 5, 6, 7)}


def found(folder: Path, field: str, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files of a field anywhere below a folder, sorted. Links are followed, but not in circles.

    Nothing hidden: a Mac (._a.jpg) and Jupyter (.ipynb_checkpoints/) leave what is none of the data.
    """
    place, files = folder.resolve(), []
    if place in above:
        return []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES[field] and path.is_file():
            files.append(path)
        elif path.is_dir():
            files += found(path, field, (*above, place))
    return files


def by_name(folder: Path, files: list[Path]) -> dict[Path, Path]:
    """Files by what they are called below a folder, but for the suffix. Raises ValueError if two agree."""
    named = {}
    for path in files:
        other = named.setdefault(path.relative_to(folder).with_suffix(""), path)
        if other != path:
            raise ValueError(f"{other} and {path.name} belong to one picture: remove one of them")
    return named


def paired(folders: dict[str, Path]) -> list[Record]:
    """A record for each file below the first folder, with the files of the same name in the others.

    Names are compared without their suffix. Raises if a folder is missing or empty, a file alone or doubled.
    """
    for field, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; {field} files are expected there")
    (first, root), *others = folders.items()
    records = [{first: path} for path in found(root, first)]
    if not records:
        raise FileNotFoundError(f"{root} has no pictures ({' '.join(SUFFIXES[first])}); "
                                "put some there, or name another --data-dir")
    names = by_name(root, [record[first] for record in records]) if others else {}
    for field, folder in others:
        partners = by_name(folder, found(folder, field))
        alone = sorted(set(names) ^ set(partners))
        if alone:
            there, missing = (first, field) if alone[0] in names else (field, first)
            raise FileNotFoundError(
                f"{folders[there] / alone[0]} ({there}) has no partner in {folders[missing]} ({missing}); "
                f"{len(alone)} files are alone: add what is missing, or remove them")
        for name, record in zip(names, records):
            record[field] = partners[name]
    return records


def any_folder(directory: Path, split: str, fields: tuple[str, ...]) -> list[Record]:
    """Your own pictures; masks, depth maps and poses in folders of that name beside images/."""
    given = all((directory / name).is_dir() for name in ("train", "val"))
    root = directory / split if given else directory
    beside = [field for field in FIELDS[1:] if (root / field).is_dir()]
    folders = {field: root / ("images" if field == "image" else field) for field in fields}
    if fields == ("image",) and not ((root / "images").is_dir() and beside):
        folders = {"image": root}
    if "pose" in beside and "pose" in fields and any(
            path.suffix.lower() == ".npy" for path in found(root / "pose", "pose")):
        folders["image"] = root / "images"  # its size is needed to draw the key points
    records = paired(folders)
    if given:
        return records
    names = [record[fields[0]].relative_to(folders[fields[0]]) for record in records]
    kept = set(filter(kept_for_validation, names)) or {min(names, key=lot)}  # at least one
    return [record for record, name in zip(records, names) if (split == "val") == (name in kept)]


def kept_for_validation(path: Path) -> bool:
    """A fixed choice by file name, but for the suffix: adding pictures moves none of the others."""
    return lot(path) % VALIDATION_SHARE == 0


def lot(path: Path) -> int:
    """A number drawn by file name, but for the suffix."""
    return int(hashlib.sha256(os.fsencode(path.with_suffix("").as_posix())).hexdigest(), 16)


def imagenet(directory: Path, split: str, fields: tuple[str, ...]) -> list[Record]:
    """A label is the place of its class folder among the sorted ones of train/."""
    folders = {field: directory / split if field == "image" else directory / field / split
               for field in fields}
    classes = {name: label for label, name in enumerate(class_folders(directory))}
    records = paired(folders)
    for record in records:
        name = record[fields[0]].relative_to(folders[fields[0]]).parts[0]
        if name not in classes:
            raise FileNotFoundError(
                f"{record[fields[0]]} is in no folder that is named like a class folder in "
                f"{directory / 'train'} (n01440764, …): sort the pictures into those")
        record["label"] = classes[name]
    return records


def class_folders(directory: Path) -> list[str]:
    train = directory / "train"
    return sorted(path.name for path in train.iterdir()
                  if path.is_dir() and not path.name.startswith(".")) if train.is_dir() else []


def restricted_imagenet(directory: Path, split: str, fields: tuple[str, ...]) -> list[Record]:
    """Nine groups of similar classes; 0 to 8 in the order of `RESTRICTED`. Other classes are left out."""
    count = len(class_folders(directory))
    if count != 1000:
        raise FileNotFoundError(
            f"{directory / 'train'} has {count} class folders; restricted-imagenet counts through all 1,000, "
            "of which those that it leaves out may be empty")
    group = {label: i for i, (first, last) in enumerate(RESTRICTED.values())
             for label in range(first, last + 1)}
    return [record | {"label": group[record["label"]]} for record in imagenet(directory, split, fields)
            if record["label"] in group]


def ade20k(directory: Path, split: str, fields: tuple[str, ...]) -> list[Record]:
    """Scene parsing: labels 1 to 150, and 0 for anything else."""
    split = {"train": "training", "val": "validation"}[split]
    return paired({field: directory / ("images" if field == "image" else "annotations") / split
                   for field in fields})


def deepfashion(directory: Path, split: str, fields: tuple[str, ...]) -> list[Record]:
    """In-shop clothes retrieval: landmarks are key points (8, 3), "query" and "gallery" for validation."""
    landmarks = read_list(directory, "Anno", "list_landmarks_inshop.txt")
    partition = read_list(directory, "Eval", "list_eval_partition.txt")
    images = directory if (directory / "img").is_dir() else directory / "Img"
    found_images = (images / "img").is_dir()
    for there, name in ((landmarks, "Anno/list_landmarks_inshop.txt"), (found_images, "Img/img/")):
        if not there:
            raise FileNotFoundError(f"{directory} has no {name}, nor that without {name.split('/')[0]}/; "
                                    "name the folder of DeepFashion's in-shop benchmark")
    validates = {name: status != "train" for name, *_, status in partition}
    records = []
    for name, *words in landmarks:
        if (split == "val") == validates.get(name, kept_for_validation(Path(name))):
            try:
                records.append({"image": images / name, "pose": key_points(*words)})
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"list_landmarks_inshop.txt has a line for {name} that is not like the "
                                 "official ones: fetch it again") from None
    return records


def key_points(clothes: str, variation: str, *numbers: str) -> ndarray:
    """Landmarks of a line as key points (8, 3): x, y, and 0 where one is cut off or not on such clothes."""
    points = np.zeros((8, 3), np.float32)
    state, x, y = np.array(numbers, np.float32).reshape(-1, 3).T  # state: 0 visible, 1 occluded, 2 cut off
    points[list(LANDMARKS[clothes])] = np.stack([x, y, state < 2], axis=1)
    return points


def read_list(directory: Path, subfolder: str, name: str) -> list[list[str]]:
    """The words of each line of a list file, but for the count and the heading; [] if there is none."""
    for path in (directory / name, directory / subfolder / name):
        if path.is_file():
            return [line.split() for line in path.read_text().splitlines()[2:] if line.strip()]
    return []


LAYOUTS = {"folder": any_folder, "imagenet": imagenet, "restricted-imagenet": restricted_imagenet,
           "ade20k": ade20k, "deepfashion": deepfashion}
