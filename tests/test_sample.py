"""What sample.py draws from one checkpoint.

Oracles: `Prior.sample` with the same conditions and random numbers, the drawn scenes, and the order itself.
"""
import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import run
import sample
import scenes
import train_gpt
import train_vq
from gpt import GPT
from helpers import build, seeded, shell
from orderings import ORDERINGS
from outputs import picture_grid, to_pixels
from stages import FirstStage, Prior, Sampling
from vq import VQ, Palette


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Sample as the command line says from a checkpoint of a prior; the image tokens that were drawn."""
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 5})
    monkeypatch.chdir(tmp_path)
    drawn, decode = [], Prior.pictures
    monkeypatch.setattr(Prior, "pictures", lambda *given: (drawn.append(given[1]), decode(*given))[1])

    def draw(prior: Prior, flags: str) -> torch.Tensor | None:
        drawn.clear()
        sample.main(["--checkpoint", str(save(prior)), "--device", "cpu", *flags.split()])
        return torch.cat(drawn) if drawn else None

    return draw


def save(prior: Prior) -> Path:
    prior.gpt.float()
    torch.save({"kind": "gpt"} | prior.state(), "model.pt")
    return Path("model.pt")


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def pixels_behind_masks() -> Prior:
    """A model of 8×8 pixels, as --pixels trains it, after masks of 4×4 codes."""
    prior = build("segmentation")
    image = FirstStage(Palette(torch.rand(16, 3)), "image", data.Preparation(8), {})
    layout = dataclasses.replace(prior.layout, height=8, width=8)
    gpt = GPT(dataclasses.replace(prior.gpt.config, block_size=layout.block_size))
    return Prior(gpt, layout, prior.stages | {"image": image}, prior.trained_on)


def shown(prior: Prior, tokens: torch.Tensor) -> torch.Tensor:
    return prior.image.decode(prior.layout.grids(tokens)[-1])


def test_one_checkpoint_becomes_a_grid_or_numbered_files(draw):
    prior, flags = build(order="spiral"), "--count 6 --batch-size 4 --out"
    tokens = draw(prior, f"{flags} a.png")
    assert torch.equal(draw(prior, f"{flags} files"), tokens)
    assert not torch.equal(draw(prior, f"{flags} c.jpg --seed 1"), tokens)
    assert Image.open("c.jpg").format == "JPEG" and pixels("c.jpg").shape == (3 * 98 - 2, 2 * 98 - 2, 3)
    assert np.array_equal(pixels("a.png"), np.asarray(picture_grid(shown(prior, tokens), columns=2)))
    assert sorted(path.name for path in Path("files").iterdir()) == [f"{i:06d}.png" for i in range(6)]
    for i, picture in enumerate(to_pixels(shown(prior, tokens))):
        assert np.array_equal(pixels(f"files/{i:06d}.png"), picture)
    for name, kind in (("e.gif", "GIF"), ("f.TIF", "TIFF")):
        draw(prior, f"{flags} {name}")
        assert Image.open(name).format == kind
    Path("folder.png").mkdir()
    for taken in ("files", "folder.png"):
        with pytest.raises(run.UsageError, match=f"{taken} is a folder, not empty or named like a picture"):
            draw(prior, f"{flags} {taken}")


def test_drawing_that_takes_long_says_how_much_is_left(draw, monkeypatch, capsys):
    clock = itertools.count(0, 4)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    draw(build(), "--count 6 --batch-size 2 --animate a.gif")
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["4 of 6 samples · eta 0m04s", "6 of 6 samples · eta 0m00s"]


def test_every_field_of_sampling_reaches_the_draws(draw):
    prior = build("class")  # with a null token
    usual = draw(prior, "--class ball")
    greedy = prior.sample(4, torch.zeros(4).long(), None, Sampling(top_k=1))
    for flags in ("--top-k 1", "--top-k 0 --temperature 0.001", "--top-p 1e-6"):
        assert torch.equal(draw(prior, f"--class ball {flags}"), greedy)
    extreme = {"temperature": 9.0, "top_k": 1, "top_p": 1e-6, "guidance": 9.0}
    for field in dataclasses.fields(Sampling):
        assert field.name in extreme, f"name a value of {field.name} above that changes what is drawn"
        changed = draw(prior, f"--class ball --{field.name.replace('_', '-')} {extreme[field.name]}")
        assert not torch.equal(changed, usual), field.name


def test_numbered_samples_follow_the_validation_conditions_with_the_condition_beside_each(draw, capsys):
    for kind in ("segmentation", "depth", "pose", "class"):
        prior = build(kind)
        tokens = draw(prior, f"--count 3 --batch-size 2 --out {kind}")
        dataset = data.open_dataset("scenes", "", "val", data.Preparation(8, (kind,)))
        values = [dataset[index, None][kind] for index in range(3)]
        condition = torch.from_numpy(np.stack(values))
        condition = prior.stages[kind].encode(condition) if prior.stages[kind] else condition
        random = seeded(0)
        expected = [prior.sample(len(part), part, None, Sampling(), random) for part in condition.split(2)]
        assert torch.equal(tokens, torch.cat(expected))
        for i, value in enumerate(values):
            assert np.array_equal(pixels(f"{kind}/{i:06d}.png"), to_pixels(shown(prior, tokens))[i])
            if kind == "class":
                continue
            beside = pixels(f"{kind}/{i:06d}-condition.png")
            if kind == "depth":
                assert np.abs(beside / 32767.5 - 1 - value).max() < 1e-4
            else:
                assert np.array_equal(beside, value if kind == "segmentation" else value.transpose(1, 2, 0))
    lines = [f"{i:06d} {scenes.CLASSES[scenes.draw_scene('val', i, 8).label]}\n" for i in range(3)]
    assert Path("class/classes.txt").read_text() == "".join(lines)
    many = build("class")
    many.trained_on["classes"][2:2] = ["bush"]  # since the training the data set has lost it
    with pytest.raises(ValueError, match="has other classes than this model was trained with; name some"):
        draw(many, "--count 3 --out many")
    assert draw(build("class"), "--out rows.png").shape == (5 * 4, 16)  # there are no more conditions
    assert capsys.readouterr().out.endswith("20 samples in rows.png, 4 for each validation condition\n")
    assert draw(build("class"), "--count 35 --out rows.png").shape == (36, 16)  # goes round them, in full rows
    draw(build("class"), "--count 7 --out more")
    assert capsys.readouterr().out.endswith("7 samples in more\n")
    labels = [line.split()[1] for line in Path("more/classes.txt").read_text().splitlines()]
    assert len(labels) == 7 and labels[5:] == labels[:2] and len(set(labels)) > 1
    foreign = build("class")
    foreign.classes[0] = "\N{CJK UNIFIED IDEOGRAPH-732B}\udcff"  # a folder's name may hold any bytes
    draw(foreign, "--class 0 --count 1 --out names")
    assert Path("names/classes.txt").read_bytes() == b"000000 \xe7\x8c\xab\xff\n"


def test_classes_by_name_and_number_are_rows_and_guidance_is_heard(draw):
    prior = build("class")
    for guidance in (1.0, 3.0):
        tokens = draw(prior, f"--class house,3 --count 2 --guidance {guidance} --batch-size 3")
        random, labels = seeded(0), torch.tensor([1, 1, 3, 3])
        expected = [prior.sample(len(part), part, None, Sampling(guidance=guidance), random)
                    for part in labels.split(3)]
        assert torch.equal(tokens, torch.cat(expected))
    assert np.array_equal(pixels("samples.png"), np.asarray(picture_grid(shown(prior, tokens), 2)))
    prior.classes[1] = "house,tree"  # a name may have commas
    assert draw(prior, "--class house,tree --count 2").shape == (2, 16)
    assert sample.find_class("10", ["0", "1", "10", "2"]) == 2
    with pytest.raises(run.UsageError, match="no class '3'"):  # is the fourth meant, or a name?
        sample.find_class("3", ["0", "1", "10", "2"])


def test_a_condition_file_or_folder_is_a_row_behind_itself(draw, tmp_path):
    prior, folder = build("segmentation"), tmp_path / "masks"
    folder.mkdir()
    masks = [scenes.draw_scene("val", i, 8).segmentation for i in range(2)]
    for i, mask in enumerate(masks):
        Image.fromarray(mask).resize((16, 16), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    values = torch.from_numpy(np.stack(masks))
    tokens = draw(prior, "--condition masks --count 3")
    condition = prior.stages["segmentation"].encode(values).repeat_interleave(3, 0)
    assert torch.equal(tokens, prior.sample(6, condition, None, Sampling(), seeded(0)))
    left = data.as_pictures(data.as_input(values, "segmentation", 8), "segmentation")
    second = picture_grid(torch.cat([left[1:], shown(prior, tokens[3:])]), columns=4)
    assert np.array_equal(pixels("samples.png")[-96:], np.asarray(second))
    assert torch.equal(draw(prior, "--condition masks/0.png --count 3"),
                       prior.sample(3, condition[:3], None, Sampling(), seeded(0)))


def photo(name: str, seed: int = 0) -> torch.Tensor:
    """Writes a picture of 8×8; (1, 3, 8, 8) uint8."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(values).save(name)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def test_completion_keeps_the_first_codes_in_the_models_order_and_hides_the_rest(draw):
    prior = build("class", "spiral")
    codes = prior.image.encode(photo("a.png")).flatten(1)[:, ORDERINGS["spiral"](4, 4)]
    for keep, kept in ((0.5, 8), (0.3, 5), (0, 0), (1, 16)):
        tokens = draw(prior, f"--complete a.png --keep {keep} --class tree --count 2")
        given = codes[:, :kept].expand(2, -1)
        assert torch.equal(tokens, prior.sample(2, torch.tensor([2, 2]), given, Sampling(), seeded(0)))
        assert torch.equal(tokens[:, :kept], given)
    assert draw(prior, "--complete a.png").shape == (4, 16)  # without a class, after the null token
    Path("two").mkdir()
    both = torch.cat([photo(f"two/{i}.png", i) for i in range(2)])
    given = prior.image.encode(both).flatten(1)[:, ORDERINGS["spiral"](4, 4)][:, :8].repeat_interleave(3, 0)
    for names, labels in (("tree,ball", [2] * 3 + [0] * 3), ("tree", [2] * 6)):  # one for each, or for all
        tokens = draw(prior, f"--complete two --class {names} --count 3")
        assert torch.equal(tokens, prior.sample(6, torch.tensor(labels), given, Sampling(), seeded(0)))

    prior = build(order="row")
    for folder, seed in (("images", 1), ("images/more", 2), ("segmentation", 3)):  # a data set's folder
        Path("data", folder).mkdir(parents=True)
        photo(f"data/{folder}/a.png", seed)
    assert draw(prior, "--complete data --count 3").shape == (2 * 3, 16)
    values = photo("a.png")
    for seed, hide in ((1, ""), (1, "--hide")):
        values[:, :, 4:] = photo("b.png", seed)[:, :, 4:]  # another lower half
        Image.fromarray(values[0].permute(1, 2, 0).numpy()).save("b.png")
        a, b = (draw(prior, f"--complete {name}.png {hide}")[:, :8] for name in "ab")
        assert torch.equal(a, b) == bool(hide)


def test_pictures_and_masks_are_pairs_by_name_or_if_no_names_agree_in_order(draw):
    prior = build("segmentation", "spiral")
    masks = [scenes.draw_scene("val", i, 8).segmentation for i in range(2)]
    condition = prior.stages["segmentation"].encode(torch.from_numpy(np.stack(masks)))  # (2, 4, 4)
    for folder, names in (("pictures", "ab"), ("same", "ab"), ("none", "xy"), ("some", "bc"),
                          ("moved", ["b", "more/a"])):  # in the order of their names
        for name, mask in zip(names, masks):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(f"{folder}/{name}.png")
    both = torch.cat([photo(f"pictures/{name}.png", i) for i, name in enumerate("ab")])
    given = prior.image.encode(both).flatten(1)[:, ORDERINGS["spiral"](4, 4)][:, :8]
    for folder in ("same", "none"):
        tokens = draw(prior, f"--complete pictures --condition {folder} --count 1")
        assert torch.equal(tokens, prior.sample(2, condition, given, Sampling(), seeded(0)))
    assert draw(prior, "--complete pictures --condition some/b.png").shape == (8, 16)  # of that one for both
    for folder in ("some", "moved"):
        with pytest.raises(run.UsageError, match=f"but pictures/a.png and {folder}/b.png would be a pair"):
            draw(prior, f"--complete pictures --condition {folder}")


def test_scales_from_a_picture_are_a_row_for_each_number_of_scales(draw):
    prior, values = build(scales=(1, 2)), photo("a.png")
    tokens = draw(prior, "--scales-from a.png --count 3")
    own = prior.layout.image_tokens(prior.image.pyramid(prior.image.encode(values), (1, 2)))
    rows = tokens.unflatten(0, (4, 3))
    random = seeded(0)
    for row, kept in zip(rows, (0, 1, 5, 21)):
        given = own[:, :kept].expand(3, -1)
        assert torch.equal(row, prior.sample(3, None, given, Sampling(), random))
        assert torch.equal(row[:, :kept], given)
    assert pixels("samples.png").shape == (4 * 96 + 6, 4 * 96 + 6, 3)  # the picture in front of three samples


def test_larger_pictures_are_whole_multiples_above_the_training_size(draw, monkeypatch, capsys):
    prior = build()
    draw(prior, "--size 8x12 --count 2 --out wide")
    grid = prior.sample_window(2, 4, 6, None, Sampling(), seeded(0))
    for i, picture in enumerate(to_pixels(prior.image.decode(grid))):
        assert np.array_equal(pixels(f"wide/{i:06d}.png"), picture)
    for flags in ("--size 9x12", "--size 4x4", "--size 8x12 --animate a.gif"):
        flags = ["--checkpoint", save(prior), "--device", "cpu", *flags.split()]
        status, _, errors = shell("sample.py", flags, monkeypatch, capsys)
        assert status == 2 and "size" in errors and errors.count("\n") == 1, flags


def test_a_condition_map_of_a_larger_size_is_cut_by_the_window(draw):
    prior = build("segmentation")
    mask = np.concatenate([scenes.draw_scene("val", i, 8).segmentation for i in range(2)], 1)
    Image.fromarray(mask).save("mask.png")
    draw(prior, "--condition mask.png --size 8x16 --count 1 --out wide")
    condition = prior.stages["segmentation"].encode(torch.from_numpy(mask)[None])  # (1, 4, 8)
    grid = prior.sample_window(1, 4, 8, condition, Sampling(), seeded(0))
    assert np.array_equal(pixels("wide/000000.png"), to_pixels(prior.image.decode(grid))[0])


def test_the_networks_run_under_the_runs_autocast(draw, monkeypatch):
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast(device.type, torch.bfloat16))
    for owner, name in ((GPT, "forward"), (VQ, "decode")):
        def recorded(self, *arguments, original=getattr(owner, name)):
            seen.append(torch.is_autocast_enabled("cpu"))
            return original(self, *arguments)
        monkeypatch.setattr(owner, name, recorded)
    for flags in ("--count 2", "--size 8x12 --count 2"):
        seen = []
        draw(build(), flags)
        assert len(seen) > 16 and all(seen), flags


def test_the_animation_fills_the_grid_in_its_order(draw):
    draw(build(order="spiral"), "--count 4 --animate a.gif")
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 17 and gif.info["loop"] == 0
        milliseconds, frames = 0, []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            milliseconds += gif.info["duration"]
            frames.append(np.asarray(gif.convert("RGB"))[:64, :64].astype(int))  # cells of 16×16 pixels
    assert 3000 <= milliseconds <= 6000
    for step, cell in enumerate(ORDERINGS["spiral"](4, 4).tolist()):
        y, x = np.nonzero((frames[step + 1] != frames[step]).any(2))
        assert set(zip((y // 16).tolist(), (x // 16).tolist())) == {divmod(cell, 4)}
    assert frames[0].std((0, 1)).max() < 4  # nothing is drawn yet
    draw(build("class", scales=(1, 2)), "--class ball --count 2 --animate b.gif")
    with Image.open("b.gif") as gif:
        assert gif.n_frames == 1 + 4 + 16 + 1


def test_the_benchmark_prints_the_speed_with_and_without_the_cache(draw, monkeypatch, capsys):
    lengths, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *all: (lengths.append(all[1].shape[1]), forward(*all))[1])
    for kind, prefix in (("none", 1), ("depth", 16)):
        lengths.clear()
        assert draw(build(kind), "--benchmark --batch-size 2").shape == (8, 16)  # the first of each warms up
        assert lengths == 2 * [prefix, *[1] * 15] + 2 * list(range(prefix, prefix + 16))
        out = capsys.readouterr().out
        for name in ("cached", "uncached"):
            assert f"{name}: 2 pictures of 16 tokens in " in out
        assert out.count(" pictures/s · ") == out.count(" tokens/s · ") == 2


def test_a_preset_that_is_not_trained_yet_can_be_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokens = sum(train_gpt.untrained_prior("demo").layout.lengths)
    sample.main("--benchmark --batch-size 1 --device cpu".split())
    shown = capsys.readouterr().out
    assert "does not exist yet" in shown and f"1 pictures of {tokens} tokens" in shown
    with pytest.raises(run.UsageError, match="--n-head has no effect here"):
        sample.main("--benchmark --batch-size 1 --device cpu --n-head 2".split())
    prior = train_gpt.untrained_prior("cifar10")
    assert (prior.layout.sizes, prior.layout.vocab_size, prior.gpt.config.n_layer) == ([(16, 16)], 1025, 12)
    assert prior.image.vq.config == train_vq.PRESETS["cifar10"].model()
    assert sample.PRESETS["paper"] == sample.SampleConfig()


def test_no_mistake_ends_in_a_traceback(first_stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 5})
    monkeypatch.chdir(tmp_path)
    for name, prior in [("none", build()), ("class", build("class", null_token=False)),
                        ("mask", build("segmentation")), ("spiral", build(order="spiral")),
                        ("scales", build(scales=(1, 2))), ("pixels", pixels_behind_masks())]:
        save(prior).rename(f"{name}.pt")
    photo("photo.png")
    Image.fromarray(np.full((8, 8), 8, np.uint8)).save("label8.png")
    for checkpoint, flags, status, sentence in [
            (first_stage, "", 1, "is a checkpoint of train_vq.py; name a checkpoint.pt that train_gpt.py"),
            ("none.pt", "--animate a.mp4", 2, "animate is 'a.mp4'; it must name a .gif file"),
            ("none.pt", "--keep 0.3", 2, "--keep has no effect here: it belongs to --complete"),
            ("class.pt", "--class ball --data-dir x", 2, "--data-dir has no effect here: no conditions of"),
            ("none.pt", "--data-dir x", 2, "--data-dir has no effect here: this model has no condition"),
            ("none.pt", "--benchmark --count 3", 2, "--count has no effect here: a benchmark"),
            ("class.pt", "--benchmark --data-dir x", 2, "--data-dir has no effect here: a benchmark"),
            ("none.pt", "--complete photo.png --keep 2", 2, "keep is 2.0; it must lie in [0, 1]"),
            ("none.pt", "--complete photo.png --size 16x16", 2,
             "exclude each other, so do size and animate; choose one"),
            ("none.pt", "--complete model.py", 1, "model.py cannot be opened (No such file or directory)"),
            ("none.pt", "--size 16", 2, "size is '16'; it must be like 64x128"),
            ("none.pt", "--batch-size 0", 2, "batch_size is 0; it must be at least 1"),
            ("none.pt", "--n-head 4", 2, "--n-head has no effect here: only the authors' files"),
            ("spiral.pt", "--size 16x16", 2, "needs a model of one scale in the order row"),
            ("scales.pt", "--complete photo.png --hide", 2, "--hide needs a model of one scale"),
            ("pixels.pt", "--condition mask.png --size 8x16", 2,
             "this model's have 4×4, its pictures 8×8"),
            ("class.pt", "--complete photo.png --class 0,1", 2,
             "the number of conditions is 2, that of pictures 1: name one condition for all"),
            ("none.pt", "--scales-from photo.png", 2, "needs a model of several scales, unlike none.pt"),
            ("none.pt", "--class ball", 2, "--class does not fit none.pt, which was trained with"),
            ("class.pt", "--condition photo.png", 2, "--condition does not fit class.pt, which was"),
            ("mask.pt", "--class ball", 2, "which was trained with --condition segmentation"),
            ("class.pt", "--class ball --condition photo.png", 2, "--condition does not fit class.pt, which"),
            ("mask.pt", "--size 8x16", 2, "--size needs a --condition of that size"),
            ("class.pt", "--class huose", 2, "among the 4 of this model; did you mean house"),
            ("class.pt", "--class 4", 2, "no class '4' among the 4 of this model; did you mean ball"),
            ("class.pt", "--complete photo.png", 2, "this model needs a condition (class); name one"),
            ("class.pt", "--class 0 --guidance 2", 2, "guidance is 2.0, but this model knows no dropped"),
            ("mask.pt", "--condition label8.png", 1, "label8.png has the label 8, but labels go from 0 to 7"),
            ("mask.pt", "--condition photo.png", 1, "photo.png is a picture in colours")]:
        code, _, errors = shell("sample.py", ["--checkpoint", checkpoint, "--device", "cpu", *flags.split()],
                                monkeypatch, capsys)
        assert (code, errors.count("\n"), errors[:11]) == (status, 1, "sample.py: "), (flags, errors)
        assert sentence in errors, (sentence, errors)
        assert not Path("samples.png").exists()
