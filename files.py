"""Which files belong to a data set, and each as an array: pictures, masks, depth maps, poses (§4, §A.2).

A layout lists a folder as records, one a picture: {"image": file, "segmentation": file, …, "class": label},
with the fields asked for. What is missing or cannot be told raises FileNotFoundError or ValueError.

    folder               any pictures, or images/x.jpg beside segmentation/x.png, depth/x.png and pose/x.png
                         (or .npy); in train/ and val/, or one in 20 is for validation; class subfolders
    imagenet             train/<wnid>/*.JPEG, val/<wnid>/*.JPEG; depth maps in depth/train/<wnid>/, depth/val/
    restricted-imagenet  the same folder; nine groups of its 1,000 classes
    ade20k               images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
    deepfashion          in-shop: img/…, list_landmarks_inshop.txt, and if there list_eval_partition.txt

Symbols: H×W pixels, S×S after cropping, J key points.
"""
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps

from scenes import draw_keypoints

Record = dict[str, Path | ndarray | int]
Listing = tuple[dict[Path, Record], tuple[str, ...]]  # a split's records by name, and the classes' names
READER_VERSION = 3  # raise it when what a file becomes changes, here or in data.py: codes are then made anew

FIELDS = ("image", "segmentation", "depth", "pose")  # grep for these names, to add one
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",  # case does not matter
            ".heic", ".heif", ".avif")  # which Pillow may not read: named, not left out silently
SUFFIXES = {"image": PICTURES,
            "segmentation": (".png", ".bmp", ".tif", ".tiff"),  # not lossy, nor GIF, which renumbers labels
            "depth": (*PICTURES, ".npy"), "pose": (*PICTURES, ".npy")}
VALIDATION_SHARE = 20  # one picture in 20 of a folder without a validation split
VALIDATION_FOLDERS = ("val", "valid", "validation")
SPLIT_FOLDERS = {"train", "training", *VALIDATION_FOLDERS, "test", "testing"}
MASK_FOLDERS = {*FIELDS[1:], "mask", "masks", "label", "labels", "annotation", "annotations",
                "segmentationclass"}  # must never be trained as pictures
NO_LABEL = 255  # in a mask: this pixel has none
ADE20K_SEGMENTS = 151  # 150 classes, and 0 for anything else
# Restricted ImageNet: the first and last of ImageNet's 1,000 sorted classes, counted from 0.
RESTRICTED = {"dog": (151, 268), "cat": (281, 285), "frog": (30, 32), "turtle": (33, 37), "bird": (80, 100),
              "primate": (365, 382), "fish": (389, 397), "crab": (118, 121), "insect": (300, 319)}
# DeepFashion's landmarks of upper-body (1), lower-body (2) and full-body (3) clothes, as indices into the
# eight of the last: left and right collar, sleeve, waistline, hem.
LANDMARKS = {"1": (0, 1, 2, 3, 6, 7), "2": (4, 5, 6, 7), "3": (0, 1, 2, 3, 4, 5, 6, 7)}


@dataclass(frozen=True)
class Preparation:
    """How pictures become arrays: what a first stage was trained on, and needs again."""
    size: int  # S, pixels along each side
    fields: tuple[str, ...] = ("image",)  # of "image", "segmentation", "depth", "pose", "class"
    flip: bool = False  # mirror half of the training pictures
    upscale: bool = False  # enlarge pictures smaller than S instead of refusing them
    void_label: int = NO_LABEL  # in a mask: the value of pixels without a label, besides 255
    segments: int = 0  # labels of the masks; ValueError for one that has more; 0: not checked


class UnreadableError(ValueError):
    """A file that is damaged, or no picture or array at all: in training another one can stand in for it."""


def list_files(folder: Path, field: str) -> list[Path]:
    """The files of a field anywhere below a folder, sorted. Links are followed, no folder is listed twice."""
    files, visited = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse_unreadable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # hidden: no data
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        files += [Path(place, name) for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES[field]]
    return sorted(files)


def refuse_unreadable(error: OSError):
    raise FileNotFoundError(f"{error.filename} cannot be opened ({error.strerror})")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted; [] if there is no such folder."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def pair_by_stem(folders: dict[str, Path]) -> dict[Path, Record]:
    """A record for each file below the first folder, with the files in the others that differ in suffix only.

    Raises FileNotFoundError or ValueError if a folder is missing or empty, a file alone or doubled.
    """
    files = {field: {} for field in folders}  # field → {relative path without suffix: with suffix}
    for field, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; {field} files are expected there")
        for path in list_files(folder, field):
            name = path.relative_to(folder)
            other = files[field].setdefault(name.with_suffix("") if len(folders) > 1 else name, name)
            if other != name:
                raise ValueError(f"{folder / other} and {name.name} belong to one picture: remove one")
    (first, names), *others = files.items()
    if not names:
        raise FileNotFoundError(f"{folders[first]} has no pictures ({' '.join(SUFFIXES[first])}); "
                                "put some there, or name another --data-dir")
    for field, partners in others:
        alone = sorted(set(names) ^ set(partners))
        if alone:
            there, missing = (first, field) if alone[0] in names else (field, first)
            raise FileNotFoundError(
                f"{folders[there] / alone[0]} ({there}) has no partner in {folders[missing]} "
                f"({missing}); {len(alone)} files are alone: add what is missing, or remove them")
    return {name: {field: folder / files[field][stem] for field, folder in folders.items()}
            for stem, name in names.items()}


def label_classes(records: dict[Path, Record], classes: tuple[str, ...]):
    """Give each record the index of its class folder, the first on the way to its file."""
    labels = {name: label for label, name in enumerate(classes)}
    for name, record in records.items():
        if name.parts[0] not in labels:
            file = next(iter(record.values()))
            some = ", ".join(classes[:3]) + ", …" * (len(classes) > 3) or "there is none"
            raise FileNotFoundError(f"{file} is in no class folder of training ({some}): sort all pictures "
                                    "into a folder for each class, alike in each split")
        record["class"] = labels[name.parts[0]]


def any_folder(directory: Path, split: str, fields: tuple[str, ...]) -> Listing:
    """Your own pictures; masks, depth maps and poses in folders of that name beside images/."""
    there = {path.name.lower(): path for path in subfolders(directory)}
    named = [there[name] for name in VALIDATION_FOLDERS if name in there]
    if len(named) > 1 or "train" not in there and SPLIT_FOLDERS & set(there):
        raise unclear(directory)
    train, validation = there.get("train", directory), named[0] if named else there.get("test")
    folders = field_folders(validation if split == "val" and validation else train, fields)
    records = pair_by_stem(folders)
    inside = {place.name.lower(): place for name in records for place in name.parents}
    masks = MASK_FOLDERS & set(inside) if "image" in folders else set()
    splits = SPLIT_FOLDERS & set(inside)
    if masks or len(splits) > 1:  # one may be a class
        raise unclear(next(iter(folders.values())), [inside[name] for name in sorted(masks | splits)])
    classes = ()
    if "class" in fields:
        field, place = next(iter(field_folders(train, fields).items()))
        classes = tuple(path.name for path in subfolders(place) if list_files(path, field))
        label_classes(records, classes)
    if not validation:  # some are kept, at least one
        kept = {name for name in records if path_hash(name) % VALIDATION_SHARE == 0}
        kept = kept or {min(records, key=path_hash)}
        records = {name: record for name, record in records.items() if (name in kept) == (split == "val")}
    return records, classes


def field_folders(root: Path, fields: tuple[str, ...]) -> dict[str, Path]:
    """Where the files of each field lie. ValueError if that cannot be told."""
    there = {path.name.lower(): path for path in subfolders(root)}
    asked = [field for field in fields if field != "class"] or ["image"]
    beside = set(FIELDS[1:]) & set(there)
    images = there.get("images", root if asked == ["image"] else root / "images")
    mixed = (len(there) > 1 and not beside) if "images" in there else MASK_FOLDERS & set(there)
    if "image" in asked and mixed:
        raise unclear(root)
    folders = {field: images if field == "image" else there.get(field, root / field) for field in asked}
    poses = list_files(there["pose"], "pose") if "pose" in asked and "pose" in there else []
    if any(path.suffix.lower() == ".npy" for path in poses):
        folders["image"] = images  # its size is needed to draw the key points
    return folders


def unclear(folder: Path, places: list[Path] | None = None) -> ValueError:
    names = ", ".join(map(str, places or [path.name for path in subfolders(folder)]))
    return ValueError(f"{folder} has the folders {names}: which hold pictures, and which validation, "
                      "cannot be told; expected are train/ and val/ or neither, with pictures, or images/ "
                      "beside segmentation/, depth/ or pose/ (ADE20K: --data ade20k); rename such classes")


def path_hash(path: Path) -> int:
    """A number from the name without suffix: added files move no other, unless only one was held out."""
    return int(hashlib.sha256(os.fsencode(path.with_suffix("").as_posix())).hexdigest(), 16)


def imagenet(directory: Path, split: str, fields: tuple[str, ...]) -> Listing:
    """A label is the index of its class folder among the sorted ones of train/."""
    asked = [field for field in fields if field != "class"] or ["image"]
    folders = {field: directory / ("" if field == "image" else field) / split for field in asked}
    records = pair_by_stem(folders)
    classes = tuple(path.name for path in subfolders(directory / "train"))
    label_classes(records, classes)
    return records, classes


def restricted_imagenet(directory: Path, split: str, fields: tuple[str, ...]) -> Listing:
    """Nine groups of similar classes; 0 to 8 in the order of `RESTRICTED`. Other classes are left out."""
    records, classes = imagenet(directory, split, fields)
    if len(classes) != 1000:
        raise FileNotFoundError(f"{directory / 'train'} has {len(classes)} class folders; "
                                "restricted-imagenet counts through all 1,000, of which some may be empty")
    group = {label: i for i, (first, last) in enumerate(RESTRICTED.values())
             for label in range(first, last + 1)}
    return {name: record | {"class": group[record["class"]]} for name, record in records.items()
            if record["class"] in group}, tuple(RESTRICTED)


def ade20k(directory: Path, split: str, fields: tuple[str, ...]) -> Listing:
    """Scene parsing: labels 1 to 150, and 0 for anything else."""
    place = {"train": "training", "val": "validation"}[split]
    return pair_by_stem({field: directory / ("images" if field == "image" else "annotations") / place
                         for field in fields}), ()


def deepfashion(directory: Path, split: str, fields: tuple[str, ...]) -> Listing:
    """In-shop clothes retrieval: landmarks are key points (8, 3), "query" and "gallery" for validation."""
    names = ("Anno/list_landmarks_inshop.txt", "Img/img", "Eval/list_eval_partition.txt")
    places = [(directory / name, directory / Path(name).name) for name in names]
    landmarks, images, partition = (next(filter(Path.exists, place), None) for place in places)
    if not landmarks or not images:
        name = names[1] if landmarks else names[0]
        raise FileNotFoundError(f"{directory} has no {name}, nor that without {Path(name).parent}/; "
                                "name the folder of DeepFashion's in-shop benchmark")
    validates, records, line = {}, {}, [""]
    try:
        for line in read_list(partition) if partition else []:
            validates[line[0]] = {"train": False, "query": True, "gallery": True}[line[-1]]
        for line in read_list(landmarks):
            name, clothes, _, *numbers = line
            state, x, y = np.array(numbers, np.float32).reshape(-1, 3).T  # 0 visible, 1 occluded, 2 cut off
            points = np.zeros((8, 3), np.float32)  # x, y, and 0 where one is cut off or not on such clothes
            points[list(LANDMARKS[clothes])] = np.stack([x, y, state < 2], axis=1)
            if (split == "val") == validates.get(name, path_hash(Path(name)) % VALIDATION_SHARE == 0):
                records[Path(name)] = {"image": images.parent / name, "pose": points}
    except (KeyError, ValueError):
        raise ValueError(f"the lists in {directory} have a line for {line[0]} that is not like "
                         "the official ones: fetch them again") from None
    return records, ()


def read_list(path: Path) -> list[list[str]]:
    """The words of each line of a list file, without the count and the heading, if they are there."""
    lines = [os.fsdecode(line).split() for line in path.read_bytes().split(b"\n")]
    return [line for i, line in enumerate(lines)
            if line and (i > 1 or Path(line[0]).suffix.lower() in PICTURES)]


LAYOUTS = {"folder": any_folder, "imagenet": imagenet, "restricted-imagenet": restricted_imagenet,
           "ade20k": ade20k, "deepfashion": deepfashion}


def open_image(path: Path, size: int = 0) -> Image.Image:
    """A picture file, upright, or UnreadableError. `size` skips JPEG detail that a resize loses."""
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (2 * size, 2 * size))
            return ImageOps.exif_transpose(file)
    except Exception as error:  # damaged bytes can raise anything
        raise UnreadableError(f"{path} cannot be read as a picture ({error}): remove or replace it") from None


def open_rgb(path: Path, size: int) -> Image.Image:
    """Any picture as RGB, transparency laid on white. Grey, palette, CMYK and 16-bit are converted."""
    picture = open_image(path, size)
    if picture.mode.startswith(("I", "F")):  # 16-bit or float grey: scale to 8 bits, `convert` would clip
        grey = np.asarray(picture, np.float32)
        scale = 257 if picture.mode.startswith("I;16") or grey.max() > 255 else 1
        scale = 1 / 255 if picture.mode == "F" and grey.max() <= 1 else scale
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def open_labels(path: Path, void_label: int = NO_LABEL, segments: int = 0) -> Image.Image:
    """A mask, grey or palette, as mode L: the pixels' labels, below `segments` (0: any), or 255 for none."""
    picture = open_image(path)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise ValueError(f"{path} is a picture in colours ({picture.mode}); a mask has one channel, "
                         "with labels: save it as 8-bit grey or with a palette")
    labels = np.array(picture).astype(np.int64)  # of a palette the index
    labels[labels == void_label] = NO_LABEL
    limit = segments or NO_LABEL
    wrong = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= limit))]
    if wrong.size:
        raise ValueError(f"{path} has the label {wrong[0]}, but labels go from 0 to {limit - 1} (255: "
                         "none): correct it, or train with larger --segments or another --void-label")
    return Image.fromarray(labels.astype(np.uint8))


def open_depth(path: Path) -> Image.Image:
    """A depth map, a grey picture or a .npy file with (H, W), scaled from its range to [−1, 1]; §4 (ii)."""
    picture = open_array(path) if path.suffix.lower() == ".npy" else open_image(path)
    if isinstance(picture, Image.Image) and picture.mode == "P":  # its numbers are indices of colours
        picture = picture.convert("RGB")
    depth = np.squeeze(np.asarray(picture)).astype(np.float64)  # float32 would round large numbers
    if depth.ndim != 2 or not depth.size:
        raise ValueError(f"{path} has the shape {depth.shape}; a depth map has one channel, (H, W)")
    if not np.isfinite(depth).all():
        raise ValueError(f"{path} has depths that are infinite or not a number: remove or replace it")
    low, high = depth.min(), depth.max()
    depth = (depth - low) / (high - low) * 2 - 1 if high > low else np.zeros_like(depth)
    return Image.fromarray(depth.astype(np.float32))


def open_array(path: Path) -> ndarray:
    """The numbers in a .npy file. Raises UnreadableError for anything else."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"of {array.dtype}, not of numbers")
        return array
    except Exception as error:  # damaged bytes can raise anything
        raise UnreadableError(f"{path} cannot be read as an array ({error}): remove or replace it") from None


def open_pose(pose: Path | ndarray, image: Path | None, size: tuple[int, int]) -> Image.Image:
    """A picture of a pose; or key points, an array or in a .npy file, which are drawn as large as the image.

    They are (J, 2), x and y in pixels of the image, or (J, 3) with 0 in the last column where one is unknown.
    Without an image they are pixels of a picture of `size` (W, H); ValueError if they do not fit into it.
    """
    if isinstance(pose, Path) and pose.suffix.lower() != ".npy":
        return open_rgb(pose, size=0)
    points = open_array(pose) if isinstance(pose, Path) else pose
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"{pose} has the shape {points.shape}; key points are (J, 2), x and y in "
                         "pixels of the image, or (J, 3) with 0 in the last column where one is unknown")
    largest = np.nanmax(points[:, :2], initial=0)
    if 0 < largest < 2:
        raise ValueError(f"the key points of {image or pose} go up to {largest:.2g}: multiply by its sides")
    if image:
        return draw_keypoints(points, open_image(image).size)
    if (points[:, :2] > size).any():
        raise ValueError(f"{pose} has key points up to {largest:.0f}; without an image they are pixels "
                         f"of a picture of {size[0]}×{size[1]}: scale them to that")
    # Drawn at four times the size, so that the resize smooths the edges.
    return draw_keypoints(points * np.array([4, 4, 1])[:points.shape[1]], (4 * size[0], 4 * size[1]))


def open_field(field: str, record: Record, preparation: Preparation, size: tuple[int, int]) -> Image.Image:
    if field == "image":
        return open_rgb(record["image"], preparation.size)
    if field == "segmentation":
        return open_labels(record["segmentation"], preparation.void_label, preparation.segments)
    if field == "depth":
        return open_depth(record["depth"])
    return open_pose(record["pose"], record.get("image"), size)
