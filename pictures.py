"""Files → arrays: pictures of any kind, masks, depth maps, key points (§4), and the same cut of all of them.

Symbols: S×S pixels, J key points.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image, ImageColor, ImageDraw, ImageOps

NO_LABEL = 255  # in a mask: this pixel has none
# A label is never a mixture of two, and depth stays in [−1, 1], which bicubic would leave.
RESAMPLING = {"image": Image.Resampling.BICUBIC, "segmentation": Image.Resampling.NEAREST,
              "depth": Image.Resampling.BILINEAR, "pose": Image.Resampling.BILINEAR}


def opened(path: Path, size: int = 0) -> Image.Image:
    """A picture file, upright. `size` lets the JPEG decoder skip detail that a resize to it loses.

    Raises ValueError for a file that is no picture.
    """
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (2 * size, 2 * size))
            return ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove or replace it") from None


def open_picture(path: Path, size: int) -> Image.Image:
    """Any picture as RGB, transparency laid on white. Grey, palette, CMYK and 16-bit are converted."""
    picture = opened(path, size)
    if picture.mode.startswith(("I", "F")):  # 16-bit grey: scale to 8 bits, `convert` would clip
        grey = np.asarray(picture, np.float32)
        scale = 257 if picture.mode.startswith("I;16") or grey.max() > 255 else 1
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def open_labels(path: Path, void_label: int) -> Image.Image:
    """A mask, grey or palette, as mode L: the label of each pixel, 255 if it has none. Raises ValueError."""
    picture = opened(path)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise ValueError(f"{path} is a picture in colours ({picture.mode}); a mask has one channel, with the "
                         "number of a label in each pixel: save it as 8-bit grey or with a palette")
    labels = np.array(picture).astype(np.int64)  # of a palette the index
    labels[labels == void_label] = NO_LABEL
    if labels.min() < 0 or labels.max() > NO_LABEL:
        raise ValueError(f"{path} has labels from {labels.min()} to {labels.max()}; a mask may have those "
                         f"from 0 to {NO_LABEL - 1}, and {NO_LABEL} where there is none")
    return Image.fromarray(labels.astype(np.uint8))


def open_depth(path: Path) -> Image.Image:
    """A depth map of one channel, mode F, scaled from its smallest and largest value to [−1, 1]; §4 (ii).

    A picture of 8, 16 or 32 bits, or an array (H, W) in a .npy file. ValueError for anything else.
    """
    if path.suffix.lower() == ".npy":
        depth = open_array(path)
    else:
        picture = opened(path)
        depth = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)  # numbers of colours
    depth = np.squeeze(depth).astype(np.float64)  # float32 would round large numbers off before the scaling
    if depth.ndim != 2 or not depth.size:
        raise ValueError(f"{path} has the shape {depth.shape}; a depth map has one channel, (H, W)")
    if not np.isfinite(depth).all():
        raise ValueError(f"{path} has depths that are infinite or not a number: remove or replace it")
    low, high = depth.min(), depth.max()
    depth = (depth - low) / (high - low) * 2 - 1 if high > low else np.zeros_like(depth)
    return Image.fromarray(depth.astype(np.float32))


def open_array(path: Path) -> ndarray:
    """The numbers in a .npy file. Raises ValueError for anything else."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"of {array.dtype}, not of numbers")
        return array
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} cannot be read as an array ({error}): remove or replace it") from None


def open_pose(pose: Path | ndarray, image: Path | None, size: int) -> Image.Image:
    """A picture of a pose; or key points, an array or in a .npy file, which are drawn as large as the image.

    They are (J, 2), x and y in pixels of the image, or (J, 3) with 0 in the last column where one is unknown.
    """
    if isinstance(pose, Path) and pose.suffix.lower() != ".npy":
        return open_picture(pose, size)
    points = open_array(pose) if isinstance(pose, Path) else pose
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"{pose} has the shape {points.shape}; key points are (J, 2), x and y in pixels of "
                         "the image, or (J, 3) with 0 in the last column where one is unknown")
    return draw_keypoints(points, opened(image).size)


def draw_keypoints(points: ndarray, size: tuple[int, int], limbs: tuple = ()) -> Image.Image:
    """Key points (J, 2 or 3) as discs of J hues on black, size (width, height); §4 (iii).

    `limbs` are pairs of points to be joined, in the second one's hue.
    """
    points = np.concatenate([points, np.ones_like(points[:, :1])], axis=1)[:, :3]  # (J, 3)
    known = np.isfinite(points).all(1) & (points[:, 2] > 0)  # (J,)
    hues = [ImageColor.getrgb(f"hsv({360 * j / len(points):.0f},100%,100%)") for j in range(len(points))]
    picture = Image.new("RGB", size)
    draw, radius = ImageDraw.Draw(picture), min(size) / 24  # 1.3 pixels at 32×32: thinner ones get lost
    for a, b in limbs:
        if known[a] and known[b]:
            draw.line([tuple(points[a, :2]), tuple(points[b, :2])], fill=hues[b], width=round(1.5 * radius))
    for j in np.flatnonzero(known):
        draw.circle(tuple(points[j, :2]), radius, fill=hues[j])
    return picture


class Window(NamedTuple):
    """S×S pixels at (left, top) of a picture that is resized to width×height before."""
    width: int
    height: int
    left: int
    top: int
    size: int
    mirrored: bool


def choose_window(width: int, height: int, size: int, flip: bool,
                  random: np.random.Generator | None) -> Window:
    """Of a picture whose shorter side is resized to S: a random place, mirrored or not; None: the centre."""
    scale = size / min(width, height)
    width, height = (max(size, round(side * scale)) for side in (width, height))
    if random is None:
        return Window(width, height, (width - size) // 2, (height - size) // 2, size, mirrored=False)
    left, top = random.integers(width - size + 1), random.integers(height - size + 1)
    return Window(width, height, left, top, size, mirrored=flip and random.random() < 0.5)


def cut_out(picture: Image.Image, window: Window, field: str) -> ndarray:
    """The pixels of a window: (3, S, S) of an RGB picture, else (S, S)."""
    picture = picture.resize((window.width, window.height), RESAMPLING[field], reducing_gap=3.0)
    pixels = np.asarray(picture)[window.top:window.top + window.size, window.left:window.left + window.size]
    pixels = pixels[:, ::-1] if window.mirrored else pixels
    return np.array(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels, order="C")  # not Pillow's own
