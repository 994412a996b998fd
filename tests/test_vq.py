"""Claims about vq.py. (The lookup of the nearest code itself is tested in test_kernels.py.)

Oracles: slow loops (nearest code, attention, pooling, Lloyd's algorithm), derivatives written out by hand,
the parameter counts of the authors' released model, and identities (encode gives the codes of forward).
"""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vq as vq_file
from codebook import (as_vectors, codebook_use, entropy, initialize_codebook, kmeans, kmeans_plusplus,
                      restart_dead_codes)
from helpers import ALONE
from vq import (VQ, AttentionBlock, Downsample, Palette, Quantizer, ResidualBlock, Upsample, VQConfig,
                memory_format, norm_groups)

THIN = VQConfig(3, 8, "1,2", 1, codebook_size=12, code_width=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) * 2 - 1


def thin_vq() -> VQ:
    """A network with its codebook initialized from its latents, so that images use more than one code."""
    vq = VQ(THIN)
    initialize_codebook(vq, [images(8)], ALONE)
    return vq


def with_random_parameters(block: torch.nn.Module) -> torch.nn.Module:
    """In float64, and with no parameter that is zero or one and so would hide a missing term."""
    for parameter in block.double().requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


def quantizer(latents: Tensor, codebook: Tensor, commitment_weight: float = 0.25):
    """A quantizer with this codebook, latents that require a gradient, and its output for them."""
    K, D = codebook.shape
    module = Quantizer(VQConfig(codebook_size=K, code_width=D, commitment_weight=commitment_weight))
    module.codebook.data.copy_(codebook)
    latents = latents.clone().requires_grad_()
    return module, latents, module(latents)


def slow_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """argmin |x − c|² in float64, vector by vector and code by code; the first of equals wins."""
    codes, nearest = codebook.detach().double().tolist(), []
    for x in vectors.detach().double().tolist():
        distances = [sum((a - b) ** 2 for a, b in zip(x, code)) for code in codes]
        nearest.append(distances.index(min(distances)))
    return torch.tensor(nearest)


# the network

def test_defaults_are_the_paper_with_the_parameters_of_the_released_model():
    config = VQConfig()
    assert (config.codebook_size, config.code_width, config.commitment_weight) == (1024, 256, 0.25)
    assert config.widths == [128, 128, 256, 256, 512] and config.downsampling == 16
    with torch.device("meta"):
        vq = VQ(config)
        latents = vq.latents(torch.empty(2, 3, 256, 256))
        assert latents.shape == (2, 256, 16, 16)
        assert vq.decoder(latents).shape == (2, 3, 256, 256)
    for layer in (vq.encoder[-1], vq.decoder[0]):  # the authors' quant_conv and post_quant_conv
        assert (layer.in_channels, layer.out_channels, layer.kernel_size) == (256, 256, (1, 1))
    sizes = [sum(p.numel() for p in part.parameters()) for part in (vq.encoder, vq.decoder, vq.quantizer)]
    assert sizes == [29_298_176 + 65_792, 42_449_795 + 65_792, 262_144]
    assert sum(p.numel() for p in vq.parameters()) == 72_141_699


@pytest.mark.parametrize("channels, multipliers, size, grid", [
    (1, " 1, 4", (8, 8), (4, 4)), (3, "1", (8, 8), (8, 8)), (7, "1,2,2", (32, 16), (8, 4)),
    (3, "1,1,2,2,4", (32, 48), (2, 3))])
def test_each_resolution_after_the_first_halves_the_grid(channels, multipliers, size, grid):
    config = VQConfig(channels, 1, multipliers, 1, codebook_size=1, code_width=1, commitment_weight=0.0)
    vq, pictures = VQ(config), torch.zeros(2, channels, *size)
    reconstructions, codes, loss = vq(pictures)
    assert reconstructions.shape == vq.decode(codes).shape == pictures.shape
    assert codes.shape == vq.encode(pictures).shape == (2, *grid) and codes.dtype == torch.int64
    assert loss.shape == ()
    assert config.downsampling == size[0] // grid[0]


@pytest.mark.parametrize("channels, out_channels", [(8, 8), (8, 16)])
def test_residual_block_adds_two_normalized_convolutions_to_its_input(channels, out_channels):
    block = with_random_parameters(ResidualBlock(channels, out_channels))
    x = torch.randn(2, channels, 5, 4, dtype=torch.float64)
    weights = dict(block.named_parameters())

    def normalize_and_convolve(x: Tensor, layer: int) -> Tensor:
        groups = x.reshape(2, x.shape[1] // 4, -1)  # four channels to a group
        variance = groups.var(2, unbiased=False, keepdim=True)
        groups = (groups - groups.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
        scale, shift = weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        x = groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]
        kernel, bias = weights[f"layers.{layer + 2}.weight"], weights[f"layers.{layer + 2}.bias"]
        return F.conv2d(x * torch.sigmoid(x), kernel, bias, padding=1)

    inner = normalize_and_convolve(normalize_and_convolve(x, 0), 3)
    shortcut = x
    if channels != out_channels:
        kernel, bias = weights["shortcut.weight"][..., 0, 0], weights["shortcut.bias"][:, None, None]
        shortcut = torch.einsum("oc,bchw->bohw", kernel, x) + bias
    torch.testing.assert_close(block(x), shortcut + inner)


def test_attention_block_is_softmax_attention_between_all_cells():
    C, h, w = 8, 3, 4
    block = with_random_parameters(AttentionBlock(C))
    x = torch.randn(2, C, h, w, dtype=torch.float64)
    qkv = block.qkv(block.norm(x))
    expected = x.clone()
    for b in range(2):
        q, k, v = (qkv[b, i * C:(i + 1) * C].reshape(C, h * w).T for i in range(3))  # (h*w, C)
        for cell in range(h * w):
            weights = torch.stack([(q[cell] @ k[other] / math.sqrt(C)).exp() for other in range(h * w)])
            mixed = (weights / weights.sum()) @ v  # (C,)
            expected[b, :, cell // w, cell % w] += block.out.weight[:, :, 0, 0] @ mixed + block.out.bias
    torch.testing.assert_close(block(x), expected)


def test_new_blocks_are_their_shortcut_plus_a_constant_in_each_channel():
    x = torch.randn(2, 8, 5, 4)
    for block in (AttentionBlock(8), ResidualBlock(8, 8), ResidualBlock(8, 16)):
        shortcut = block.shortcut(x) if isinstance(block, ResidualBlock) else x
        assert (block(x) - shortcut).std((0, 2, 3)).max() < 1e-6


def test_gradient_checkpointing_recomputes_the_layers_and_gives_the_same_gradients():
    gradients, runs = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        vq = VQ(THIN, checkpointing)
        vq.encoder[1].layers[2].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
        vq.encode(images())
        vq(images())[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in vq.encoder.parameters()])
    assert runs == [False, True] + [False, True, True]  # encode; forward; and with checkpointing backward
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_group_normalization_has_32_groups_or_a_minimum_of_channels_per_group():
    groups = {512: 32, 256: 32, 128: 32, 64: 16, 32: 8, 8: 2, 4: 1, 3: 1, 1: 1}
    assert {channels: norm_groups(channels) for channels in groups} == groups
    for minimum, expected in ((1, {16: 16, 32: 32}), (8, {16: 2, 32: 4})):
        vq = VQ(VQConfig(3, 16, "1,2", 1, 12, 6, group_channels=minimum))
        norms = [layer for layer in vq.modules() if isinstance(layer, torch.nn.GroupNorm)]
        assert {layer.num_channels: layer.num_groups for layer in norms} == expected


def test_downsample_pads_on_the_right_and_below_and_upsample_repeats_each_cell():
    down, up = Downsample(1), Upsample(1)
    torch.nn.init.ones_(down.conv.weight)  # sums what is under the 3×3 window
    torch.nn.init.dirac_(up.conv.weight)  # the identity
    for layer in (down, up):
        torch.nn.init.zeros_(layer.conv.bias)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    expected = [[0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11],
                [8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15]]
    assert down(x)[0, 0].tolist() == expected
    assert up(torch.tensor([[[[1.0, 2]]]]))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_configs_of_impossible_sizes_are_refused():
    for values, message in (
            *(({name: 0}, f"{name} is 0; it must be at least 1") for name in (
                "image_channels", "base_channels", "residual_blocks", "codebook_size", "code_width",
                "group_channels")),
            *(({"channel_multipliers": text}, f"channel_multipliers is '{text}'") for text in (
                "", "1,,2", "1,0", "1,-2", "1.5")),
            ({"base_channels": 40, "group_channels": 1}, "40 channels do not split into 32 groups"),
            ({"base_channels": 130}, "130 channels do not split into 32 groups"),
            ({"base_channels": 4, "channel_multipliers": "1,33"}, "132 channels do not split into 32 groups"),
            ({"commitment_weight": -0.1}, "commitment_weight is -0.1"),
            ({"commitment_weight": math.nan}, "commitment_weight is nan")):
        with pytest.raises(ValueError, match=message):
            VQConfig(**values)


def test_images_of_a_wrong_shape_are_refused():
    vq, palette = VQ(THIN), Palette(torch.zeros(4, 3))
    for shape in ((3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3), (1, 3, 8, 8, 1), (1, 3, 7, 8), (1, 3, 8, 7)):
        for use in (vq, vq.encode, vq.latents):
            with pytest.raises(ValueError, match=r"images are .*\(B, 3, H, W\) .* divisible by 2"):
                use(torch.zeros(shape))
        if len(shape) != 4 or shape[1] != 3:
            with pytest.raises(ValueError, match=r"images are .*, not \(B, 3, H, W\)"):
                palette.encode(torch.zeros(shape))


# the quantizer

def test_quantized_latents_are_the_nearest_codes_and_pass_the_gradient_straight_through():
    codebook, incoming = torch.randn(7, 3), torch.randn(2, 3, 4, 5)
    module, latents, (quantized, codes, _) = quantizer(torch.randn(2, 3, 4, 5), codebook)
    assert quantized.shape == latents.shape and codes.shape == (2, 4, 5)
    assert len(codes.unique()) > 3
    for b in range(2):
        for i in range(4):
            assert torch.equal(codes[b, i], slow_nearest(latents[b, :, i].T, codebook))
            torch.testing.assert_close(quantized[b, :, i], codebook[codes[b, i]].T)
    quantized.backward(incoming)
    assert torch.equal(latents.grad, incoming)
    assert module.codebook.grad is None or not module.codebook.grad.any()


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25, 1.5])
def test_commitment_weight_reaches_only_the_encoder(commitment_weight):
    codebook = torch.randn(5, 3)
    module, latents, (_, codes, loss) = quantizer(torch.randn(2, 3, 4, 2), codebook, commitment_weight)
    loss.backward()
    z, e = as_vectors(latents.detach()).double(), codebook.double()[codes.flatten()]  # (N, D)
    squares = float(((z - e) ** 2).mean())
    assert loss.item() == pytest.approx((1 + commitment_weight) * squares, rel=1e-5)
    to_encoder = commitment_weight * 2 * (z - e) / z.numel()
    torch.testing.assert_close(as_vectors(latents.grad).double(), to_encoder, rtol=1e-5, atol=1e-7)
    to_codes = torch.zeros(5, 3, dtype=torch.float64)
    for code, x, c in zip(codes.flatten().tolist(), z, e):
        to_codes[code] += 2 * (c - x) / z.numel()
    torch.testing.assert_close(module.codebook.grad.double(), to_codes, rtol=1e-5, atol=1e-7)


def test_quantizing_a_code_gives_itself_and_no_loss_in_float32_under_autocast_too():
    codebook = torch.linspace(-1, 1, 1024)[:, None]  # bfloat16 has eight bits to tell 1,024 codes apart
    codes = torch.randint(1024, (2, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        _, _, (quantized, found, loss) = quantizer(codebook[codes].permute(0, 3, 1, 2), codebook)
    assert torch.equal(found, codes) and torch.equal(quantized[:, 0], codebook[codes, 0])
    assert quantized.dtype == loss.dtype == torch.float32
    assert loss.item() == 0
    latents = torch.randn(1, 1, 3, 3).bfloat16()
    _, _, (quantized, found, _) = quantizer(latents, codebook)
    assert quantized.dtype == torch.float32
    assert torch.equal(found.flatten(), slow_nearest(as_vectors(latents), codebook))


def test_new_codebook_is_small_and_uniform():
    codebook = Quantizer(VQConfig(codebook_size=50, code_width=400)).codebook.detach()
    assert codebook.abs().max() <= 1 / 50
    assert codebook.std().item() == pytest.approx(1 / 50 / math.sqrt(3), rel=0.02)


def test_encode_finds_the_codes_of_forward_the_nearest_in_row_major_order():
    vq = thin_vq()
    codes, latents = vq.encode(images()), vq.latents(images()).detach()
    assert torch.equal(codes, vq(images())[1])
    assert len(codes.unique()) > 3
    for b in range(2):
        for i in range(8):
            assert torch.equal(codes[b, i], slow_nearest(latents[b, :, i].T, vq.quantizer.codebook))


def test_decode_of_encode_is_the_reconstruction_of_forward_and_float32_under_autocast():
    vq = thin_vq()
    codes = vq.encode(images())
    embedded, decoded = vq.embed(codes), vq.decode(codes)
    assert embedded.shape == (2, 6, 8, 8)
    assert torch.equal(embedded[1, :, 2, 5], vq.quantizer.codebook[codes[1, 2, 5]])
    torch.testing.assert_close(decoded, vq(images())[0], rtol=1e-4, atol=1e-5)
    assert not decoded.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert vq.decode(codes).dtype == torch.float32


def test_without_quantization_latents_are_decoded_and_the_codebook_has_a_gradient_of_0():
    vq, pictures = thin_vq(), images()
    reconstructions, codes, loss = vq(pictures, quantize=False)
    assert torch.equal(reconstructions, vq.decoder(vq.latents(pictures))) and loss == 0
    assert torch.equal(codes, vq.encode(pictures))
    (reconstructions.mean() + loss).backward()
    assert vq.encoder[0].weight.grad.any() and not vq.quantizer.codebook.grad.any()


def test_convolutions_are_channels_last_on_a_cpu_unless_they_train_on_long_rows():
    """cifar10's 32 pixels of 64 channels are the longest, of 4 bytes each (results/speed)."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory_format(cpu) == memory_format(cpu, 4 * 32 * 64) == torch.channels_last
    assert memory_format(cpu, 4 * 33 * 64) == memory_format(gpu) == torch.preserve_format


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_block_returns_the_memory_format_of_the_weights(memory_format):
    """One map in the other format makes convolutions convert it and go on in channels last."""
    vq, formats = thin_vq().to(memory_format=memory_format), []
    for layer in [*vq.encoder, *vq.decoder]:
        layer.register_forward_hook(
            lambda layer, x, y: formats.append(y.is_contiguous(memory_format=memory_format)))
    vq.decode(vq(images())[1])
    assert len(formats) == len(vq.encoder) + 2 * len(vq.decoder) and all(formats)


@pytest.mark.parametrize("h, w, size", [(8, 8, 4), (8, 8, 1), (8, 4, 2), (6, 6, 3), (4, 8, 4)])
def test_requantize_pools_the_embedded_codes_and_looks_them_up_again(h, w, size):
    vq = VQ(THIN)
    vq.quantizer.codebook.data = torch.randint(-9, 10, (12, 6)).float()  # so that no sum is rounded
    codes = torch.randint(12, (3, h, w))
    coarse = vq.requantize(codes, size)
    assert coarse.shape == (3, size, size) and coarse.dtype == torch.int64
    sums = torch.zeros(3, size, size, 6)
    for b in range(3):
        for i in range(h):
            for j in range(w):
                sums[b, i * size // h, j * size // w] += vq.quantizer.codebook.data[codes[b, i, j]]
    pooled = as_vectors(sums.permute(0, 3, 1, 2)) * (size * size / (h * w))
    assert torch.equal(coarse.flatten(), slow_nearest(pooled, vq.quantizer.codebook))


def test_requantize_to_the_same_size_gives_equal_codes_and_refuses_sizes_that_do_not_divide():
    vq, codes = VQ(THIN), torch.randint(12, (2, 6, 6))
    vq.quantizer.codebook.data.fill_(1.0)  # equal rows, which a lookup cannot tell apart
    assert torch.equal(vq.requantize(codes, 6), codes)
    for size in (0, -1, 3, 4, 6):
        for h, w in ((6, 2), (2, 6)):
            with pytest.raises(ValueError, match=f"size is {size}; .* {h}×{w} codes"):
                vq.requantize(codes[:, :h, :w], size)


def test_palette_gives_each_pixel_the_nearest_colour():
    palette = Palette(torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1], [1, -1, -1]]))
    pictures = torch.rand(2, 3, 4, 5) * 2 - 1
    codes = palette.encode(pictures)
    assert codes.shape == (2, 4, 5) and codes.dtype == torch.int64
    for b in range(2):
        for i in range(4):
            assert torch.equal(codes[b, i], slow_nearest(pictures[b, :, i].T, palette.colours))
    for use in (palette.decode, palette.embed):
        assert use(codes).shape == (2, 3, 4, 5)
        assert torch.equal(use(codes)[1, :, 2, 3], palette.colours[codes[1, 2, 3]])
    copy = Palette(torch.zeros(4, 3))
    copy.load_state_dict(palette.state_dict())
    assert torch.equal(copy.encode(pictures), codes)
    assert not palette.colours.requires_grad


def test_palette_is_fitted_by_kmeans_to_at_most_250_000_random_pixels(monkeypatch):
    colours = torch.tensor([[0.5, -1, 1], [-0.25, 0, 0.75], [1, 1, 1]])
    fitted = Palette.fit(colours.repeat(100, 1), 3).colours
    assert sorted(fitted.tolist()) == sorted(colours.tolist())
    given = []
    monkeypatch.setattr(vq_file, "kmeans", lambda x, count: given.append((x, count)) or x[:count])
    for pixels in (250_007, 90):
        Palette.fit(torch.arange(pixels)[:, None].float(), 5)
    assert [(vectors.unique().numel(), count) for vectors, count in given] == [(250_000, 5), (90, 5)]
    assert given[0][0].max() >= 250_000  # not the first ones


# k-means: where codes start, and where dead ones start again

def test_kmeans_is_lloyds_algorithm():
    vectors = torch.randn(60, 3)
    torch.manual_seed(5)
    centres = kmeans_plusplus(vectors, 4, vectors[:0])
    for _ in range(6):
        nearest = slow_nearest(vectors, centres)
        centres = torch.stack([vectors[nearest == k].double().mean(0) for k in range(4)]).float()
    torch.manual_seed(5)
    torch.testing.assert_close(kmeans(vectors, 4, iterations=6), centres, rtol=1e-4, atol=1e-5)


def test_an_empty_cluster_keeps_its_centre():
    vectors = torch.tensor([[3.0, 5.0], [-1.0, 2.0]]).repeat(3, 1)
    centres = kmeans(vectors, 8, iterations=3)  # of eight centres, six are never the first of the nearest
    assert centres.shape == (8, 2)
    assert {tuple(centre) for centre in centres.tolist()} == {(3.0, 5.0), (-1.0, 2.0)}


def encoder_of(vectors: Tensor) -> tuple[VQ, Tensor]:
    """An autoencoder, and images whose latents are these vectors (N, 6)."""
    vq = VQ(THIN)
    vq.latents = lambda images: images
    return vq, vectors.T[None, :, :, None]  # (1, D, N, 1)


def test_initialize_runs_ten_iterations_of_kmeans_on_all_vectors():
    vectors = torch.randn(900, 6)
    vq, images = encoder_of(vectors)
    parameter, trained = vq.quantizer.codebook, vq.quantizer.codebook.requires_grad  # the optimizer holds it
    torch.manual_seed(2)
    initialize_codebook(vq, images.split(500, 2), ALONE)
    torch.manual_seed(2)
    assert torch.equal(parameter, kmeans(vectors, 12, iterations=10))
    assert vq.quantizer.codebook is parameter and parameter.requires_grad == trained


@pytest.mark.parametrize("vectors, count, given, expected", [
    ([1, 0, 5, 8], 1, [0, 10], {(1,): 1 / 30, (0,): 0, (5,): 25 / 30, (8,): 4 / 30}),
    ([0, 1, 3], 2, [], {(0, 1): 1 / 30, (0, 3): 9 / 30, (1, 0): 1 / 15, (1, 3): 4 / 15, (3, 0): 3 / 13,
                        (3, 1): 4 / 39})])
def test_kmeans_plusplus_draws_by_the_squared_distance_to_the_nearest_centre(vectors, count, given, expected):
    vectors, given = torch.tensor(vectors).float()[:, None], torch.tensor(given).float()[:, None]
    draws = [tuple(kmeans_plusplus(vectors, count, given)[:, 0].tolist()) for _ in range(3000)]
    assert set(draws) <= set(expected)
    for outcome, share in expected.items():
        assert draws.count(outcome) / 3000 == pytest.approx(share, abs=0.03), outcome


def test_kmeans_plusplus_draws_no_vector_twice_while_others_remain():
    vectors = torch.arange(6.0)[:, None] * torch.tensor([[1.0, -2.0]])
    for _ in range(20):
        assert sorted(kmeans_plusplus(vectors, 6, vectors[:0])[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
        assert sorted(kmeans_plusplus(vectors, 4, vectors[[0, 3]])[:, 0].tolist()) == [1, 2, 4, 5]
    assert sorted(set(kmeans_plusplus(vectors, 9, vectors[:0])[:, 0].tolist())) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("dead", [[2, 3, 9], [], range(12)])
def test_restart_moves_dead_codes_onto_different_vectors_away_from_live_codes(dead):
    before, elsewhere = 9 * torch.randn(12, 6), torch.randn(20, 6)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[list(dead)] = True
    vq, images = encoder_of(torch.cat([before[~mask].repeat(50, 1), elsewhere]))
    parameter, trained = vq.quantizer.codebook, vq.quantizer.codebook.requires_grad
    parameter.data.copy_(before)
    moments = {name: torch.ones(12, 6) for name in ("exp_avg", "exp_avg_sq")}
    restart_dead_codes(vq, SimpleNamespace(state={parameter: moments}), 1.0 - mask.float(), images, ALONE)
    after = parameter.detach()
    assert torch.equal(after[~mask], before[~mask])
    moved = {tuple(code) for code in after[mask].tolist()}
    assert len(moved) == len(dead) and moved <= {tuple(vector) for vector in elsewhere.tolist()}
    assert vq.quantizer.codebook is parameter and parameter.requires_grad == trained


def test_codebook_use_counts_the_codes_used_and_their_perplexity():
    nats = -sum(share * math.log(share) for share in (5 / 16, 1 / 16, 2 / 16, 8 / 16))
    for counts, expected, perplexity in (
            ([5, 0, 1, 2, 0, 8], 4, math.exp(nats)), ([3] * 64, 64, 64), ([0, 9, 0], 1, 1)):
        for counts in (torch.tensor(counts), torch.tensor(counts).float()):
            assert codebook_use(counts) == (expected, pytest.approx(perplexity, rel=1e-12))
            assert entropy(counts) == pytest.approx(math.log(perplexity), abs=1e-12)
