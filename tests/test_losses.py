"""Claims about losses.py.

Oracles: LPIPS and the discriminator written out layer by layer with F.conv2d, straight from the tensors of a
weight file; derivatives by hand and by finite differences; literal schedules; identities (an image is at
distance 0 from itself; scaling the likelihood scales λ); and what the original programs computed, where
PARITY_DATA names a folder with their results (lpips_seed0.npz, vqgan_f16_seed0.npz) and LPIPS weights.
"""
import ast
import copy
import hashlib
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import losses
from losses import (Adversary, PatchDiscriminator, PerceptualLoss, adaptive_weight, image_loss, mask_loss,
                    score_images, score_masks)
from test_taming import parity_file, picture
from test_taming import random_weights as authors_weights

# The convolutions of torchvision's networks, each with a ReLU: channels, size, stride, padding.
VGG16 = [(64, 3, 1, 1)] * 2 + ["tap"]
for channels, count in ((128, 2), (256, 3), (512, 3), (512, 3)):
    VGG16 += ["pool"] + [(channels, 3, 1, 1)] * count + ["tap"]
NETWORKS = {"vgg16": VGG16,
            "alexnet": [(64, 11, 4, 2), "tap", "pool", (192, 5, 1, 2), "tap", "pool", (384, 3, 1, 1), "tap",
                        (256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap"]}


def random_weights(backbone: str) -> dict[str, Tensor]:
    """Weights in the format of the files that users have, drawn at random; heads are never negative."""
    weights, inputs, taps, index = {}, 3, 0, 0
    for layer in NETWORKS[backbone]:
        if layer == "tap":
            weights[f"lin{taps}.model.1.weight"] = torch.rand(1, inputs, 1, 1)
            taps += 1
        elif layer == "pool":
            index += 1
        else:
            channels, size, *_ = layer
            scale = math.sqrt(2 / (inputs * size * size))
            weights[f"features.{index}.weight"] = scale * torch.randn(channels, inputs, size, size)
            weights[f"features.{index}.bias"] = 0.1 * torch.randn(channels)
            inputs, index = channels, index + 2  # its ReLU has a number, too
    return weights


def slow_lpips(weights: dict[str, Tensor], backbone: str, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of two images (3, H, W), scalar, in float64, from its paper's formula."""
    mean, deviation = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    heads = [weights[name].double().flatten() for name in sorted(weights) if name.startswith("lin")]
    convolutions = sorted({int(name.split(".")[1]) for name in weights if name.startswith("features.")})
    x = ((torch.stack([a, b]).double() + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
    total = 0.0
    for layer in NETWORKS[backbone]:
        if layer == "pool":
            x = F.max_pool2d(x, 2 if backbone == "vgg16" else 3, 2)
        elif layer == "tap":
            unit = x / x.square().sum(1, keepdim=True).sqrt()
            total += torch.einsum("chw,c->hw", (unit[0] - unit[1]) ** 2, heads.pop(0)).mean()
        else:
            index = convolutions.pop(0)
            weight, bias = (weights[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, *layer[2:]).clamp(min=0)
    return total


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A weight file for each backbone, in float16 and saved on a GPU, as many are."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("weights")
    with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:0"):
        for backbone in NETWORKS:
            weights = {name: weight.half() for name, weight in random_weights(backbone).items()}
            torch.save(weights, folder / f"{backbone}.pth")
    return {backbone: folder / f"{backbone}.pth" for backbone in NETWORKS}


@pytest.fixture(scope="module")
def alexnet(files) -> PerceptualLoss:
    return PerceptualLoss(files["alexnet"], "alexnet")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(count: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, size, size) * 2 - 1


# LPIPS


@pytest.mark.parametrize("backbone, height, width, parameters", [
    ("vgg16", 33, 16, 14_716_160), ("alexnet", 40, 31, 2_470_848)])
def test_lpips_and_its_gradient_are_its_formula_with_the_parameters_of_the_release(
        files, backbone, height, width, parameters):
    loss = PerceptualLoss(str(files[backbone]), *([backbone] if backbone != "vgg16" else []))  # the default
    weights = torch.load(files[backbone], map_location="cpu", weights_only=True)
    a, b = ((torch.rand(2, 3, height, width) * 2 - 1).requires_grad_() for _ in range(2))
    distances = loss(a, b)
    slow = torch.stack([slow_lpips(weights, backbone, *pair) for pair in zip(a, b)])  # (2,)
    assert distances.dtype == torch.float32 and slow.min() > 0.01
    torch.testing.assert_close(distances.double(), slow, rtol=1e-4, atol=0)
    gradients = (torch.autograd.grad(x.sum(), (a, b)) for x in (distances, slow))
    for gradient, expected in zip(*gradients):
        assert (gradient - expected).norm() < 1e-2 * expected.norm()
    assert sum(weight.numel() for weight in loss.parameters()) == parameters


def test_lpips_is_a_fixed_metric_0_for_equal_images_and_of_grey_as_three_equal_channels(alexnet):
    a, b = pictures(), pictures()
    assert alexnet(a, a).tolist() == [0, 0]
    assert torch.equal(alexnet(a, b), alexnet(b, a)) and alexnet(a, b).min() > 0
    a, b = pictures(channels=1), pictures(channels=1)
    assert torch.equal(alexnet(a, b), alexnet(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    outer = nn.ModuleDict({"loss": alexnet}).train()
    assert outer.training and not any(module.training for module in alexnet.modules())
    assert alexnet.train() is alexnet and not any(weight.requires_grad for weight in outer.parameters())


def test_where_no_feature_is_active_lpips_is_0_and_its_gradient_finite(tmp_path):
    dead = {name: -1.0 * torch.ones_like(weight) if name.endswith("bias") else torch.zeros_like(weight)
            for name, weight in random_weights("alexnet").items()}  # unit vectors are 0/0
    torch.save(dead, tmp_path / "dead.pth")
    images = pictures().requires_grad_()
    distances = PerceptualLoss(tmp_path / "dead.pth", "alexnet")(images, pictures())
    distances.sum().backward()
    assert distances.tolist() == [0, 0] and images.grad.isfinite().all()


def test_images_of_another_range_or_size_are_refused_but_not_a_decoders_in_training(files, alexnet):
    real = pictures()
    assert alexnet(real * 1.0005, real * 1.0005).isfinite().all()  # rounding
    assert alexnet(real, real * torch.nan).isnan().all()  # the training log reports it
    for wrong in (real * 127.5 + 127.5, real * 1.01, real.double()):
        for arguments in ((wrong, real), (real, wrong)):
            with pytest.raises(ValueError, match=r"up to ±.*; LPIPS needs float32 in \[−1, 1\]"):
                alexnet(*arguments)
    assert torch.equal(alexnet.distance(real, real / 2), alexnet(real, real / 2))
    assert alexnet.distance(real, 3 * real).isfinite().all()
    for a, b, sentence in (
            (pictures(2), pictures(1), r"are \(2, 3, 32, 32\) and \(1, 3, 32, 32\); LPIPS with alexnet"),
            (pictures(size=30), pictures(size=30), "at least 31×31 pixels"),
            (pictures(channels=2), pictures(channels=2), r"\(B, 1 or 3, H, W\)"),
            (real[0], real[0], "needs two equal shapes"), (real.byte(), real, "images are torch.uint8")):
        with pytest.raises(ValueError, match=sentence):
            alexnet(a, b)
    with pytest.raises(ValueError, match="at least 16×16 pixels"):
        PerceptualLoss(files["vgg16"])(pictures(size=15), pictures(size=15))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    good, path = random_weights("alexnet"), tmp_path / "weights.pth"
    cases = [({name: good[name] for name in good if name != "lin3.model.1.weight"}, r'Missing.*"heads\.3"'),
             (good | {"lin5.model.1.weight": torch.zeros(1)}, r'Unexpected.*"heads\.5"'),
             (good | {"lins.0.model.1.weight": torch.zeros(1)}, r'Unexpected.*"lins\.0\.model\.1\.weight"'),
             (good | {3: torch.zeros(1)}, 'Unexpected.*"3"'),
             (good | {"features.0.bias": torch.zeros(1)}, r"features\.0\.bias.*\[1\].*\[64\]"),
             ({"state_dict": good}, "weights.pth is not a plain dict of tensors"),
             ([1, 2], "weights.pth is not a plain dict of tensors")]
    for weights, sentence in cases:
        torch.save(weights, path)
        with pytest.raises(ValueError, match=sentence) as error:
            PerceptualLoss(path, "alexnet")
        assert "\n" not in str(error.value) and "--perceptual none" in str(error.value)
    with pytest.raises(ValueError, match="backbone is 'vgg'; choose one of vgg16, alexnet"):
        PerceptualLoss(path, "vgg")


def test_a_missing_damaged_or_malicious_file_ends_in_a_sentence(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    with pytest.raises(FileNotFoundError, match="none.pth does not exist; name a file of LPIPS weights"):
        PerceptualLoss(tmp_path / "none.pth")
    torch.save({"features.0.weight": Malicious()}, tmp_path / "bad.pth")
    for content in ((tmp_path / "bad.pth").read_bytes(), b"", b"not weights"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pth is damaged, or holds more than"):
            PerceptualLoss(tmp_path / "bad.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("backbone", NETWORKS)
def test_without_a_file_the_two_public_ones_are_downloaded_once_and_checked(backbone, tmp_path, monkeypatch):
    """Two files stand in for the public ones, with their checksums in place of the real ones."""
    weights = random_weights(backbone) | {"classifier.1.weight": torch.zeros(3)}  # torchvision's have it, too
    served, downloads, fetched = {}, [], []
    for (url, sha256, name), heads in zip(losses.DOWNLOADS[backbone], (False, True), strict=True):
        torch.save({key: weights[key] for key in weights if key.startswith("lin") == heads}, tmp_path / name)
        assert len(sha256) == 64 and (heads or url.endswith(f"/{name}") and f"-{sha256[:8]}.pth" in name)
        served[url] = (tmp_path / name).read_bytes()
        downloads.append((url, hashlib.sha256(served[url]).hexdigest(), name))

    def download(url, path, hash_prefix, progress):
        fetched.append(url)
        if url not in served:
            raise RuntimeError("no route")
        assert hash_prefix == hashlib.sha256(served[url]).hexdigest()
        Path(path).write_bytes(served[url])

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(losses.DOWNLOADS, backbone, downloads)
    loss = PerceptualLoss("", backbone)
    assert torch.equal(loss.state_dict()["features.0.weight"], weights["features.0.weight"])
    cached = tmp_path / "hub" / "checkpoints" / downloads[1][2]
    for damage in (b"", b"damage"):  # the damaged one is fetched again
        cached.write_bytes(cached.read_bytes() + damage)
        PerceptualLoss("", backbone)
    assert fetched == [*served, url]
    cached.unlink()
    served.clear()
    with pytest.raises(FileNotFoundError, match=f"^{name} is not in .* from {url} .no route.: put it there"):
        PerceptualLoss("", backbone)


# The discriminator


def slow_discriminator(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """pix2pix's, 3 layers, with batch statistics, from its state dict."""
    x = F.conv2d(x, weights["main.0.weight"], weights["main.0.bias"], 2, 1)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        x = F.conv2d(torch.where(x > 0, x, 0.2 * x), weights[f"main.{index}.weight"], None, stride, 1)
        x = x - x.mean((0, 2, 3), keepdim=True)
        weight, bias = (weights[f"main.{index + 1}.{part}"][:, None, None] for part in ("weight", "bias"))
        x = x / (x.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt() * weight + bias
    return F.conv2d(torch.where(x > 0, x, 0.2 * x), weights["main.11.weight"], weights["main.11.bias"], 1, 1)


def test_for_a_benchmark_lpips_has_random_weights_and_needs_no_file(monkeypatch):
    monkeypatch.setattr(losses, "download", None)
    for backbone, size in losses.SMALLEST.items():
        distances = PerceptualLoss(None, backbone)(torch.rand(2, 3, size, size), torch.rand(2, 3, size, size))
        assert distances.shape == (2,) and (distances > 0).all() and distances.isfinite().all()


def test_the_discriminator_is_pix2pixs_with_the_sizes_and_names_of_the_authors():
    network, images = PatchDiscriminator(), pictures(3, 40)
    assert torch.allclose(network(images), slow_discriminator(network.state_dict(), images), atol=1e-4)
    assert sum(weight.numel() for weight in network.parameters()) == 2_765_633
    assert network(pictures(1, 256)).shape == (1, 1, 30, 30)
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = [[f"main.{index}.weight", *(f"main.{index + 1}.{name}" for name in norm)] for index in (2, 5, 8)]
    assert list(network.state_dict()) == ["main.0.weight", "main.0.bias", *sum(names, []),
                                          "main.11.weight", "main.11.bias"]
    for module in PatchDiscriminator(base_channels=128).main:  # pix2pix's initialization
        if not isinstance(module, nn.LeakyReLU):
            mean = float(isinstance(module, nn.BatchNorm2d))
            assert module.weight.mean().item() == pytest.approx(mean, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_other_channels_and_depths_of_the_discriminator():
    for layers, channels, smallest in ((1, 1, 6), (2, 4, 12), (3, 3, 24), (4, 3, 48)):
        network = PatchDiscriminator(channels, base_channels=4, layers=layers)
        assert network(pictures(2, smallest, channels)).shape == (2, 1, 1, 1)
        assert network.main[-1].in_channels == 4 * min(2**layers, 8)
        for wrong in (pictures(2, smallest - 1, channels), pictures(2, smallest, channels + 1)):
            with pytest.raises(ValueError, match=f"needs .* at least {smallest}×{smallest}"):
                network(wrong)


def adversary(start: int = 1, ramp: int = 0, world: int = 1) -> Adversary:
    return Adversary(PatchDiscriminator(base_channels=4, layers=1), 0.8, (0.5, 0.9), start, ramp, world)


def test_a_step_of_the_discriminator_is_adam_on_the_hinge_loss_of_two_separate_passes():
    opponent, images, fakes = adversary(), pictures(2, 8), pictures(2, 8).requires_grad_()
    network = copy.deepcopy(opponent.discriminator)
    adam = torch.optim.Adam(network.parameters(), 0.01, betas=(0.5, 0.9))
    for lr in (0.01, 0.3):
        numbers = opponent.train_step(images, fakes, lr)
        real, fake = network(images), network(fakes.detach())
        loss = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
        expected = {"discriminator": loss.item(), "logits_real": real.mean().item(),
                    "logits_fake": fake.mean().item()}
        assert {name: value.item() for name, value in numbers.items()} == pytest.approx(expected, rel=1e-5)
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert fakes.grad is None
    for name, weight in network.state_dict().items():
        assert torch.allclose(opponent.discriminator.state_dict()[name], weight, rtol=1e-5, atol=1e-5), name


def test_the_discriminator_trains_from_its_start_on_while_its_weight_grows_linearly():
    for ramp, weights in ((0, [0, 0, 0.8, 0.8, 0.8, 0.8]), (1, [0, 0, 0.8, 0.8, 0.8, 0.8]),
                          (4, [0, 0, 0.2, 0.4, 0.8, 0.8])):
        opponent = adversary(start=5, ramp=ramp)
        assert [opponent.weight_at(step) for step in (1, 4, 5, 6, 8, 99)] == pytest.approx(weights)
        assert [opponent.trains(step) for step in (1, 4, 5, 6)] == [False, False, True, True]


def test_a_resumed_adversary_is_the_same_and_a_schedule_that_has_begun_is_kept():
    one, images, fakes = adversary(start=5, ramp=3), pictures(2, 8), pictures(2, 8)
    one.train_step(images, fakes, 0.01)
    state = copy.deepcopy(one.state_dict())  # as a file would be
    for step, later, expected in ((4, 50, (50, 9)), (5, 50, (5, 3)), (6, 50, (5, 3)), (4, 2, (5, 9)),
                                  (3, 2, (4, 9)), (5, 2, (5, 3))):  # an earlier start: in the next step
        two = adversary(start=later, ramp=9)
        two.load_state_dict(copy.deepcopy(state), step)
        assert (two.start, two.ramp) == expected, (step, later)
    for _ in range(2):  # the second pass shows the first step
        numbers = [opponent.train_step(images, fakes, 0.01)["logits_fake"] for opponent in (one, two)]
        assert torch.equal(*numbers)


# What the autoencoder minimizes


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_norms():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, generator_loss = (weight**2).sum(), 2 * weight[0]  # gradients (6, 8) and (2, 0)
    ratio = adaptive_weight(nll, generator_loss, weight)
    assert not ratio.requires_grad and weight.grad is None
    for scale, divisor, expected in ((1, 1, 10 / 2.0001), (3, -1, 30 / 2.0001), (0.1, 1e4, 1 / 3e-4),
                                     (1, torch.inf, 1e4)):  # the bound, not 1e5
        found = adaptive_weight(scale * nll, generator_loss / divisor, weight).item()
        assert found == pytest.approx(expected, rel=1e-4)
    (nll + generator_loss).backward()  # the graph is still there


def test_image_loss_and_generator_loss_are_their_formulas_and_backpropagate_through_lpips_and_d_once(alexnet):
    opponent, last, images, passes = adversary(start=2, ramp=4), nn.Conv2d(2, 3, 3, padding=1), pictures(), []
    network, fakes = copy.deepcopy(opponent.discriminator), last(torch.randn(2, 2, 32, 32))
    l1, lpips = (fakes - images).abs().mean(), alexnet.distance(images, fakes).mean()
    ratio = adaptive_weight(l1 + 2 * lpips, -network(fakes).mean(), last.weight)
    expected = l1 + 2 * lpips - 0.4 * ratio * network(fakes).mean()  # 0.4: the second of four steps to 0.8
    gradients = torch.autograd.grad(expected, (last.weight, last.bias), retain_graph=True)

    def counted(x, name):  # notes each backward pass
        x = x.clone()
        x.register_hook(lambda gradient: passes.append(name))
        return x

    perceptual, distance, forward = copy.copy(alexnet), alexnet.distance, opponent.discriminator.forward
    perceptual.distance = lambda a, b: distance(a, counted(b, "lpips"))
    opponent.discriminator.forward = lambda x: forward(counted(x, "discriminator"))
    nll, parts = image_loss(images, fakes, perceptual, 2.0)
    generator_loss, adaptive = opponent.generator_loss(nll, fakes, last.weight, step=3)
    (nll + generator_loss).backward()
    assert passes == ["lpips", "discriminator"]
    assert all(weight.grad is None and weight.requires_grad for weight in opponent.discriminator.parameters())
    assert (nll + generator_loss).item() == pytest.approx(expected.item(), rel=1e-4)
    assert adaptive.item() == pytest.approx(ratio.item(), rel=1e-4)
    for weight, gradient in zip((last.weight, last.bias), gradients):
        assert torch.allclose(weight.grad, gradient, rtol=1e-4, atol=1e-6)
    numbers = {name: part.item() for name, part in parts.items()}
    assert numbers == pytest.approx({"l1": l1.item(), "perceptual": lpips.item()}, rel=1e-5)
    for loss, weight in ((None, 1.0), (alexnet, 0.0)):  # neither measured
        nll, parts = image_loss(images, fakes, loss, weight)
        assert list(parts) == ["l1"] and nll.item() == pytest.approx(l1.item(), rel=1e-6)


def test_two_processes_with_the_same_images_have_the_numbers_of_one(monkeypatch):
    reduced = []  # as if another process had the same gradients
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: reduced.append(tensor.mul_(2)))
    alone, together, fakes = adversary(), adversary(world=2), pictures(2, 8, 3).requires_grad_()
    together.load_state_dict(copy.deepcopy(alone.state_dict()), step=0)
    factors = [opponent.generator_loss(fakes.sum() / 1e6, fakes, fakes, 1)[1].item()
               for opponent in (alone, together)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-5) and len(reduced) == 1
    images = pictures(2, 8)
    for opponent in (alone, together):
        opponent.train_step(images, fakes, 0.01)
    for one, two in zip(alone.optimizer.state.values(), together.optimizer.state.values(), strict=True):
        assert torch.allclose(one["exp_avg"], two["exp_avg"], rtol=1e-5)


def test_a_training_step_reads_no_value_of_a_tensor(files):
    """Tensors on the meta device have none: reading one, for which a GPU would be waited for, raises."""
    perceptual, opponent = PerceptualLoss(files["alexnet"], "alexnet").to("meta"), adversary()
    last = nn.Conv2d(2, 3, 3, padding=1).to("meta")
    opponent.discriminator.to("meta")
    images, fakes = pictures().to("meta"), last(torch.empty(2, 2, 32, 32, device="meta"))
    nll, _ = image_loss(images, fakes, perceptual, 1.0)
    generator_loss, _ = opponent.generator_loss(nll, fakes, last.weight, 1)
    (nll + generator_loss + mask_loss(images, fakes, images.sum())).backward()
    opponent.train_step(images, fakes, 0.01)
    assert last.weight.grad.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        perceptual(images, fakes)  # checks values


# Masks and scores


def test_masks_are_compared_by_cross_entropy_over_the_pixels_that_have_a_label():
    labels = torch.tensor([[[0, 2, 1], [255, 1, 255]], [[2, 2, 0], [0, 255, 1]]])
    one_hot = F.one_hot(labels.clamp(max=3), 4)[..., :3].permute(0, 3, 1, 2).float()
    logits = torch.randn(2, 3, 2, 3, requires_grad=True)
    nats = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    for labelled in (9.0, 4.5, 0.25):
        loss = mask_loss(one_hot, logits, torch.tensor(labelled))
        assert loss.item() == pytest.approx(nats.item() / labelled, rel=1e-6)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss * labelled, nats)]
    assert torch.allclose(*gradients, atol=1e-6)
    assert mask_loss(0 * one_hot, logits, torch.tensor(0.0)).item() == 0  # no label anywhere
    right = (logits.argmax(1) == labels).sum().item()
    assert score_masks(one_hot, logits).tolist() == pytest.approx([nats.item(), right, 9], rel=1e-6)
    assert 0 < right < (logits.argmax(1) == one_hot.argmax(1)).sum()  # which would count pixels without label


def test_scores_of_images_are_sums_over_images_of_what_can_be_shown(alexnet):
    images, others = pictures(3), 1.5 * pictures(3)
    l1, lpips, count = score_images(images, others, alexnet).tolist()
    assert count == 3 and l1 == pytest.approx(3 * F.l1_loss(others, images).item(), rel=1e-5)
    assert lpips == pytest.approx(alexnet(images, others.clamp(-1, 1)).sum().item(), rel=1e-5)
    assert score_images(images, others, None).tolist() == pytest.approx([l1, 0, 3])


# The original programs


@pytest.mark.parametrize("backbone", NETWORKS)
def test_lpips_agrees_with_the_original_program(backbone):
    expected = np.load(parity_file("lpips_seed0.npz"))[backbone]
    loss = PerceptualLoss(parity_file(f"lpips_{backbone}.pth"), backbone)
    assert np.abs(loss(picture(2, 64, 0), picture(2, 64, 1)).numpy() - expected).max() < 1e-5


def test_the_discriminator_agrees_with_the_original_program():
    """Its weights were drawn for all keys of the authors' model in turn, of which we need the last."""
    text = parity_file("taming_vqgan_f16_1024_keys.txt").read_text()
    rows = [line.split("\t") for line in text.splitlines() if line.endswith("param")]
    weights = authors_weights({row[0]: ast.literal_eval(row[1]) for row in rows}, seed=0)
    network, prefix = PatchDiscriminator(), "loss.discriminator."
    found = {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
    network.load_state_dict(network.state_dict() | found)
    expected = np.load(parity_file("vqgan_f16_seed0.npz"))["logits"]
    assert np.abs(network(picture(2, 64, 0)).detach().numpy() - expected).max() < 1e-4
