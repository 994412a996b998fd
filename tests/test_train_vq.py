"""The first stage's training with the losses of losses.py, on twenty small pictures in a folder.

Oracles: the plain loop of L1 and quantization loss written out; the run that was never interrupted, bit for
bit; one process, for two; values computed again from the checkpoint; the error's literal sentence. The
perceptual loss has AlexNet's layers with weights drawn at random.
"""
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import losses
import run
import scenes
import train_vq
from vq import VQ, VQConfig, as_vectors, colours_of_use

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--data folder --image-size 32 --base-channels 8 --channel-multipliers 1,2 --codebook-size 16 "
         "--code-width 4 --batch-size 4 --restart-every 3 --log-every 1 --eval-every 20 --device cpu").split()
ADVERSARIAL = ("--discriminator-weight 0.8 --discriminator-layers 1 --discriminator-start 0.5 "
               "--discriminator-warmup 0.25 --discriminator-ramp 0.25").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """16 training and 4 validation pictures of 32×32, a bright square on a dark ground; and LPIPS weights."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = np.full((32, 32, 3), 40, np.uint8)
            y, x = random.integers(0, 16, 2)
            pixels[y:y + 16, x:x + 16] = random.integers(100, 255, 3)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    torch.manual_seed(0)
    layers = losses.backbone_layers("alexnet").state_dict()
    weights = {f"features.{name}": weight for name, weight in layers.items()}
    weights |= {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
                for i, width in enumerate(losses.TAPS["alexnet"].values())}
    torch.save(weights, folder / "alexnet.pth")
    return folder


def flags(folder: Path, out: Path, perceptual: bool = True, adversarial: bool = True) -> list[str]:
    return [*FLAGS, "--data-dir", str(folder), "--out", str(out), *(ADVERSARIAL if adversarial else ()),
            *(["--perceptual", "alexnet", "--perceptual-weights", str(folder / "alexnet.pth")]
              if perceptual else ())]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A checkpoint after 12 steps: the discriminator trains from step 4 on, and is heard from step 7 on."""
    return train_vq.main([*flags(folder, tmp_path_factory.mktemp("trained")), "--steps", "12"])


def log_of(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]


def tensors(tree, name="") -> dict[str, torch.Tensor]:
    """All tensors of a nested dict or list, by path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{name}/{key}").items()}


def differences(path: Path, other: Path) -> list[str]:
    a, b = (tensors(torch.load(file, weights_only=True)) for file in (path, other))
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def shell(arguments: list[str], monkeypatch, capsys) -> tuple[int, str]:
    """What the shell sees: exit status and standard error."""
    monkeypatch.setattr(sys, "argv", ["train_vq.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run.command_line(train_vq.main)
    return ending.value.code, capsys.readouterr().err


# What is trained


def test_without_perceptual_loss_and_discriminator_the_loop_is_l1_and_quantization_loss(folder, tmp_path):
    """Bit for bit: the demo and cifar10 presets train like this."""
    found = train_vq.main([*flags(folder, tmp_path, False, False), "--steps", "8", "--restart-every", "0"])
    config = train_vq.TrainConfig(**torch.load(found, weights_only=True)["config"])
    dataset = data.open_dataset("folder", str(folder), "train", 32)

    def batches():
        return data.load(dataset, data.training_order(16, 4, seed=0), torch.device("cpu"), workers=0)

    torch.manual_seed(0)
    vq = VQ(config.model())
    optimizer = torch.optim.Adam(vq.parameters(), config.lr, betas=(config.beta1, config.beta2))
    with torch.no_grad():
        vq.quantizer.initialize(as_vectors(vq.latents(next(batches()))))  # 4·256 vectors, enough for 16 codes
    for step, images in zip(range(8), batches()):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(config, step)
        reconstructions, _, quantization_loss = vq(images)
        optimizer.zero_grad()
        (F.l1_loss(reconstructions, images) + quantization_loss).backward()
        optimizer.step()
    model = torch.load(found, weights_only=True)["model"]
    assert [name for name, weight in vq.state_dict().items() if not torch.equal(weight, model[name])] == []
    assert torch.load(found, weights_only=True)["adversary"] is None


def test_only_the_paper_preset_needs_a_download():
    paper, *others = (train_vq.PRESETS[name] for name in ("paper", "demo", "cifar10"))
    assert (paper.perceptual, paper.perceptual_weight, paper.adversarial) == ("vgg16", 1.0, True)
    assert paper.upscale  # ImageNet has pictures of less than 256 pixels
    assert (paper.discriminator_weight, paper.discriminator_start) == (0.8, 0.5)
    assert paper.discriminator_steps == (240_001, 250_001, 300_001)
    assert all((preset.perceptual, preset.adversarial) == ("none", False) for preset in others)


def test_the_discriminator_trains_before_it_is_heard_and_neither_before_its_step(trained):
    keys = [set(line) for line in log_of(trained)]
    assert ["discriminator" in line for line in keys] == [False] * 3 + [True] * 9
    assert ["lambda" in line for line in keys] == [False] * 6 + [True] * 6
    for line in log_of(trained):
        assert line["perceptual"] > 0
        for name in ("discriminator", "lambda"):
            assert line.get(name, 1.0) > 0
    assert {"logits_real", "logits_fake"} <= keys[-1] and not {"logits_real", "logits_fake"} & keys[2]
    steps = torch.load(trained, weights_only=True)["adversary"]["optimizer"]["state"][0]["step"]
    assert steps == 9


def test_an_unheard_discriminator_changes_nothing_and_a_heard_one_does(folder, trained, tmp_path):
    unheard = [*flags(folder, tmp_path / "a"), "--steps", "12", "--discriminator-start", "0.99"]
    without = [*flags(folder, tmp_path / "b", adversarial=False), "--steps", "12"]
    never = [*flags(folder, tmp_path / "c"), "--steps", "12", "--discriminator-start", "1"]
    unheard, without, never = map(train_vq.main, (unheard, without, never))
    with_it, alone, none = (torch.load(path, weights_only=True) for path in (unheard, without, never))
    assert with_it["adversary"]["optimizer"]["state"] and none["adversary"] is None
    assert all(torch.equal(weight, with_it["model"][name]) for name, weight in alone["model"].items())
    assert differences(without, never) == []
    heard = torch.load(trained, weights_only=True)["model"]
    assert any(not torch.equal(weight, heard[name]) for name, weight in alone["model"].items())


def test_the_autoencoder_runs_once_a_step_and_the_discriminator_three_times(folder, tmp_path, monkeypatch):
    calls = {"autoencoder": 0, "discriminator": 0, "perceptual": 0}

    def counting(network, name):
        forward = network.forward

        def counted(*arguments, **options):
            calls[name] += torch.is_grad_enabled()
            return forward(*arguments, **options)
        monkeypatch.setattr(network, "forward", counted)

    counting(train_vq.VQ, "autoencoder")
    counting(train_vq.PatchDiscriminator, "discriminator")
    counting(train_vq.PerceptualLoss, "perceptual")
    train_vq.main([*flags(folder, tmp_path), "--steps", "4", "--discriminator-start", "0"])
    assert calls == {"autoencoder": 4, "discriminator": 12, "perceptual": 4}


def test_each_loss_gets_what_it_asks_for(folder, tmp_path, monkeypatch):
    def spy(owner, name, seen):
        function = getattr(owner, name)

        def recording(*arguments, **options):
            seen.append(arguments)
            return function(*arguments, **options)
        monkeypatch.setattr(owner, name, recording)

    of_autoencoder, of_discriminator, rates = [], [], []
    spy(train_vq, "autoencoder_loss", of_autoencoder)
    spy(losses.Adversary, "backward", of_discriminator)
    spy(losses.Adversary, "step", rates)
    found = train_vq.main([*flags(folder, tmp_path), "--steps", "2", "--discriminator-start", "0", "--lr",
                           "1e-4", "--warmup-steps", "4", "--beta1", "0.3", "--beta2", "0.7"])
    for step, (autoencoders, discriminators) in enumerate(zip(of_autoencoder, of_discriminator)):
        images, reconstructions, *_, last_layer, labelled = autoencoders
        _, real, fake = discriminators
        _, lr = rates[step]
        levels = (images + 1) * 127.5
        assert torch.allclose(levels, levels.round(), atol=1e-3) and not reconstructions.equal(images)
        assert real is images and fake is reconstructions and last_layer.shape == (3, 8, 3, 3)
        assert labelled is None
        assert lr == pytest.approx(1e-4 * (step + 1) / 4)
    adversary = torch.load(found, weights_only=True)["adversary"]
    assert adversary["optimizer"]["param_groups"][0]["betas"] == (0.3, 0.7)
    assert "main.5.bias" in adversary["discriminator"] and len(adversary["discriminator"]) == 10  # one layer


def test_the_perceptual_and_the_discriminator_weights_reach_the_loss(folder, trained, tmp_path):
    models = [torch.load(trained, weights_only=True)["model"]]
    for name in ("--perceptual-weight", "--discriminator-weight"):
        out = train_vq.main([*flags(folder, tmp_path / name), "--steps", "12", name, "0.3"])
        models.append(torch.load(out, weights_only=True)["model"])
    for one, two in itertools.combinations(models, 2):
        assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_perceptual_weight_of_0_only_measures(folder, tmp_path):
    measured, without = [*flags(folder, tmp_path / "a", adversarial=False), "--perceptual-weight", "0"], [
        *flags(folder, tmp_path / "b", False, False)]
    measured, without = (train_vq.main([*arguments, "--steps", "4"]) for arguments in (measured, without))
    assert differences(measured, without) == []
    lines = log_of(measured)
    assert lines[-1]["val_lpips"] > 0 and not any("perceptual" in line for line in lines)


def test_a_batch_in_parts_trains_as_in_one_piece(folder, tmp_path, monkeypatch):
    restart, sizes = train_vq.restart_dead_codes, []
    monkeypatch.setattr(train_vq, "restart_dead_codes", lambda vq, optimizer, uses, images, process: (
        sizes.append(len(images)), restart(vq, optimizer, uses, images, process)))
    whole, parts = (train_vq.main([*flags(folder, tmp_path / n, adversarial=False), "--steps", "6",
                                   "--restart-every", "5", "--accumulate", n]) for n in ("1", "4"))
    assert sizes == [4, 4]  # dead codes move onto the outputs of whole batches
    one, two = (torch.load(path, weights_only=True) for path in (whole, parts))
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], rtol=1e-3, atol=1e-4), name
    assert torch.equal(one["uses"], two["uses"])  # each code of each part, once
    for i, before in one["optimizer"]["state"].items():  # Adam itself hides a factor of all gradients
        after = two["optimizer"]["state"][i]["exp_avg"]
        assert torch.allclose(before["exp_avg"], after, rtol=1e-2, atol=1e-2 * after.abs().max().item()), i
    for before, after in zip(log_of(whole), log_of(parts)):
        for name in ("l1", "perceptual", "vq"):
            assert after[name] == pytest.approx(before[name], rel=1e-3)


@pytest.fixture(scope="module")
def half_void(tmp_path_factory) -> Path:
    """Eight masks of two labels for training, every second one all but empty, and two for validation."""
    folder, random = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        (folder / split / "segmentation").mkdir(parents=True)
        for i in range(count):
            labels = (random.random((4, 4)) < 0.5).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            labels[2 + 30 * (i % 2 == 0):] = 255
            Image.fromarray(labels).save(folder / split / "segmentation" / f"{i}.png")
    return folder


def test_a_label_counts_as_much_in_each_part_however_many_a_part_has(half_void, tmp_path):
    whole, parts = (train_vq.main([*flags(half_void, tmp_path / n, False, False), "--steps", "2", "--target",
                                   "segmentation", "--accumulate", n]) for n in ("1", "4"))
    one, two = (torch.load(path, weights_only=True)["optimizer"]["state"] for path in (whole, parts))
    for i, before in one.items():
        before, after = before["exp_avg"], two[i]["exp_avg"]
        assert torch.allclose(before, after, rtol=1e-2, atol=1e-2 * before.abs().max().item()), i
    for before, after in zip(log_of(whole), log_of(parts)):
        assert after["cross_entropy"] == pytest.approx(before["cross_entropy"], rel=1e-3)


def test_each_part_has_its_share_of_the_discriminators_step(folder, tmp_path, monkeypatch):
    backward, shares = losses.Adversary.backward, []
    monkeypatch.setattr(losses.Adversary, "backward", lambda self, images, fakes, share: (
        shares.append((len(images), share)), backward(self, images, fakes, share))[1])
    train_vq.main([*flags(folder, tmp_path, False), "--steps", "2", "--discriminator-start", "0",
                   "--accumulate", "2"])
    assert shares == [(2, 0.5)] * 4


def test_gradient_checkpointing_changes_nothing_but_the_memory(folder, tmp_path, monkeypatch):
    arguments = [*flags(folder, tmp_path / "a", False, False), "--steps", "4"]
    plain = train_vq.main(arguments)
    checkpointed = train_vq.main([*arguments, "--out", str(tmp_path / "b"), "--gradient-checkpointing"])
    assert differences(plain, checkpointed) == []
    more = [*arguments, "--steps", "6", "--resume"]  # it may be switched on or off on the way
    switched = train_vq.main([*more, "--gradient-checkpointing"])
    assert differences(switched, train_vq.main([*more, "--out", str(tmp_path / "b")])) == []

    seen = []
    with monkeypatch.context() as context:
        context.setattr(train_vq, "VQ", lambda config, on: (seen.append(on), VQ(config, on))[1])
        for i, more in enumerate(([], ["--gradient-checkpointing"])):
            train_vq.main([*flags(folder, tmp_path / f"{i}", False, False), "--steps", "1", *more])
    assert seen == [False, True]

    kept = {}  # what is kept for the backward pass
    for on in (False, True):
        vq, storages = VQ(VQConfig(3, 8, "1,2", 2, 16, 4), gradient_checkpointing=on), {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            vq(torch.rand(8, 3, 32, 32))
        kept[on] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert kept[True] < 0.6 * kept[False]


def test_pictures_and_masks_train_in_bfloat16_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run.Process, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    for target in ("image", "segmentation"):
        arguments = [*flags(folder, tmp_path / target), "--data", "scenes", "--target", target, "--steps", "8"]
        monkeypatch.setitem(data.SCENES, "val", 4)
        checkpoint = torch.load(train_vq.main(arguments), weights_only=True)
        assert all(weight.dtype == torch.float32 for weight in checkpoint["model"].values())
        losses = [line["cross_entropy" if target == "segmentation" else "l1"]
                  for line in log_of(tmp_path / target / "checkpoint.pt")]
        assert losses[-1] < losses[0]


# What is coded


def conditions(folder: Path) -> Path:
    """The drawn scenes as files: 12 for training, 4 for validation; label 9 instead of the sky's 0."""
    for split, count in (("train", 12), ("val", 4)):
        for name in ("images", "segmentation", "depth", "pose"):
            (folder / split / name).mkdir(parents=True)
        for i in range(count):
            scene = scenes.draw_scene(split, i, 32)
            mask = np.where(scene.segmentation == 0, 9, scene.segmentation).astype(np.uint8)
            Image.fromarray(scene.image).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "segmentation" / f"{i}.png")
            np.save(folder / split / "depth" / f"{i}.npy", scene.depth)
            np.save(folder / split / "pose" / f"{i}.npy", scene.keypoints)
    return folder


@pytest.mark.parametrize("where", ["scenes", "folder"])
@pytest.mark.parametrize("target, channels", [("segmentation", 8), ("depth", 1), ("pose", 3)])
def test_masks_depth_maps_and_poses_are_coded_and_go_on_bit_for_bit(
        target, channels, where, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(data.SCENES, "val", 4)
    monkeypatch.setitem(data.SCENES, "train", 12)
    files = conditions(tmp_path) if where == "folder" else tmp_path
    base = [*flags(folder, tmp_path / "a"), "--target", target, "--data", where, "--data-dir", str(files),
            "--void-label", "9", "--steps", "8"]
    whole = train_vq.main(base)
    checkpoint = torch.load(whole, weights_only=True)
    assert checkpoint["model_config"]["image_channels"] == channels
    assert (checkpoint["adversary"] is None) == (target == "segmentation")
    *_, line = log_of(whole)
    if target == "segmentation":
        assert {"cross_entropy", "val_cross_entropy", "val_accuracy"} <= set(line)
        assert not {"l1", "val_l1", "perceptual", "val_lpips", "lambda"} & set(line)
    else:
        assert {"l1", "perceptual", "lambda", "discriminator", "val_l1", "val_lpips"} <= set(line)

    vq = VQ(VQConfig(**checkpoint["model_config"]))
    vq.load_state_dict(checkpoint["model"])
    validation = data.open_dataset(where, str(files), "val", 32, fields=(target,), void_label=9)
    images = next(data.load(validation, data.fixed_order(4, 4), torch.device("cpu"), 0, target, channels))
    with torch.no_grad():
        reconstructions, _, _ = vq(images)
    shown = np.asarray(Image.open(tmp_path / "a" / "step-000008.png"))
    assert shown.shape[2] == 3
    if target == "segmentation":
        wanted = [reconstructions.argmax(1), images.argmax(1)]
        expected = (wanted[0] == wanted[1])[images.sum(1) > 0].float().mean().item()
        assert line["val_accuracy"] == pytest.approx(expected, abs=1e-6)
        assert 0 < (images.sum(1) == 0).float().mean() < 0.6 if where == "folder" else images.sum(1).min() == 1
        assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 4  # colours
    else:
        assert line["val_l1"] == pytest.approx((images - reconstructions).abs().mean().item(), rel=1e-4)
    assert images.shape == (4, channels, 32, 32) and images.std() > 0.1

    half = [*base, "--out", str(tmp_path / "b")]
    save = run.save_checkpoint

    def save_and_stop(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(run, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_vq.main([*half, "--checkpoint-every", "5"])
    assert differences(train_vq.main([*half, "--checkpoint-every", "5", "--resume"]), whole) == []


def test_labels_of_the_masks_are_counted_over_both_splits_or_named(tmp_path, folder):
    files = conditions(tmp_path / "files")
    Image.fromarray(np.full((32, 32), 11, np.uint8)).save(files / "val" / "segmentation" / "0.png")
    base = [*flags(folder, tmp_path / "a", False, False), "--target", "segmentation", "--data-dir", str(files),
            "--steps", "1"]
    for more, channels in (([], 12), (["--segments", "20"], 20)):
        found = train_vq.main([*base, "--out", str(tmp_path / str(channels)), *more])
        assert torch.load(found, weights_only=True)["model_config"]["image_channels"] == channels
    with pytest.raises(ValueError, match="a mask has the label 9, but segments is 9: raise --segments"):
        train_vq.main([*base, "--out", str(tmp_path / "c"), "--segments", "9"])


def masks(folder: Path, training: int, validation: int) -> list[str]:
    """Masks of one label in each split, and the flags to train on them."""
    for split, label in (("train", training), ("val", validation)):
        (folder / split / "segmentation").mkdir(parents=True)
        for i in range(4):
            mask = Image.fromarray(np.full((32, 32), label, np.uint8))
            mask.save(folder / split / "segmentation" / f"{i}.png")
    return [*flags(folder, folder / "out", False, False), "--target", "segmentation", "--steps", "1"]


def test_masks_need_a_label_beside_0_in_one_of_the_splits(tmp_path):
    found = train_vq.main(masks(tmp_path / "a", 3, 0))
    assert torch.load(found, weights_only=True)["model_config"]["image_channels"] == 4
    with pytest.raises(ValueError, match="hold no label but 0, and 255, which means that a pixel has none"):
        train_vq.main(masks(tmp_path / "b", 0, 255))
    assert not (tmp_path / "b" / "out").exists()


def test_validation_masks_without_any_label_have_no_scores(tmp_path):
    *_, line = log_of(train_vq.main([*masks(tmp_path, 1, 255), "--segments", "2"]))
    assert line["codes_used"] >= 1 and not {"val_cross_entropy", "val_accuracy"} & set(line)


def test_masks_use_neither_lpips_nor_discriminator_whatever_the_preset_and_have_a_folder_of_their_own():
    masks = dataclasses.replace(train_vq.PRESETS["paper"], target="segmentation", data="ade20k")
    assert not masks.perceives and not masks.adversarial
    assert dataclasses.replace(masks, image_size=16, perceptual="alexnet")  # which is too small for either
    assert str(masks.folder) == "runs/vq-paper-ade20k-segmentation"
    depth = dataclasses.replace(train_vq.PRESETS["paper"], target="depth", data="imagenet")
    assert depth.perceives and depth.adversarial and str(depth.folder) == "runs/vq-paper-imagenet-depth"
    assert str(train_vq.PRESETS["demo"].folder) == "runs/vq-demo-scenes"


# Resuming


@pytest.mark.parametrize("stop", [5, 8])  # while the discriminator trains unheard, and later
def test_a_run_with_a_discriminator_goes_on_bit_for_bit(stop, folder, trained, tmp_path, monkeypatch):
    save = run.save_checkpoint

    def save_and_stop(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["step"] == stop:
            raise KeyboardInterrupt

    arguments = [*flags(folder, tmp_path), "--steps", "12", "--checkpoint-every", "1"]
    with monkeypatch.context() as context:
        context.setattr(run, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_vq.main(arguments)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == stop and saved["adversary"]["steps"] == [4, 7, 10]
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes((folder / "alexnet.pth").read_bytes())
    resumed = train_vq.main(["--resume", "--out", str(tmp_path), "--data", "folder",
                             "--perceptual-weights", str(moved)])
    assert differences(resumed, trained) == []


def test_a_longer_run_does_not_stop_hearing_its_discriminator(folder, trained, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(trained.read_bytes())
    longer = train_vq.main(["--resume", "--out", str(tmp_path), "--data", "folder", "--steps", "30"])
    lines = log_of(longer)
    assert len(lines) == 18 and all("lambda" in line and "discriminator" in line for line in lines)
    assert torch.load(longer, weights_only=True)["adversary"]["steps"] == [4, 7, 10]


# What a run says and leaves behind


def test_the_status_line_shows_the_losses_that_the_log_holds(folder, tmp_path, capsys):
    found = train_vq.main([*flags(folder, tmp_path), "--steps", "4"])
    lines = re.findall(r"^step .*$", capsys.readouterr().out, re.MULTILINE)
    last = log_of(found)[-1]
    expected = (f"step 4/4 · train L1 {last['l1']:.4f} + LPIPS {last['perceptual']:.4f} + "
                f"vq {last['vq']:.4f} · λ {last['lambda']:.3g} · discriminator {last['discriminator']:.3f}, "
                f"logits real {last['logits_real']:+.2f} fake {last['logits_fake']:+.2f} · "
                f"val L1 {last['val_l1']:.4f} LPIPS {last['val_lpips']:.4f} · "
                f"{last['codes_used']} of 16 codes in use")
    assert lines[-1].startswith(expected)
    assert lines[0].count("·") == lines[-1].count("·") - 4 and "λ" not in lines[0]


def test_the_validation_lpips_is_the_mean_over_the_pictures_as_they_are_shown(folder, trained):
    checkpoint = torch.load(trained, weights_only=True)
    vq = VQ(VQConfig(**checkpoint["model_config"]))
    vq.load_state_dict(checkpoint["model"])
    distance = losses.PerceptualLoss(folder / "alexnet.pth", "alexnet")
    values = []
    for path in (folder / "val").iterdir():
        image = torch.from_numpy(np.asarray(Image.open(path)).astype(np.float32) / 127.5 - 1)
        image = image.permute(2, 0, 1)[None]
        values.append(distance(vq.decode(vq.encode(image)).clamp(-1, 1), image).item())
    assert log_of(trained)[-1]["val_lpips"] == pytest.approx(np.mean(values), rel=1e-4)


def test_the_picture_of_use_is_red_for_unused_codes_and_brighter_for_frequent_ones():
    cells = colours_of_use(torch.tensor([0.0, 99, 9, 1, 0]))
    pixels = np.asarray(run.picture_grid(cells, columns=3, side=12)).astype(int)
    cells = [pixels[row * 14 + 6, column * 14 + 6].tolist() for row, column in np.ndindex(2, 3)]
    assert pixels.shape == (2 * 12 + 2, 3 * 12 + 2 * 2, 3)
    red, white = [255, 0, 0], [255, 255, 255]
    assert cells[0] == cells[4] == red and cells[1] == cells[5] == white
    assert cells[2] == [128] * 3 and cells[3] == [38] * 3  # halfway between log 1 and log 100; log 2


def test_codes_are_counted_before_some_are_moved_and_none_is_moved_in_the_last_step(
        folder, tmp_path, monkeypatch):
    events = []
    evaluate, restart, save = train_vq.evaluate, train_vq.restart_dead_codes, run.save_checkpoint
    monkeypatch.setattr(train_vq, "evaluate", lambda *a: (events.append("evaluate"), evaluate(*a))[1])
    monkeypatch.setattr(train_vq, "restart_dead_codes", lambda *a: (events.append("restart"), restart(*a))[1])
    monkeypatch.setattr(run, "save_checkpoint", lambda *a: (events.append("save"), save(*a))[1])
    train_vq.main([*flags(folder, tmp_path, False, False), "--steps", "6", "--eval-every", "3",
                   "--checkpoint-every", "3"])
    assert events == ["evaluate", "restart", "save", "evaluate", "save"]


def test_each_evaluation_draws_the_use_of_the_codes(trained):
    with Image.open(trained.parent / "step-000012-codes.png") as picture:
        assert picture.size == (4 * 12 + 3 * 2,) * 2
        pixels = np.asarray(picture).astype(int)
    red = sum((pixels[row * 14, column * 14] == [255, 0, 0]).all() for row, column in np.ndindex(4, 4))
    assert 16 - red == log_of(trained)[-1]["codes_used"]


def test_a_collapsed_codebook_warns_and_says_what_helps(folder, trained, tmp_path, capsys):
    checkpoint = torch.load(trained, weights_only=True)
    config = dataclasses.replace(train_vq.TrainConfig(**checkpoint["config"]), codebook_size=32)
    validation = data.open_dataset("folder", str(folder), "val", 32)
    process = run.Process(torch.device("cpu"), 0, 1)
    vq = VQ(config.model())
    for used, warns in ((1, True), (2, False)):
        vq.quantizer.codebook.data.fill_(100.0)
        vq.quantizer.codebook.data[:used] = as_vectors(vq.latents(next(data.load(
            validation, data.fixed_order(4, 4), process.device, 0)))).detach()[[0, -1]][:used]
        scores = train_vq.evaluate(vq, None, validation, config, process, tmp_path / "a.png")
        assert scores["codes_used"] == used and "val_lpips" not in scores
        sentence = f"warning: {used} of 32 codes in use; what helps: --restart-every"
        assert (sentence in capsys.readouterr().out) == warns


# Mistakes


def test_mistakes_end_in_a_sentence_and_leave_nothing(folder, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    out = tmp_path / "out"
    base, bad = flags(folder, out, False, False), tmp_path / "bad.pth"
    bad.write_bytes(b"no weights")
    named, alexnet = ["--perceptual-weights", str(folder / "alexnet.pth")], ["--perceptual", "alexnet"]
    fetching = (r"vgg16-397923af.pth is not in \S*hub/checkpoints and could not be fetched from https://\S+ "
                ".*no route.*--perceptual-weights, or leave LPIPS out with --perceptual none")
    cases = [
        (["--perceptual", "vgg16"], 1, fetching),
        (alexnet, 1, "alexnet-owt-7be5be79.pth is not in"),
        ([*alexnet, "--perceptual-weights", str(tmp_path / "none.pth")], 1, "none.pth does not"),
        ([*alexnet, "--perceptual-weights", str(bad)], 1, "bad.pth is damaged"),
        (["--perceptual", "vgg16", *named], 1, "cannot be the LPIPS weights of vgg16"),
        (named, 2, "perceptual_weights names a file but perceptual is 'none'; add --perceptual vgg16"),
        (["--perceptual", "vgg19"], 2, "perceptual is 'vgg19'; choose one of none, vgg16, alexnet"),
        ([*alexnet, *named, "--image-size", "30"], 2, "image_size is 30, too small .* 31"),
        (["--discriminator-weight", "0.8", "--image-size", "22"], 2, "image_size is 22, too small .* 24"),
        (["--discriminator-layers", "0"], 2, "discriminator_layers is 0; it must be at least 1"),
        (["--discriminator-weight", "-1"], 2, "discriminator_weight is -1.0; it must be at least 0"),
        (["--discriminator-start", "-1"], 2, "discriminator_start is -1.0; it must be at least 0"),
        (["--discriminator-warmup", "-1"], 2, "discriminator_warmup is -1.0; it must be at least 0"),
        (["--discriminator-ramp", "-1"], 2, "discriminator_ramp is -1.0; it must be at least 0"),
        (["--perceptual-weight", "-1"], 2, "perceptual_weight is -1.0; it must be at least 0"),
        (["--accumulate", "0"], 2, "accumulate is 0; it must be at least 1"),
        (["--accumulate", "3"], 2, r"4, which cannot be shared evenly by 1 process\(es\), in 3 parts each; .* 3"),
        (["--target", "normals"], 2, "'normals'; it has image, segmentation, depth, pose"),
        (["--target", "depth", "--data", "cifar10"], 2, "cifar10 has no 'depth'; it has image"),
        (["--target", "depth"], 1, "depth is no folder; depth files are expected there"),
        (["--target", "segmentation", "--segments", "-1"], 2, "segments is -1; it must be at least 0"),
        (["--segments", "256"], 2, "segments is 256; labels end at 254, so it must be at most 255"),
        (["--void-label", "-1"], 2, "void_label is -1; it must be at least 0"),
    ]
    for more, status, sentence in cases:
        code, errors = shell([*base, *more], monkeypatch, capsys)
        assert (code, errors.count("\n")) == (status, 1) and re.search(sentence, errors), (more, errors)
        assert not out.exists(), more


# Several processes

WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
import losses, run, train_vq

class Unnormalized(losses.PatchDiscriminator):  # batch statistics depend on who has which pictures
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for i, module in enumerate(self.main):
            if {unnormalized} and isinstance(module, torch.nn.BatchNorm2d):
                self.main[i] = torch.nn.Identity()

kept, opened = [], train_vq.open_adversary
def keep(*arguments):
    kept.append(opened(*arguments))
    return kept[-1]
class Kept(train_vq.VQ):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        kept.append(self)
train_vq.VQ, train_vq.open_adversary, train_vq.PatchDiscriminator = Kept, keep, Unnormalized
train_vq.main(sys.argv[1:])
if torch.distributed.is_initialized():
    for network in (kept[0], kept[1].discriminator):
        for weight in network.parameters():
            weights = [torch.empty_like(weight) for _ in range(2)]
            torch.distributed.all_gather(weights, weight.detach())
            assert torch.equal(*weights)
    print("replicas agree")
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("unnormalized", [True, False])
def test_two_processes_agree_and_compute_what_one_does(unnormalized, folder, tmp_path):
    """But for the norms of the discriminator: each process has its own statistics, as with the authors."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), unnormalized=unnormalized))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    models = []
    for name, launcher in (("one", []), ("two", torchrun))[not unnormalized:]:
        command = [sys.executable, *launcher, str(tmp_path / "worker.py"), *flags(folder, tmp_path / name),
                   "--steps", "8", "--discriminator-start", "0.25",  # below: λ is that of each part
                   *(["--restart-every", "0"] if unnormalized else ["--restart-every", "3", "--accumulate", "2"])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("replicas agree") == (2 if launcher else 0)
        checkpoint = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        since_restart = 8 if unnormalized else 2  # steps; the uses are those of both processes
        assert checkpoint["uses"].sum() == since_restart * 4 * 16 * 16
        models.append(checkpoint["model"] | checkpoint["adversary"]["discriminator"])
    if unnormalized:
        for name, weight in models[0].items():
            assert torch.allclose(weight, models[1][name], rtol=1e-3, atol=1e-4), name
        one, two = (log_of(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
        for before, after in zip(one, two):
            for name in ("l1", "perceptual", "lambda", "discriminator", "logits_real", "val_lpips"):
                if name in before:
                    close = pytest.approx(before[name], rel=2e-3, abs=1e-4)
                    assert after[name] == close, (before["step"], name)
