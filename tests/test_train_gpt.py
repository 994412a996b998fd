"""The second stage's training, on small pictures in a folder and on a few drawn scenes.

Oracles: the run that was never interrupted, bit for bit; a slow loop over tokens for the validation loss; the
plain loop for what a step does; a search through all crops for what was encoded; one process, for two.
"""
import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cache
import data
import run
import scenes
import train_gpt
import train_vq
import vq
from benchmark import CountOperations
from codebook import kmeans
from gpt import GPT, GPTConfig
from helpers import (ALONE, ROOT, assert_bit_equal, gpt_flags, log_of, run_script, shell, start, tensors,
                     without_log_of_torch)
from kernels import causal_attention, causal_attention_triton
from orderings import ORDERINGS
from outputs import load_checkpoint, to_pixels
from stages import FirstStage, Prior
from vq import VQ, VQConfig

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --device cpu".split()


def train_until_step_10(flags: list[str], number: signal.Signals):
    """The script in a process that sends its group, as schedulers do, a signal in step 10."""
    steps = run.steps

    def steps_with_signal(*arguments):
        for step, *rest in steps(*arguments):
            if step == 10:
                os.killpg(0, number)
            yield step, *rest

    run.steps = steps_with_signal
    run_script("train_gpt.py", flags)


def test_a_killed_or_stopped_run_ends_bit_for_bit_as_if_it_had_not_been(pictures, first_stage, tmp_path):
    def flags(name: str) -> list[str]:
        return [*gpt_flags(pictures, first_stage, tmp_path / name),
                *"--steps 30 --decay --warmup-steps 3 --checkpoint-every 4".split()]

    whole = train_gpt.main(flags("whole"))
    for number, status, saved in ((signal.SIGKILL, -signal.SIGKILL, 8), (signal.SIGTERM, 130, 11)):
        out = tmp_path / number.name
        process = start(train_until_step_10, flags(number.name), number, folder=out)
        process.join(60)
        process.kill()
        assert (process.exitcode, load_checkpoint(out / "checkpoint.pt", "gpt")["step"]) == (status, saved)
        if number == signal.SIGTERM:
            stopped = r"train_gpt.py: stopped after step 11 of 30; .* is saved, --resume goes on\n"
            assert re.fullmatch(stopped, without_log_of_torch((out / "err").read_text()))
        assert_bit_equal(train_gpt.main(["--resume", "--data", "folder", "--out", str(out)]), whole)
        assert [line["step"] for line in log_of(out / "checkpoint.pt")] == list(range(1, 31))


def test_a_run_goes_on_longer_elsewhere_and_with_its_own_first_stage(
        pictures, first_stage, tmp_path, monkeypatch, capsys):
    path, moved = tmp_path / "vq.pt", tmp_path / "moved"
    path.write_bytes(first_stage.read_bytes())
    flags = ["--steps", "2", "--order", "alternate", "--seed", "7"]
    train_gpt.main([*gpt_flags(pictures, path, tmp_path / "a"), *flags])
    path.write_bytes(b"something else")
    shutil.copytree(pictures, moved)
    resume = ["--resume", "--out", tmp_path / "a", "--data-dir", moved]
    longer = train_gpt.main([*map(str, resume), "--steps", "4"])
    whole = [*gpt_flags(pictures, first_stage, tmp_path / "b"), *flags]
    assert_bit_equal(longer, train_gpt.main([*whole, "--steps", "4"]))
    assert load_checkpoint(longer, "gpt")["config"]["order"] == "alternate"
    other = train_gpt.main([*whole, "--steps", "4", "--seed", "8", "--out", str(tmp_path / "c")])
    a, b = (load_checkpoint(path, "gpt")["model"]["head.weight"] for path in (longer, other))
    assert not torch.equal(a, b)

    Image.new("RGB", (16, 16)).save(moved / "train" / "more.png")
    capsys.readouterr()
    train_gpt.main([*map(str, resume), "--steps", "5"])
    assert f"pictures in {moved} have changed" in capsys.readouterr().out
    status, _, errors = shell("train_gpt.py", [*resume[:-1], pictures, "--steps", "6"], monkeypatch, capsys)
    assert status == 1 and f"{pictures} holds other pictures than {moved}" in errors


def test_classes_that_changed_do_not_go_on(first_stage, tmp_path, monkeypatch, capsys):
    def save(name: str, number: int):
        path = tmp_path / "pictures" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(path)

    for i in range(40):
        save("ac"[i % 2], i)
    flags = [*gpt_flags(tmp_path / "pictures", first_stage, tmp_path / "run"), "--condition", "class"]
    trained_on = load_checkpoint(train_gpt.main([*flags, "--steps", "1"]), "gpt")["trained_on"]
    assert trained_on["classes"] == ["a", "c"]
    save("b", 1)
    status, _, errors = shell("train_gpt.py", [*flags, "--steps", "2", "--resume"], monkeypatch, capsys)
    assert status == 1 and "classes" in errors


def test_training_is_the_plain_loop_with_warm_up_decay_and_clipping(pictures, first_stage, tmp_path):
    settings = ("--steps 6 --dropout 0 --lr 1e-2 --warmup-steps 2 --decay --clip 0.05 --weight-decay 0.3 "
                "--beta1 0.8 --beta2 0.9 --seed 4 --order subsample --gelu none").split()
    trained = load_checkpoint(train_gpt.main([*gpt_flags(pictures, first_stage, tmp_path), *settings]), "gpt")
    stage = FirstStage.load(first_stage)
    images = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
              for file in sorted((pictures / "train").iterdir())]
    codes = stage.encode(torch.stack(images)).flatten(1)[:, ORDERINGS["subsample"](8, 8)]
    torch.manual_seed(4)
    gpt = GPT(GPTConfig(17, 64, 2, 2, 16, gelu="none"))
    decays = [name.endswith("weight") and "norm" not in name and "embedding" not in name
              for name, _ in gpt.named_parameters()]
    assert sum(decays) == 2 * 4 + 1  # four matrices in each block, and the head
    groups = [[weight for weight, decay in zip(gpt.parameters(), decays) if decay == wanted]
              for wanted in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.3},
                                   {"params": groups[1], "weight_decay": 0.0}], betas=(0.8, 0.9))
    batches = data.training_batches(16, 4, 4)
    for lr in (0.005, 0.01, *(0.01 * (0.05 + 0.475 * (1 + np.cos(np.pi * i / 4))) for i in range(4))):
        batch = codes[[index for index, _ in next(batches)]]
        inputs = torch.cat([torch.full((4, 1), 16), batch[:, :-1]], 1)  # behind the null token
        loss = F.cross_entropy(gpt(inputs).flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(gpt.parameters(), 0.05) > 0.05
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, weight in gpt.state_dict().items():
        found = trained["model"][name]
        if name.endswith("qkv.bias"):  # that of the keys has no gradient but rounding, which Adam enlarges
            weight, found = weight.view(3, -1)[::2], found.view(3, -1)[::2]
        assert torch.allclose(weight, found, atol=2e-5), name


def test_a_first_stage_that_the_processes_cannot_share_evenly_is_to_be_trained_first(tmp_path, monkeypatch):
    class Three(run.Process):
        def wait_for_all(self):
            pass

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(train_gpt.PRESETS["demo"], batch_size=18)
    monkeypatch.setitem(train_vq.PRESETS, "demo", dataclasses.replace(train_vq.PRESETS["demo"], batch_size=8))
    sentence = "batch_size is 8, which .* by 3 .* .of the first stage in runs/vq-demo-scenes: train"
    with pytest.raises(run.UsageError, match=sentence):
        train_gpt.default_stage(config, "image", Three(torch.device("cpu"), 0, 3))


def test_a_diverged_run_ends_before_it_is_sampled_from_or_saved_and_names_its_pictures(
        pictures, first_stage, tmp_path, monkeypatch, capsys):
    for name, evaluations, loss in (("a", "99", "train"), ("b", "1", "val")):
        before, flags = None, gpt_flags(pictures, first_stage, tmp_path / name)
        flags += "--steps 30 --checkpoint-every 1 --views 3".split()
        if loss == "val":
            before = train_gpt.main([*flags, "--steps", "1"]).read_bytes()
            flags.append("--resume")
        flags += ["--eval-every", evaluations, "--lr", "1e30"]
        status, _, errors = shell("train_gpt.py", flags, monkeypatch, capsys)
        found = re.search(rf"the {loss} loss became (?:nan|inf) in step (\d+)(?: with (.*))?: ", errors)
        assert status == 1 and found
        if loss == "train":  # an evaluation has no batch
            names = sorted(path.name for path in (pictures / "train").iterdir())
            batch = next(data.training_batches(3 * len(names), 4, seed=0, start=int(found[1]) - 1))
            assert found[2] == ", ".join(f"train/{names[i % len(names)]}" for i, _ in batch)
        checkpoint = tmp_path / name / "checkpoint.pt"
        assert before in (None, checkpoint.read_bytes())
        assert all(weight.isfinite().all() for weight in load_checkpoint(checkpoint, "gpt")["model"].values())
        assert len(list((tmp_path / name).glob("step-*.png"))) == (loss == "val")


def test_two_processes_compute_what_one_does(pictures, first_stage, tmp_path):
    def flags(name: str) -> list[str]:
        return [*gpt_flags(pictures, first_stage, tmp_path / name), "--codes-dir",
                str(tmp_path / f"codes-{name}"), *"--dropout 0 --steps 8 --views 2".split()]

    one = load_checkpoint(train_gpt.main(flags("one")), "gpt")["model"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, ROOT / "train_gpt.py", *flags("two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8/8") == 1  # only one process talks
    assert "\n16 training and 4 validation pictures; baselines" in done.stdout  # each once, whatever the views
    for file in (tmp_path / "codes-one").iterdir():  # each of the two has encoded its share
        assert (np.load(file) == np.load(tmp_path / "codes-two" / file.name)).mean() > 0.99
    a, b = (tmp_path / name / "checkpoint.pt" for name in ("one", "two"))
    assert log_of(a)[-1]["val"] == pytest.approx(log_of(b)[-1]["val"], rel=1e-4)
    for name, weight in load_checkpoint(b, "gpt")["model"].items():
        assert torch.allclose(weight, one[name], rtol=1e-3, atol=1e-4), name


def test_the_log_repeats_the_screen_and_codes_are_computed_once_for_all_orders(
        pictures, first_stage, second_stage, tmp_path, capsys):
    capsys.readouterr()
    path = train_gpt.main([*gpt_flags(pictures, first_stage, tmp_path), "--steps", "2", "--order", "zcurve"])
    out = capsys.readouterr().out
    assert "encoding" not in out  # second_stage has the same codes
    stage = FirstStage.load(first_stage)
    dataset = data.open_dataset("folder", str(pictures), "val", stage.preparation)
    codes = stage.encode(next(data.load(dataset, data.fixed_batches(4, 4), torch.device("cpu"), 0))["image"])
    unigram = torch.special.entr(torch.bincount(codes.flatten()) / codes.numel()).sum()
    assert f"baselines: 2.773 nats/token for a uniform guess, {unigram:.3f} for the frequency" in out
    shown = re.search(r"step 2/2 · train (\S+) nats/token · val (\S+) · lr (\S+) · \d+ ms/", out).groups()
    logged = log_of(path)[-1]
    assert shown == (f"{logged['train']:.3f}", f"{logged['val']:.3f}", f"{logged['lr']:.1e}")
    assert out.splitlines()[-1].endswith(f"{path} · {tmp_path / 'step-000002.png'}")
    cells, pixels = np.array(logged["val_by_cell"][0]), np.asarray(Image.open(tmp_path / "loss-map.png"))
    expected = cells / cells.max() * 255
    assert np.abs(pixels[16::32, 16::32, 0] - expected).max() <= 1  # brighter where it is harder


@pytest.fixture
def few_scenes(tmp_path, monkeypatch):
    """Twelve scenes of 16×16 pixels, and a demo preset of a first stage that is trained for 4 steps."""
    small = dataclasses.replace(
        train_vq.PRESETS["demo"], image_size=16, base_channels=8, channel_multipliers="1,2", codebook_size=16,
        code_width=4, steps=4, batch_size=4, restart_every=3, eval_every=4, checkpoint_every=2, seed=1)
    monkeypatch.setitem(train_vq.PRESETS, "demo", small)
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 5})
    monkeypatch.chdir(tmp_path)


def nats_by_token(prior: Prior, index: int, null: bool) -> list[float]:
    """The validation loss of each image token, one after the other."""
    layout, K = prior.layout, 16
    dataset, first = data.Scenes("val", data.Preparation(16, tuple(prior.stages))), index // 4 * 4
    values = {field: torch.as_tensor(value)[None] for field, value in dataset[index, None].items()}
    # As in the evaluation's batches: the mean of two codes is equally near to both, and rounding decides.
    codes = torch.cat([prior.image.encode(torch.from_numpy(dataset[i, None]["image"])[None])
                       for i in range(first, min(first + 4, len(dataset)))])
    image = []
    for side in (1, 2, 4, 8) if layout.scales else (8,):
        grid = prior.image.vq.requantize(codes, side)[index - first].flatten().tolist()
        image += [grid[cell] for cell in ORDERINGS[layout.order](side, side).tolist()]
    prefix = [K]  # the null token of an unconditional model
    if prior.condition == "class":
        prefix = [K + 4 if null else K + int(values["class"])]
    elif prior.condition:
        condition = prior.stages[prior.condition].encode(values[prior.condition]).flatten().tolist()
        prefix = [K + 16 if null else K + code for code in condition]
    logits = prior.gpt(torch.tensor([(prefix + image)[:-1]]))[0].log_softmax(1)
    return [-logits[len(prefix) - 1 + t, token].item() for t, token in enumerate(image)]


def test_every_condition_trains_what_it_needs_and_is_validated_over_all_image_tokens(few_scenes, capsys):
    wanted = {"none": "--order zcurve", "class": "--condition-dropout 0.95 --order spiral",
              "segmentation": "--order alternate", "depth": "--multiscale --condition-dropout 0.8",
              "pose": "--multiscale --order subsample"}
    small = "--eval-every 2 --steps 3 --lr 3e-2".split()
    for condition, flags in wanted.items():
        path = train_gpt.main(["--condition", condition, *flags.split(), *TINY, *small])
        out, logged = capsys.readouterr().out, log_of(path)[-1]
        trained = re.findall(r"no finished first stage in runs/vq-demo-scenes(\S*): training it first", out)
        assert trained == {"none": [""], "class": []}.get(condition, [f"-{condition}"])
        scales = "-multiscale" if "multiscale" in flags else ""
        prior = Prior.load(path, torch.device("cpu"))
        order = prior.layout.order
        name = "" if condition == "none" else f"-{condition}"
        assert path.parent.name == f"gpt-demo-scenes-{order}{name}{scales}"
        with torch.no_grad():
            nats = np.array([nats_by_token(prior, i, null=False) for i in range(5)])
        assert nats.shape == (5, 85 if scales else 64)
        columns, rows = {"none": (8, 4), "class": (4, 5)}.get(condition, (5, 5))  # a map before its samples
        with Image.open(path.parent / "step-000003.png") as grid:
            assert grid.size == (98 * columns - 2, 98 * rows - 2)
            if columns == 5:
                dataset = data.Scenes("val", data.Preparation(16, (condition,)))
                values = next(data.load(dataset, data.fixed_batches(5, 5), torch.device("cpu"), 0))
                stage = prior.stages[condition]
                maps = stage.decode(stage.encode(values[condition])).expand(-1, 3, -1, -1)  # (5, 3, 16, 16)
                shown = [np.asarray(grid)[98 * i:98 * i + 96:6, :96:6] for i in range(5)]
                assert np.abs(np.int64(shown) - to_pixels(maps)).max() <= 1
        assert logged["val"] == pytest.approx(nats.mean(), rel=1e-5)
        assert logged["nats_per_picture"] == pytest.approx(nats.sum(1).mean(), rel=1e-4)
        assert ("val_null" in logged) == ("dropout" in flags)
        if "val_null" in logged:
            with torch.no_grad():
                null = np.array([nats_by_token(prior, i, null=True) for i in range(5)])
            assert logged["val_null"] == pytest.approx(null.mean(), rel=1e-5)
            assert abs(null.mean() - nats.mean()) > 3e-4
        first = 0
        for side, grid in zip((1, 2, 4, 8) if scales else (8,), logged["val_by_cell"], strict=True):
            cells = np.empty(side * side)
            cells[ORDERINGS[order](side, side).numpy()] = nats.mean(0)[first:first + side * side]
            assert np.allclose(np.array(grid).flatten(), cells, atol=2e-4)
            if scales:
                assert logged[f"val_{side}"] == pytest.approx(cells.mean(), rel=1e-4)
            first += side * side
        most = max(np.max(grid) for grid in logged["val_by_cell"])  # one scale of brightness for all panels
        panels = np.asarray(Image.open(path.parent / "loss-map.png"))[:, :, 0]
        for i, grid in enumerate(logged["val_by_cell"]):
            assert abs(panels[16, 258 * i + 16] - grid[0][0] / most * 255) <= 1


def test_conditions_are_dropped_in_training_only_and_evaluation_gives_the_mode_back(few_scenes, monkeypatch):
    calls, settings, dtypes = [], [], set()
    forward, draw = GPT.forward, Prior.sample

    def recorded(self, tokens, cache=None):
        calls.append((self.training, tokens))
        logits = forward(self, tokens, cache)
        dtypes.add(logits.dtype)
        return logits

    def sampled(self, count, condition, given, sampling, generator):
        settings.append((count, sampling.top_k, sampling.temperature, condition.tolist()))
        return draw(self, count, condition, given, sampling, generator)

    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(GPT, "forward", recorded)
    monkeypatch.setattr(Prior, "sample", sampled)
    train_gpt.main([*TINY, *("--condition class --condition-dropout 0.5 --eval-every 3 --steps 6 --top-k 7 "
                             "--temperature 0.9").split()])
    training = [tokens for mode, tokens in calls if mode]
    assert [len(tokens) for tokens in training] == [4] * 6
    modes = [mode for mode, _ in itertools.groupby(mode for mode, _ in calls)]
    assert modes == [True, False, True, False]
    dropped = torch.cat(training)[:, 0] == 20
    assert 0 < dropped.sum() < 24 and torch.cat(training)[:, 1:].max() < 16
    labels = [scenes.draw_scene("val", i, 16).label for i in range(5)]
    assert settings == [(20, 7, 0.9, [label for label in labels for _ in range(4)])] * 2
    assert dtypes == {torch.bfloat16}  # under the run's autocast in training, evaluation and sampling


def test_the_pixel_baseline_has_the_pixels_colours_for_codes(few_scenes, monkeypatch, capsys):
    monkeypatch.setattr(vq, "kmeans", lambda pixels, count: kmeans(pixels[::37], count))  # 1 second, not 15
    path = train_gpt.main(["--pixels", "--order", "spiral", "--condition", "class", "--steps", "1", *TINY])
    assert path.parent.name == "gpt-demo-scenes-spiral-class-pixels"
    assert "first stage" not in capsys.readouterr().out
    prior = Prior.load(path, torch.device("cpu"))
    assert prior.layout.sizes == [(16, 16)] and prior.layout.codebook_size == 512
    colours = prior.image.vq.colours
    images = torch.from_numpy(data.Scenes("val", data.Preparation(16))[3, None]["image"])[None]
    codes = prior.image.encode(images)
    inputs = images / 127.5 - 1
    distances = (inputs[:, None] - colours[:, :, None, None]).square().sum(2)  # (1, 512, 16, 16)
    assert torch.allclose((prior.image.decode(codes) - inputs).square().sum(1), distances.amin(1), atol=1e-5)
    assert distances.amin(1).sqrt().mean() < 0.05
    with Image.open(path.parent / "step-000001.png") as grid:
        assert len(grid.getcolors(10**6)) <= 513  # 512 colours and the gaps


def test_a_conditions_first_stage_is_trained_at_the_size_of_the_images(few_scenes):
    image = train_vq.main(["--image-size", "32", "--out", "larger"])
    path = train_gpt.main(["--vq", str(image), "--condition", "depth", "--steps", "1", *TINY])
    sizes = {field: stage["preparation"]["size"] for field, stage in load_checkpoint(path, "gpt")["stages"].items()}
    assert sizes == {"image": 32, "depth": 32}
    other = train_vq.main(["--image-size", "32", "--channel-multipliers", "1,2,2", "--out", "coarser"])
    with pytest.raises(ValueError, match="at 32 pixels the preset's first stage of depth has another number"):
        train_gpt.main(["--vq", str(other), "--condition", "depth", "--out", "new", *TINY])


def test_the_weights_of_the_lowest_validation_loss_are_kept(few_scenes, capsys):
    flags = ["--eval-every", "1", "--checkpoint-every", "99", *TINY]
    path = train_gpt.main(["--steps", "12", "--lr", "0.8", "--warmup-steps", "12", *flags])  # too high
    values = [line["val"] for line in log_of(path)]
    step = 1 + min(range(12), key=values.__getitem__)
    assert 1 < step < 12 and f"after step {step}: " in capsys.readouterr().out
    best, last = (load_checkpoint(path.with_name(name), "gpt") for name in ("best.pt", "checkpoint.pt"))
    assert (best["step"], last["best"]) == (step, (values[step - 1], step)) and last["step"] == 12
    stages = {"image": FirstStage.load("runs/vq-demo-scenes/checkpoint.pt")}
    config = train_gpt.TrainConfig(**last["config"])
    codes = cache.encode_pictures(config, stages, None, ALONE)[1]
    for name, value in (("best.pt", values[step - 1]), ("checkpoint.pt", values[11])):
        prior = Prior.load(path.with_name(name), ALONE.device)
        assert train_gpt.evaluate(prior, codes, config, ALONE)["val"] == value
    train_gpt.main(["--steps", "13", "--lr", "9", "--warmup-steps", "12", "--resume", *flags])  # no lower one
    assert load_checkpoint(path.with_name("best.pt"), "gpt")["step"] == step


def test_compiled_networks_compute_the_same(few_scenes, monkeypatch):
    """Losses and gradients, also that at the last layer alone (§A.1, λ); each network is one whole graph."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes two seconds
    compile, compiled = torch.compile, []
    graphs = CompileCounterWithBackend("aot_eager")  # without a C++ compiler, which a machine may lack

    def traced(network, **options):
        compiled.append(network)
        return compile(network, backend=graphs, **options)

    monkeypatch.setattr(torch, "compile", traced)
    config, images, results = train_vq.PRESETS["demo"].model(), torch.rand(2, 3, 16, 16), []
    for compiled_too in (False, True):
        torch.manual_seed(0)
        vq = VQ(config, compiled=compiled_too)
        reconstructions, _, loss = vq(images)
        last = vq.decoder[-1].weight
        alone, = torch.autograd.grad(reconstructions.mean(), last, retain_graph=True)
        (reconstructions.mean() + loss).backward()
        results.append([reconstructions, loss, alone, *(weight.grad for weight in vq.parameters())])
    assert len(compiled) == 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert graphs.frame_count == 2  # encoder, and decoder but for its last layer
    paths = [train_gpt.main(["--steps", "2", *TINY, "--out", out, *flags])
             for out, flags in (("plain", []), ("compiled", ["--compile"]))]
    assert len(compiled) == 3 and graphs.frame_count > 2
    plain, other = (tensors(load_checkpoint(path, "gpt")["model"]) for path in paths)
    assert plain.keys() == other.keys()
    assert all(torch.allclose(weight, other[name], atol=1e-4) for name, weight in plain.items())


def test_a_benchmark_tells_what_a_run_costs_and_leaves_nothing(few_scenes, tmp_path, second_stage, capsys):
    line = r"(\S+) ms/step · (\S+?)(k?) \w+/s · \S+ of \S+ TFLOP/s \((\d+)% of this CPU's peak\) · \S+ GiB"
    taken = ["--out", str(second_stage.parent)]  # by a run that is neither read nor changed
    for script, units, flags in (
            (train_gpt, 256, [*TINY, "--data", "folder", "--data-dir", "none", "--pixels"]),
            (train_gpt, 85, [*TINY, "--condition", "depth", "--multiscale", *taken]),
            (train_vq, 1, ["--target", "segmentation", "--device", "cpu"])):
        assert script.main(["--benchmark", "--steps", "500", *flags]) is None
        *_, speed, cost = capsys.readouterr().out.splitlines()
        ms, rate, thousand, share = re.fullmatch(line, speed).groups()
        in_a_step = float(rate) * (1000 if thousand else 1) * float(ms) / 1000
        assert in_a_step == pytest.approx(4 * units, rel=0.05) and 0 < int(share) <= 100, speed
        assert cost.startswith("500 steps of 4 pictures, 2,000 in all: ")
    assert list(tmp_path.iterdir()) == []


def test_operations_are_counted_forwards_and_backwards():
    x, weight = torch.rand(7, 5), torch.rand(5, 3, requires_grad=True)
    with CountOperations() as counted:
        (x @ weight).sum().backward()  # one product forwards, one for the weight's gradient
    assert counted.flops == 2 * (2 * 7 * 5 * 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for attention in (causal_attention, causal_attention_triton):
        query, key, value = torch.rand(3, 1, 2, 8, 4, device=device, requires_grad=True).unbind(0)
        with CountOperations() as counted:
            attention(query, key, value).sum().backward()  # two products of 8×8×4 a head, then five
        assert counted.flops == 7 * (2 * 2 * 8 * 8 * 4)


class Pixels:
    """Stands for a first stage whose codes are the pixels themselves, of a picture the red ones."""

    side = codebook_size = 16

    def __init__(self, field: str, flip: bool):
        self.preparation, self.hash = data.Preparation(16, (field,), flip=flip), lambda: field

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return values[:, 0] if values.ndim == 4 else values


def test_image_and_condition_have_the_same_crop_and_flip_in_every_view(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)  # nine crops of height 16
    for i, picture in enumerate(pixels):
        for field, array in (("images", picture), ("segmentation", picture[:, :, 0] // 64)):
            (tmp_path / "train" / field).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "train" / field / f"{i}.png")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    config = dataclasses.replace(
        train_gpt.PRESETS["demo"], data="folder", data_dir=str(tmp_path), condition="segmentation", views=4,
        codes_dir=str(tmp_path / "codes"), workers=0)
    for flip in (True, False):
        stages = {field: Pixels(field, flip) for field in ("image", "segmentation")}
        training, validation, _ = cache.encode_pictures(config, stages, None, ALONE)
        assert len(training["image"]) == 24 and len(validation["image"]) == 6
        training = {field: views[range(24)] for field, views in training.items()}
        assert np.array_equal(training["segmentation"], training["image"] // 64)
        crops = [(left, mirrored) for n in range(24) for left in range(9) for mirrored in (False, True)
                 if np.array_equal(pixels[n % 6, :, left:left + 16, 0][:, ::-1 if mirrored else 1],
                                   training["image"][n])]
        assert len(crops) == 24 and set(crops[:6]) == {(4, False)}  # the first view is not augmented
        assert {mirrored for _, mirrored in crops} == {False, flip} and len(set(crops)) > 5


def test_a_grid_that_does_not_fit_is_refused_before_anything_is_encoded(few_scenes):
    stage = FirstStage(VQ(VQConfig(3, 4, "1,1", 1, 4, 4)), "image", data.Preparation(12), {})  # 6×6 codes
    torch.save({"kind": "vq"} | stage.state(), "vq.pt")
    for flags, sentence in ((["--order", "zcurve"], "needs a square grid whose side is a power of two, not 6×6"),
                            (["--multiscale"], r"divide 6×6 \(for --multiscale, a power of two\)")):
        with pytest.raises(ValueError, match=sentence):
            train_gpt.main([*TINY, "--vq", "vq.pt", *flags])
    assert not Path("runs/codes").exists()


def test_a_first_stage_that_was_cut_off_goes_on_and_leaves_no_trace_in_the_second(
        few_scenes, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    flags = [*TINY, "--steps", "1"]
    with monkeypatch.context() as context:
        context.setattr(train_vq, "restart_dead_codes", interrupt)  # called at step 3
        with pytest.raises(KeyboardInterrupt):
            train_gpt.main(flags)
    first_stage = Path("runs/vq-demo-scenes/checkpoint.pt")
    assert load_checkpoint(first_stage, "vq")["step"] == 2
    out = train_gpt.main(flags)
    assert_bit_equal(first_stage, train_vq.main(["--out", "whole", "--device", "cpu"]))
    again = train_gpt.main([*flags, "--out", "again"])
    assert_bit_equal(again, out)  # whether the first stage was trained just before makes no difference
    assert "has other settings" not in capsys.readouterr().out
    changed = dataclasses.replace(train_vq.PRESETS["demo"], code_width=7)
    monkeypatch.setitem(train_vq.PRESETS, "demo", changed)
    train_gpt.main([*flags, "--out", "other"])
    assert f"{first_stage} has other settings than this preset's first stage" in capsys.readouterr().out


def test_no_mistake_ends_in_a_traceback(pictures, first_stage, second_stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs/vq-demo-folder").mkdir(parents=True)
    Path("runs/vq-demo-folder/checkpoint.pt").write_bytes(first_stage.read_bytes())
    Path("mine").mkdir()
    Path("best").mkdir()
    Path("best/checkpoint.pt").write_bytes(second_stage.with_name("best.pt").read_bytes())
    for name in "ab":
        Image.new("RGB", (16, 16)).save(f"mine/{name}.png")
    out = tmp_path / "out"
    gpt, here = gpt_flags(pictures, first_stage, out), gpt_flags(pictures, first_stage, second_stage.parent)
    for flags, status, sentence in [
            (["--order", "sprial"], 2, "order is 'sprial'; choose one of row, spiral, zcurve, subsample"),
            (["--steps", "many"], 2, "argument --steps: invalid int value: 'many'; --help lists"),
            (["--preset", "huge"], 2, "preset is 'huge'; choose one of demo, cifar10, paper"),
            (["--condition", "sex"], 2, "condition is 'sex'; choose one of none, class, segmentation"),
            (["--preset", "cifar10", "--condition", "pose"], 2, "cifar10 has no 'pose'; it has image, class"),
            (["--condition-dropout", "1"], 2, "condition_dropout is 1.0; it must lie in [0, 1)"),
            (["--data-dir", "mine"], 2, "--data-dir has no effect here: scenes are drawn; files need --data"),
            (["--condition", "class", "--condition-vq", "x.pt"], 2, "--condition-vq has no effect here"),
            (["--pixels", "--multiscale"], 2, "pixels have neither a first stage (--vq) nor coarser scales"),
            (["--condition-dropout", "0.1"], 2, "--condition-dropout has no effect here: there is"),
            (["--data", "folder", "--data-dir", "mine"], 1,
             f"was trained on {pictures}, not on mine: name it with --vq"),
            ([*gpt, "--vq", "none.pt"], 1, "none.pt does not exist; name a checkpoint.pt that train_vq.py"),
            ([*gpt, "--vq", second_stage], 1, "checkpoint of train_gpt.py; name a checkpoint.pt that train"),
            ([*gpt, "--condition", "depth", "--condition-vq", first_stage], 1, "a first stage of image in"),
            ([*gpt, "--condition", "class"], 1, "is in no class folder"),
            (here, 2, "already holds a run (4 of 4 steps done); add --resume"),
            (["--resume", "--out", "best"], 2, "holds weights only, as best.pt does: sample from it"),
            (["--out", first_stage / "new"], 2, f"{first_stage} is not a folder that may be written to: name"),
            (["--benchmark", "--resume"], 2, "--resume has no effect here: a benchmark only"),
            (["--pixels", "--preset", "paper"], 2, "256×256 pixels are too many tokens"),
            (["--resume", "--out", second_stage.parent, "--n-layer", "3"], 2, "n_layer is 3 but the run in")]:
        code, _, errors = shell("train_gpt.py", flags, monkeypatch, capsys)
        assert (code, errors.count("\n"), errors[:14]) == (status, 1, "train_gpt.py: "), (flags, errors)
        assert sentence in errors, (sentence, errors)
        assert not out.exists(), flags
