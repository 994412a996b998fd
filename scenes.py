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


class Scene(NamedTuple):
    """One picture and what is known about it."""
    image: ndarray  # (S, S, 3) uint8
    label: int  # index into CLASSES
    segmentation: ndarray  # (S, S) uint8, indices into SEGMENTS
    depth: ndarray  # (S, S) float32 in [−1, 1]: −1 the sky, 1 the nearest ground (inverse distance, as MiDaS)
    keypoints: ndarray  # (J, 2) float32, x and y of KEYPOINTS in pixels; outside [0, S) if out of the picture


class Canvas:
    """Paints shapes back to front on a picture, its segmentation and its depth."""

    def __init__(self, size: int):
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = centres[None, :], centres[:, None]  # (1, S), (S, 1)
        self.size = size
        self.image = np.zeros((size, size, 3), np.float32)
        self.segmentation = np.zeros((size, size), np.uint8)
        self.depth = np.full((size, size), -1, np.float32)

    def paint(self, distance: ndarray, colour: tuple, segment: str, depth: ndarray | float):
        """Cover the inside of a shape, given as signed distance (S, S), with a colour (3,) in [0, 255]."""
        coverage = np.clip(0.5 - distance * self.size, 0, 1)[..., None]  # (S, S, 1)
        self.image += coverage * (np.asarray(colour, np.float32) - self.image)
        inside = np.broadcast_to(distance < 0, self.segmentation.shape)
        self.segmentation[inside] = SEGMENTS.index(segment)
        self.depth[inside] = np.broadcast_to(depth, self.depth.shape)[inside]

    def below(self, y: float) -> ndarray:
        return np.broadcast_to(y - self.y, self.depth.shape)

    def disc(self, x: float, y: float, radius: float) -> ndarray:
        return np.hypot(self.x - x, self.y - y) - radius

    def box(self, x: float, y: float, width: float, height: float) -> ndarray:
        """The box that stands with the middle of its lower edge on (x, y)."""
        return np.maximum(np.abs(self.x - x) - width / 2, np.abs(self.y - (y - height / 2)) - height / 2)

    def triangle(self, x: float, y: float, width: float, height: float) -> ndarray:
        """The upright triangle whose lower edge has its middle on (x, y)."""
        slope = np.hypot(height, width / 2)
        sides = (np.abs(self.x - x) * height + (self.y - y + height) * -width / 2) / slope
        return np.maximum(sides, self.y - y)

    def limb(self, start: ndarray, end: ndarray, thickness: float) -> ndarray:
        """The line between two points (2,) with round ends."""
        dx, dy = end - start
        t = ((self.x - start[0]) * dx + (self.y - start[1]) * dy) / max(dx * dx + dy * dy, 1e-12)
        t = np.clip(t, 0, 1)
        return np.hypot(self.x - start[0] - t * dx, self.y - start[1] - t * dy) - thickness / 2


def draw_scene(split: str, index: int, size: int) -> Scene:
    """Picture number `index` of a split ("train" or "val"), S = size; no picture is in both splits."""
    random = np.random.default_rng((SPLITS[split], index))
    canvas = Canvas(size)
    sky, ground = random.integers(len(SKIES)), random.integers(len(GROUNDS))
    horizon = 0.5
    canvas.image[:] = SKIES[sky]
    sun = canvas.disc(random.integers(1, 8) / 8, random.integers(1, 3) / 8 + 1 / 32, 0.09)
    canvas.paint(sun, SUNS[sky], "sun", depth=-1)
    nearness = (canvas.y - horizon) / (1 - horizon)  # 0 at the horizon, 1 at the lower edge
    canvas.paint(canvas.below(horizon), GROUNDS[ground], "ground", 2 * nearness - 1)

    side = random.integers(2)  # the person stands in one half of the picture, the largest object in the other
    person = random.choice([0.625, 0.875])  # nearness of the feet, as that of the objects below
    objects = [0.25, random.choice([0.5, 0.75])][random.integers(2):]
    for near in sorted([person, *objects]):  # far to near
        if near == person:
            keypoints = paint_person(canvas, random, side, near, horizon)
        else:
            largest = near == objects[-1]
            x = (1 - side) * 0.5 + random.integers(1, 4) / 8 if largest else random.integers(1, 8) / 8
            label = int(random.integers(len(CLASSES)))  # that of the last object, the largest, stays
            paint_object(canvas, random, CLASSES[label], x, near, horizon, largest)
    image = np.clip(canvas.image.round(), 0, 255).astype(np.uint8)
    return Scene(image, label, canvas.segmentation, canvas.depth, (keypoints * size).astype(np.float32))


def paint_object(canvas: Canvas, random: np.random.Generator, kind: str, x: float, near: float,
                 horizon: float, largest: bool):
    """A ball, house, tree or tent whose foot is at x and the given nearness; nearer is larger."""
    y = horizon + near * (1 - horizon)
    size = (0.18 + 0.16 * near) * (1.3 if largest else 0.8)
    paint, depth = PAINTS[random.integers(len(PAINTS))], 2 * near - 1
    if kind == "ball":
        canvas.paint(canvas.disc(x, y - size / 2, size / 2), paint, kind, depth)
        canvas.paint(canvas.disc(x - size / 7, y - size / 1.5, size / 9), SUNS[2], kind, depth)
    elif kind == "house":
        canvas.paint(canvas.box(x, y, size, 0.7 * size), paint, kind, depth)
        canvas.paint(canvas.triangle(x, y - 0.7 * size, 1.2 * size, 0.5 * size), ROOF, kind, depth)
        canvas.paint(canvas.box(x, y, 0.25 * size, 0.4 * size), DOOR, kind, depth)
    elif kind == "tree":
        canvas.paint(canvas.box(x, y, 0.18 * size, 0.7 * size), TRUNK, kind, depth)
        canvas.paint(canvas.disc(x, y - 0.95 * size, 0.42 * size), CROWN, kind, depth)
    else:
        canvas.paint(canvas.triangle(x, y, 1.2 * size, 0.85 * size), paint, kind, depth)
        canvas.paint(canvas.triangle(x, y, 0.35 * size, 0.5 * size), DOOR, kind, depth)


def paint_person(canvas: Canvas, random: np.random.Generator, side: int, near: float,
                 horizon: float) -> ndarray:
    """A person with bent limbs in the left (0) or right (1) half; returns key points (J, 2) in heights."""
    foot = np.array([side * 0.5 + random.integers(1, 4) / 8, horizon + near * (1 - horizon)])
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
    shirt = PAINTS[random.integers(len(PAINTS))]
    limbs = [(TROUSERS, 0.11, a, b) for s in ("left", "right")
             for a, b in (("hip", f"{s} knee"), (f"{s} knee", f"{s} foot"))]
    limbs += [(shirt, 0.2, "neck", "hip")]
    limbs += [(c, 0.09, a, b) for s in ("left", "right")
              for c, a, b in ((shirt, "neck", f"{s} elbow"), (SKIN, f"{s} elbow", f"{s} hand"))]
    for colour, thickness, a, b in limbs:
        canvas.paint(canvas.limb(points[a], points[b], thickness * height), colour, "person", 2 * near - 1)
    canvas.paint(canvas.disc(*points["head"], 0.1 * height), SKIN, "person", 2 * near - 1)
    return np.stack([points[name] for name in KEYPOINTS])
