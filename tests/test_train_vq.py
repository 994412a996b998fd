"""The first stage's training on twenty small pictures, LPIPS by an AlexNet of random weights.

Oracles: the loop written out, with λ by plain autograd; the run that was never interrupted, bit for bit; one
process, for two; numbers computed again from the checkpoint; literal pixels; the error's one sentence.
"""
import collections
import dataclasses
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (ALONE, ROOT, VQ_FLAGS, assert_bit_equal, log_of, shell, start_two, tensors, vq_flags,
                     without_log_of_torch)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import outputs
import data
import losses
import run
import train_vq
from codebook import as_vectors, initialize_codebook
from outputs import to_pixels
from stages import FirstStage
from vq import VQ, Quantizer, VQConfig, memory_format

LARGE = ["--image-size", "32", "--upscale"]  # enough for AlexNet and a discriminator of one layer
ADVERSARIAL = ("--discriminator-weight 0.6 --discriminator-layers 1 --discriminator-start 0.5 "
               "--discriminator-ramp 0.25").split()
SCENES = [*VQ_FLAGS, "--data", "scenes", "--steps", "8"]
MASKS = [*SCENES, "--target", "segmentation"]


@pytest.fixture(scope="module")
def plain(pictures) -> list[str]:
    """Flags of a run of 8 steps without LPIPS and discriminator; the right --out is still to come."""
    return [*vq_flags(pictures, Path("unused")), "--steps", "8"]


@pytest.fixture(scope="module")
def lpips(plain, tmp_path_factory) -> list[str]:
    torch.manual_seed(0)
    features = losses.backbone_layers("alexnet").state_dict()
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
             for i, width in enumerate(losses.TAPS["alexnet"].values())}
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save({f"features.{name}": weight for name, weight in features.items()} | heads, path)
    return [*plain, *LARGE, "--perceptual", "alexnet", "--perceptual-weights", str(path)]


@pytest.fixture(scope="module")
def full(lpips) -> list[str]:
    """With a codebook that is set in step 2, and a discriminator that starts in step 4."""
    return [*lpips, *ADVERSARIAL, "--quantize-after", "0.2", "--restart-every", "4"]


@pytest.fixture(scope="module")
def trained(full, tmp_path_factory) -> Path:
    return train(full, tmp_path_factory.mktemp("trained"))


def train(flags: list[str], out: Path, *more: str) -> Path:
    return train_vq.main([*flags, "--out", str(out), *more])


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def open_split(path: Path, split: str, items: list) -> tuple[train_vq.TrainConfig, list[torch.Tensor]]:
    """The config of a checkpoint, and the inputs of batches of its data."""
    config = train_vq.TrainConfig(**read(path)["config"])
    dataset = data.open_dataset(config.data, config.data_dir, split, config.preparation)
    channels = read(path)["model_config"]["image_channels"]
    return config, list(train_vq.load_inputs(dataset, items, config, channels, ALONE.device))


def open_perceptual_loss(config: train_vq.TrainConfig) -> losses.PerceptualLoss | None:
    return losses.PerceptualLoss(config.perceptual_weights, config.perceptual) if config.uses_lpips else None


def interrupt(flags: list[str], out: Path, step: int, monkeypatch):
    def save_and_stop(config, process, at, parts):
        outputs.save_checkpoint(config, process, at, parts)
        if at == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(train_vq, "save_checkpoint", save_and_stop)
        train(flags, out, "--checkpoint-every", "1")


def test_the_loop_is_its_losses_written_out(plain, full, tmp_path, monkeypatch):
    """Without LPIPS and discriminator bit for bit: the demo and cifar10 presets train like this.

    Against a discriminator each step multiplies differences of rounding, so there are only three of them.
    """
    monkeypatch.setattr(data, "SCENES", {"train": 16, "val": 4})
    shared = "--restart-every 0 --no-decay --warmup-steps 6 --beta1 0.3 --beta2 0.7".split()
    short = "--perceptual-weight 0.7 --steps 6 --discriminator-start 4 --discriminator-ramp 2".split()
    plain_first = ["--quantize-after", "0.25"]
    for i, flags in enumerate((plain, [*plain, *plain_first], [*MASKS, *plain_first], [*full, *short])):
        found = train(flags, tmp_path / str(i), *shared)
        items = list(itertools.islice(data.training_batches(16, 4, seed=0), len(log_of(found))))
        config, batches = open_split(found, "train", items)
        perceptual = open_perceptual_loss(config)
        torch.manual_seed(0)
        vq = VQ(config.model(batches[0].shape[1])).to(memory_format=memory_format(torch.device("cpu")))
        adversary = train_vq.open_adversary(config, 3, ALONE)
        D = adversary and adversary.discriminator
        optimizers = [torch.optim.Adam(network.parameters(), betas=(0.3, 0.7), fused=True)
                      for network in (vq, D) if network]
        quantized_from = (1, 3, 3, 2)[i]
        for step, images in enumerate(batches, 1):
            if step == quantized_from:
                initialize_codebook(vq, batches[step - 1:step + (D is None)], ALONE)  # of 16 vectors a code
                uses = torch.full((16,), float(step > 1))
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 6, 1)  # D's too
            if step < quantized_from:
                x, quantization_loss = vq.decoder(vq.latents(images)), 0 * vq.quantizer.codebook.sum()
            else:
                x, codes, quantization_loss = vq(images)
                uses += torch.bincount(codes.flatten(), minlength=16)
            loss = F.cross_entropy(x, images.argmax(1)) if i == 2 else F.l1_loss(x, images)
            expected = {"cross_entropy" if i == 2 else "l1": loss, "vq": quantization_loss}
            if perceptual:
                expected["perceptual"] = perceptual.distance(x, images).mean()
                loss = loss + 0.7 * expected["perceptual"]
            if D and step >= 4:
                g, last = -D(x).mean(), vq.decoder[-1].weight
                norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, g)]
                expected["lambda"] = norms[0] / (norms[1] + 1e-4)
                loss = loss + 0.6 * min((step - 3) / 2, 1) * expected["lambda"] * g
            optimizers[0].zero_grad()
            (loss + quantization_loss).backward()
            optimizers[0].step()
            if D and step >= 4:
                real, fake = D(images), D(x.detach())
                hinge = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
                optimizers[1].zero_grad()
                hinge.backward()
                optimizers[1].step()
                expected |= {"discriminator": hinge, "logits_real": real.mean(), "logits_fake": fake.mean()}
            line = log_of(found)[step - 1]
            assert ("lambda" in line) == ("lambda" in expected), step
            for name, value in expected.items():
                assert line[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4), (step, name)
        if i < 2:
            weights = read(found)["model"]
            assert all(torch.equal(weight, weights[name]) for name, weight in vq.state_dict().items())
            assert torch.equal(uses, read(found)["uses"])


def test_the_autoencoder_and_lpips_run_once_a_step_and_the_discriminator_three_times(
        full, tmp_path, monkeypatch):
    calls = collections.Counter()
    for owner, name in ((VQ, "forward"), (losses.PatchDiscriminator, "forward"),
                        (losses.PerceptualLoss, "distance")):
        monkeypatch.setattr(owner, name, lambda *arguments, owner=owner, function=getattr(owner, name): (
            calls.update([owner] * torch.is_grad_enabled()), function(*arguments))[1])
    train(full, tmp_path, "--discriminator-start", "1", "--steps", "2")
    assert calls == {VQ: 2, losses.PatchDiscriminator: 6, losses.PerceptualLoss: 2}


def test_a_perceptual_weight_of_0_only_measures_and_a_discriminator_waits_for_its_start(
        plain, lpips, tmp_path):
    waiting = [*lpips, "--perceptual-weight", "0", *ADVERSARIAL, "--discriminator-start", "5"]
    measured = train(waiting, tmp_path / "a", "--steps", "4")
    without = train([*plain, *LARGE], tmp_path / "b", "--steps", "4")
    a, b, line = read(measured), read(without), log_of(measured)[-1]
    assert all(torch.equal(weight, a["model"][name]) for name, weight in b["model"].items())
    assert a["adversary"]["optimizer"]["state"] == {} and b["adversary"] is None
    assert line["val_lpips"] > 0 and "perceptual" not in line


def test_only_the_paper_preset_needs_a_download_and_masks_have_neither_lpips_nor_discriminator():
    paper, *others = (train_vq.PRESETS[name] for name in ("paper", "demo", "cifar10"))
    assert paper.uses_lpips and paper.adversarial and paper.upscale  # ImageNet has pictures below 256 pixels
    assert not any(preset.uses_lpips or preset.adversarial for preset in others)
    masks = dataclasses.replace(paper, target="segmentation", data="ade20k", image_size=16)  # small for both
    assert not masks.uses_lpips and not masks.adversarial
    assert str(masks.folder) == "runs/vq-paper-ade20k-segmentation"
    for start, ramp, schedule in ((0.5, 0.25, (6, 3)), (7, 2, (7, 2)), (1, 0, (1, 0))):  # shares, or steps
        adversary = train_vq.open_adversary(dataclasses.replace(
            paper, steps=12, discriminator_start=start, discriminator_ramp=ramp), 3, ALONE)
        assert schedule == (adversary.start, adversary.ramp)


def test_gradient_checkpointing_recomputes_and_changes_nothing(plain, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("vq.checkpoint", lambda *arguments, **options: (
        calls.append(1), checkpoint(*arguments, **options))[1])
    whole, part = train(plain, tmp_path / "a"), train(plain, tmp_path / "b", "--steps", "4")
    assert not calls
    assert_bit_equal(whole, train(plain, part.parent, "--resume", "--gradient-checkpointing"))
    assert calls


def test_pictures_and_masks_train_in_bfloat16_too(full, tmp_path, monkeypatch):
    quantize, seen = Quantizer.forward, set()

    def recorded(self, latents):
        seen.add((self.training, latents.dtype))
        return quantize(self, latents)

    monkeypatch.setattr(Quantizer, "forward", recorded)
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 4})
    for name, flags in (("l1", full), ("cross_entropy", MASKS)):
        found = train(flags, tmp_path / name)
        assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
        assert all(weight.dtype == torch.float32 for weight in read(found)["model"].values())
        assert log_of(found)[-1][name] < log_of(found)[0][name]


def test_a_step_between_two_log_lines_never_waits_for_the_gpu(full, tmp_path, monkeypatch):
    """On a CPU, by the operations that would: reading a value back, or a shape that depends on values."""
    aten, waits, watching, run_steps = torch.ops.aten, [], [], run.steps

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket
            by_mask = name in (aten.index, aten.index_put, aten.index_put_) and any(
                index is not None and index.dtype == torch.bool for index in arguments[1])
            waits_for_gpu = by_mask or name in (aten._local_scalar_dense, aten.nonzero, aten.bincount,
                                                aten.masked_select, aten._unique2)
            if watching and waits_for_gpu:
                calls = "".join(traceback.format_stack())
                if "torch/optim/" not in calls:  # Adam counts steps on the CPU
                    waits.append(calls)
            return function(*arguments, **options or {})

    def steps(*arguments):
        for step, images, due in run_steps(*arguments):
            watching[:] = [step] if step > 1 and not any(due) else []
            yield step, images, due

    monkeypatch.setattr(run, "steps", steps)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: [value.item() for value in values.flatten()])
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 4})
    for flags in ([*full, "--discriminator-start", "1"], MASKS):
        with Watch():
            train(flags, tmp_path / flags[-1], "--log-every", "4", "--restart-every", "4", "--steps", "4")
    assert waits == []


@pytest.mark.parametrize("target, channels", [("segmentation", 8), ("depth", 1), ("pose", 3)])
def test_masks_depth_maps_and_poses_are_coded_measured_and_go_on_bit_for_bit(
        target, channels, full, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SCENES", {"train": 12, "val": 20})  # validation in two batches
    flags = MASKS if target == "segmentation" else [
        *SCENES, "--target", target, *LARGE[:2], *full[full.index("--perceptual"):]]
    whole = train(flags, tmp_path / "a")
    interrupt(flags, tmp_path / "b", 5, monkeypatch)
    assert_bit_equal(train(flags, tmp_path / "b", "--resume"), whole)
    config, (images,) = open_split(whole, "val", data.fixed_batches(20, 20))
    assert images.shape[1] == channels
    line, vq = log_of(whole)[-1], VQ(VQConfig(**read(whole)["model_config"]))
    vq.load_state_dict(read(whole)["model"])
    with torch.no_grad():
        x, codes, _ = vq(images)
    expected = {"codes_used": len(codes.unique())}
    if target == "segmentation":
        expected["val_accuracy"] = (x.argmax(1) == images.argmax(1)).float().mean().item()
        expected["val_cross_entropy"] = F.cross_entropy(x, images.argmax(1)).item()
        assert not {"l1", "val_l1", "perceptual", "val_lpips", "lambda"} & set(line)
    else:
        distance = open_perceptual_loss(config)
        expected["val_lpips"] = distance(images, x.clamp(-1, 1)).mean().item()
        expected["val_l1"] = (images - x).abs().mean().item()
        assert line["lambda"] > 0 and line["perceptual"] > 0
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_evaluation_leaves_training_mode_and_returns_to_it(tmp_path, monkeypatch):
    modes, forward = [], VQ.forward
    monkeypatch.setattr(VQ, "forward", lambda vq, *given: (modes.append(vq.training), forward(vq, *given))[1])
    train([*SCENES, "--eval-every", "2", "--steps", "4"], tmp_path)
    assert [mode for mode, _ in itertools.groupby(modes)] == [True, False, True, False]


def test_nothing_is_evaluated_before_there_are_codes(tmp_path):
    path = train([*SCENES, "--eval-every", "1", "--steps", "4", "--quantize-after", "0.5"], tmp_path)
    assert ["val_l1" in line for line in log_of(path)] == [False, False, True, True]


def test_labels_of_the_masks_are_counted_over_both_splits_or_named(tmp_path, capsys):
    def flags(name: str, training: list, validation: list) -> list[str]:
        random = np.random.default_rng(0)
        for split, labels in (("train", training), ("val", validation)):
            (tmp_path / name / split / "segmentation").mkdir(parents=True)
            for i in range(4):
                mask = random.choice(labels, (16, 16)).astype(np.uint8)
                Image.fromarray(mask).save(tmp_path / name / split / "segmentation" / f"{i}.png")
        return [*vq_flags(tmp_path / name, tmp_path), "--target", "segmentation", "--steps", "1"]

    masks = flags("a", [0, 3, 9], [0, 11])
    for more, channels in (([], 12), (["--void-label", "11"], 10), (["--segments", "20"], 20)):
        found = train(masks, tmp_path / str(channels), *more)
        assert read(found)["model_config"]["image_channels"] == channels
    Image.new("L", (16, 16), 15).save(tmp_path / "a" / "train" / "segmentation" / "4.png")
    with pytest.raises(ValueError, match="has the label 15, but labels go from 0 to 11"):  # not taken for void
        train([*masks, "--steps", "4"], tmp_path / "12", "--resume")
    with pytest.raises(ValueError, match="has the label 11, but labels go from 0 to 8"):
        train(masks, tmp_path / "out", "--segments", "9")
    assert "validation masks" not in capsys.readouterr().out
    black_and_white = flags("b", [0, 255], [0, 255])
    with pytest.raises(ValueError, match="the masks in .* hold no label but 0"):
        train(black_and_white, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    train(black_and_white, tmp_path / "named", "--segments", "2")
    assert "warning: the first validation masks in" in capsys.readouterr().out
    line = log_of(train(flags("c", [0, 1], [255]), tmp_path / "void"))[-1]
    assert line["codes_used"] >= 1 and not {"val_cross_entropy", "val_accuracy"} & set(line)  # of no pixel


@pytest.mark.parametrize("stop", [1, 3, 4, 5])  # the codebook is set in step 2, the discriminator starts in 4
def test_a_run_goes_on_bit_for_bit_across_the_starts_of_codebook_and_discriminator(
        stop, full, trained, tmp_path, monkeypatch):
    interrupt(full, tmp_path, stop, monkeypatch)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    if stop < 2:
        with pytest.raises(ValueError, match="has no codes yet: go on with train_vq.py --resume"):
            FirstStage.load(tmp_path / "checkpoint.pt")
    assert_bit_equal(train(full, tmp_path, "--resume"), trained)
    # With more steps a share of them is another step; but what has begun goes on.
    (tmp_path / "checkpoint.pt").write_bytes(before)
    longer = train(full, tmp_path, "--resume", "--steps", "12")
    assert [line["step"] for line in log_of(longer) if "lambda" in line] == [
        *range(6 if stop < 4 else 4, 13)]


def test_a_run_goes_on_with_weights_in_another_memory_format(plain, tmp_path, monkeypatch):
    """As on a CPU after a GPU: the moments are moved, too, for fused Adam reads both as plain memory."""
    whole, rows = train(plain, tmp_path / "whole", "--lr", "0.01"), []
    with monkeypatch.context() as other:
        other.setattr(train_vq, "memory_format", lambda _, row=0: rows.append(row) or torch.preserve_format)
        train(plain, tmp_path / "half", "--lr", "0.01", "--steps", "6")
    config = read(whole)["config"]
    assert 4 * config["image_size"] * config["base_channels"] in rows
    resumed = train(plain, tmp_path / "half", "--lr", "0.01", "--resume")
    for (name, a), b in zip(read(whole)["model"].items(), read(resumed)["model"].values()):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3), (name, (a - b).abs().max())


def test_sigterm_to_all_processes_saves_and_ends_in_a_sentence(plain, tmp_path):
    """As batch systems and closed terminals do it: the process that prepares pictures gets it, too."""
    flags = [*plain, "--workers", "1", "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(ROOT / "train_vq.py"), *flags], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        log = tmp_path / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        errors = without_log_of_torch(process.communicate(timeout=60)[1])
    finally:
        process.kill()
    step = read(tmp_path / "checkpoint.pt")["step"]
    assert process.returncode == 130 and errors.count("\n") == 1
    assert errors.startswith(f"train_vq.py: stopped after step {step} of 100000;")
    done = train(flags, tmp_path, "--resume", "--steps", str(step + 2))
    assert [line["step"] for line in log_of(done)] == list(range(1, step + 3))


def test_codes_are_counted_before_dead_ones_move_and_none_moves_in_the_last_step(
        plain, tmp_path, monkeypatch):
    events = []
    for name in ("evaluate", "restart_dead_codes", "save_checkpoint"):
        monkeypatch.setattr(train_vq, name, lambda *arguments, name=name, function=getattr(train_vq, name): (
            events.append(name), function(*arguments))[1])
    found = train(plain, tmp_path, "--steps", "6", "--eval-every", "3", "--checkpoint-every", "3")
    assert events == ["evaluate", "restart_dead_codes", "save_checkpoint", "evaluate", "save_checkpoint"]
    assert read(found)["uses"].sum() == 3 * 4 * 64  # since step 3


def test_dead_codes_move_onto_encoder_outputs_without_old_moments_and_nothing_else_moves():
    torch.manual_seed(0)
    vq, images = VQ(VQConfig(3, 8, "1,2", 1, 16, 4)), torch.rand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(vq.parameters(), fused=True)
    vq(images)[2].backward()
    optimizer.step()
    codebook, dead = vq.quantizer.codebook, torch.arange(16) % 3 == 0
    moments = optimizer.state[codebook]
    moments["exp_avg"].fill_(1.0)
    moments["exp_avg_sq"].fill_(1.0)
    before = {name: x.clone() for name, x in tensors([vq.state_dict(), optimizer.state_dict()]).items()}
    train_vq.restart_dead_codes(vq, optimizer, 1.0 - dead.float(), images, ALONE)
    latents, moved = as_vectors(vq.latents(images)).detach(), codebook.detach().clone()
    assert all((latents == code).all(1).any() for code in moved[dead]) and len(moved[dead].unique(dim=0)) == 6
    changed = {name: (x != before[name]).any(1)
               for name, x in tensors([vq.state_dict(), optimizer.state_dict()]).items()
               if not torch.equal(x, before[name])}
    assert len(changed) == 3 and all(torch.equal(rows, dead) for rows in changed.values())
    assert moments["exp_avg"][dead].eq(0).all() and moments["exp_avg_sq"][dead].eq(0).all()
    train_vq.restart_dead_codes(vq, optimizer, 1.0 - dead.float(), images * float("nan"), ALONE)
    assert torch.equal(codebook, moved)


def test_pictures_stand_above_their_reconstructions_in_rows_of_eight(trained, tmp_path):
    config, vq = train_vq.TrainConfig(**read(trained)["config"]), FirstStage.load(trained).vq
    for split, count, columns in (("val", 4, 4), ("train", 16, 8)):
        dataset = data.open_dataset("folder", config.data_dir, split, config.preparation)
        train_vq.draw(vq, dataset, torch.ones(16), config, tmp_path / "grid.png")
        values = torch.stack([torch.as_tensor(dataset[i, None]["image"]) for i in range(count)])
        images = data.as_input(values, "image", 3)
        expected = to_pixels(torch.stack([images, vq.decode(vq.encode(images))]))  # (2, N, 32, 32, 3)
        pixels = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
        assert pixels.shape == (2 * count // columns * 98 - 2, columns * 98 - 2, 3)  # 32·3 pixels, a gap of 2
        for row, column in np.ndindex(2 * count // columns, columns):
            cell = pixels[98 * row:98 * row + 96:3, 98 * column:98 * column + 96:3]
            assert abs(cell - expected[row % 2, row // 2 * columns + column]).max() <= 1  # rounding


def test_the_picture_of_use_is_red_for_unused_codes_and_brighter_for_frequent_ones(trained, tmp_path):
    config = train_vq.TrainConfig(**read(trained)["config"])
    validation = data.open_dataset("folder", config.data_dir, "val", config.preparation)
    counts = torch.tensor([0.0, 99, 9, 1, 0])
    train_vq.draw(VQ(config.model()), validation, counts, config, tmp_path / "use.png")
    pixels = np.asarray(Image.open(tmp_path / "use-codes.png"))
    found = [pixels[row * 14 + 6, column * 14 + 6].tolist() for row, column in np.ndindex(2, 3)]
    red, white = [255, 0, 0], [255, 255, 255]
    assert found == [red, white, [128] * 3, [38] * 3, red, white]  # log 100, its half, log 2; an empty place


def test_a_collapsed_codebook_warns_and_says_what_helps(trained, capsys):
    config, (images,) = open_split(trained, "val", data.fixed_batches(4, 4))
    config = dataclasses.replace(config, codebook_size=32)
    validation = data.open_dataset("folder", config.data_dir, "val", config.preparation)
    vq = VQ(config.model())
    for used in (1, 2):
        vq.quantizer.codebook.data.fill_(100.0)
        vq.quantizer.codebook.data[:used] = as_vectors(vq.latents(images)).detach()[[0, -1]][:used]
        scores, counts = train_vq.evaluate(vq, None, validation, config, ALONE)
        assert scores["codes_used"] == (counts > 0).sum() == used
        assert ("warning: 1 of 32 codes in use; what helps: " in capsys.readouterr().out) == (used == 1)


def test_a_loss_of_your_own_is_in_the_status_line():
    known, own = {"l1": 0.5, "lr": 1e-3}, {"edges": 0.25, "by_class": [0.5]}
    assert train_vq.status_text(own | known, 256) == train_vq.status_text(known, 256) + " · edges 0.25"
    assert train_vq.status_text(known, 256).startswith("train L1 0.5000")


def test_a_diverged_run_spares_the_checkpoint_and_names_the_step_and_its_pictures(
        pictures, full, tmp_path, monkeypatch, capsys):
    before = train(full, tmp_path, "--log-every", "50", "--steps", "2").read_bytes()
    for steps in (8, 3):  # losses between two status lines, and weights that an evaluation finds
        more = ["--out", tmp_path, "--resume", "--steps", steps, "--log-every", 50, "--lr", 1e30]
        status, _, errors = shell("train_vq.py", [*full, *more], monkeypatch, capsys)
        sentence = (r"train_vq.py: the \w+ loss became nan in step (\d)(?: with (.*))?: go on from "
                    r".*checkpoint.pt of step 2 with --resume and a lower --lr\n")
        found = re.fullmatch(sentence, errors)
        assert status == 1 and found
        if steps == 8:  # an evaluation has no batch
            names = sorted(os.listdir(pictures / "train"))
            batch = next(data.training_batches(16, 4, seed=0, start=int(found[1]) - 1))
            assert found[2] == ", ".join(f"train/{names[index]}" for index, _ in batch)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_unreadable_picture_is_skipped_in_training_and_in_validation_found_before_the_first_step(
        pictures, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for split, number in (("train", 3), ("val", 1)):
        path = folder / split / f"{number}.png"
        path.write_bytes(path.read_bytes()[:50])  # of about 82
        flags = [*vq_flags(folder, tmp_path / "run"), *"--steps 8 --eval-every 8".split()]
        status, out, errors = shell(
            "train_vq.py", [*flags, *["--resume"] * (split == "val")], monkeypatch, capsys)
        if split == "train":
            assert (status, errors) == (0, "") and "step 8/8" in out
            assert out.count("skipped in training, 1 of 16 so far: ") == 1 and str(path) in out
    assert status == 1 and re.fullmatch(rf"train_vq.py: {path} cannot be read as a picture .*\n", errors)
    assert "first stage" not in out and len(log_of(tmp_path / "run" / "checkpoint.pt")) == 8


def test_a_wrong_picture_ends_a_run_after_a_step_that_saves(pictures, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    third = next(itertools.islice(data.training_batches(16, 4, seed=0), 2, None))
    path = sorted((folder / "train").iterdir())[third[0][0]]
    good = path.read_bytes()
    Image.new("RGB", (9, 9)).save(path)
    flags = [*vq_flags(folder, tmp_path / "run"), "--steps", "6", "--checkpoint-every", "99", "--no-upscale"]
    status, out, errors = shell("train_vq.py", flags, monkeypatch, capsys)
    assert status == 1 and re.fullmatch(rf"train_vq.py: {path} has 9×9 pixels, too few .*\n", errors)
    assert "stopped after step 2 of 6" in out and read(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    path.write_bytes(good)
    assert shell("train_vq.py", [*flags, "--resume"], monkeypatch, capsys)[0] == 0


def test_mistakes_end_in_a_sentence_and_leave_nothing(plain, lpips, tmp_path, monkeypatch, capsys):
    wrong = ("discriminator_layers 0,discriminator_start nan,discriminator_ramp inf,perceptual_weight -1.0,"
             "segments 256,void_label -1,codebook_size 65537,quantize_after 1.0,restart_every -1,"
             f"seed {2**63}").split(",")
    cases = [(plain, f"--{text.replace('_', '-')}", 2, f"{text.replace(' ', ' is ')}; it must")
             for text in wrong]
    useless = [(plain, ("perceptual-weights x", "perceptual-weight 1", "segments 3",
                        "discriminator-start 0.5", "discriminator-ramp 0.5", "discriminator-layers 2")),
               (SCENES, ("data-dir x", "flip", "upscale", "void-label 9")),
               (MASKS, ("perceptual alexnet", "discriminator-weight 1"))]
    cases += [(flags, f"--{flag}", 2, f"--{flag.split()[0]} has no effect here")
              for flags, those in useless for flag in those]
    cases += [
        (lpips, "--perceptual vgg16", 1, "cannot be the LPIPS weights of vgg16"),
        (lpips, "--image-size 30", 2, "image_size is 30, too small .* 31"),
        (plain, "--discriminator-weight 0.8", 2, "image_size is 16, too small .* 24"),
        (plain, "--image-size 17", 2, "image_size is 17, .*choose a multiple of 2"),
        (plain, "--target normals", 2, "has no 'normals'"),
        (plain, "--target depth", 1, "depth is no folder"),
        (plain, "--device meta", 2, "device is 'meta', which torch cannot use here"),
        (plain, "--code-width 1000000000", 1, "too little memory")]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for flags, more, status, sentence in cases:
        if "code-width" in more:
            resource.setrlimit(resource.RLIMIT_AS, (2**36, limits[1]))
        arguments = [*flags, *more.split(), "--out", tmp_path / "out"]
        code, _, errors = shell("train_vq.py", arguments, monkeypatch, capsys)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert (code, errors.count("\n")) == (status, 1) and re.search(sentence, errors), (more, errors)
        assert not (tmp_path / "out").exists(), more


class Unnormalized(losses.PatchDiscriminator):
    """Without norms, whose statistics depend on which process has which pictures, as with the authors."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.main = torch.nn.Sequential(*(module for module in self.main
                                          if not isinstance(module, torch.nn.BatchNorm2d)))


def train_and_compare(flags: list[str]):
    """In one of two processes: train, and compare all weights with the other's."""
    networks = []
    for name, made in (("VQ", VQ), ("PatchDiscriminator", Unnormalized)):
        setattr(train_vq, name, lambda *arguments, made=made, **options: (
            networks.append(made(*arguments, **options)), networks[-1])[1])
    train_vq.main(flags)
    for weight in (weight for network in networks for weight in network.parameters()):
        weights = [torch.empty_like(weight) for _ in range(2)]
        torch.distributed.all_gather(weights, weight.detach())
        assert torch.equal(*weights)
    print("replicas agree", flush=True)
    torch.distributed.destroy_process_group()
    os._exit(0)  # DistributedDataParallel keeps threads of gloo alive, which can abort a normal exit


def test_two_processes_agree_and_compute_what_one_does(full, tmp_path, monkeypatch):
    flags = [*full, "--codebook-size", "64", "--discriminator-start", "2", "--restart-every", "3"]
    processes = start_two(train_and_compare, [*flags, "--out", str(tmp_path / "two")], folder=tmp_path)
    try:
        for rank, process in enumerate(processes):
            process.join(200)
            out, errors = ((tmp_path / str(rank) / name).read_text() for name in ("out", "err"))
            assert process.exitcode == 0 and "replicas agree" in out, errors
    finally:
        for process in processes:
            process.kill()
    monkeypatch.setattr(train_vq, "PatchDiscriminator", Unnormalized)
    paths = train(flags, tmp_path / "one"), tmp_path / "two" / "checkpoint.pt"
    one, two = map(read, paths)
    assert one["uses"].sum() == two["uses"].sum() == 2 * 4 * 256 and one["uses"].min() == 0  # since step 6
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], rtol=1e-3, atol=1e-3), name
    for before, after in zip(*map(log_of, paths)):
        for line in (before, after):
            line["margin"] = line.get("logits_real", 0) - line.get("logits_fake", 0)
        for name in before.keys() - {"ms_per_step", "images_per_s"}:
            # The last bias adds to all logits. Its gradient is rounding alone, of which Adam makes steps.
            shift = 2 * before["lr"] * before["step"] if name.startswith("logits") else 0
            expected = pytest.approx(before[name], rel=2e-3, abs=1e-4 + shift)
            assert after[name] == expected, (before["step"], name)
