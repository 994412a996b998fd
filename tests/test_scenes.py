"""Claims about scenes.py.

Oracles: the fields of one picture against each other (mask, depth, key points and class tell of the same
scene), the same scene at other resolutions, and shapes whose place and area are known.
"""
import hashlib

import numpy as np
import pytest

import scenes
from scenes import (CLASSES, GROUNDS, KEYPOINTS, PAINTS, SEGMENTS, SKIES, SKIN, SUNS, Canvas, Scene,
                    draw_scene)

SKY, GROUND, SUN, PERSON = (SEGMENTS.index(name) for name in ("sky", "ground", "sun", "person"))
OBJECTS = [SEGMENTS.index(name) for name in CLASSES]


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [draw_scene("train", index, 64) for index in range(150)]


def visible_keypoints(scene: Scene) -> list[tuple[str, int, int]]:
    """(name, column, row) of the key points that lie in the picture."""
    size = len(scene.image)
    cells = [(name, *np.floor(point).astype(int)) for name, point in zip(KEYPOINTS, scene.keypoints)]
    return [(name, x, y) for name, x, y in cells if 0 <= x < size and 0 <= y < size]


# which picture

def test_number_gives_the_same_picture_to_the_bit():
    for split, index, size in (("train", 0, 32), ("train", 7, 33), ("val", 7, 16)):
        first, second = draw_scene(split, index, size), draw_scene(split, index, size)
        for name in Scene._fields:
            assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_picture_does_not_depend_on_what_was_drawn_before_or_on_the_global_random_state():
    first = draw_scene("train", 5, 24)
    draw_scene("val", 2, 24)
    np.random.seed(1)
    assert np.array_equal(draw_scene("train", 5, 24).image, first.image)


def test_no_picture_is_drawn_twice_or_in_both_splits():
    hashes = [hashlib.sha256(draw_scene(split, index, 32).image.tobytes()).hexdigest()
              for split in ("train", "val") for index in range(400)]
    assert len(set(hashes)) == 800


def test_splits_draw_from_different_random_streams():
    same = [draw_scene("train", i, 16).label == draw_scene("val", i, 16).label for i in range(120)]
    assert 0.1 < np.mean(same) < 0.45  # four classes: a quarter by chance
    for i in range(20):
        assert np.abs(draw_scene("train", i, 16).keypoints - draw_scene("val", i, 16).keypoints).max() > 0.01


def test_unknown_split_is_refused():
    with pytest.raises(KeyError):
        draw_scene("test", 0, 16)


# one scene, any resolution

@pytest.mark.parametrize("size", [1, 2, 16, 31, 64])
def test_fields_have_the_documented_shapes_types_and_ranges(size):
    scene = draw_scene("train", 3, size)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert type(scene.label) is int and 0 <= scene.label < len(CLASSES)
    assert scene.segmentation.shape == (size, size) and scene.segmentation.dtype == np.uint8
    assert scene.segmentation.max() < len(SEGMENTS)
    assert scene.depth.shape == (size, size) and scene.depth.dtype == np.float32
    assert scene.depth.min() >= -1 and scene.depth.max() <= 1
    assert scene.keypoints.shape == (11, 2) and scene.keypoints.dtype == np.float32


def test_resolution_does_not_change_the_scene():
    for index in range(30):
        small, large = draw_scene("val", index, 32), draw_scene("val", index, 128)
        assert small.label == large.label
        np.testing.assert_allclose(large.keypoints, 4 * small.keypoints, rtol=1e-5)
        shrunk = large.image.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 2.5
        assert (large.segmentation[2::4, 2::4] == small.segmentation).mean() > 0.93
        another = draw_scene("val", index + 30, 32)
        assert np.abs(shrunk - another.image).mean() > 10  # so the bound above says something


def test_edges_are_smooth():
    canvas = Canvas(40)
    canvas.paint(canvas.disc(0.5, 0.5, 0.3), np.array([200, 100, 50]), "ball", 0.0)
    area = np.pi * (0.3 * 40) ** 2
    shares = canvas.image / np.array([200, 100, 50])
    assert np.allclose(shares, shares[..., :1], atol=1e-5)
    assert shares[..., 0].sum() == pytest.approx(area, rel=4e-3)
    assert (canvas.segmentation == SEGMENTS.index("ball")).sum() == pytest.approx(area, rel=0.02)
    partly = (shares[..., 0] > 0.01) & (shares[..., 0] < 0.99)
    assert 30 < partly.sum() < 2 * 2 * np.pi * 0.3 * 40  # a rim about one pixel wide


@pytest.mark.parametrize("shape, box, area", [
    (lambda canvas: canvas.disc(0.4, 0.5, 0.2), (0.2, 0.6, 0.3, 0.7), np.pi * 0.04),
    (lambda canvas: canvas.box(0.4, 0.8, 0.3, 0.5), (0.25, 0.55, 0.3, 0.8), 0.15),
    (lambda canvas: canvas.triangle(0.4, 0.8, 0.4, 0.6), (0.2, 0.6, 0.2, 0.8), 0.12),
    (lambda canvas: canvas.limb(np.array([0.2, 0.3]), np.array([0.6, 0.3]), 0.1), (0.15, 0.65, 0.25, 0.35),
     0.04 + np.pi * 0.05**2),
    (lambda canvas: canvas.limb(np.array([0.5, 0.5]), np.array([0.5, 0.5]), 0.4), (0.3, 0.7, 0.3, 0.7),
     np.pi * 0.04),
    (lambda canvas: canvas.below(0.7), (0, 1, 0.7, 1), 0.3)])
def test_shapes_have_their_place_and_area(shape, box, area):
    canvas = Canvas(200)
    inside = np.broadcast_to(shape(canvas) < 0, (200, 200))
    rows, columns = np.nonzero(inside)
    found = [columns.min() / 200, (columns.max() + 1) / 200, rows.min() / 200, (rows.max() + 1) / 200]
    assert found == pytest.approx(box, abs=0.016)  # the tip of a triangle is narrower than a pixel
    assert inside.mean() == pytest.approx(area, rel=0.02)


def test_signed_distance_grows_by_one_along_a_line_out_of_a_shape():
    canvas = Canvas(100)
    for shape in (canvas.disc(0.5, 0.5, 0.2), canvas.box(0.5, 0.7, 0.4, 0.4), canvas.below(0.5),
                  canvas.limb(np.array([0.3, 0.5]), np.array([0.7, 0.5]), 0.2)):
        column = np.broadcast_to(shape, (100, 100))[:35, 50]
        np.testing.assert_allclose(np.diff(column), -0.01, atol=1e-5)


def test_triangle_is_as_far_as_its_nearest_side():
    canvas = Canvas(50)
    distance = canvas.triangle(0.5, 0.9, 0.6, 0.8)  # corners (0.2, 0.9), (0.8, 0.9), (0.5, 0.1)
    for row, column in ((40, 25), (20, 25), (30, 20), (42, 12), (44, 25)):
        x, y = (column + 0.5) / 50, (row + 0.5) / 50
        to_base = 0.9 - y
        to_side = min(abs(0.8 * (x - end) - direction * 0.3 * (y - 0.9)) / np.hypot(0.3, 0.8)
                      for end, direction in ((0.2, -1), (0.8, 1)))
        assert distance[row, column] == pytest.approx(-min(to_base, to_side), abs=1e-5)


# what the fields say about each other

def test_sky_and_sun_are_infinitely_far(many):
    for scene in many:
        assert (scene.depth[(scene.segmentation == SKY) | (scene.segmentation == SUN)] == -1).all()
        assert (scene.depth[scene.segmentation >= SEGMENTS.index("ball")] > -1).all()


def test_ground_comes_nearer_from_the_horizon_to_the_lower_edge(many):
    for scene in many:
        rows = {}
        for y, x in zip(*np.nonzero(scene.segmentation == GROUND)):
            rows.setdefault(y, set()).add(float(scene.depth[y, x]))
        assert all(len(values) == 1 for values in rows.values())
        depths = [rows[y].pop() for y in sorted(rows)]
        steps = np.diff(depths) / np.diff(sorted(rows))
        assert (steps > 0).all() and np.allclose(steps, steps[0], atol=1e-4)
        top, bottom = min(rows), max(rows)
        assert 0.4 < top / 64 < 0.6  # the horizon
        assert depths[0] == pytest.approx(-1, abs=1.1 * steps[0])
        assert depths[-1] + (63.5 - bottom) * steps[0] == pytest.approx(1 - steps[0] / 2, abs=0.6 * steps[0])


def test_sky_is_above_the_ground(many):
    for scene in many:
        sky, ground = (np.nonzero(scene.segmentation == segment)[0] for segment in (SKY, GROUND))
        assert sky.max() < ground.min()
        sun = np.nonzero(scene.segmentation == SUN)[0]
        assert not len(sun) or sun.max() < ground.min()


def test_every_picture_has_sky_ground_and_person_and_most_show_the_sun(many):
    seen = [set(np.unique(scene.segmentation)) for scene in many]
    assert all({SKY, GROUND, PERSON} <= segments for segments in seen)
    assert np.mean([SUN in segments for segments in seen]) > 0.7


def test_class_is_the_kind_of_the_largest_object(many):
    for scene in many:
        areas = [(scene.segmentation == segment).sum() for segment in OBJECTS]
        assert areas[scene.label] == max(areas) > 0


def test_all_classes_occur_equally_often(many):
    labels = np.bincount([scene.label for scene in many], minlength=len(CLASSES))
    assert labels.min() > 150 / len(CLASSES) / 2


def test_object_stands_upright_at_one_depth(many):
    for scene in many[:40]:
        for segment in (*OBJECTS, PERSON):
            depths = np.unique(scene.depth[scene.segmentation == segment])
            assert len(depths) <= (1 if segment == PERSON else 2)  # at most two objects, maybe of one kind
            assert all(-1 < depth < 0.85 for depth in depths)


def test_objects_stand_where_the_ground_is_as_near_as_they_are():
    # tents and houses have a straight lower edge; it must meet ground of its own depth
    checked = 0
    for index in range(60):
        scene = draw_scene("train", index, 128)
        if CLASSES[scene.label] not in ("tent", "house"):
            continue
        rows, columns = np.nonzero(scene.segmentation == OBJECTS[scene.label])
        nearest = scene.depth[rows, columns].max()
        below = rows[scene.depth[rows, columns] == nearest].max()  # its lowest row
        ground = np.nonzero(scene.segmentation[below] == GROUND)[0]
        if len(ground):
            assert scene.depth[below, ground[0]] == pytest.approx(nearest, abs=0.08)
            checked += 1
    assert checked > 15


def test_nearer_objects_hide_farther_ones(many):
    for scene in many:
        person = scene.depth[scene.segmentation == PERSON].max()
        for name, x, y in visible_keypoints(scene):
            if scene.segmentation[y, x] not in (PERSON, SKY, GROUND, SUN):
                assert scene.depth[y, x] >= person  # what covers the person stands in front


def test_key_points_lie_on_the_person_unless_hidden(many):
    on, inside = 0, 0
    for scene in many:
        for name, x, y in visible_keypoints(scene):
            inside += 1
            on += scene.segmentation[y, x] == PERSON
    assert inside > 0.98 * len(KEYPOINTS) * len(many)
    assert on > 0.97 * inside


def test_person_is_upright_with_left_and_right_limbs_on_their_sides(many):
    names = {name: i for i, name in enumerate(KEYPOINTS)}
    for scene in many:
        x, y = scene.keypoints.T
        assert y[names["head"]] < y[names["neck"]] < y[names["hip"]]
        for side, sign in (("left", -1), ("right", 1)):
            assert 0 < sign * (x[names[f"{side} knee"]] - x[names["hip"]])
            assert 0 < sign * (x[names[f"{side} foot"]] - x[names[f"{side} knee"]])
            assert y[names[f"{side} foot"]] > y[names[f"{side} knee"]] > y[names["hip"]]
            assert sign * (x[names[f"{side} elbow"]] - x[names["neck"]]) > 0


def test_elbows_bend_upwards_and_knees_inwards(many):
    names = {name: i for i, name in enumerate(KEYPOINTS)}

    def turn(scene: Scene, start: str, middle: str, end: str) -> float:
        """Positive where the way from start over middle to end turns to the left on the picture."""
        a, b, c = (scene.keypoints[names[name]] for name in (start, middle, end))
        return (b - a)[1] * (c - b)[0] - (b - a)[0] * (c - b)[1]

    for scene in many:
        for side, sign in (("left", -1), ("right", 1)):
            assert sign * turn(scene, "neck", f"{side} elbow", f"{side} hand") > 0
            assert sign * turn(scene, "hip", f"{side} knee", f"{side} foot") < 0


def test_limbs_keep_their_proportions(many):
    names = {name: i for i, name in enumerate(KEYPOINTS)}
    parts = {("neck", "hip"): 0.34, ("head", "neck"): 0.12}
    for side in ("left", "right"):
        parts |= {("neck", f"{side} elbow"): 0.19, (f"{side} elbow", f"{side} hand"): 0.18,
                  ("hip", f"{side} knee"): 0.24, (f"{side} knee", f"{side} foot"): 0.24}
    for scene in many:
        heights = [np.hypot(*(scene.keypoints[names[a]] - scene.keypoints[names[b]])) / length
                   for (a, b), length in parts.items()]
        assert max(heights) == pytest.approx(min(heights), rel=1e-3)
        assert 0.27 * 64 < heights[0] < 0.56 * 64


def test_nearer_person_is_larger(many):
    depths = np.array([scene.depth[scene.segmentation == PERSON].max() for scene in many])
    lengths = np.array([scene.keypoints[2, 1] - scene.keypoints[0, 1] for scene in many])  # head to hip
    assert np.corrcoef(depths, lengths)[0, 1] > 0.6


def test_person_and_class_object_stand_in_different_halves(many):
    sides = []
    for scene in many:
        person = scene.keypoints[KEYPOINTS.index("hip"), 0] / 64
        columns = np.nonzero(scene.segmentation == OBJECTS[scene.label])[1]
        sides.append(person > 0.5)
        if len(np.unique(scene.depth[scene.segmentation == OBJECTS[scene.label]])) == 1:  # one of that kind
            assert (person > 0.5) != (np.median(columns) / 64 > 0.5)
    assert 0.35 < np.mean(sides) < 0.65


def sky_of(scene: Scene) -> int:
    """Which of SKIES a picture has, from its upper edge."""
    return int(np.abs(np.median(scene.image[0], axis=0) - np.array(SKIES)).sum(1).argmin())


def test_sky_and_ground_have_listed_colours_in_all_combinations(many):
    seen = set()
    for scene in many:
        sky, ground = (np.median(scene.image[scene.segmentation == segment], axis=0)
                       for segment in (SKY, GROUND))
        assert np.abs(sky - SKIES[sky_of(scene)]).max() <= 1
        distances = np.abs(ground - np.array(GROUNDS)).max(1)
        assert distances.min() <= 1
        seen.add((sky_of(scene), int(distances.argmin())))
    assert len(seen) == len(SKIES) * len(GROUNDS)  # they are drawn independently


def test_sun_or_moon_has_the_colour_that_goes_with_the_sky(many):
    for scene in many:
        sun = scene.image[scene.segmentation == SUN]
        if len(sun) > 60:
            assert np.abs(np.median(sun, axis=0) - SUNS[sky_of(scene)]).max() <= 1


def test_person_has_a_listed_shirt_and_a_head_of_skin(many):
    shirts, heads = set(), 0
    for scene in many:
        head, neck, hip = scene.keypoints[:3]
        x, y = (0.4 * neck + 0.6 * hip).astype(int)  # below the arms' roots
        distances = np.abs(scene.image[y, x] - np.array(PAINTS)).max(1)
        if distances.min() <= 1:  # else an arm hangs there
            shirts.add(int(distances.argmin()))
        x, y = head.astype(int)
        heads += np.abs(scene.image[y, x] - np.array(SKIN)).max() <= 1
    assert shirts == set(range(len(PAINTS)))
    assert heads > 0.9 * len(many)


def test_people_raise_their_arms_differently(many):
    elbows = np.array([scene.keypoints[3] - scene.keypoints[1] for scene in many])
    assert np.ptp(np.arctan2(elbows[:, 1], -elbows[:, 0])) > 1.5  # radians


def test_constants_name_all_segments():
    assert set(CLASSES) <= set(SEGMENTS) and len(set(SEGMENTS)) == len(SEGMENTS) == 8
    assert scenes.SPLITS == {"train": 0, "val": 1}
