"""The three scripts as a user runs them, on twenty small pictures in a folder.

Oracles: the run that was never interrupted, bit for bit; one process, for two; the error's literal sentence.
"""
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run
import sample
import train_gpt
import train_vq

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_vq.py": train_vq, "train_gpt.py": train_gpt, "sample.py": sample}
VQ_FLAGS = ("--data folder --image-size 16 --base-channels 8 --channel-multipliers 1,2 --codebook-size 16 "
            "--code-width 4 --batch-size 4 --restart-every 3 --log-every 1 --eval-every 20 "
            "--device cpu").split()
GPT_FLAGS = ("--data folder --n-layer 2 --n-head 2 --n-embd 16 --batch-size 4 --dropout 0.1 --log-every 1 "
             "--eval-every 20 --top-k 10 --device cpu").split()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """16 training and 4 validation pictures of 16×16: a bright square on a dark ground."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = np.full((16, 16, 3), 40, np.uint8)
            y, x = random.integers(0, 8, 2)
            pixels[y:y + 8, x:x + 8] = random.integers(100, 255, 3)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def first_stage(pictures, tmp_path_factory) -> Path:
    """A checkpoint of train_vq.py after 12 steps."""
    out = tmp_path_factory.mktemp("vq")
    return train_vq.main([*VQ_FLAGS, "--data-dir", str(pictures), "--out", str(out), "--steps", "12"])


@pytest.fixture(scope="session")
def second_stage(pictures, first_stage, tmp_path_factory) -> Path:
    """A checkpoint of train_gpt.py after 4 steps, in the order spiral."""
    out = tmp_path_factory.mktemp("gpt")
    return train_gpt.main([*gpt_flags(pictures, first_stage, out), "--order", "spiral", "--steps", "4"])


def vq_flags(pictures: Path, out: Path) -> list[str]:
    return [*VQ_FLAGS, "--data-dir", str(pictures), "--out", str(out)]


def gpt_flags(pictures: Path, first_stage: Path, out: Path) -> list[str]:
    return [*GPT_FLAGS, "--data-dir", str(pictures), "--vq", str(first_stage), "--out", str(out),
            "--codes-dir", str(first_stage.parent / "codes")]


def tensors(tree, name="") -> dict[str, torch.Tensor]:
    """All tensors of a nested dict or list, by path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{name}/{key}").items()}


def assert_bit_equal(path: Path, other: Path):
    a, b = (torch.load(file, weights_only=True) for file in (path, other))
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def shell(script: str, flags: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """What the shell sees of a script: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run.command_line(SCRIPTS[script].main)
    out, err = capsys.readouterr()
    return ending.value.code, out, err


# Resuming


@pytest.mark.parametrize("stage", ["train_vq.py", "train_gpt.py"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_ends_bit_for_bit_as_if_it_had_not_been(
        stage, number, pictures, first_stage, tmp_path):
    def flags(name):
        out = tmp_path / name
        base = vq_flags(pictures, out) if stage == "train_vq.py" else gpt_flags(pictures, first_stage, out)
        return [*base, "--steps", "40", "--decay", "--warmup-steps", "3", "--checkpoint-every", "4"]

    whole = SCRIPTS[stage].main(flags("whole"))
    command = [sys.executable, str(ROOT / stage), *flags("interrupted")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, cwd=tmp_path, **pipes)
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(number)
            break
    _, errors = process.communicate()
    saved = torch.load(tmp_path / "interrupted" / "checkpoint.pt", weights_only=True)
    if number == signal.SIGINT:
        assert process.returncode == 130
        stopped = rf"{stage}: stopped after step {saved['step']} of 40; .* is saved, --resume goes on\n"
        assert re.fullmatch(stopped, errors)
        assert 10 <= saved["step"] < 40
    else:
        assert process.returncode == -signal.SIGKILL
        assert 8 <= saved["step"] < 40 and saved["step"] % 4 == 0

    resumed = SCRIPTS[stage].main(["--resume", "--data", "folder", "--out", str(tmp_path / "interrupted")])
    assert_bit_equal(resumed, whole)
    lines = (tmp_path / "interrupted" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 41))


def test_resume_takes_the_config_from_the_checkpoint_and_may_train_longer(pictures, first_stage, tmp_path):
    flags = gpt_flags(pictures, first_stage, tmp_path / "a")
    train_gpt.main([*flags, "--steps", "3", "--order", "alternate", "--seed", "7"])
    longer = train_gpt.main(["--resume", "--out", str(tmp_path / "a"), "--steps", "6"])
    flags = gpt_flags(pictures, first_stage, tmp_path / "b")
    whole = train_gpt.main([*flags, "--steps", "6", "--order", "alternate", "--seed", "7"])
    assert_bit_equal(longer, whole)
    assert torch.load(longer, weights_only=True)["config"]["order"] == "alternate"


def test_the_number_of_worker_processes_changes_nothing(pictures, first_stage, tmp_path):
    other = train_vq.main([*vq_flags(pictures, tmp_path), "--steps", "12", "--workers", "2"])
    assert_bit_equal(other, first_stage)


def test_two_seeds_give_two_models(pictures, first_stage, tmp_path):
    other = train_vq.main([*vq_flags(pictures, tmp_path), "--steps", "12", "--seed", "1"])
    models = (torch.load(path, weights_only=True)["model"] for path in (other, first_stage))
    a, b = (model["quantizer.codebook"] for model in models)
    assert not torch.equal(a, b)


# What a run leaves behind


def test_a_checkpoint_holds_numbers_strings_tensors_and_the_first_stage(first_stage, second_stage):
    checkpoint = torch.load(second_stage, weights_only=True)
    assert checkpoint["kind"] == "gpt" and checkpoint["step"] == 4 and checkpoint["grid"] == [8, 8]
    assert checkpoint["config"]["order"] == "spiral"
    assert checkpoint["provenance"]["torch"] == torch.__version__
    vq = torch.load(first_stage, weights_only=True)
    assert checkpoint["first_stage"]["path"] == str(first_stage)
    assert checkpoint["first_stage"]["hash"] == train_gpt.weights_hash(vq["model_config"], vq["model"])
    copies = checkpoint["first_stage"]["model"]
    assert all(torch.equal(vq["model"][name], weight) for name, weight in copies.items())


def test_the_log_repeats_what_the_screen_shows(pictures, first_stage, tmp_path, capsys):
    train_gpt.main([*gpt_flags(pictures, first_stage, tmp_path), "--steps", "2"])
    out = capsys.readouterr().out
    assert re.search(r"what is good: 2\.773 nats/token is a uniform guess, \d\.\d+ knows how frequent", out)
    line = re.search(r"step 2/2 · train (\d\.\d{3}) nats/token · val (\d\.\d{3}) · lr (\d\.\de-\d\d) · "
                     r"\d+ ms/step · [\d.]+k? tokens/s · \d\.\d GiB · eta 0m00s", out)
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    shown = [f"{logged['train']:.3f}", f"{logged['val']:.3f}", f"{logged['lr']:.1e}"]
    assert shown == [line[1], line[2], line[3]]
    assert logged["step"] == 2
    assert out.splitlines()[-1].endswith(f"{tmp_path / 'checkpoint.pt'} · {tmp_path / 'step-000002.png'}")


def test_the_validation_loss_is_the_mean_over_all_validation_tokens(pictures, first_stage, second_stage):
    from gpt import GPT, GPTConfig
    from orderings import ORDERINGS
    from vq import VQ, VQConfig
    checkpoint = torch.load(second_stage, weights_only=True)
    gpt = GPT(GPTConfig(**checkpoint["model_config"])).eval()
    gpt.load_state_dict(checkpoint["model"])
    vq = VQ(VQConfig(**checkpoint["first_stage"]["model_config"]))
    vq.load_state_dict(checkpoint["first_stage"]["model"])
    p = ORDERINGS["spiral"](8, 8).tolist()
    nats = []
    for i in range(4):
        pixels = np.asarray(Image.open(pictures / "val" / f"{i}.png")).astype(np.float32) / 127.5 - 1
        codes = vq.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).flatten().tolist()
        tokens = [16] + [codes[cell] for cell in p]  # 16: the start token, one more than the last code
        with torch.no_grad():
            logs = gpt(torch.tensor([tokens[:-1]])).log_softmax(2)[0]
        nats += [-logs[t, tokens[t + 1]].item() for t in range(64)]
    logged = json.loads((second_stage.parent / "log.jsonl").read_text().splitlines()[-1])
    assert logged["val"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_the_pictures_show_inputs_above_reconstructions_and_32_samples(pictures, first_stage, second_stage):
    with Image.open(first_stage.parent / "step-000012.png") as grid:
        side = 16 * 6  # small pictures are enlarged to about 96 pixels
        assert grid.size == (4 * side + 3 * 2, 2 * side + 2)  # four validation pictures
        enlarged = np.asarray(grid)[:side, :side]
    with Image.open(pictures / "val" / "0.png") as original:
        assert np.array_equal(enlarged[3::6, 3::6], np.asarray(original))
    with Image.open(second_stage.parent / "step-000004.png") as grid:
        assert grid.size == (8 * side + 7 * 2, 4 * side + 3 * 2)


def test_codes_are_computed_once_for_all_orders(pictures, first_stage, second_stage, tmp_path, capsys):
    capsys.readouterr()
    train_gpt.main([*gpt_flags(pictures, first_stage, tmp_path), "--order", "zcurve", "--steps", "1"])
    assert "encoding" not in capsys.readouterr().out


def test_the_second_stage_learns(pictures, first_stage, tmp_path):
    """Sixteen grids can be learnt by heart: the loss must fall far below the entropy of the codes."""
    train_gpt.main([*gpt_flags(pictures, first_stage, tmp_path), "--steps", "200", "--lr", "1e-2",
                    "--dropout", "0", "--n-embd", "32", "--eval-every", "200"])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["train"] > 2.5
    assert np.mean([line["train"] for line in log[-10:]]) < 0.5


def test_without_a_first_stage_one_is_trained_or_goes_on_if_it_was_cut_off(
        pictures, tmp_path, monkeypatch, capsys):
    flags = dict(zip(VQ_FLAGS[::2], VQ_FLAGS[1::2]))
    fields = {name[2:].replace("-", "_"): int(value) if value.isdigit() else value
              for name, value in flags.items()}
    small = train_vq.TrainConfig(**fields, preset="demo", data_dir=str(pictures), steps=6, checkpoint_every=2,
                                 perceptual="none", discriminator_weight=0.0)
    monkeypatch.setitem(train_vq.PRESETS, "demo", small)
    monkeypatch.chdir(tmp_path)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(train_vq, "restart_dead_codes", interrupt)  # called at step 3
        with pytest.raises(KeyboardInterrupt):
            train_gpt.main([*GPT_FLAGS, "--data-dir", str(pictures), "--steps", "1"])
    first_stage = Path("runs/vq-demo-folder/checkpoint.pt")
    assert torch.load(first_stage, weights_only=True)["step"] == 2
    capsys.readouterr()

    out = train_gpt.main([*GPT_FLAGS, "--data-dir", str(pictures), "--steps", "1"])
    assert out == Path("runs/gpt-demo-folder-row/checkpoint.pt") and out.is_file()
    assert "no finished first stage in runs/vq-demo-folder: training it first" in capsys.readouterr().out
    whole = train_vq.main(["--data-dir", str(pictures), "--data", "folder", "--out", "whole"])
    assert_bit_equal(first_stage, whole)
    again = train_gpt.main([*GPT_FLAGS, "--data-dir", str(pictures), "--steps", "1", "--out", "again"])
    assert_bit_equal(again, out)  # whether the first stage was trained just before makes no difference


# Sampling


def test_one_checkpoint_is_all_that_sampling_needs(second_stage, tmp_path):
    alone = tmp_path / "elsewhere.pt"
    alone.write_bytes(second_stage.read_bytes())
    flags = ["--checkpoint", str(alone), "--count", "6", "--batch-size", "4", "--device", "cpu"]
    sample.main([*flags, "--out", str(tmp_path / "a.png")])
    sample.main([*flags, "--out", str(tmp_path / "b.png")])
    sample.main([*flags, "--out", str(tmp_path / "c.png"), "--seed", "1"])
    a, b, c = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    side = 16 * 6
    assert a.shape == (3 * side + 4, 2 * side + 2, 3)  # six pictures in two columns
    assert np.array_equal(a, b) and not np.array_equal(a, c)

    sample.main([*flags, "--out", str(tmp_path / "files")])
    names = sorted(path.name for path in (tmp_path / "files").iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    for i, name in enumerate(names):
        pixels = np.asarray(Image.open(tmp_path / "files" / name))
        top, left = i // 2 * (side + 2), i % 2 * (side + 2)
        assert np.array_equal(pixels, a[top + 3:top + side:6, left + 3:left + side:6])


def test_the_animation_fills_the_grid_in_its_order(second_stage, tmp_path):
    from orderings import ORDERINGS
    sample.main(["--checkpoint", str(second_stage), "--count", "4", "--device", "cpu",
                 "--out", str(tmp_path / "a.png"), "--animate", str(tmp_path / "a.gif")])
    cells = ORDERINGS["spiral"](8, 8).tolist()
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 65 and gif.info["loop"] == 0
        milliseconds, frames = 0, []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            milliseconds += gif.info["duration"]
            pixels = np.asarray(gif.convert("RGB"))[:64, :64]  # the first picture: cells of 8×8 pixels
            frames.append(pixels.astype(int))
    assert 3000 <= milliseconds <= 6000
    for step, cell in enumerate(cells):
        changed = (frames[step + 1] != frames[step]).any(2)
        y, x = np.nonzero(changed)
        assert set(zip((y // 8).tolist(), (x // 8).tolist())) <= {divmod(cell, 8)}
    assert (np.abs(frames[0] - 191).max(2) < 8).all()  # nothing drawn yet: grey
    assert (np.abs(frames[-1] - 191).max(2) > 24).mean() > 0.5


# Mistakes


def test_no_mistake_ends_in_a_traceback(pictures, first_stage, second_stage, tmp_path, monkeypatch, capsys):
    bad, empty, holey = tmp_path / "bad.pt", tmp_path / "empty", tmp_path / "holey"
    bad.write_bytes(b"not a checkpoint")
    empty.mkdir()
    for split in ("train", "val"):
        (holey / split).mkdir(parents=True)
        (holey / split / "a.png").write_bytes((pictures / "train" / "0.png").read_bytes()[:60])
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(second_stage.read_bytes()[:5000])
    of_depth, of_masks = tmp_path / "depth.pt", tmp_path / "masks.pt"
    for file, target, channels in ((of_depth, "depth", 1), (of_masks, "image", 8)):  # theirs tell no target
        other = torch.load(first_stage, weights_only=True)
        other["config"]["target"], other["model_config"]["image_channels"] = target, channels
        torch.save(other, file)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    vq, gpt = vq_flags(pictures, out), gpt_flags(pictures, first_stage, out)
    needs_vq, needs_gpt = (f"name a checkpoint.pt that train_{kind}.py has written" for kind in ("vq", "gpt"))
    orders = "row, spiral, zcurve, subsample, alternate"
    here = [*gpt_flags(pictures, first_stage, second_stage.parent)]
    deeper = ["--resume", "--out", str(second_stage.parent), "--n-layer", "3"]
    cases = [
        ("train_gpt.py", ["--order", "sprial"], 2, f"order is 'sprial'; choose one of {orders}"),
        ("train_gpt.py", ["--ordr", "row"], 2, "unrecognized arguments: --ordr row; --help lists the flags"),
        ("train_gpt.py", ["--steps", "many"], 2, "argument --steps: invalid int value: 'many'; --help lists"),
        ("train_gpt.py", ["--n-head", "7"], 2, "n_embd is 160, which 7 heads do not divide"),
        ("train_gpt.py", ["--preset", "huge"], 2, "preset is 'huge'; choose one of demo, cifar10, paper"),
        ("train_vq.py", ["--image-size", "30"], 2, "image_size is 30, which channel_multipliers"),
        ("train_vq.py", ["--base-channels", "70"], 2, "70 channels do not split into"),
        ("train_vq.py", ["--channel-multipliers", "1,x"], 2, "channel_multipliers is '1,x'; it must"),
        ("train_vq.py", ["--steps", "0"], 2, "steps is 0; it must be at least 1"),
        ("train_vq.py", [*vq, "--device", "tpu9"], 2, "device is 'tpu9', which torch cannot use here"),
        ("train_vq.py", [*vq, "--data-dir", str(tmp_path / "none")], 1, "none is no folder; name your"),
        ("train_vq.py", [*vq, "--data-dir", str(empty)], 1, "empty has no pictures (.jpg"),
        ("train_vq.py", [*vq, "--data-dir", str(holey)], 1, "a.png cannot be read as a picture"),
        ("train_vq.py", [*vq, "--data-dir", str(holey), "--workers", "1"], 1, "a.png cannot be read as a"),
        ("train_vq.py", [*vq, "--image-size", "32"], 1, "has 16×16 pixels, too few for an image_size of 32"),
        ("train_gpt.py", [*gpt, "--vq", str(tmp_path / "none.pt")], 1, f"none.pt does not exist; {needs_vq}"),
        ("train_gpt.py", [*gpt, "--vq", str(second_stage)], 1, f"checkpoint of train_gpt.py; {needs_vq}"),
        ("train_gpt.py", [*gpt, "--vq", str(bad)], 1, "bad.pt is damaged, or holds more than"),
        ("train_gpt.py", [*gpt, "--vq", str(of_depth)], 1, "first stage of another target (depth, 1 channels); "),
        ("train_gpt.py", [*gpt, "--vq", str(of_masks)], 1, "another target (image, 8 channels); name one of pict"),
        ("train_gpt.py", here, 2, "already holds a run (4 of 4 steps done); add --resume"),
        ("train_gpt.py", deeper, 2, "n_layer is 3 but the run in"),
        ("sample.py", ["--checkpoint", str(first_stage)], 1, f"is a checkpoint of train_vq.py; {needs_gpt}"),
        ("sample.py", ["--checkpoint", str(truncated)], 1, "truncated.pt is damaged, or holds more than"),
        ("sample.py", ["--temperature", "0"], 2, "temperature is 0.0; it must be above 0"),
        ("sample.py", ["--animate", "a.mp4"], 2, "animate is 'a.mp4'; it must name a .gif file"),
    ]
    for script, flags, status, sentence in cases:
        code, _, errors = shell(script, flags, monkeypatch, capsys)
        assert (code, errors.count("\n")) == (status, 1) and errors.startswith(f"{script}: "), (flags, errors)
        assert sentence in errors, (sentence, errors)
        assert not (out / "checkpoint.pt").exists(), flags


def test_a_checkpoint_with_code_in_it_runs_nothing(tmp_path, monkeypatch, capsys):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    torch.save({"kind": "gpt", "model": Malicious()}, tmp_path / "bad.pt")
    code, _, errors = shell("sample.py", ["--checkpoint", str(tmp_path / "bad.pt")], monkeypatch, capsys)
    assert code == 1 and "holds more than numbers, strings and tensors" in errors
    assert not (tmp_path / "it ran").exists()


def test_a_run_goes_on_without_its_first_stage_but_not_with_another(
        pictures, first_stage, tmp_path, monkeypatch, capsys):
    path = tmp_path / "vq.pt"
    path.write_bytes(first_stage.read_bytes())
    flags = gpt_flags(pictures, path, tmp_path / "a")
    train_gpt.main([*flags, "--steps", "2"])
    other = torch.load(path, weights_only=True)
    other["model"]["quantizer.codebook"][0, 0] += 1e-3
    torch.save(other, path)
    resume = ["--resume", "--out", str(tmp_path / "a"), "--steps", "3"]
    code, _, errors = shell("train_gpt.py", resume, monkeypatch, capsys)
    assert code == 1 and "vq.pt is not the first stage that the run in" in errors
    path.unlink()
    assert torch.load(train_gpt.main(resume), weights_only=True)["step"] == 3


def test_a_default_first_stage_of_other_pictures_is_refused(
        pictures, first_stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/vq-demo-folder").mkdir(parents=True)
    Path("runs/vq-demo-folder/checkpoint.pt").write_bytes(first_stage.read_bytes())
    Path("mine").mkdir()
    code, _, errors = shell("train_gpt.py", ["--data", "folder", "--data-dir", "mine"], monkeypatch, capsys)
    assert code == 1 and f"was trained on {pictures}, not on mine: name it with --vq" in errors


@pytest.mark.parametrize("script, loss", [("train_vq.py", "l1"), ("train_gpt.py", "train")])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
        script, loss, pictures, first_stage, tmp_path, monkeypatch, capsys):
    flags = (vq_flags(pictures, tmp_path) + ["--restart-every", "1"] if script == "train_vq.py" else
             gpt_flags(pictures, first_stage, tmp_path))
    flags += ["--steps", "30", "--checkpoint-every", "1", "--lr", "1e30"]
    code, _, errors = shell(script, flags, monkeypatch, capsys)
    assert code == 1 and re.search(rf"the {loss} loss became (nan|inf): ", errors)
    model = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(weight.isfinite().all() for weight in model.values())


def test_a_first_stage_that_diverges_between_two_status_lines_still_reaches_the_next(
        pictures, tmp_path, monkeypatch, capsys):
    flags = "--restart-every 1 --log-every 10 --checkpoint-every 99 --steps 30 --lr 1e30".split()
    code, _, errors = shell("train_vq.py", [*vq_flags(pictures, tmp_path), *flags], monkeypatch, capsys)
    assert code == 1 and re.search(r"the l1 loss became (nan|inf): ", errors)


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run.save_checkpoint(path, {"kind": "gpt", "step": 1, "weight": torch.arange(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk had room for 100 kB more
    try:
        with pytest.raises(OSError, match="step 2 could not be written .*the checkpoint before it is intact"):
            run.save_checkpoint(path, {"kind": "gpt", "step": 2, "weight": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.load_checkpoint(path, "gpt")["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


# Several processes


def test_two_processes_compute_what_one_does(pictures, first_stage, tmp_path):
    for stage, module in (("train_vq.py", train_vq), ("train_gpt.py", train_gpt)):
        def flags(name):
            out = tmp_path / f"{stage}-{name}"
            vq, gpt = vq_flags(pictures, out), gpt_flags(pictures, first_stage, out)
            return [*vq, "--restart-every", "0"] if stage == "train_vq.py" else [*gpt, "--dropout", "0"]

        one = torch.load(module.main([*flags("one"), "--steps", "8"]), weights_only=True)["model"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *torchrun, str(ROOT / stage)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command += [*flags("two"), "--steps", "8"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 8/8") == 1  # only one process talks
        two = torch.load(tmp_path / f"{stage}-two" / "checkpoint.pt", weights_only=True)["model"]
        for name, weight in one.items():
            assert torch.allclose(weight, two[name], rtol=1e-3, atol=1e-4), (stage, name)
