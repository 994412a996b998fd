"""Claims about losses.py.

Oracles: LPIPS and the discriminator written out layer by layer with F.conv2d, straight from the tensors of a
weight file; derivatives by hand; literal logits; identities (a picture is at distance 0 from itself; scaling
the likelihood scales λ). And the values that the original programs give, where PARITY_DATA names a folder
with lpips_seed0.npz, vqgan_f16_seed0.npz, taming_vqgan_f16_1024_keys.txt and the two files of LPIPS weights.
"""
import copy
import math
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data
import losses
import vq
from losses import (Adversary, PatchDiscriminator, PerceptualLoss, adaptive_weight, autoencoder_loss,
                    cross_entropy, hinge_loss, score_sums)

# The convolutions of torchvision's networks: index in `features`, channels in and out, size, stride, padding.
VGG16 = [(0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1), "tap", "pool",
         (5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1), "tap", "pool",
         (10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1), "tap", "pool",
         (17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1), "tap", "pool",
         (24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1), "tap"]
ALEXNET = [(0, 3, 64, 11, 4, 2), "tap", "pool", (3, 64, 192, 5, 1, 2), "tap", "pool",
           (6, 192, 384, 3, 1, 1), "tap", (8, 384, 256, 3, 1, 1), "tap", (10, 256, 256, 3, 1, 1), "tap"]
NETWORKS = {"vgg16": VGG16, "alexnet": ALEXNET}
CACHE_NAMES = {"vgg16": ["vgg16-397923af.pth", "lpips-v0.1-vgg.pth"],
               "alexnet": ["alexnet-owt-7be5be79.pth", "lpips-v0.1-alex.pth"]}


def random_weights(backbone: str) -> dict[str, Tensor]:
    """Weights in the format of the files that users have, drawn at random; heads are never negative."""
    generator = torch.Generator().manual_seed(3)
    weights, channels, taps = {}, 0, 0
    for layer in NETWORKS[backbone]:
        if layer == "tap":
            weights[f"lin{taps}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
            taps += 1
        elif layer != "pool":
            index, inputs, channels, size, _, _ = layer
            scale = math.sqrt(2 / (inputs * size * size))
            shape = (channels, inputs, size, size)
            weights[f"features.{index}.weight"] = scale * torch.randn(shape, generator=generator)
            weights[f"features.{index}.bias"] = 0.1 * torch.randn(channels, generator=generator)
    return weights


def slow_lpips(weights: dict[str, Tensor], backbone: str, a: Tensor, b: Tensor) -> float:
    """LPIPS of two pictures (3, H, W) in float64, from its paper's formula."""
    pool = {"vgg16": (2, 2), "alexnet": (3, 2)}[backbone]
    mean, deviation = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    total, taps = 0.0, 0
    x = torch.stack([((picture.double() + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]
                     for picture in (a, b)])
    for layer in NETWORKS[backbone]:
        if layer == "pool":
            x = F.max_pool2d(x, *pool)
        elif layer == "tap":
            head = weights[f"lin{taps}.model.1.weight"].double().flatten()
            taps += 1
            unit = x / x.square().sum(1, keepdim=True).sqrt()
            squares = (unit[0] - unit[1]) ** 2  # (channels, h, w)
            total += float(torch.einsum("chw,c->hw", squares, head).mean())
        else:
            index, *_, stride, padding = layer
            weight, bias = (weights[f"features.{index}.{part}"].double() for part in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
    return total


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A weight file for each backbone; VGG16's in float16, as it is often stored."""
    folder = tmp_path_factory.mktemp("weights")
    for backbone in NETWORKS:
        weights = random_weights(backbone)
        if backbone == "vgg16":
            weights = {name: weight.half() for name, weight in weights.items()}
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


# The perceptual distance


@pytest.mark.parametrize("backbone, height, width", [("vgg16", 33, 16), ("alexnet", 40, 31)])
def test_lpips_is_its_formula(files, backbone, height, width):
    weights = torch.load(files[backbone], weights_only=True)
    a, b = torch.rand(2, 2, 3, height, width) * 2 - 1
    distances = PerceptualLoss(files[backbone], backbone)(a, b)
    slow = [slow_lpips(weights, backbone, a[i], b[i]) for i in range(2)]
    assert distances.shape == (2,) and distances.dtype == torch.float32
    assert distances.tolist() == pytest.approx(slow, rel=1e-4) and min(slow) > 0.01


def test_vgg16_is_the_default_and_the_first_stage_offers_both_networks(files):
    assert PerceptualLoss(files["vgg16"]).backbone == "vgg16"
    assert (vq.PerceptualLoss, vq.PatchDiscriminator) == (PerceptualLoss, PatchDiscriminator)


def test_lpips_has_the_parameters_of_the_release(files, alexnet):
    count = [sum(weight.numel() for weight in loss.parameters())
             for loss in (PerceptualLoss(str(files["vgg16"])), alexnet)]
    assert count == [14_716_160, 2_470_848]


def test_a_picture_is_at_distance_0_from_itself_and_distances_are_symmetric(alexnet):
    a, b = pictures(), pictures()
    assert alexnet(a, a).tolist() == [0, 0]
    assert torch.equal(alexnet(a, b), alexnet(b, a)) and alexnet(a, b).min() > 0


def test_grey_pictures_count_as_three_equal_channels(alexnet):
    a, b = pictures(channels=1), pictures(channels=1)
    assert torch.equal(alexnet(a, b), alexnet(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_lpips_stays_frozen_and_in_eval_mode_inside_a_network_that_trains(alexnet):
    outer = nn.ModuleDict({"loss": alexnet}).train()
    assert outer.training and not any(module.training for module in alexnet.modules())
    assert alexnet.train() is alexnet
    assert not any(weight.requires_grad for weight in outer.parameters())
    assert not any(isinstance(module, nn.Dropout) for module in alexnet.modules())


def test_the_gradient_of_lpips_is_its_slope_and_reaches_both_pictures(files):
    loss = PerceptualLoss(files["alexnet"], "alexnet").double()
    a, b = pictures(1, 31).double().requires_grad_(), pictures(1, 31).double().requires_grad_()
    loss(a, b).sum().backward()
    step = 1e-5 * torch.randn_like(a)
    with torch.no_grad():
        slopes = [(loss(a + step, b) - loss(a - step, b)).item(),
                  (loss(a, b + step) - loss(a, b - step)).item()]
    assert [2 * (picture.grad * step).sum().item() for picture in (a, b)] == pytest.approx(slopes, rel=1e-3)


def test_a_patch_without_features_gives_no_infinite_gradient(files, tmp_path):
    """Where every ReLU is 0 the unit length is 0/0, whose derivative must not be."""
    weights = {name: torch.full_like(weight, -1.0) if name.endswith("bias") else torch.zeros_like(weight)
               for name, weight in random_weights("alexnet").items()}
    torch.save(weights, tmp_path / "dead.pth")
    images = pictures().requires_grad_()
    PerceptualLoss(tmp_path / "dead.pth", "alexnet")(images, pictures()).sum().backward()
    assert images.grad.isfinite().all()


def test_a_decoders_overshoot_passes_beside_a_real_picture(alexnet):
    real, overshoot = pictures(), 3 * pictures()
    assert alexnet(real, overshoot, unclamped=True).isfinite().all()
    assert alexnet(real * 1.0005, real * 1.0005).isfinite().all()  # rounding
    for unclamped in (False, True):
        alexnet(real, overshoot * torch.nan, unclamped)  # the run's log has a better sentence for it


@pytest.mark.parametrize("scale, shift", [(127.5, 127.5), (1.01, 0.0), (2.0, 0.5)])
def test_pictures_of_another_range_are_refused(alexnet, scale, shift):
    real = pictures()
    wrong = real * scale + shift
    for arguments in ((wrong, wrong), (wrong, real), (real, wrong), (wrong, real, True)):
        with pytest.raises(ValueError, match=r"pictures reach ±.* and ±.*; LPIPS needs them in \[−1, 1\]"):
            alexnet(*arguments)
    if scale > 100:
        with pytest.raises(ValueError, match=r"reconstructions reach ±.* so the decoder diverges: .*--resume"):
            alexnet(real, wrong, unclamped=True)


def test_pictures_that_do_not_fit_are_refused(files, alexnet):
    cases = [(pictures(2), pictures(1), r"are \(2, 3, 32, 32\) and \(1, 3, 32, 32\); LPIPS with alexnet"),
             (pictures(size=30), pictures(size=30), "at least 31×31 pixels"),
             (pictures(channels=2), pictures(channels=2), r"\(B, 1 or 3, H, W\)"),
             (pictures()[0], pictures()[0], "needs two equal shapes"),
             (pictures().byte(), pictures(), "are torch.uint8 and torch.float32, not float32")]
    for a, b, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            alexnet(a, b)
    with pytest.raises(ValueError, match="at least 16×16 pixels"):
        PerceptualLoss(files["vgg16"])(pictures(size=15), pictures(size=15))


# Its weights


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: weight for key, weight in weights.items() if key != name}


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    good = random_weights("alexnet")
    path = tmp_path / "weights.pth"
    cases = [(without(good, "lin3.model.1.weight"), "there is no lin3.model.1.weight"),
             (without(good, "features.8.bias"), "there is no features.8.bias"),
             (good | {"lin5.model.1.weight": torch.zeros(1)}, "lin5.model.1.weight is not expected"),
             (good | {"extra": torch.zeros(1)}, "extra is not expected"),
             (good | {"lins.0.model.1.weight": torch.zeros(1)}, "lins.0.model.1.weight is not expected"),
             (good | {"heads.0": torch.zeros(1, 64, 1, 1)}, "heads.0 is not expected"),
             (good | {"features.0.bias": torch.zeros(1)}, r"features.0.bias is \(1,\) instead of \(64,\)"),
             ({"state_dict": good}, "weights.pth is not a plain dict of tensors"),
             ([1, 2], "weights.pth is not a plain dict of tensors")]
    for weights, sentence in cases:
        torch.save(weights, path)
        with pytest.raises(ValueError, match=sentence) as error:
            PerceptualLoss(path, "alexnet")
        assert "\n" not in str(error.value) and "--perceptual none" in str(error.value)
    torch.save(good | {"classifier.1.weight": torch.zeros(3)}, path)  # torchvision's files have these too
    PerceptualLoss(path, "alexnet")
    with pytest.raises(ValueError, match="cannot be the LPIPS weights of vgg16"):
        PerceptualLoss(path)
    with pytest.raises(ValueError, match="backbone is 'vgg'; choose one of vgg16, alexnet"):
        PerceptualLoss(path, "vgg")


def test_weights_saved_on_a_gpu_load_anywhere(tmp_path, monkeypatch):
    """The heads of the LPIPS release were."""
    with monkeypatch.context() as context:
        context.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(random_weights("alexnet"), tmp_path / "cuda.pth")
    assert b"cuda:0" in (tmp_path / "cuda.pth").read_bytes()
    weights = PerceptualLoss(tmp_path / "cuda.pth", "alexnet").parameters()
    assert {str(weight.device) for weight in weights} == {"cpu"}


def test_a_missing_damaged_or_malicious_file_ends_in_a_sentence(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    with pytest.raises(FileNotFoundError, match="none.pth does not exist; name a file of LPIPS weights"):
        PerceptualLoss(tmp_path / "none.pth")
    for content in (b"", b"not weights"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pth is damaged, or holds more than"):
            PerceptualLoss(tmp_path / "bad.pth")
    torch.save({"features.0.weight": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth is damaged, or holds more than"):
        PerceptualLoss(tmp_path / "bad.pth")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("backbone", NETWORKS)
def test_without_a_file_the_two_public_ones_are_fetched_once_and_checked(
        backbone, files, tmp_path, monkeypatch, capsys):
    """Two files stand in for the public ones, with their checksums in place of the real ones."""
    weights = random_weights(backbone)
    parts = [{name: weights[name] for name in weights if name.startswith("features")}
             | {"classifier.0.weight": torch.zeros(2)},
             {name: weights[name] for name in weights if name.startswith("lin")}]
    served, places, fetched = {}, [], []
    for (name, url, sha256), part in zip(losses.PLACES[backbone], parts):
        torch.save(part, tmp_path / name)
        served[url] = (tmp_path / name).read_bytes()
        assert len(sha256) == 64 and url.startswith("https://")
        places.append((name, url, losses.hashlib.sha256(served[url]).hexdigest()))
    assert [name for name, _, _ in places] == CACHE_NAMES[backbone]

    def download(url, path, hash_prefix, progress):
        assert hash_prefix == dict((url, sha256) for _, url, sha256 in places)[url]
        fetched.append(url)
        Path(path).write_bytes(served[url])

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(losses.PLACES, backbone, tuple(places))
    loss = PerceptualLoss("", backbone)
    assert "fetching https://download.pytorch.org/models/" in capsys.readouterr().out
    PerceptualLoss("", backbone)
    assert len(fetched) == 2
    assert torch.equal(loss.state_dict()["features.0.weight"], weights["features.0.weight"])
    cached = tmp_path / "hub" / "checkpoints" / CACHE_NAMES[backbone][1]
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(ValueError, match="has the sha256 sum .* instead of .*: remove it to fetch it again"):
        PerceptualLoss("", backbone)


def test_the_checksums_are_those_that_torchvision_has_in_its_file_names():
    for (name, url, sha256), _ in losses.PLACES.values():
        assert url.endswith(f"/{name}") and name.endswith(f"-{sha256[:8]}.pth")


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value")])
def test_without_a_network_one_sentence_says_what_to_do(error, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise error

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(FileNotFoundError) as caught:
        PerceptualLoss("")
    sentence = str(caught.value)
    for part in (f"vgg16-397923af.pth is not in {tmp_path / 'checkpoints'}", "--perceptual-weights",
                 "https://download.pytorch.org/models/vgg16-397923af.pth", "--perceptual none"):
        assert part in sentence
    assert "\n" not in sentence


# The discriminator


def slow_discriminator(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """pix2pix's, 3 layers, with batch statistics, from its state dict."""
    leaky = F.leaky_relu(F.conv2d(x, weights["main.0.weight"], weights["main.0.bias"], 2, 1), 0.2)
    for index, stride in ((2, 2), (5, 2), (8, 1)):
        x = F.conv2d(leaky, weights[f"main.{index}.weight"], None, stride, 1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        weight, bias = (weights[f"main.{index + 1}.{part}"][:, None, None] for part in ("weight", "bias"))
        x = x * weight + bias
        leaky = torch.where(x > 0, x, 0.2 * x)
    return F.conv2d(leaky, weights["main.11.weight"], weights["main.11.bias"], 1, 1)


def test_the_discriminator_is_pix2pixs():
    network = PatchDiscriminator()
    images = pictures(3, 40)
    assert torch.allclose(network(images), slow_discriminator(network.state_dict(), images), atol=1e-4)


def test_the_discriminator_has_the_size_and_names_of_the_authors():
    network = PatchDiscriminator()
    assert sum(weight.numel() for weight in network.parameters()) == 2_765_633
    assert network(pictures(2, 64)).shape == (2, 1, 6, 6)
    assert PatchDiscriminator()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["main.0.weight", "main.0.bias", "main.2.weight", *(f"main.3.{name}" for name in statistics),
             "main.5.weight", *(f"main.6.{name}" for name in statistics), "main.8.weight",
             *(f"main.9.{name}" for name in statistics), "main.11.weight", "main.11.bias"]
    assert list(network.state_dict()) == names


def test_the_discriminator_starts_as_in_pix2pix():
    network = PatchDiscriminator(base_channels=128)
    for module in network.main:
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 1e-3
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01) and not module.bias.any()


@pytest.mark.parametrize("layers, channels, smallest", [(1, 1, 6), (2, 4, 12), (3, 3, 24), (4, 3, 48)])
def test_other_pictures_and_depths_of_the_discriminator(layers, channels, smallest):
    network = PatchDiscriminator(channels, base_channels=4, layers=layers)
    assert network(pictures(2, smallest, channels)).shape == (2, 1, 1, 1)
    widest = max(module.out_channels for module in network.main if isinstance(module, nn.Conv2d))
    assert widest == 4 * min(2**layers, 8)
    for wrong in (pictures(2, smallest - 1, channels), pictures(2, smallest, channels + 1)):
        with pytest.raises(ValueError, match=f"this discriminator needs .* at least {smallest}×{smallest}"):
            network(wrong)


# The losses


def test_the_hinge_loss_of_literal_logits():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3))
    assert hinge_loss(torch.zeros(5), torch.zeros(2)).item() == 1
    assert hinge_loss(torch.ones(2), -torch.ones(2)).item() == 0


def adversary(steps: tuple[int, int, int] = (1, 1, 1)) -> Adversary:
    return Adversary(PatchDiscriminator(base_channels=4, layers=1), 0.8, (0.5, 0.9), steps)


def train(opponent: Adversary, images: Tensor, fakes: Tensor) -> dict[str, Tensor]:
    """One step of its discriminator on a whole batch."""
    numbers = opponent.backward(images, fakes, share=1.0)
    opponent.step(lr=0.01)
    return numbers


def test_the_generators_loss_is_minus_the_mean_logit_and_leaves_no_gradient_in_the_discriminator():
    opponent = adversary()
    images = pictures(2, 8).requires_grad_()
    loss = opponent.generator_loss(images)
    assert loss.item() == pytest.approx(-opponent.discriminator(images).mean().item(), rel=1e-6)
    loss.backward()
    assert images.grad.abs().max() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in opponent.discriminator.parameters())


def test_a_step_of_the_discriminator_is_adam_on_the_hinge_loss_of_two_separate_passes():
    opponent, images, fakes = adversary(), pictures(2, 8), pictures(2, 8).requires_grad_()
    network = PatchDiscriminator(base_channels=4, layers=1)
    network.load_state_dict(opponent.discriminator.state_dict())
    adam = torch.optim.Adam(network.parameters(), 0.01, betas=(0.5, 0.9))
    for _ in range(2):
        numbers = train(opponent, images, fakes)
        real, fake = network(images), network(fakes.detach())
        loss = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        expected = {"discriminator": loss.item(), "logits_real": real.mean().item(),
                    "logits_fake": fake.mean().item()}
        assert {name: value.item() for name, value in numbers.items()} == pytest.approx(expected, rel=1e-5)
    for weight, other in zip(opponent.discriminator.parameters(), network.parameters()):
        assert torch.allclose(weight, other, atol=1e-6)
    assert fakes.grad is None


def test_the_discriminator_learns_to_tell_noise_from_a_ramp():
    opponent, ramp = adversary(), torch.linspace(-1, 1, 8).expand(4, 3, 8, 8)
    numbers = [train(opponent, ramp, pictures(4, 8)) for _ in range(40)]
    assert numbers[0]["discriminator"] > 0.8 and numbers[-1]["discriminator"] < 0.3
    assert numbers[-1]["logits_real"] > 0.3 > -0.3 > numbers[-1]["logits_fake"]


def test_the_discriminators_weight_grows_evenly_from_the_step_in_which_it_is_heard():
    sudden, gradual = adversary(steps=(1, 5, 5)), adversary(steps=(1, 5, 8))
    assert [sudden.weight_at(step) for step in (1, 4, 5, 6, 99)] == [0, 0, 0.8, 0.8, 0.8]
    weights = [gradual.weight_at(step) for step in (1, 4, 5, 6, 7, 8, 9, 99)]
    assert weights == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_an_adversary_goes_on_where_it_was_and_what_has_begun_does_not_stop():
    one, two = adversary(steps=(4, 6, 8)), adversary(steps=(40, 60, 80))
    images, fakes = pictures(2, 8), pictures(2, 8)
    train(one, images, fakes)
    state = copy.deepcopy(one.state_dict())  # as a file would be
    two.load_state_dict(state, step=3)
    assert (two.trains_from, two.heard_from, two.full_from) == (40, 60, 80)  # its own schedule: none has begun
    two.load_state_dict(state, step=5)
    assert (two.trains_from, two.heard_from, two.full_from) == (4, 60, 80)
    two.load_state_dict(state, step=6)
    assert (two.trains_from, two.heard_from, two.full_from) == (4, 6, 8)
    numbers = [train(opponent, images, fakes)["discriminator"] for opponent in (one, two)]
    assert torch.equal(*numbers)
    for weight, other in zip(one.discriminator.parameters(), two.discriminator.parameters()):
        assert torch.equal(weight, other)


def test_the_autoencoders_loss_is_the_sum_of_its_parts(alexnet):
    opponent, last = adversary(), nn.Conv2d(2, 3, 3, padding=1)
    images, quantization_loss = pictures(), last.weight.sum() - last.weight.sum().detach() + 0.25
    fakes = last(torch.randn(2, 2, 32, 32))
    l1, lpips = (fakes - images).abs().mean().item(), alexnet(images, fakes, True).mean().item()
    logits = opponent.discriminator(fakes).mean().item()

    def loss(*rest):
        total, parts = autoencoder_loss(images, fakes, quantization_loss, *rest, 0.7, last.weight)
        return total.item(), {name: part.item() for name, part in parts.items()}

    assert loss(None, 1.0, None) == (pytest.approx(l1 + 0.25), pytest.approx({"l1": l1, "vq": 0.25}))
    total, parts = loss(alexnet, 2.0, None)
    assert parts == pytest.approx({"l1": l1, "vq": 0.25, "perceptual": lpips}, rel=1e-5)
    assert total == pytest.approx(l1 + 2 * lpips + 0.25, rel=1e-5)
    total, parts = loss(alexnet, 2.0, opponent)
    nll = (fakes - images).abs().mean() + 2 * alexnet(images, fakes, True).mean()  # no codebook's loss in λ
    expected = adaptive_weight(nll, -opponent.discriminator(fakes).mean(), last.weight).item()
    assert parts["lambda"] == pytest.approx(expected, rel=1e-4)
    assert total == pytest.approx(l1 + 2 * lpips + 0.25 - 0.7 * expected * logits, rel=1e-4)


def test_the_autoencoders_loss_has_its_parts_slope_and_walks_back_through_each_once(alexnet, monkeypatch):
    walks = []

    class Counted(torch.autograd.Function):  # the identity, which notes each backward pass
        @staticmethod
        def forward(context, x, name):
            context.name = name
            return x.clone()

        @staticmethod
        def backward(context, slope):
            walks.append(context.name)
            return slope, None

    opponent, last, images = adversary(), nn.Conv2d(2, 3, 3, padding=1), pictures()
    fakes, quantization_loss = last(torch.randn(2, 2, 32, 32)), last.bias.square().sum()
    nll = (fakes - images).abs().mean() + 2 * alexnet(images, fakes, True).mean()
    generator = -opponent.discriminator(fakes).mean()
    expected = nll + quantization_loss + 0.7 * adaptive_weight(nll, generator, last.weight) * generator
    expected = torch.autograd.grad(expected, (last.weight, last.bias), retain_graph=True)
    opponent.discriminator.zero_grad(set_to_none=True)

    forward, generator_loss = alexnet.forward, opponent.generator_loss
    monkeypatch.setattr(alexnet, "forward", lambda a, b, unclamped: forward(a, Counted.apply(b, "lpips"), unclamped))
    monkeypatch.setattr(opponent, "generator_loss", lambda x: generator_loss(Counted.apply(x, "opponent")))
    total, _ = autoencoder_loss(images, fakes, quantization_loss, alexnet, 2.0, opponent, 0.7, last.weight)
    total.backward()
    assert walks == ["lpips", "opponent"]
    assert all(weight.grad is None for weight in opponent.discriminator.parameters())
    _, parts = autoencoder_loss(images, fakes, quantization_loss, None, 0.0, opponent, 0.0, last.weight)
    assert walks == ["lpips", "opponent"] and "lambda" not in parts  # not even computed while unheard
    for weight, slope in zip((last.weight, last.bias), expected):
        assert torch.allclose(weight.grad, slope, rtol=1e-4, atol=1e-6)


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_lengths():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, generator = (weight**2).sum(), 2 * weight[0]  # gradients (6, 8) and (2, 0)
    found = adaptive_weight(nll, generator, weight)
    assert found.item() == pytest.approx(10 / (2 + 1e-4), rel=1e-6)
    assert not found.requires_grad and weight.grad is None
    assert adaptive_weight(3 * nll, generator, weight).item() == pytest.approx(3 * found.item(), rel=1e-6)
    small = adaptive_weight(nll / 10, generator / 1e4, weight).item()
    assert small == pytest.approx(1 / (2e-4 + 1e-4), rel=1e-4)
    assert adaptive_weight(nll, -generator, weight).item() == pytest.approx(found.item(), rel=1e-6)
    assert adaptive_weight(nll, 0 * generator, weight).item() == 1e4  # the bound, not 1e5
    (nll + generator).backward()  # the graph is still there


def test_two_processes_with_the_same_pictures_have_the_numbers_of_one(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # as if
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    nll, generator = (weight**2).sum() / 100, 1e-4 * weight[0]  # so small that the 1e-4 counts
    one, two = (adaptive_weight(nll, generator, weight, world).item() for world in (1, 2))
    assert one == pytest.approx(two, rel=1e-6)
    alone, together = adversary(), adversary()
    together.load_state_dict(copy.deepcopy(alone.state_dict()), step=0)
    together.world = 2
    images, fakes = pictures(2, 8), pictures(2, 8)
    for opponent in (alone, together):
        train(opponent, images, fakes)
    for one, two in zip(alone.discriminator.parameters(), together.discriminator.parameters()):
        means = [adam.state[weight]["exp_avg"] for adam, weight in
                 ((alone.optimizer, one), (together.optimizer, two))]
        assert torch.allclose(*means, rtol=1e-5)


def test_gradients_of_parts_add_up_to_one_step_and_do_not_outlive_it():
    whole, parts, images, fakes = adversary(), adversary(), pictures(4, 8), pictures(4, 8)
    parts.load_state_dict(copy.deepcopy(whole.state_dict()), step=0)
    for network in (whole.discriminator, parts.discriminator):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # its statistics are those of a part
    for _ in range(2):
        train(whole, images, fakes)
        for a, b in zip(images.chunk(2), fakes.chunk(2)):
            parts.backward(a, b, share=0.5)
        parts.step(lr=0.01)
        assert all(weight.grad is None for weight in parts.discriminator.parameters())
    for one, two in zip(whole.discriminator.parameters(), parts.discriminator.parameters()):
        assert torch.allclose(one, two, atol=1e-6)


# Masks


def test_cross_entropy_is_torchs_over_the_pixels_that_have_a_label():
    labels = torch.tensor([[[0, 2, 1], [255, 1, 255]], [[2, 2, 0], [0, 255, 1]]])
    logits = torch.randn(2, 3, 2, 3, requires_grad=True)
    expected = F.cross_entropy(logits, labels, ignore_index=255, reduction="sum")
    found = cross_entropy(data.as_input(labels, "segmentation", 3), logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    one, two = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert torch.allclose(one, two, atol=1e-6)
    assert cross_entropy(torch.zeros(1, 3, 2, 2), torch.randn(1, 3, 2, 2)).item() == 0  # no label anywhere


def test_scores_of_masks_count_only_pixels_with_a_label():
    labels = torch.tensor([[[0, 1, 255], [2, 255, 1]]])
    logits = torch.tensor([[[9., 9, 9], [0, 0, 0]], [[0, 0, 0], [0, 9, 9]], [[0, 0, 0], [9, 0, 0]]])[None]
    one_hot = data.as_input(labels, "segmentation", 3)  # right: 0 yes, 1 no, 2 yes, 1 yes
    nats, right, count = score_sums(one_hot, logits, None, one_hot=True).tolist()
    assert (right, count) == (3, 4)
    assert nats == pytest.approx(4 * F.cross_entropy(logits, labels, ignore_index=255).item(), rel=1e-6)


def test_scores_of_pictures_are_sums_over_pictures_of_what_can_be_shown(alexnet):
    images, others = pictures(3), 1.5 * pictures(3)
    l1, lpips, count = score_sums(images, others, alexnet, one_hot=False).tolist()
    assert count == 3
    assert l1 == pytest.approx(3 * F.l1_loss(others, images).item(), rel=1e-5)
    assert lpips == pytest.approx(alexnet(images, others.clamp(-1, 1)).sum().item(), rel=1e-5)
    assert score_sums(images, others, None, one_hot=False).tolist() == pytest.approx([l1, 0, 3])


def test_the_autoencoders_loss_of_masks_is_their_cross_entropy():
    one_hot = data.as_input(torch.tensor([[[0, 1], [1, 255]]]), "segmentation", 2)
    logits, last = torch.randn(1, 2, 2, 2), nn.Conv2d(2, 2, 1)
    for labelled, divisor in ((3.0, 3), (1.5, 1.5), (0.0, 1)):
        total, parts = autoencoder_loss(one_hot, logits, torch.tensor(0.25), None, 1.0, None, 0.0, last.weight,
                                        torch.tensor(labelled))
        assert set(parts) == {"cross_entropy", "vq"}
        assert total.item() == pytest.approx(cross_entropy(one_hot, logits).item() / divisor + 0.25)


def test_the_adaptive_weight_makes_both_gradients_equally_long_at_the_last_layer():
    last = nn.Conv2d(2, 3, 3, padding=1)
    images = last(torch.randn(2, 2, 32, 32))
    nll, generator = images.abs().mean(), -PatchDiscriminator()(images).mean()
    weighted = adaptive_weight(nll, generator, last.weight) * generator
    lengths = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm().item()
               for loss in (nll, weighted)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.02)


# The original programs


@pytest.fixture
def parity() -> Path:
    if "PARITY_DATA" not in os.environ:
        pytest.skip("PARITY_DATA names no folder with the original programs' values and weights")
    return Path(os.environ["PARITY_DATA"])


def find(folder: Path, name: str) -> Path:
    return next(folder.rglob(name))


def smooth_pictures(batch: int, size: int, seed: int) -> Tensor:
    """The pictures on which the original programs were run: sums of eight waves, (batch, 3, size, size)."""
    random = np.random.default_rng(1000 + seed)
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    images = np.zeros((batch, 3, size, size))
    for channel in images.reshape(-1, size, size):
        for _ in range(8):
            fy, fx, phase = random.uniform(-20, 20), random.uniform(-20, 20), random.uniform(0, 6.28)
            channel += np.sin(fy * y + fx * x + phase) / 3
    return torch.from_numpy(np.clip(images, -1, 1).astype(np.float32))


@pytest.mark.parametrize("backbone", NETWORKS)
def test_lpips_agrees_with_the_original_program(backbone, parity):
    expected = np.load(find(parity, "lpips_seed0.npz"))[backbone]
    loss = PerceptualLoss(find(parity, f"lpips_{backbone}.pth"), backbone)
    found = loss(smooth_pictures(2, 64, 0), smooth_pictures(2, 64, 1))
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_the_discriminator_agrees_with_the_original_program(parity):
    """Its weights were drawn for all keys of the authors' model in turn, of which we need the last."""
    keys = find(parity, "taming_vqgan_f16_1024_keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in keys if not line.startswith("#")]
    shapes = {row[0]: tuple(int(n) for n in row[1].strip("()").split(",") if n.strip())
              for row in rows if row[-1] == "param"}
    random, weights = np.random.default_rng(0), {}
    for key, shape in sorted(shapes.items()):
        value = random.standard_normal(shape, dtype=np.float32)
        if key.startswith("loss.discriminator."):
            value = (value * np.float32(0.1) + np.float32(key.endswith("weight")) if len(shape) == 1
                     else value / np.float32(np.sqrt(np.prod(shape[1:]))))
            weights[key.removeprefix("loss.discriminator.")] = value
    network = PatchDiscriminator()
    network.load_state_dict(network.state_dict() | {key: torch.from_numpy(w) for key, w in weights.items()})
    expected = np.load(find(parity, "vqgan_f16_seed0.npz"))["logits"]
    assert np.abs(network(smooth_pictures(2, 64, 0)).detach().numpy() - expected).max() < 1e-4
