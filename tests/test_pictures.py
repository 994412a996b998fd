"""Claims about pictures.py, many through data.open_dataset.

Oracles: the colours, labels, depths and points that a file was made of, and slices of its pixels.
"""
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from PIL import Image

from data import open_dataset
from pictures import (NO_LABEL, choose_window, cut_out, draw_keypoints, open_depth, open_labels, open_picture,
                      open_pose)
from picture_files import ORANGE, assert_colour, noise, only_picture, pictures, save, splits


def crop(pixels: ndarray, size: int, flip: bool = False, random: np.random.Generator | None = None) -> ndarray:
    """(H, W, 3) → (3, S, S)."""
    window = choose_window(pixels.shape[1], pixels.shape[0], size, flip, random)
    return cut_out(Image.fromarray(pixels), window, "image")


# folders: what becomes of a picture

@pytest.mark.parametrize("name", [
    "a.png", "a.jpg", "A.JPEG", "a.webp", "a.bmp", "a.tif", "a.TIFF", "a.ppm", "a.gif"])
def test_formats_keep_their_colour(tmp_path, name):
    splits(tmp_path)
    save(tmp_path / "val" / name)
    assert_colour(only_picture(tmp_path), ORANGE, 4)


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 77, (77, 77, 77)), ("1", 1, (255, 255, 255)), ("1", 0, (0, 0, 0)),
    ("RGBA", (*ORANGE, 255), ORANGE), ("RGBA", (*ORANGE, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
    ("LA", (77, 255), (77, 77, 77)), ("LA", (0, 0), (255, 255, 255)), ("LA", (0, 102), (153, 153, 153))])
def test_grey_and_transparent_pictures_become_rgb_on_white(tmp_path, mode, colour, expected):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", colour, mode=mode)
    assert_colour(only_picture(tmp_path), expected, 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_becomes_rgb(tmp_path, name):
    splits(tmp_path)
    save(tmp_path / "val" / name, (0, 255, 255, 0), mode="CMYK")
    assert_colour(only_picture(tmp_path), (255, 0, 0), 6)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_looked_up_and_their_transparent_entry_is_white(tmp_path, name, transparent):
    splits(tmp_path)
    picture = Image.new("P", (32, 32), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(0, (0, 0, 16, 32))
    picture.save(tmp_path / "val" / name, **({"transparency": 0} if transparent else {}))
    image = only_picture(tmp_path)
    assert_colour(image[:, :, :16], (255, 255, 255) if transparent else (10, 20, 30))
    assert_colour(image[:, :, 16:], (200, 100, 50))


def test_rgb_png_with_a_transparent_colour_is_white_there(tmp_path):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", transparency=ORANGE)
    assert_colour(only_picture(tmp_path), (255, 255, 255))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    splits(tmp_path)
    levels = np.repeat(np.arange(32, dtype=np.uint16)[None] * 2000, 32, 0)
    Image.fromarray(levels).save(tmp_path / "val" / name)
    expected = np.broadcast_to(levels / 257, (3, 32, 32))
    assert np.abs(only_picture(tmp_path) - expected).max() <= 0.51


def test_dark_16_bit_grey_stays_dark(tmp_path):
    splits(tmp_path)
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "val" / "a.png")
    assert_colour(only_picture(tmp_path), (1, 1, 1))


@pytest.mark.parametrize("largest, expected", [(51400, 200), (200, 200)])
def test_32_bit_grey_is_taken_for_16_bit_if_it_does_not_fit_into_8(tmp_path, largest, expected):
    splits(tmp_path)
    Image.fromarray(np.full((32, 32), largest, np.int32)).save(tmp_path / "val" / "a.tif")
    assert_colour(only_picture(tmp_path), (expected,) * 3)


@pytest.mark.parametrize("orientation, corner", [
    (1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_are_turned_upright(tmp_path, orientation, corner, suffix):
    """`corner` is the quarter, (row, column), where the first stored pixel belongs, by the EXIF standard."""
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    splits(tmp_path)
    picture.save(tmp_path / "val" / f"a.{suffix}", exif=exif)
    image = only_picture(tmp_path)
    quarters = image.reshape(3, 2, 16, 2, 16)[:, :, 4:12, :, 4:12].mean((0, 2, 4))
    assert np.argwhere(quarters > 128).tolist() == [list(corner)]
    assert quarters.max() > 250 and np.sort(quarters.flatten())[2] < 5


def test_turning_upright_comes_before_the_crop(tmp_path):
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("red", (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png", 32).size == (32, 96)


def test_large_jpegs_are_decoded_at_reduced_size_but_not_below_what_is_needed(tmp_path):
    save(tmp_path / "a.jpg", size=(1600, 1200))
    width, height = open_picture(tmp_path / "a.jpg", 32).size
    assert 64 <= height < 1200 and width / height == pytest.approx(4 / 3, rel=0.02)
    save(tmp_path / "b.jpg", size=(100, 90))
    assert open_picture(tmp_path / "b.jpg", 64).size == (100, 90)
    save(tmp_path / "c.jpg", size=(400, 300))
    assert open_picture(tmp_path / "c.jpg", 100).size == (400, 300)  # 150 lines would do, but not to average


@pytest.mark.parametrize("damage", [
    "truncated.png", "truncated.jpg", "truncated.webp", "truncated.gif", "truncated.bmp",
    "empty.png", "empty.jpg", "text.png", "text.jpg", "text.gif"])
def test_damaged_files_are_named(tmp_path, damage):
    splits(tmp_path)
    file = noise(tmp_path / "val" / damage)
    if damage.startswith("truncated"):
        content = file.read_bytes()
        file.write_bytes(content[:len(content) // 2])
    else:
        file.write_bytes(b"no picture at all" if damage.startswith("text") else b"")
    sentence = re.escape(f"{file} cannot be read as a picture") + r" \(.+\): remove or replace it"
    with pytest.raises(ValueError, match=sentence):
        pictures(tmp_path)[0, None]


def test_picture_that_vanished_is_named(tmp_path):
    splits(tmp_path)
    file = save(tmp_path / "val" / "a.png")
    dataset = pictures(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="a.png cannot be read"):
        dataset[0, None]


def test_bomb_of_pixels_is_refused(tmp_path, monkeypatch):
    splits(tmp_path)
    save(tmp_path / "val" / "a.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="a.png cannot be read as a picture"):
        pictures(tmp_path)[0, None]


@pytest.mark.parametrize("size", [(31, 40), (40, 31), (1, 1)])
def test_small_pictures_are_refused_unless_upscaled(tmp_path, size):
    splits(tmp_path)
    file = save(tmp_path / "val" / "a.png", size=size)
    with pytest.raises(ValueError) as error:
        pictures(tmp_path)[0, None]
    for part in (str(file), f"{size[0]}×{size[1]} pixels", "image_size of 32", "--image-size", "--upscale"):
        assert part in str(error.value)
    assert_colour(pictures(tmp_path, upscale=True)[0, None]["image"], ORANGE)


def test_picture_of_exactly_the_size_is_unchanged(tmp_path):
    splits(tmp_path)
    file = noise(tmp_path / "val" / "a.png", (32, 32))
    assert np.array_equal(only_picture(tmp_path), np.asarray(Image.open(file)).transpose(2, 0, 1))


# crops

@pytest.mark.parametrize("width, height", [
    (96, 64), (64, 96), (33, 32), (32, 75), (500, 33), (32, 32), (7, 9), (101, 67)])
def test_validation_crop_is_the_centre_of_the_picture_with_its_shorter_side_resized(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    scale = 32 / min(width, height)
    resized = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)),
                                             Image.Resampling.BICUBIC)
    left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
    expected = np.asarray(resized)[top:top + 32, left:left + 32].transpose(2, 0, 1).astype(int)
    found = crop(pixels, 32, flip=True)
    assert found.shape == (3, 32, 32) and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found - expected).mean() < 0.5


@pytest.mark.parametrize("field", ["image", "depth", "pose"])
def test_shrinking_averages_instead_of_picking_pixels(field):
    pixels = np.zeros((256, 256) if field == "depth" else (256, 256, 3), np.uint8)
    pixels[::2] = 255  # fine stripes
    image = cut_out(Image.fromarray(pixels), choose_window(256, 256, 32, False, None), field)
    assert np.abs(image.astype(int) - 127).max() < 12


def test_training_crops_reach_every_place_and_stay_inside():
    pixels = np.arange(36 * 34, dtype=np.float32).reshape(34, 36)
    pixels = np.stack([pixels // 256, pixels % 256, 0 * pixels], 2).astype(np.uint8)  # each pixel is unique

    def corners(pixels: ndarray) -> set[int]:
        """The second channel of the upper left pixel, in 60 crops of 34×34: two lines of 36 are spare."""
        crops = [crop(pixels, 34, random=np.random.default_rng(seed)) for seed in range(60)]
        return {int(image[1, 0, 0]) for image in crops}

    assert corners(pixels) == {0, 1, 2}
    assert corners(pixels.transpose(1, 0, 2)) == {0, 1, 2}


def test_training_crops_differ_between_epochs_pictures_and_seeds_and_are_reproducible(tmp_path):
    splits(tmp_path)
    (tmp_path / "train" / "plain.png").unlink()
    for name in ("a", "b"):  # the same picture twice
        noise(tmp_path / "train" / f"{name}.png", (128, 32))
    dataset = pictures(tmp_path, "train")
    looks = {(seed, epoch, index): dataset[index, (seed, epoch)]["image"].tobytes()
             for seed in (7, 8) for epoch in range(3) for index in (0, 1)}
    assert len(set(looks.values())) >= 10  # of 12: 97 places to cut at, so two may agree
    again = pictures(tmp_path, "train")
    for (seed, epoch, index), look in reversed(looks.items()):
        assert again[index, (seed, epoch)]["image"].tobytes() == look


def test_training_picture_without_a_key_and_validation_with_one_are_the_centre(tmp_path):
    for split in ("train", "val"):
        noise(tmp_path / split / "a.png", (128, 32))
    centre = np.asarray(Image.open(tmp_path / "val" / "a.png"))[:, 48:80].transpose(2, 0, 1)
    assert np.array_equal(pictures(tmp_path, "train", flip=True)[0, None]["image"], centre)
    for epoch in range(8):
        assert np.array_equal(pictures(tmp_path, "val", flip=True)[0, (0, epoch)]["image"], centre)


def test_pictures_are_mirrored_only_with_flip(tmp_path):
    splits(tmp_path)
    (tmp_path / "train" / "plain.png").unlink()
    file = noise(tmp_path / "train" / "a.png", (32, 32))
    original = np.asarray(Image.open(file)).transpose(2, 0, 1)
    plain, flipped = pictures(tmp_path, "train"), pictures(tmp_path, "train", flip=True)
    turned = 0
    for epoch in range(60):
        assert np.array_equal(plain[0, (0, epoch)]["image"], original)
        image = flipped[0, (0, epoch)]["image"]
        if not np.array_equal(image, original):
            assert np.array_equal(image, original[:, :, ::-1])
            turned += 1
    assert 15 < turned < 45


# masks

def mask_file(path: Path, labels: ndarray, mode: str = "L") -> Path:
    picture = Image.fromarray(labels)
    if mode == "P":
        picture.putpalette([255 - i // 3 for i in range(768)])  # entry i is not the colour i
    picture.save(path)
    return path


@pytest.mark.parametrize("mode, dtype", [("L", np.uint8), ("P", np.uint8), ("I;16", np.uint16), ("1", bool)])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_mask_holds_the_number_in_each_pixel_whatever_its_format(tmp_path, mode, dtype, suffix):
    labels = np.random.default_rng(0).integers(0, 2 if mode == "1" else 255, (5, 7)).astype(dtype)
    found = open_labels(mask_file(tmp_path / f"a{suffix}", labels, mode), void_label=255)
    assert found.mode == "L" and np.array_equal(np.asarray(found), labels)


def test_pixels_of_the_void_label_have_none_and_255_never_has(tmp_path):
    file = mask_file(tmp_path / "a.png", np.array([[0, 11, 255, 3]], np.uint8))
    assert np.asarray(open_labels(file, void_label=11)).tolist() == [[0, NO_LABEL, NO_LABEL, 3]]
    assert np.asarray(open_labels(file, void_label=0)).tolist() == [[NO_LABEL, 11, NO_LABEL, 3]]
    assert np.asarray(open_labels(file, void_label=255)).tolist() == [[0, 11, NO_LABEL, 3]]
    wide = mask_file(tmp_path / "b.png", np.array([[0, 65535]], np.uint16))
    assert np.asarray(open_labels(wide, void_label=65535)).tolist() == [[0, NO_LABEL]]


@pytest.mark.parametrize("name, pixels, sentence", [
    ("a.png", np.zeros((4, 4, 3), np.uint8), r"a.png is a picture in colours \(RGB\); a mask has one channel"),
    ("a.png", np.zeros((4, 4, 4), np.uint8), r"a.png is a picture in colours \(RGBA\)"),
    ("a.png", np.zeros((4, 4, 2), np.uint8), r"a.png is a picture in colours \(LA\)"),
    ("a.tif", np.zeros((4, 4), np.float32), r"a.tif is a picture in colours \(F\)"),
    ("a.png", np.full((4, 4), 256, np.uint16), "a.png has labels from 256 to 256; a mask may have those from 0"),
    ("a.tif", np.full((4, 4), -1, np.int32), "a.tif has labels from -1 to -1")])
def test_what_is_no_mask_is_named(tmp_path, name, pixels, sentence):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(ValueError, match=sentence):
        open_labels(tmp_path / name, void_label=255)


def test_resizing_mixes_no_labels(tmp_path):
    labels = np.random.default_rng(0).choice([3, 90, 255], (50, 60)).astype(np.uint8)
    for size in (20, 75):
        window = choose_window(60, 50, size, False, None)
        found = cut_out(Image.fromarray(labels), window, "segmentation")
        assert found.shape == (size, size) and set(np.unique(found)) == {3, 90, 255}


@pytest.mark.parametrize("times", [1, 3])
def test_all_fields_are_cut_alike_at_any_resolution(tmp_path, times):
    """Squares whose colour, label, depth and drawn pose are one number; the others `times` as large."""
    numbers = np.random.default_rng(0).permutation(48).reshape(6, 8).astype(np.uint8)
    blocks = np.kron(numbers, np.ones((10, 10), np.uint8))  # (60, 80)
    finer = np.kron(blocks, np.ones((times, times), np.uint8))
    for split in ("train", "val"):
        for field, pixels, suffix in (("images", np.stack([5 * blocks] * 3, 2), ".png"),
                                      ("segmentation", finer, ".png"), ("depth", finer, ".npy"),
                                      ("pose", np.stack([5 * finer] * 3, 2), ".png")):
            (tmp_path / split / field).mkdir(parents=True)
            path = tmp_path / split / field / f"a{suffix}"
            np.save(path, pixels) if suffix == ".npy" else Image.fromarray(pixels).save(path)
    fields = ("image", "segmentation", "depth", "pose")
    dataset = open_dataset("folder", str(tmp_path), "train", 30, flip=True, fields=fields)
    seen = set()
    for epoch in range(12):
        item = dataset[0, (0, epoch)]
        labels = item["segmentation"].astype(float)
        seen.add(item["segmentation"].tobytes())
        inner = np.ones((30, 30), bool)  # away from the squares' borders, where colours mix
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                inner &= np.roll(labels, shift, axis) == labels
        inner[:2] = inner[-2:] = inner[:, :2] = inner[:, -2:] = False
        assert inner.sum() > 20
        assert np.abs(item["image"][0] / 5 - labels)[inner].max() < 1.5
        assert np.abs(item["pose"][0] / 5 - labels)[inner].max() < 1.5
        assert np.abs((item["depth"] + 1) / 2 * 47 - labels)[inner].max() < 1.5
    assert len(seen) > 8


def test_fields_that_cannot_show_the_same_are_named(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.png", size=(80, 60))
        save(tmp_path / split / "segmentation" / "a.png", 1, (60, 80), "L")
    dataset = open_dataset("folder", str(tmp_path), "val", 30, fields=("image", "segmentation"))
    with pytest.raises(ValueError, match="segmentation/a.png has 60×80 pixels but .*a.png 80×60: both must show"):
        dataset[0, None]


@pytest.mark.parametrize("size, same", [((1000, 750), True), ((1000, 740), True), ((500, 375), True),
                                        ((1000, 700), False), ((700, 750), False)])
def test_shapes_may_differ_by_a_hundredth_but_not_by_a_twentieth(tmp_path, size, same):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.png", size=(1000, 750))
        save(tmp_path / split / "segmentation" / "a.png", 1, size, "L")
    dataset = open_dataset("folder", str(tmp_path), "val", 16, fields=("image", "segmentation"))
    if same:
        assert dataset[0, None]["segmentation"].min() == 1
    else:
        with pytest.raises(ValueError, match="both must show the same"):
            dataset[0, None]


def test_rounding_of_small_pictures_is_no_mismatch(tmp_path):
    """The decoder halves 257×264 to 33×33, which is another shape by 1/33."""
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.jpg", size=(257, 264))
        save(tmp_path / split / "segmentation" / "a.png", 1, (257, 264), "L")
    assert open_picture(tmp_path / "val" / "images" / "a.jpg", 16).size == (33, 33)
    dataset = open_dataset("folder", str(tmp_path), "val", 16, fields=("image", "segmentation"))
    assert dataset[0, None]["segmentation"].tolist() == [[1] * 16] * 16


def test_a_small_mask_is_enlarged_beside_its_image_but_refused_alone(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "a.png", size=(80, 60))
        save(tmp_path / split / "segmentation" / "a.png", 1, (40, 30), "L")
    both = open_dataset("folder", str(tmp_path), "val", 60, fields=("image", "segmentation"))
    assert both[0, None]["segmentation"].tolist() == [[1] * 60] * 60
    alone = open_dataset("folder", str(tmp_path), "val", 60, fields=("segmentation",))
    with pytest.raises(ValueError, match="segmentation/a.png has 40×30 pixels, too few"):
        alone[0, None]


# depth maps

@pytest.mark.parametrize("name, dtype, low, high", [
    ("a.png", np.uint8, 10, 200), ("a.png", np.uint16, 500, 60_000), ("a.tif", np.float32, -3.5, 80.25),
    ("a.tif", np.int32, -70_000, 90_000), ("a.npy", np.float64, 0.5, 2.5), ("a.npy", np.float16, -1, 1),
    ("a.NPY", np.int64, 0, 9), ("a.tif", np.uint16, 0, 65_535)])
def test_a_depth_map_is_scaled_from_its_own_range(tmp_path, name, dtype, low, high):
    depth = np.linspace(low, high, 48).reshape(6, 8).astype(dtype)
    if name.lower().endswith("npy"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, depth)
    else:
        Image.fromarray(depth).save(tmp_path / name)
    found = open_depth(tmp_path / name)
    values = np.asarray(found)
    assert found.mode == "F" and found.size == (8, 6)
    assert (values.min(), values.max()) == (-1, 1)
    spread = depth.astype(np.float64)
    expected = 2 * (spread - spread.min()) / (spread.max() - spread.min()) - 1
    assert np.abs(values - expected).max() < 1e-5


def test_depth_may_have_an_axis_of_length_one_and_a_flat_map_is_0(tmp_path):
    for i, shape in enumerate(((1, 6, 8), (6, 8, 1), (6, 8))):
        np.save(tmp_path / f"{i}.npy", np.arange(48.0).reshape(shape))
        assert open_depth(tmp_path / f"{i}.npy").size == (8, 6)
    np.save(tmp_path / "flat.npy", np.full((6, 8), 3.0))
    assert np.asarray(open_depth(tmp_path / "flat.npy")).tolist() == [[0] * 8] * 6


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("value, sentence", [
    (np.array([[0, np.nan], [1, 2]]), "a.npy has depths that are infinite or not a number"),
    (np.array([[0, np.inf], [1, 2]]), "a.npy has depths that are infinite"),
    (np.zeros((4, 4, 3)), r"a.npy has the shape \(4, 4, 3\); a depth map has one channel"),
    (np.zeros(4), r"a.npy has the shape \(4,\)"),
    (np.array([Malicious()], dtype=object), "a.npy cannot be read as an array .*Object arrays"),
    (np.array([["near", "far"]]), r"a.npy cannot be read as an array \(of <U4, not of numbers\): remove"),
    (np.zeros((4, 4), "f4, f4"), "a.npy cannot be read as an array .*not of numbers"),
    (b"PK\3\4" + bytes(99), "a.npy cannot be read as an array"),  # as an .npz file begins
    (b"text", "a.npy cannot be read as an array"), (b"", "a.npy cannot be read as an array")])
def test_what_is_no_depth_map_is_named_and_nothing_in_it_runs(tmp_path, value, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(value, bytes):
        (tmp_path / "a.npy").write_bytes(value)
    else:
        np.save(tmp_path / "a.npy", value)
    with pytest.raises(ValueError, match=sentence):
        open_depth(tmp_path / "a.npy")
    assert not (tmp_path / "touched").exists()


def test_a_depth_map_in_colours_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.png has the shape \(40, 40, 3\); a depth map has one channel"):
        open_depth(save(tmp_path / "a.png"))


def test_a_depth_map_with_a_palette_is_one_in_colours(tmp_path):
    """Else the numbers of its colours would be taken for depths."""
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("P").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png has the shape \(6, 8, 3\); a depth map has one channel"):
        open_depth(tmp_path / "a.png")


def test_depths_that_float32_cannot_tell_apart_are_scaled_before_they_are_rounded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[2**31, 2**31 + 1, 2**31 + 2]] * 2))
    assert np.asarray(open_depth(tmp_path / "a.npy")).tolist() == [[-1, 0, 1]] * 2


def test_depth_stays_in_its_range_when_resized():
    depth = np.where(np.random.default_rng(0).random((40, 40)) < 0.5, -1, 1).astype(np.float32)
    for size in (13, 97):
        found = cut_out(Image.fromarray(depth), choose_window(40, 40, size, False, None), "depth")
        assert found.dtype == np.float32 and found.shape == (size, size)
        assert -1 <= found.min() < found.max() <= 1


# poses

def test_key_points_are_discs_of_their_own_hues_and_unknown_ones_are_not_drawn():
    points = np.array([[10.0, 20, 1], [40, 20, 1], [70, 20, 0], [np.nan, 20, 1], [70, 50, 1]])
    drawn = np.asarray(draw_keypoints(points, (80, 60)))
    assert drawn.shape == (60, 80, 3) and drawn.dtype == np.uint8
    colours = [tuple(drawn[20, 10]), tuple(drawn[20, 40]), tuple(drawn[50, 70])]
    assert colours[0] == (255, 0, 0) and len(set(colours)) == 3
    assert all(max(colour) == 255 and min(colour) == 0 for colour in colours)
    assert drawn[20, 70].max() == 0 and drawn[40].max() == 0
    assert 0 < (drawn.max(2) > 0).sum() < 3 * 40  # discs of radius 2.5
    assert drawn[20, 12].max() == 255 and drawn[20, 15].max() == 0


def test_limbs_join_known_points_in_the_hue_of_the_second():
    points = np.array([[10.0, 30, 1], [50, 30, 1], [50, 10, 0]])
    plain, joined = (np.asarray(draw_keypoints(points, (60, 60), limbs)) for limbs in ((), ((0, 1), (1, 2))))
    assert plain[30, 30].max() == 0 and np.array_equal(joined[30, 30], plain[30, 50])
    assert joined[20, 50].max() == 0  # one end is unknown


def test_points_follow_the_crop_and_the_mirror_of_their_image(tmp_path):
    """A white square in the image, the only key point in the middle of it."""
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 1)):
        for name in ("images", "pose"):
            (tmp_path / split / name).mkdir(parents=True)
        for i in range(count):
            x, y = random.integers(30, 50), random.integers(20, 40)
            pixels = np.zeros((60, 90, 3), np.uint8)
            pixels[y - 6:y + 7, x - 6:x + 7] = 255
            Image.fromarray(pixels).save(tmp_path / split / "images" / f"{i}.png")
            np.save(tmp_path / split / "pose" / f"{i}.npy", np.array([[x, y]]))
    dataset = open_dataset("folder", str(tmp_path), "train", 40, flip=True, fields=("image", "pose"))
    compared = 0
    for i in range(12):
        item = dataset[i, (0, 0)]
        squares, discs = np.argwhere(item["image"][0] > 128), np.argwhere(item["pose"][0] > 128)
        whole = len(squares) > 60 and squares.min() > 0 and squares.max() < 39
        if whole:
            compared += 1
            assert np.abs(squares.mean(0) - discs.mean(0)).max() < 0.8
    assert compared > 5


def test_points_are_pixels_of_the_whole_image_however_small_it_is_asked_for(tmp_path):
    save(tmp_path / "a.jpg", size=(800, 600))
    drawn = np.asarray(open_pose(np.array([[700, 500]]), tmp_path / "a.jpg", 32))
    assert drawn.shape == (600, 800, 3) and drawn[500, 700].tolist() == [255, 0, 0]


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 4, 2)])
def test_what_are_no_key_points_is_named(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=r"a.npy has the shape \(.*\); key points are \(J, 2\)"):
        open_pose(tmp_path / "a.npy", save(tmp_path / "a.png"), 32)


def test_a_drawn_pose_is_a_picture(tmp_path):
    assert open_pose(save(tmp_path / "a.png", (1, 2, 3)), None, 32).getpixel((0, 0)) == (1, 2, 3)
