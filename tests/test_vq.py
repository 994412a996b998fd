"""Claims about vq.py and kernels/nearest_code.py.

Oracles: slow loops in float64 (nearest code, Lloyd's algorithm, attention), derivatives written out by hand,
the parameter counts of the authors' released model, and identities (encode gives the codes of forward;
quantizing a code gives itself).
"""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vq as vq_file
from kernels import nearest_code
from vq import (VQ, AttentionBlock, Downsample, Palette, Quantizer, ResidualBlock, Upsample, VQConfig,
                as_vectors, codebook_use, entropy, kmeans, kmeans_plusplus, norm_groups)

THIN = VQConfig(3, 8, "1,2", 1, codebook_size=12, code_width=6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def thin_vq(config: VQConfig = THIN) -> VQ:
    """A network whose codes lie where its latents lie, so that pictures use more than one."""
    vq = VQ(config)
    vq.quantizer.initialize(as_vectors(vq.latents(images(8)).detach()))
    return vq


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count)) * 2 - 1


def quantizer(latents: Tensor, codebook: Tensor, commitment_weight: float = 0.25):
    """A quantizer with this codebook, latents that ask for a gradient, and what it makes of them."""
    K, D = codebook.shape
    module = Quantizer(VQConfig(codebook_size=K, code_width=D, commitment_weight=commitment_weight))
    module.codebook.data.copy_(codebook)
    latents = latents.clone().requires_grad_()
    return module, latents, module(latents)


def slow_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """argmin |x − c|² in float64, one vector and one code at a time; the first of equals wins."""
    nearest = []
    for x in vectors.detach().double():
        best, least = 0, math.inf
        for k, c in enumerate(codebook.detach().double()):
            distance = float(((x - c) ** 2).sum())
            if distance < least:
                best, least = k, distance
        nearest.append(best)
    return torch.tensor(nearest)


# the network

def test_paper_configuration_has_the_parameters_of_the_released_model():
    with torch.device("meta"):
        vq = VQ(VQConfig())
    last, first = vq.encoder[-1], vq.decoder[0]
    assert last.kernel_size == first.kernel_size == (1, 1)
    assert parameters(last) == parameters(first) == 65_792
    assert parameters(vq.encoder) - 65_792 == 29_298_176
    assert parameters(vq.decoder) - 65_792 == 42_449_795
    assert parameters(vq.quantizer) == 262_144
    assert parameters(vq) == 72_141_699


def test_defaults_are_the_paper():
    config = VQConfig()
    assert (config.codebook_size, config.code_width, config.commitment_weight) == (1024, 256, 0.25)
    assert config.widths == [128, 128, 256, 256, 512]
    assert config.downsampling == 16


def test_paper_configuration_takes_256x256_pictures_to_16x16_codes_of_width_256():
    with torch.device("meta"):
        vq = VQ(VQConfig())
        latents = vq.latents(torch.empty(2, 3, 256, 256))
        assert latents.shape == (2, 256, 16, 16)
        assert vq.decoder(torch.empty_like(latents)).shape == (2, 3, 256, 256)


@pytest.mark.parametrize("multipliers, size, grid", [
    ("1", (8, 8), (8, 8)), ("1,1", (32, 32), (16, 16)), ("1,2,2", (32, 32), (8, 8)), ("1,2", (16, 8), (8, 4)),
    ("1,1,2,2,4", (256, 256), (16, 16)), ("1,1,2,2,4", (32, 48), (2, 3))])
def test_each_comma_halves_the_picture(multipliers, size, grid):
    config = VQConfig(3, 4, multipliers, 1, codebook_size=10, code_width=5)
    vq = VQ(config)
    pictures = torch.zeros(1, 3, *size)
    with torch.no_grad():
        reconstructions, codes, loss = vq(pictures)
    assert reconstructions.shape == pictures.shape
    assert codes.shape == (1, *grid) and codes.dtype == torch.int64
    assert loss.shape == ()
    assert vq.embed(codes).shape == (1, 5, *grid)
    assert vq.encode(pictures).shape == (1, *grid)
    assert vq.decode(codes).shape == pictures.shape
    assert config.downsampling == size[0] // grid[0]


def test_channels_of_pictures_may_differ_from_three():
    vq = VQ(VQConfig(7, 8, "1,1", 1, 10, 5))
    assert vq.decode(vq.encode(torch.zeros(1, 7, 8, 8))).shape == (1, 7, 8, 8)


def test_attention_is_at_the_coarsest_grid_only():
    vq = VQ(VQConfig(3, 8, "1,2,3", 2, 10, 5))
    sides = []
    for module in vq.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    vq(torch.zeros(1, 3, 16, 16))
    assert sides == [4] * (2 + 1) + [4] * (1 + 3)


def test_network_gives_the_same_twice():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        vq = thin_vq()
        reconstructions, codes, loss = vq(images())
        loss.backward()
        outputs.append((reconstructions, codes, loss, vq.encoder[0].weight.grad))
    for first, second in zip(*outputs):
        assert torch.equal(first, second)


def with_random_parameters(block: torch.nn.Module) -> torch.nn.Module:
    """So that no part of a new block that starts at zero or one is left out."""
    for parameter in block.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block


@pytest.mark.parametrize("channels, out_channels", [(8, 8), (8, 16)])
def test_residual_block_adds_two_normalized_convolutions_to_its_input(channels, out_channels):
    block = with_random_parameters(ResidualBlock(channels, out_channels).double())
    x = torch.randn(2, channels, 5, 4, dtype=torch.float64)
    weights = dict(block.named_parameters())

    def normalized(x: Tensor, layer: int) -> Tensor:
        B, C = x.shape[:2]
        groups = x.reshape(B, C // 4, -1)  # four channels to a group
        variance = groups.var(2, unbiased=False, keepdim=True)
        groups = (groups - groups.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
        scale, shift = weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        x = groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]
        return x * torch.sigmoid(x)

    inner = F.conv2d(normalized(x, 0), weights["layers.2.weight"], weights["layers.2.bias"], padding=1)
    inner = F.conv2d(normalized(inner, 3), weights["layers.5.weight"], weights["layers.5.bias"], padding=1)
    shortcut = x
    if channels != out_channels:
        shortcut = torch.einsum("oc,bchw->bohw", weights["shortcut.weight"][..., 0, 0], x)
        shortcut = shortcut + weights["shortcut.bias"][:, None, None]
    torch.testing.assert_close(block(x), shortcut + inner)


def test_new_blocks_start_as_their_shortcut_but_for_a_constant_in_each_channel():
    x = torch.randn(2, 8, 5, 4)
    for block in (AttentionBlock(8), ResidualBlock(8, 8)):
        assert (block(x) - x).std((0, 2, 3)).max() < 1e-6
    block = ResidualBlock(8, 16)
    assert (block(x) - block.shortcut(x)).std((0, 2, 3)).max() < 1e-6


def test_groups_for_normalization_are_32_or_hold_four_channels():
    groups = {512: 32, 256: 32, 128: 32, 64: 16, 32: 8, 8: 2, 4: 1, 3: 1, 1: 1}
    assert {channels: norm_groups(channels) for channels in groups} == groups


def test_attention_block_is_softmax_attention_between_all_cells():
    C, h, w = 8, 3, 4
    block = with_random_parameters(AttentionBlock(C).double())
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


def test_downsample_pads_on_the_right_and_below_only():
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    rows = (0 + 1 + 2, 4 + 5 + 6, 8 + 9 + 10)  # what is under the 3×3 window
    columns = (2 + 6 + 10, 3 + 7 + 11)
    expected = [[sum(rows), sum(columns)], [8 + 9 + 10 + 12 + 13 + 14, 10 + 11 + 14 + 15]]
    assert layer(x)[0, 0].tolist() == expected


def test_upsample_repeats_each_cell_four_times_before_a_convolution():
    layer = Upsample(1)
    torch.nn.init.zeros_(layer.conv.weight)
    layer.conv.weight.data[0, 0, 1, 1] = 1.0  # the identity
    torch.nn.init.zeros_(layer.conv.bias)
    expected = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
    assert torch.equal(layer(torch.tensor([[[[1.0, 2], [3, 4]]]]))[0, 0], expected)


@pytest.mark.parametrize("values, message", [
    ({"image_channels": 0}, "image_channels is 0; it must be at least 1"),
    ({"base_channels": 0}, "base_channels is 0"),
    ({"residual_blocks": 0}, "residual_blocks is 0"),
    ({"codebook_size": 0}, "codebook_size is 0"),
    ({"code_width": -1}, "code_width is -1"),
    ({"channel_multipliers": ""}, "channel_multipliers is ''; it must be whole numbers"),
    ({"channel_multipliers": "1,,2"}, "channel_multipliers is '1,,2'"),
    ({"channel_multipliers": "1,0"}, "channel_multipliers is '1,0'"),
    ({"channel_multipliers": "1,-2"}, "channel_multipliers is '1,-2'"),
    ({"channel_multipliers": "1.5"}, "channel_multipliers is '1.5'"),
    ({"base_channels": 130}, "130 channels do not split into 32 groups"),
    ({"base_channels": 4, "channel_multipliers": "1,33"}, "132 channels do not split into 32 groups"),
    ({"commitment_weight": -0.1}, "commitment_weight is -0.1; it must not be negative")])
def test_config_of_impossible_sizes_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**values)


def test_smallest_sizes_are_accepted():
    config = VQConfig(1, 1, " 1, 4", 1, 1, 1, commitment_weight=0.0)
    assert config.widths == [1, 4]
    assert VQ(config).encode(torch.zeros(1, 1, 4, 2)).tolist() == [[[0], [0]]]


@pytest.mark.parametrize("shape", [
    (3, 16, 16), (1, 1, 16, 16), (1, 16, 16, 3), (1, 3, 15, 16), (1, 3, 16, 17), (1, 3, 16, 16, 1)])
def test_pictures_of_a_wrong_shape_are_refused(shape):
    vq = VQ(THIN)
    for use in (vq, vq.encode, vq.latents):
        with pytest.raises(ValueError) as error:
            use(torch.zeros(shape))
        for part in (str(shape), "(B, 3, H, W)", "divisible by 2"):
            assert part in str(error.value)


# the quantizer

def test_quantized_latents_are_the_nearest_codes():
    codebook, latents = torch.randn(7, 3), torch.randn(2, 3, 4, 5)
    _, _, (quantized, codes, loss) = quantizer(latents, codebook)
    assert quantized.shape == latents.shape and codes.shape == (2, 4, 5)
    assert len(codes.unique()) > 3
    for b in range(2):
        for i in range(4):
            for j in range(5):
                assert codes[b, i, j] == slow_nearest(latents[b, :, i, j][None], codebook)
                torch.testing.assert_close(quantized[b, :, i, j], codebook[codes[b, i, j]])


def test_gradient_passes_straight_through_the_quantizer():
    codebook, incoming = torch.randn(7, 3), torch.randn(2, 3, 4, 5)
    module, latents, (quantized, _, _) = quantizer(torch.randn(2, 3, 4, 5), codebook)
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


def test_reconstruction_alone_trains_encoder_and_decoder_but_no_code():
    vq = thin_vq()
    reconstructions, _, _ = vq(images())
    reconstructions.square().mean().backward()
    assert vq.encoder[0].weight.grad.abs().sum() > 0
    assert vq.decoder[0].weight.grad.abs().sum() > 0
    assert vq.quantizer.codebook.grad is None or not vq.quantizer.codebook.grad.any()


def test_quantizing_a_code_gives_itself_and_no_loss():
    codebook = torch.randn(9, 4)
    latents = codebook[torch.tensor([[3, 0, 8], [1, 1, 5]])].permute(2, 0, 1)[None]  # (1, 4, 2, 3)
    _, _, (quantized, codes, loss) = quantizer(latents, codebook)
    assert codes.tolist() == [[[3, 0, 8], [1, 1, 5]]]
    assert torch.equal(quantized, latents)
    assert loss.item() == 0


def test_codes_of_embedded_codes_are_the_codes():
    vq = thin_vq()
    codes = torch.randint(12, (2, 4, 3))
    assert torch.equal(nearest_code(as_vectors(vq.embed(codes)), vq.quantizer.codebook).view(2, 4, 3), codes)


def test_quantizer_computes_in_float32_under_autocast():
    codebook = torch.linspace(-1, 1, 1024)[:, None]  # bfloat16 has eight bits to tell 1,024 codes apart
    codes = torch.randint(1024, (2, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        _, _, (quantized, found, loss) = quantizer(codebook[codes].permute(0, 3, 1, 2), codebook)
    assert torch.equal(found, codes)
    assert torch.equal(quantized[:, 0], codebook[codes, 0])
    assert quantized.dtype == loss.dtype == torch.float32
    assert loss.item() == 0


def test_quantizer_takes_bfloat16_latents_to_float32_codes():
    codebook = torch.randn(9, 4)
    latents = torch.randn(1, 4, 3, 3).bfloat16()
    _, _, (quantized, codes, _) = quantizer(latents, codebook)
    assert quantized.dtype == torch.float32
    assert torch.equal(codes.flatten(), slow_nearest(as_vectors(latents), codebook))


def test_new_codebook_is_small_and_uniform():
    codebook = Quantizer(VQConfig(codebook_size=50, code_width=400)).codebook.detach()
    assert codebook.abs().max() <= 1 / 50
    assert codebook.abs().mean() == pytest.approx(0.5 / 50, rel=0.02)
    assert codebook.mean().abs() < 0.03 / 50


# encode, decode, embed

def test_encode_finds_the_codes_of_forward():
    vq = thin_vq()
    _, codes, _ = vq(images())
    assert len(codes.unique()) > 3
    assert torch.equal(vq.encode(images()), codes)


def test_codes_are_the_nearest_of_all_in_row_major_order():
    vq = thin_vq()
    codes, latents = vq.encode(images()), vq.latents(images()).detach()
    for b in range(2):
        for i in range(8):
            assert torch.equal(codes[b, i], slow_nearest(latents[b, :, i].T, vq.quantizer.codebook))


def test_decode_is_the_decoder_after_embed():
    vq = thin_vq()
    codes = torch.randint(12, (2, 8, 8))
    embedded = vq.embed(codes)
    assert embedded.shape == (2, 6, 8, 8)
    assert torch.equal(embedded[1, :, 2, 5], vq.quantizer.codebook[codes[1, 2, 5]])
    assert torch.equal(vq.decode(codes), vq.decoder(embedded))


def test_decode_of_encode_is_the_reconstruction_of_forward():
    vq = thin_vq()
    reconstructions, _, _ = vq(images())
    torch.testing.assert_close(vq.decode(vq.encode(images())), reconstructions, rtol=1e-4, atol=1e-5)


def test_encode_and_decode_leave_no_graph_and_decode_is_float32_under_autocast():
    vq = thin_vq()
    codes = vq.encode(images())
    assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 12
    assert not vq.decode(codes).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert vq.decode(codes).dtype == torch.float32


def test_vectors_are_the_cells_in_row_major_order():
    latents = torch.randn(2, 3, 4, 5)
    vectors = as_vectors(latents)
    assert vectors.shape == (40, 3)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                assert torch.equal(vectors[(b * 4 + i) * 5 + j], latents[b, :, i, j])


# nearest code

def test_nearest_code_agrees_with_a_slow_loop():
    for N, K, D in ((1, 1, 1), (20, 1, 3), (40, 17, 5), (0, 3, 2)):
        vectors, codebook = torch.randn(N, D), torch.randn(K, D)
        found = nearest_code(vectors, codebook)
        assert found.dtype == torch.int64
        assert found.tolist() == slow_nearest(vectors, codebook).tolist()


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[4.0], [1.0], [-1.0], [1.0], [-4.0]])
    assert nearest_code(torch.tensor([[0.0], [1.0], [-1.0], [9.0]]), codebook).tolist() == [1, 1, 2, 0]


def test_ties_between_different_codes_go_to_the_lowest_index_too():
    for _ in range(20):
        codebook = torch.randint(-3, 4, (11, 2)).float()
        vectors = torch.cartesian_prod(torch.arange(-3.0, 4), torch.arange(-3.0, 4)) / 2  # many lie halfway
        assert torch.equal(nearest_code(vectors, codebook), slow_nearest(vectors, codebook))


def test_common_offset_does_not_blur_the_codes():
    codebook = torch.randn(32, 8, dtype=torch.float64) * 0.01
    vectors = codebook[torch.arange(32)] + torch.randn(32, 8, dtype=torch.float64) * 1e-3
    codebook, vectors = (codebook + 100).float(), (vectors + 100).float()
    assert torch.equal(nearest_code(vectors, codebook), slow_nearest(vectors, codebook))


def test_nearest_code_works_in_pieces(monkeypatch):
    vectors, codebook = torch.randn(23, 4), torch.randn(9, 4)
    whole = nearest_code(vectors, codebook)
    monkeypatch.setattr(importlib.import_module("kernels.nearest_code"), "ROWS", 5)
    assert torch.equal(nearest_code(vectors, codebook), whole)


def test_nearest_code_computes_in_double_precision_if_both_are():
    codebook = 1 + torch.arange(8, dtype=torch.float64)[:, None] * 1e-12
    assert nearest_code(codebook, codebook).tolist() == list(range(8))


def test_nearest_code_asks_for_no_gradient():
    vectors = torch.randn(3, 2, requires_grad=True)
    assert not nearest_code(vectors, vectors).requires_grad


@pytest.mark.parametrize("vectors, codebook", [
    ((3, 2), (4, 3)), ((3,), (4, 3)), ((2, 3, 3), (4, 3)), ((3, 2), (0, 2)), ((3, 2), (2,))])
def test_nearest_code_refuses_other_shapes(vectors, codebook):
    with pytest.raises(ValueError, match="needs vectors") as error:
        nearest_code(torch.zeros(vectors), torch.zeros(codebook))
    assert str(vectors) in str(error.value) and str(codebook) in str(error.value)


# where codes start

def test_kmeans_is_lloyds_algorithm():
    vectors = torch.randn(60, 3)
    torch.manual_seed(5)
    centres = kmeans_plusplus(vectors, 4, vectors[:0]).double().tolist()
    for _ in range(6):
        members = [[] for _ in centres]
        for x in vectors.double().tolist():
            distances = [sum((a - b) ** 2 for a, b in zip(x, centre)) for centre in centres]
            members[distances.index(min(distances))].append(x)
        assert all(members)
        centres = [[sum(column) / len(group) for column in zip(*group)] for group in members]
    torch.manual_seed(5)
    torch.testing.assert_close(kmeans(vectors, 4, iterations=6), torch.tensor(centres), rtol=1e-4, atol=1e-5)


def test_kmeans_finds_well_separated_clusters():
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = (middles[:, None] + 0.1 * torch.randn(4, 25, 2)).flatten(0, 1)
    for _ in range(5):  # whatever the start: its four vectors are apart, hence in four clusters
        centres = kmeans(vectors, 4, iterations=2)
        for i, middle in enumerate(middles):
            centre = centres[torch.cdist(middle[None], centres).argmin()]
            torch.testing.assert_close(centre, vectors[25 * i:25 * (i + 1)].mean(0))


def test_empty_cluster_keeps_its_centre(monkeypatch):
    vectors = torch.tensor([[1.0], [2.0], [3.0], [4.0], [7.0]])
    start = torch.tensor([[1.0], [1.0], [4.0], [8.0]])
    monkeypatch.setattr(vq_file, "kmeans_plusplus", lambda vectors, count, centres: start)
    # the second equals the first and gets no vector; the last keeps a single one
    assert kmeans(vectors, 4, iterations=1).tolist() == [[1.5], [1.0], [3.5], [7.0]]


def test_centres_of_equal_vectors_are_finite_and_on_them():
    centres = kmeans(torch.full((5, 2), 3.0), 8, iterations=3)
    assert torch.equal(centres, torch.full((8, 2), 3.0))


def test_initialize_runs_ten_iterations_of_kmeans_on_all_vectors():
    vectors, module = torch.randn(900, 6), Quantizer(THIN)
    parameter, centres = module.codebook, {}
    for iterations in (9, 10):
        torch.manual_seed(2)
        centres[iterations] = kmeans(vectors, 12, iterations)
    torch.manual_seed(2)
    module.initialize(vectors)
    assert torch.equal(module.codebook, centres[10])
    assert not torch.equal(centres[9], centres[10])  # or nothing would tell how many there were
    assert module.codebook is parameter and parameter.requires_grad  # the optimizer holds it


def shares(draws: list, outcomes: list) -> list[float]:
    assert all(draw in outcomes for draw in draws)
    return [draws.count(outcome) / len(draws) for outcome in outcomes]


def test_vectors_are_drawn_by_their_squared_distance_to_the_nearest_one_taken():
    vectors, taken = torch.tensor([[1.0], [0.0], [5.0], [8.0]]), torch.tensor([[0.0], [10.0]])
    draws = [kmeans_plusplus(vectors, 1, taken).item() for _ in range(3000)]
    # squared distances 1, 0, 25 and 4
    assert shares(draws, [1.0, 0.0, 5.0, 8.0]) == pytest.approx([1 / 30, 0, 25 / 30, 4 / 30], abs=0.03)


def test_first_vector_is_drawn_uniformly_and_the_second_away_from_it():
    vectors = torch.tensor([[0.0], [1.0], [3.0]])
    draws = [tuple(kmeans_plusplus(vectors, 2, vectors[:0])[:, 0].tolist()) for _ in range(3000)]
    pairs = [(0.0, 1.0), (0.0, 3.0), (1.0, 0.0), (1.0, 3.0), (3.0, 0.0), (3.0, 1.0)]
    expected = [1 / 10, 9 / 10, 1 / 5, 4 / 5, 9 / 13, 4 / 13]
    assert shares(draws, pairs) == pytest.approx([share / 3 for share in expected], abs=0.03)


def test_no_vector_is_drawn_twice_while_others_wait():
    vectors = torch.arange(6.0)[:, None] * torch.tensor([[1.0, -2.0]])
    for _ in range(20):
        drawn = kmeans_plusplus(vectors, 6, vectors[:0])
        assert sorted(drawn[:, 0].tolist()) == [0, 1, 2, 3, 4, 5]
        drawn = kmeans_plusplus(vectors, 4, vectors[[0, 3]])
        assert sorted(drawn[:, 0].tolist()) == [1, 2, 4, 5]


def test_more_vectors_can_be_drawn_than_there_are_or_none():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    drawn = kmeans_plusplus(vectors, 7, vectors[:0]).tolist()
    assert len(drawn) == 7 and {tuple(vector) for vector in drawn} == {(1.0, 2.0), (3.0, 4.0)}
    assert kmeans_plusplus(vectors, 0, vectors).shape == (0, 2)


def test_restart_moves_dead_codes_onto_vectors_and_no_others():
    module, vectors = Quantizer(THIN), torch.randn(40, 6)
    parameter, before = module.codebook, module.codebook.detach().clone()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[2, 3, 9]] = True
    module.restart(dead, vectors)
    after = module.codebook.detach()
    assert torch.equal(after[~dead], before[~dead])
    chosen = [[row for row in range(40) if torch.equal(code, vectors[row])] for code in after[dead]]
    assert all(len(rows) == 1 for rows in chosen)
    assert len({rows[0] for rows in chosen}) == 3
    assert module.codebook is parameter and parameter.requires_grad


def test_restart_avoids_what_living_codes_already_stand_for():
    module, vectors = Quantizer(THIN), torch.randn(40, 6)
    dead = torch.arange(12) >= 6
    module.codebook.data[~dead] = vectors[:6]
    vectors = torch.cat([vectors[:6].repeat(50, 1), vectors[6:12]])  # 300 near living codes, 6 elsewhere
    module.restart(dead, vectors)
    found = {tuple(code) for code in module.codebook[dead].tolist()}
    assert found == {tuple(vector) for vector in vectors[300:].tolist()}


def test_restart_of_all_codes_needs_no_living_one():
    module, vectors = Quantizer(THIN), torch.randn(12, 6)
    module.restart(torch.ones(12, dtype=torch.bool), vectors)
    assert sorted(module.codebook.tolist()) == sorted(vectors.tolist())


def test_restart_without_dead_codes_changes_nothing():
    module = Quantizer(THIN)
    before = module.codebook.detach().clone()
    module.restart(torch.zeros(12, dtype=torch.bool), torch.randn(4, 6))
    assert torch.equal(module.codebook, before)


# codebook use

@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_perplexity_is_K_for_uniform_use_and_1_for_a_single_code(dtype):
    used, perplexity = codebook_use(torch.full((64,), 3, dtype=dtype))
    assert used == 64 and perplexity == pytest.approx(64)
    used, perplexity = codebook_use(torch.tensor([0, 0, 9, 0], dtype=dtype))
    assert used == 1 and perplexity == pytest.approx(1)


def test_codebook_use_agrees_with_the_formula():
    counts = [5, 0, 1, 2, 0, 8]
    shares = [count / 16 for count in counts if count]
    nats = -sum(share * math.log(share) for share in shares)
    used, perplexity = codebook_use(torch.tensor(counts))
    assert type(used) is int and used == 4
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-12)
    assert entropy(torch.tensor(counts)) == pytest.approx(nats, rel=1e-12)


# coarser scales, and pixels as codes

@pytest.mark.parametrize("h, w, size", [(8, 8, 4), (8, 8, 1), (8, 4, 2), (6, 6, 3), (4, 8, 4)])
def test_requantize_pools_the_embedded_codes_and_looks_them_up_again(h, w, size):
    vq = VQ(THIN)
    vq.quantizer.codebook.data = torch.randint(-9, 10, (12, 6)).float()
    codes = torch.randint(12, (3, h, w))
    scale = vq.requantize(codes, size)
    assert scale.shape == (3, size, size) and scale.dtype == torch.int64
    pooled = torch.zeros(3, size, size, 6)
    for b in range(3):
        for i in range(h):
            for j in range(w):
                pooled[b, i * size // h, j * size // w] += vq.quantizer.codebook.data[codes[b, i, j]]
    pooled /= h // size * (w // size)
    assert torch.equal(scale.flatten(), slow_nearest(pooled.reshape(-1, 6), vq.quantizer.codebook))


def test_requantize_to_the_size_of_the_codes_gives_equal_codes_and_refuses_sizes_that_do_not_divide():
    vq, codes = VQ(THIN), torch.arange(12).view(1, 6, 2).expand(2, 6, 2)
    vq.quantizer.codebook.data.fill_(1.0)  # equal rows, which a lookup cannot tell apart
    square = torch.cat([codes, codes, codes], 2)
    assert torch.equal(vq.requantize(square, 6), square)
    for size in (0, -1, 3, 4, 6):
        with pytest.raises(ValueError, match=f"size is {size}; .* 6×2 codes"):
            vq.requantize(codes, size)


def test_palette_gives_each_pixel_the_nearest_colour():
    palette = Palette(torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1], [1, -1, -1]]))
    images = torch.rand(2, 3, 4, 5) * 2 - 1
    codes = palette.encode(images)
    assert codes.shape == (2, 4, 5) and codes.dtype == torch.int64
    assert torch.equal(codes.flatten(), slow_nearest(as_vectors(images), palette.colours))
    for use in (palette.decode, palette.embed):
        colours = use(codes)
        assert colours.shape == (2, 3, 4, 5)
        assert torch.equal(colours[1, :, 2, 3], palette.colours[codes[1, 2, 3]])
    assert torch.equal(palette.encode(palette.decode(codes)), codes)
    copy = Palette(torch.zeros(4, 3))
    copy.load_state_dict(palette.state_dict())
    assert torch.equal(copy.encode(images), codes)
    for shape in ((3, 4, 5), (1, 4, 5, 3), (1, 1, 4, 5)):
        with pytest.raises(ValueError, match=r"not \(B, 3, H, W\)"):
            palette.encode(torch.zeros(shape))


def test_palette_is_fitted_by_kmeans_to_at_most_250_000_pixels(monkeypatch):
    colours = torch.tensor([[0.5, -1, 1], [-0.25, 0, 0.75], [1, 1, 1]])
    fitted = Palette.fit(colours.repeat(100, 1), 3).colours
    assert sorted(fitted.tolist()) == sorted(colours.tolist())
    asked = []
    monkeypatch.setattr(vq_file, "kmeans", lambda vectors, count: asked.append((vectors, count)))
    for pixels in (250_007, 90):
        Palette.fit(torch.arange(pixels)[:, None].float(), 5)
    assert [(vectors.unique().numel(), count) for vectors, count in asked] == [(250_000, 5), (90, 5)]
    assert asked[0][0].max() >= 250_000  # a random sample, not the first ones
