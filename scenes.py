"""The drawn data set: small scenes that need no download, at any resolution, with everything a condition can ask for (§4).

Each picture shows a sky with a sun or moon, a ground, a few solid objects and a person. Since the drawing knows what it draws,
each comes with its class label, segmentation mask, depth map and key points. Number `index` of a split always gives the same
picture.

Shapes are signed distances, negative inside, so edges come out smooth at every resolution. Lengths are in picture heights:
x runs from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom).

Symbols: S×S pixels, J key points.
"""
from typing import NamedTuple

import numpy as np
from numpy import ndarray

CLASSES = ("ball", "house", "tree", "tent")  # the kind of the largest object is the class of the picture
SEGMENTS = ("sky", "ground", "sun", "ball", "house", "tree", "tent", "person")  # labels of the segmentation mask
KEYPOINTS = ("head", "neck", "hip", "left elbow", "left hand", "right elbow", "right hand",
             "left knee", "left foot", "right knee", "right foot")
SPLITS = {"train": 0, "val": 1}

SKIES = ((120, 180, 240), (245, 170, 120), (40, 50, 100))  # day, dusk, night
SUNS = ((255, 235, 130), (255, 100, 60), (235, 235, 245))  # the sun or moon of each sky
GROUNDS = ((90, 160, 70), (215, 185, 125), (235, 240, 245))  # grass, sand, snow
PAINTS = ((200, 50, 50), (50, 90, 200), (240, 200, 60), (150, 60, 160))  # balls, walls, tents, shirts
SKIN, TROUSERS, TRUNK, ROOF = (240, 195, 160), (60, 60, 80), (110, 75, 45), (130, 55, 45)


class Scene(NamedTuple):
    """One picture and what is known about it."""
    image: ndarray  # (S, S, 3) uint8
    label: int  # index into CLASSES
    segmentation: ndarray  # (S, S) uint8, indices into SEGMENTS
    depth: ndarray  # (S, S) float32 in [−1, 1]: −1 the sky, 1 the nearest ground (inverse distance, as MiDaS gives it)
    keypoints: ndarray  # (J, 2) float32, x and y of KEYPOINTS in pixels; outside [0, S) when out of the picture


class Canvas:
    """Paints shapes back to front on a picture, its segmentation and its depth."""

    def __init__(self, size: int):
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = centres[None, :], centres[:, None]  # (1, S), (S, 1)
        self.size = size
        self.image = np.zeros((size, size, 3), np.float32)
        self.segmentation = np.zeros((size, size), np.uint8)
        self.depth = np.full((size, size), -1, np.float32)

    def paint(self, distance: ndarray, colour: ndarray, segment: str, depth: ndarray | float):
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
    """Picture number `index` of a split ("train" or "val"), S = size pixels wide and high; no picture is in both splits."""
    random = np.random.default_rng((SPLITS[split], index))
    canvas = Canvas(size)
    sky, ground = random.integers(len(SKIES)), random.integers(len(GROUNDS))
    horizon = random.uniform(0.42, 0.58)

    def colour(base: tuple) -> ndarray:
        """A base colour with a little variation, darker at night."""
        return np.clip(np.asarray(base) * (0.65 if sky == 2 else 1.0) + random.normal(0, 6, 3), 0, 255)

    fade = (canvas.y / horizon)[..., None]  # the sky is lighter towards the horizon
    canvas.image[:] = np.asarray(SKIES[sky]) + np.clip(fade, 0, 1) * 35
    radius = random.uniform(0.06, 0.1)
    canvas.paint(canvas.disc(random.uniform(0.1, 0.9), random.uniform(0.1, horizon - 0.12), radius), SUNS[sky], "sun", -1)
    nearness = (canvas.y - horizon) / (1 - horizon)  # 0 at the horizon, 1 at the lower edge
    canvas.paint(canvas.below(horizon), colour(GROUNDS[ground]), "ground", 2 * nearness - 1)

    feet = np.sort(random.uniform(0.25, 0.85, random.integers(2, 4)))  # nearness of the objects' feet, far to near
    person = random.uniform(0.3, 0.9)
    # The person stands in one half of the picture, the largest object in the other.
    side = random.integers(2)
    kinds = random.integers(len(CLASSES), size=len(feet))
    keypoints = None
    for i, near in enumerate(feet):
        if keypoints is None and person < near:
            keypoints = paint_person(canvas, random, colour, side, person, horizon)
        x = random.uniform(0.1, 0.9) if i < len(feet) - 1 else (1 - side) * 0.5 + random.uniform(0.15, 0.35)
        paint_object(canvas, random, colour, CLASSES[kinds[i]], x, near, horizon, large=i == len(feet) - 1)
    if keypoints is None:
        keypoints = paint_person(canvas, random, colour, side, person, horizon)
    image = np.clip(canvas.image.round(), 0, 255).astype(np.uint8)
    return Scene(image, int(kinds[-1]), canvas.segmentation, canvas.depth, (keypoints * size).astype(np.float32))


def paint_object(canvas: Canvas, random: np.random.Generator, colour, kind: str, x: float, near: float, horizon: float, large: bool):
    """A ball, house, tree or tent whose foot is at x and the given nearness; nearer is larger."""
    y = horizon + near * (1 - horizon)
    size = (0.18 + 0.16 * near) * random.uniform(0.85, 1.15) * (1.3 if large else 0.8)
    paint, depth = PAINTS[random.integers(len(PAINTS))], 2 * near - 1
    if kind == "ball":
        base = colour(paint)
        canvas.paint(canvas.disc(x, y - size / 2, size / 2), base, kind, depth)
        canvas.paint(canvas.disc(x - size / 7, y - size / 1.5, size / 9), base + 0.6 * (255 - base), kind, depth)
    elif kind == "house":
        canvas.paint(canvas.box(x, y, size, 0.7 * size), colour(paint), kind, depth)
        canvas.paint(canvas.triangle(x, y - 0.7 * size, 1.2 * size, 0.5 * size), colour(ROOF), kind, depth)
        canvas.paint(canvas.box(x, y, 0.25 * size, 0.4 * size), colour(TROUSERS), kind, depth)
    elif kind == "tree":
        canvas.paint(canvas.box(x, y, 0.18 * size, 0.7 * size), colour(TRUNK), kind, depth)
        canvas.paint(canvas.disc(x, y - 0.95 * size, 0.42 * size), colour((35, 110, 50)), kind, depth)
    else:
        canvas.paint(canvas.triangle(x, y, 1.2 * size, 0.85 * size), colour(paint), kind, depth)
        canvas.paint(canvas.triangle(x, y, 0.35 * size, 0.5 * size), colour(TROUSERS), kind, depth)


def paint_person(canvas: Canvas, random: np.random.Generator, colour, side: int, near: float, horizon: float) -> ndarray:
    """A person with bent arms and legs in the left (0) or right (1) half; returns the key points (J, 2) in picture heights."""
    foot = np.array([side * 0.5 + random.uniform(0.15, 0.35), horizon + near * (1 - horizon)])
    height = (0.3 + 0.22 * near) * random.uniform(0.9, 1.1)

    def joint(start: ndarray, length: float, angle: float) -> ndarray:
        """A point `length` body heights away; angle 0 hangs down, positive turns to the right."""
        return start + height * length * np.array([np.sin(angle), np.cos(angle)])

    hip = foot - [0, 0.46 * height]
    neck = joint(hip, 0.34, np.pi + random.uniform(-0.15, 0.15))
    points = {"head": joint(neck, 0.12, np.pi), "neck": neck, "hip": hip}
    for name, sign in (("left", -1), ("right", 1)):
        raised = random.uniform(0.2, 2.4)  # of the upper arm; the lower arm bends on from there
        points[f"{name} elbow"] = joint(neck, 0.19, sign * raised)
        points[f"{name} hand"] = joint(points[f"{name} elbow"], 0.18, sign * (raised + random.uniform(0, 0.8)))
        spread = random.uniform(0.1, 0.5)
        points[f"{name} knee"] = joint(hip, 0.24, sign * spread)
        points[f"{name} foot"] = joint(points[f"{name} knee"], 0.24, sign * spread * random.uniform(0, 1))
    skin, shirt, trousers = colour(SKIN), colour(PAINTS[random.integers(len(PAINTS))]), colour(TROUSERS)
    limbs = [(trousers, 0.11, a, b) for s in ("left", "right") for a, b in (("hip", f"{s} knee"), (f"{s} knee", f"{s} foot"))]
    limbs += [(shirt, 0.2, "neck", "hip")]
    limbs += [(c, 0.09, a, b) for s in ("left", "right")
              for c, a, b in ((shirt, "neck", f"{s} elbow"), (skin, f"{s} elbow", f"{s} hand"))]
    for paint, thickness, a, b in limbs:
        canvas.paint(canvas.limb(points[a], points[b], thickness * height), paint, "person", 2 * near - 1)
    canvas.paint(canvas.disc(*points["head"], 0.1 * height), skin, "person", 2 * near - 1)
    return np.stack([points[name] for name in KEYPOINTS])
