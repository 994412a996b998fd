"""Claims about scenes.py.

Oracles: the fields of one picture against each other (mask, depth, key points and class tell of the same
scene), the same scene at other resolutions, and shapes whose place and area are known.
"""
import numpy as np
import pytest

from scenes import CLASSES, KEYPOINTS, SEGMENTS, Canvas, Scene, draw_scene

SKY, GROUND, SUN, PERSON = (SEGMENTS.index(name) for name in ("sky", "ground", "sun", "person"))
OBJECTS = [SEGMENTS.index(name) for name in CLASSES]
NAMES = {name: i for i, name in enumerate(KEYPOINTS)}


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [draw_scene("train", index, 64) for index in range(150)]


def test_a_number_gives_the_same_picture_to_the_bit_and_no_picture_is_in_both_splits():
    first = draw_scene("train", 5, 33)
    np.random.seed(1)
    draw_scene("val", 2, 24)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw_scene("train", 5, 33)))
    images = {draw_scene(split, i, 32).image.tobytes() for split in ("train", "val") for i in range(300)}
    assert len(images) == 600
    same = [draw_scene("train", i, 16).label == draw_scene("val", i, 16).label for i in range(120)]
    assert 0.1 < np.mean(same) < 0.45  # four classes: a quarter by chance
    with pytest.raises(KeyError):
        draw_scene("test", 0, 16)


def test_fields_have_the_documented_shapes_types_and_ranges():
    for size in (1, 2, 16, 31, 64):
        scene = draw_scene("train", 3, size)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert type(scene.label) is int and 0 <= scene.label < len(CLASSES)
        assert scene.segmentation.shape == (size, size) and scene.segmentation.dtype == np.uint8
        assert scene.depth.shape == (size, size) and scene.depth.dtype == np.float32
        assert scene.segmentation.max() < len(SEGMENTS) and -1 <= scene.depth.min() <= scene.depth.max() <= 1
        assert scene.keypoints.shape == (11, 2) and scene.keypoints.dtype == np.float32


def test_resolution_does_not_change_the_scene():
    for index in range(30):
        small, large = draw_scene("val", index, 32), draw_scene("val", index, 128)
        assert small.label == large.label
        np.testing.assert_allclose(large.keypoints, 4 * small.keypoints, rtol=1e-5)
        shrunk = large.image.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 2.5
        assert (large.segmentation[2::4, 2::4] == small.segmentation).mean() > 0.93
        assert np.abs(shrunk - draw_scene("val", index + 30, 32).image).mean() > 10  # so 2.5 says something


# Shapes: (name, arguments, (left, right, top, bottom), area)
SHAPES = [("disc", (0.4, 0.5, 0.2), (0.2, 0.6, 0.3, 0.7), np.pi * 0.04),
          ("disc", (0.9, 0.1, 0.2), (0.7, 1, 0, 0.3), None),
          ("box", (0.401, 0.802, 0.3, 0.5), (0.25, 0.55, 0.3, 0.8), 0.15),
          ("triangle", (0.4, 0.8, 0.4, 0.6), (0.2, 0.6, 0.2, 0.8), 0.12),
          ("triangle", (0.5, 0.7015, 0.8, 0.1), (0.1, 0.9, 0.6, 0.7), 0.04),
          ("limbs", ([[0.2, 0.3]], [[0.6, 0.3]], [0.1]), (0.15, 0.65, 0.25, 0.35), 0.04 + np.pi * 0.05**2),
          ("limbs", ([[0.5, 0.5]], [[0.5, 0.5]], [0.4]), (0.3, 0.7, 0.3, 0.7), np.pi * 0.04),
          ("limbs", ([[0.2, 0.2], [0.8, 0.5]], [[0.2, 0.6], [0.8, 0.5]], [0.1, 0.2]), (0.15, 0.9, 0.15, 0.65),
           0.04 + np.pi * (0.05**2 + 0.1**2))]


@pytest.mark.parametrize("name, arguments, box, area", SHAPES)
def test_shapes_have_their_place_area_and_a_smooth_edge(name, arguments, box, area):
    """In a window that holds all of them: what is painted fades to nothing before the window ends."""
    canvas = Canvas(200, (0, 0, 0))
    arguments = [np.array(argument) for argument in arguments] if name == "limbs" else arguments
    parts = len(arguments[0]) if name == "limbs" else 1
    window, _ = shape = getattr(canvas, name)(*arguments)
    canvas.paint(shape, "ball", 0.5, *[(200, 100, 50)] * parts)
    inside = canvas.segmentation == SEGMENTS.index("ball")
    rows, columns = np.nonzero(inside)
    found = [columns.min() / 200, (columns.max() + 1) / 200, rows.min() / 200, (rows.max() + 1) / 200]
    assert found == pytest.approx(box, abs=0.03)  # the tip of a triangle is narrower than a pixel
    shares = canvas.image / np.array([200, 100, 50])[:, None, None]
    assert np.allclose(shares, shares[:1], atol=1e-5) and (canvas.depth[inside] == 0.5).all()
    if area:
        assert (inside.mean(), shares[0].mean()) == pytest.approx((area, area), rel=0.03)
        edge = shares[0][window]
        assert max(edge[0].max(), edge[-1].max(), edge[:, 0].max(), edge[:, -1].max()) < 1e-5
    partly = ((shares[0] > 0.01) & (shares[0] < 0.99)).sum()
    assert 0.2 * len(rows) ** 0.5 < partly < 6 * 200  # an edge about a pixel wide


def test_distances_grow_by_one_along_a_line_into_a_shape():
    canvas = Canvas(100, (0, 0, 0))
    for (window, distance) in (canvas.disc(0.5, 0.5, 0.2), canvas.box(0.5, 0.7, 0.4, 0.4),
                               canvas.limbs(np.array([[0.3, 0.5]]), np.array([[0.7, 0.5]]), np.array([0.4]))):
        whole = np.full((100, 100), np.nan)
        whole[window] = distance
        np.testing.assert_allclose(np.diff(whole[32:40, 50]), -0.01, atol=2e-5)
    window, distance = canvas.triangle(0.5, 0.9, 0.6, 0.8)  # corners (0.2, 0.9), (0.8, 0.9), (0.5, 0.1)
    whole[window] = distance
    for row, column in ((80, 50), (40, 50), (60, 40), (85, 25), (88, 50)):
        x, y = (column + 0.5) / 100, (row + 0.5) / 100
        to_side = min(abs(0.8 * (x - end) - direction * 0.3 * (y - 0.9)) / np.hypot(0.3, 0.8)
                      for end, direction in ((0.2, -1), (0.8, 1)))
        assert whole[row, column] == pytest.approx(-min(0.9 - y, to_side), abs=1e-5)


# What the fields say about each other

def test_sky_is_above_the_ground_which_comes_nearer_from_the_horizon_to_the_lower_edge(many):
    seen = [set(np.unique(scene.segmentation)) for scene in many]
    assert all({SKY, GROUND, PERSON} <= segments for segments in seen)
    assert np.mean([SUN in segments for segments in seen]) > 0.7
    for scene in many:
        far = (scene.segmentation == SKY) | (scene.segmentation == SUN)
        rows, columns = np.nonzero(scene.segmentation == GROUND)
        nearness = ((rows + 0.5) / 64 - 0.5) / 0.5
        assert (scene.depth[far] == -1).all() and (scene.depth[~far] > -1).all()
        assert np.nonzero(far)[0].max() < rows.min()
        np.testing.assert_allclose(scene.depth[rows, columns], 2 * nearness - 1, atol=1e-5)


def test_class_is_the_kind_of_the_largest_object_and_all_occur_equally_often(many):
    for scene in many:
        areas = [(scene.segmentation == segment).sum() for segment in OBJECTS]
        assert areas[scene.label] == max(areas) > 0
    assert np.bincount([scene.label for scene in many], minlength=4).min() > 150 / 4 / 2


def test_objects_stand_upright_where_the_ground_is_as_near_as_they_are(many):
    for scene in many[:40]:
        for segment in (*OBJECTS, PERSON):
            depths = np.unique(scene.depth[scene.segmentation == segment])
            assert len(depths) <= (1 if segment == PERSON else 2)  # at most two objects, maybe of one kind
    checked = 0
    for scene in (draw_scene("train", index, 128) for index in range(60)):
        if CLASSES[scene.label] in ("tent", "house"):  # have a straight lower edge
            rows, columns = np.nonzero(scene.segmentation == OBJECTS[scene.label])
            nearest = scene.depth[rows, columns].max()
            below = rows[scene.depth[rows, columns] == nearest].max()  # its lowest row
            ground = np.nonzero(scene.segmentation[below] == GROUND)[0]
            if len(ground):
                assert scene.depth[below, ground[0]] == pytest.approx(nearest, abs=0.08)
                checked += 1
    assert checked > 15


def test_key_points_lie_on_the_person_unless_hidden_by_what_is_nearer(many):
    on, inside = 0, 0
    for scene in many:
        person = scene.depth[scene.segmentation == PERSON].max()
        cells = np.floor(scene.keypoints).astype(int)
        for x, y in cells[((cells >= 0) & (cells < 64)).all(1)]:
            inside += 1
            on += scene.segmentation[y, x] == PERSON
            if scene.segmentation[y, x] not in (PERSON, SKY, GROUND, SUN):
                assert scene.depth[y, x] >= person
    assert inside > 0.98 * len(KEYPOINTS) * len(many) and on > 0.97 * inside


def test_a_person_is_upright_with_bent_limbs_of_fixed_proportions_on_their_sides(many):
    parts = {("neck", "hip"): 0.34, ("head", "neck"): 0.12}
    for side in ("left", "right"):
        parts |= {("neck", f"{side} elbow"): 0.19, (f"{side} elbow", f"{side} hand"): 0.18,
                  ("hip", f"{side} knee"): 0.24, (f"{side} knee", f"{side} foot"): 0.24}
    for scene in many:
        point = {name: scene.keypoints[i] for name, i in NAMES.items()}
        heights = [np.hypot(*(point[a] - point[b])) / length for (a, b), length in parts.items()]
        assert max(heights) == pytest.approx(min(heights), rel=1e-3) and 0.27 * 64 < heights[0] < 0.56 * 64
        assert point["head"][1] < point["neck"][1] < point["hip"][1]
        for side, sign in (("left", -1), ("right", 1)):
            knee, foot, elbow, hand = (point[f"{side} {name}"] for name in ("knee", "foot", "elbow", "hand"))
            assert sign * point["hip"][0] < sign * knee[0] < sign * foot[0]
            assert point["hip"][1] < knee[1] < foot[1] and sign * point["neck"][0] < sign * elbow[0]
            for start, middle, end, direction in ((point["neck"], elbow, hand, sign),
                                                  (point["hip"], knee, foot, -sign)):
                (ax, ay), (bx, by) = middle - start, end - middle
                assert direction * (ay * bx - ax * by) > 0  # elbows bend upwards and knees inwards
    elbows = np.array([scene.keypoints[3] - scene.keypoints[1] for scene in many])
    assert np.ptp(np.arctan2(elbows[:, 1], -elbows[:, 0])) > 1.5  # radians: arms are raised differently


def test_the_person_is_larger_when_nearer_and_in_the_other_half_than_the_class_object(many):
    depths = np.array([scene.depth[scene.segmentation == PERSON].max() for scene in many])
    lengths = np.array([scene.keypoints[2, 1] - scene.keypoints[0, 1] for scene in many])  # head to hip
    assert np.corrcoef(depths, lengths)[0, 1] > 0.6
    sides = [scene.keypoints[NAMES["hip"], 0] > 32 for scene in many]
    assert 0.35 < np.mean(sides) < 0.65
    for scene, side in zip(many, sides):
        of_class = scene.segmentation == OBJECTS[scene.label]
        if len(np.unique(scene.depth[of_class])) == 1:  # one of that kind
            assert side != (np.median(np.nonzero(of_class)[1]) > 32)


def test_sky_sun_and_ground_have_one_colour_each_in_all_combinations(many):
    """The sun's follows from the sky's; nine combinations of sky and ground."""
    seen, suns = set(), {}
    for scene in many:
        pixels = [scene.image[scene.segmentation == segment] for segment in (SKY, GROUND, SUN)]
        sky, ground, sun = (tuple(np.median(values, axis=0).tolist()) if len(values) > 60 else None
                            for values in pixels)
        seen.add((sky, ground))
        suns.setdefault(sky, set()).add(sun)
    assert len(seen) == 9 and len(suns) == 3
    assert all(len(colours - {None}) == 1 for colours in suns.values())
