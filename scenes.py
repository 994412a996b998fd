"""The drawn data set: small scenes that need no download, at any resolution, with all a condition needs (§4).

Each picture shows a sky with a sun or moon, a ground, one or two solid objects and a person. Since the
drawing knows what it draws, each comes with its class label, segmentation mask, depth map and key points.
Number `index` of a split always gives the same picture.

Shapes are signed distances, negative inside, so edges come out smooth at every resolution. Lengths are in
picture heights: x runs from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom).

Symbols: S×S pixels, J key points.
"""
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image, ImageColor, ImageDraw

CLASSES = ("ball", "house", "tree", "tent")  # the kind of the largest object is the class of the picture
SEGMENTS = ("sky", "ground", "sun", "ball", "house", "tree", "tent", "person")  # labels of the mask
KEYPOINTS = ("head", "neck", "hip", "left elbow", "left hand", "right elbow", "right hand",
             "left knee", "left foot", "right knee", "right foot")
LIMBS = ((1, 0), (1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10))  # between them
SPLITS = {"train": 0, "val": 1}

SKIES = ((140, 195, 245), (250, 185, 140), (50, 60, 115))  # day, dusk, night
SUNS = ((255, 235, 130), (255, 100, 60), (235, 235, 245))  # the sun or moon of each sky
GROUNDS = ((90, 160, 70), (215, 185, 125), (235, 240, 245))  # grass, sand, snow
PAINTS = ((200, 50, 50), (50, 90, 200), (240, 200, 60), (150, 60, 160))  # balls, walls, tents, shirts
SKIN, TROUSERS, DOOR = (240, 195, 160), (60, 60, 80), (60, 60, 80)
TRUNK, CROWN, ROOF = (110, 75, 45), (35, 110, 50), (130, 55, 45)
HORIZON = 0.5


class Scene(NamedTuple):
    """One picture and what is known about it."""
    image: ndarray  # (S, S, 3) uint8
    label: int  # index into CLASSES
    segmentation: ndarray  # (S, S) uint8, indices into SEGMENTS
    depth: ndarray  # (S, S) float32 in [−1, 1]: −1 the sky, 1 the nearest ground (inverse distance, as MiDaS)
    keypoints: ndarray  # (J, 2) float32, x and y of KEYPOINTS in pixels; outside [0, S) if out of the picture


class Canvas:
    """Paints shapes back to front on a picture, its segmentation and its depth.

    A shape is (window, distance): the rows and columns that hold all of it, and the signed distances (rows,
    columns) there, or (N, rows, columns) for N parts that are painted one after another.
    """

    def __init__(self, size: int, background: tuple):
        self.size = size
        self.centers = (np.arange(size, dtype=np.float32) + 0.5) / size  # (S,) of pixels
        self.image = np.zeros((3, size, size), np.float32) + np.float32(background)[:, None, None]
        self.segmentation = np.zeros((size, size), np.uint8)
        self.depth = np.full((size, size), -1, np.float32)

    def paint(self, shape: tuple, segment: str, depth: ndarray | float, *colours: tuple):
        """Cover the inside of a shape, and its edge in part; a colour (3,) in [0, 255] for each part."""
        (rows, columns), distance = shape
        image = self.image[:, rows, columns]
        distance = distance.reshape(len(colours), *distance.shape[-2:])
        coverages = (0.5 - distance * self.size).clip(0, 1)
        for coverage, colour in zip(coverages, np.float32(colours)[:, :, None, None]):
            image += coverage * (colour - image)
        inside = (distance < 0).any(0)
        np.copyto(self.segmentation[rows, columns], SEGMENTS.index(segment), where=inside)
        np.copyto(self.depth[rows, columns], depth, where=inside)

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple:
        """(rows, columns) of a box and a pixel around it, their x (columns,) and their y (rows, 1)."""
        columns, rows = (slice(max(0, int(first * self.size) - 1), max(0, int(last * self.size) + 2))
                         for first, last in ((left, right), (top, bottom)))
        return (rows, columns), self.centers[columns], self.centers[rows, None]

    def disc(self, x: float, y: float, radius: float) -> tuple:
        window, xs, ys = self.window(x - radius, y - radius, x + radius, y + radius)
        return window, np.hypot(xs - x, ys - y) - radius

    def box(self, x: float, y: float, width: float, height: float) -> tuple:
        """The box that stands with the middle of its lower edge on (x, y)."""
        window, xs, ys = self.window(x - width / 2, y - height, x + width / 2, y)
        beside = np.abs(xs - x) - width / 2
        return window, np.maximum(beside, np.abs(ys - (y - height / 2)) - height / 2)

    def triangle(self, x: float, y: float, width: float, height: float) -> tuple:
        """The upright triangle whose lower edge has its middle on (x, y)."""
        slope = np.hypot(height, width / 2)
        edge = (width + slope) / min(width, height) / self.size  # at sharp corners it reaches farther out
        window, xs, ys = self.window(x - width / 2 - edge, y - height - edge, x + width / 2 + edge, y)
        sides = (np.abs(xs - x) * height + (ys - y + height) * -width / 2) / slope
        return window, np.maximum(sides, ys - y)

    def limbs(self, starts: ndarray, ends: ndarray, thickness: ndarray) -> tuple:
        """The lines between N pairs of points (N, 2) with round ends, thickness (N,)."""
        radius, points = thickness[:, None, None] / 2, np.stack([starts, ends])  # (N, 1, 1), (2, N, 2)
        window, xs, ys = self.window(*points.min((0, 1)) - radius.max(), *points.max((0, 1)) + radius.max())
        (x, y), (dx, dy) = starts.T[:, :, None, None], (ends - starts).T[:, :, None, None]  # (N, 1, 1) each
        xs, ys = xs - x, ys - y  # (N, 1, columns), (N, rows, 1)
        t = ((xs * dx + ys * dy) / np.maximum(dx * dx + dy * dy, 1e-12)).clip(0, 1)  # (N, rows, columns)
        return window, np.hypot(xs - t * dx, ys - t * dy) - radius


def draw_scene(split: str, index: int, size: int) -> Scene:
    """Picture number `index` of a split ("train" or "val"), S = size; no picture is in both splits."""
    random = np.random.default_rng((SPLITS[split], index))
    sky, ground = random.integers(len(SKIES)), random.integers(len(GROUNDS))
    canvas = Canvas(size, SKIES[sky])
    sun = canvas.disc(random.integers(1, 8) / 8, random.integers(1, 3) / 8 + 1 / 32, 0.09)
    canvas.paint(sun, "sun", -1, SUNS[sky])
    window, _, ys = canvas.window(0, HORIZON, 1, 1)
    nearness = (ys - HORIZON) / (1 - HORIZON)  # (rows, 1): 0 at the horizon, 1 at the lower edge
    canvas.paint((window, HORIZON - ys), "ground", 2 * nearness - 1, GROUNDS[ground])

    side = random.integers(2)  # the person stands in one half of the picture, the largest object in the other
    person = random.choice([0.625, 0.875])  # nearness of the feet, as that of the objects below
    objects = [0.25, random.choice([0.5, 0.75])][random.integers(2):]
    for near in sorted([person, *objects]):  # far to near
        if near == person:
            keypoints = paint_person(canvas, random, side, near)
        else:
            largest = near == objects[-1]
            x = (1 - side) * 0.5 + random.integers(1, 4) / 8 if largest else random.integers(1, 8) / 8
            label = int(random.integers(len(CLASSES)))  # that of the last object, the largest, stays
            paint_object(canvas, random, CLASSES[label], x, near, largest)
    image = canvas.image.round().astype(np.uint8).transpose(1, 2, 0)  # (3, S, S) → (S, S, 3)
    return Scene(image, label, canvas.segmentation, canvas.depth, (keypoints * size).astype(np.float32))


def paint_object(canvas: Canvas, random: np.random.Generator, kind: str, x: float, near: float,
                 largest: bool):
    """A ball, house, tree or tent whose foot is at x and the given nearness; nearer is larger."""
    y = HORIZON + near * (1 - HORIZON)
    size = (0.18 + 0.16 * near) * (1.3 if largest else 0.8)
    paint, depth = PAINTS[random.integers(len(PAINTS))], 2 * near - 1
    if kind == "ball":
        parts = [(canvas.disc(x, y - size / 2, size / 2), paint),
                 (canvas.disc(x - size / 7, y - size / 1.5, size / 9), SUNS[2])]
    elif kind == "house":
        parts = [(canvas.box(x, y, size, 0.7 * size), paint),
                 (canvas.triangle(x, y - 0.7 * size, 1.2 * size, 0.5 * size), ROOF),
                 (canvas.box(x, y, 0.25 * size, 0.4 * size), DOOR)]
    elif kind == "tree":
        parts = [(canvas.box(x, y, 0.18 * size, 0.7 * size), TRUNK),
                 (canvas.disc(x, y - 0.95 * size, 0.42 * size), CROWN)]
    else:
        parts = [(canvas.triangle(x, y, 1.2 * size, 0.85 * size), paint),
                 (canvas.triangle(x, y, 0.35 * size, 0.5 * size), DOOR)]
    for shape, colour in parts:
        canvas.paint(shape, kind, depth, colour)


def paint_person(canvas: Canvas, random: np.random.Generator, side: int, near: float) -> ndarray:
    """A person with bent limbs in the left (0) or right (1) half; returns key points (J, 2) in heights."""
    foot = np.array([side * 0.5 + random.integers(1, 4) / 8, HORIZON + near * (1 - HORIZON)])
    height = 0.3 + 0.22 * near

    def joint(start: ndarray, length: float, angle: float) -> ndarray:
        """A point `length` body heights away; angle 0 hangs down, positive turns to the right."""
        return start + height * length * np.array([np.sin(angle), np.cos(angle)])

    hip = foot - [0, 0.46 * height]
    neck = joint(hip, 0.34, np.pi)
    points = {"head": joint(neck, 0.12, np.pi), "neck": neck, "hip": hip}
    for name, sign in (("left", -1), ("right", 1)):
        raised = random.choice([0.3, 0.9, 1.6, 2.3])  # of the upper arm; the lower arm bends on from there
        points[f"{name} elbow"] = joint(neck, 0.19, sign * raised)
        points[f"{name} hand"] = joint(points[f"{name} elbow"], 0.18, sign * (raised + 0.4))
        spread = random.choice([0.15, 0.45])
        points[f"{name} knee"] = joint(hip, 0.24, sign * spread)
        points[f"{name} foot"] = joint(points[f"{name} knee"], 0.24, sign * spread / 2)
    keypoints = np.array([points[name] for name in KEYPOINTS])  # (J, 2)
    shirt = PAINTS[random.integers(len(PAINTS))]
    limbs = [*LIMBS[6:], *LIMBS[1:6], (0, 0)]  # legs, body, arms and head, one upon the other
    colours = [*[TROUSERS] * 4, shirt, *[shirt, SKIN] * 2, SKIN]
    thickness = height * np.array([0.11] * 4 + [0.2] + [0.09] * 4 + [0.2])
    starts, ends = keypoints[np.transpose(limbs)]  # (N, 2) each
    canvas.paint(canvas.limbs(starts, ends, thickness), "person", 2 * near - 1, *colours)
    return keypoints


def draw_keypoints(points: ndarray, size: tuple[int, int], limbs: tuple = ()) -> Image.Image:
    """Key points (J, 2 or 3) as discs of J hues on black; `limbs` join two in the second's hue; §4 (iii)."""
    known = np.isfinite(points).all(1) & (points[:, 2:] > 0).all(1)  # (J,)
    hues = [ImageColor.getrgb(f"hsv({360 * j / len(points):.0f},100%,100%)") for j in range(len(points))]
    picture = Image.new("RGB", size)
    draw, radius = ImageDraw.Draw(picture), min(size) / 24  # 1.3 pixels at 32×32: thinner ones get lost
    for a, b in limbs:
        if known[a] and known[b]:
            draw.line([tuple(points[a, :2]), tuple(points[b, :2])], fill=hues[b], width=round(1.5 * radius))
    for j in np.flatnonzero(known):
        draw.circle(tuple(points[j, :2]), radius, fill=hues[j])
    return picture
