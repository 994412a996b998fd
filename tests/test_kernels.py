"""The two operations in plain torch: the references, and what the public names are on a CPU.

Oracles: slow loops in float64 that follow the formulas of the docstrings; numerical derivatives (gradcheck).
Ties are looked for on small integers, where arithmetic is exact in whatever order a BLAS sums.
"""
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

from kernels import backend, causal_attention, causal_attention_reference, nearest_code, nearest_code_reference

BOTH_ATTENTIONS = pytest.mark.parametrize("attention", [causal_attention_reference, causal_attention])


def slow_nearest_code(vectors, codebook):
    """For each vector the first code at the smallest squared distance: two loops in float64."""
    result = []
    for vector in vectors.detach().double():
        best, best_distance = 0, math.inf
        for k, code in enumerate(codebook.detach().double()):
            distance = float(((vector - code) ** 2).sum())
            if distance < best_distance:
                best, best_distance = k, distance
        result.append(best)
    return torch.tensor(result, dtype=torch.int64)


def slow_causal_attention(query, key, value):
    """Σ_{j ≤ i} softmax_j(q_i·k_j / √d) v_j, one output row at a time in float64."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, queries, width = query.shape
    output = torch.zeros(batch, heads, queries, width, dtype=torch.float64)
    first = key.shape[2] - queries  # position of the first query
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores = [float(query[b, h, i] @ key[b, h, j]) / width ** 0.5 for j in range(first + i + 1)]
                weights = [math.exp(score - max(scores)) for score in scores]
                for j, weight in enumerate(weights):
                    output[b, h, i] += weight / sum(weights) * value[b, h, j]
    return output


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention_inputs(batch, heads, queries, keys, width, dtype=torch.float64):
    return [random(batch, heads, length, width, seed=seed, dtype=dtype)
            for seed, length in enumerate((queries, keys, keys))]


def lattice(side, width):
    """All points of {0, …, side−1}^width, (side^width, width) float32."""
    axes = torch.meshgrid([torch.arange(side)] * width, indexing="ij")
    return torch.stack(axes, -1).view(-1, width).float()


# ---- nearest_code


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_nearest_code_is_that_of_a_slow_loop(dtype):
    for vectors, codes, width in [(50, 20, 8), (7, 33, 1), (1, 5, 3), (40, 1, 4), (20, 2, 17), (0, 3, 4)]:
        x, codebook = random(vectors, width, seed=1, dtype=dtype), random(codes, width, dtype=dtype) + 0.5
        indices = nearest_code(x.requires_grad_(), codebook.requires_grad_())
        assert torch.equal(indices, slow_nearest_code(x, codebook)) and indices.dtype == torch.int64
        assert torch.equal(indices, nearest_code_reference(x.detach(), codebook.detach()))
        mixed = nearest_code(x, codebook.float())  # half precision is compared in float32, as under autocast
        assert dtype == torch.float64 or torch.equal(mixed, indices)


@pytest.mark.parametrize("rows", [1, 3, 65536])
def test_equal_scores_go_to_the_lowest_index_however_many_rows_are_compared_at_a_time(monkeypatch, rows):
    monkeypatch.setitem(nearest_code_reference.__globals__, "ROWS", rows)
    codebook = lattice(4, 2).flip(0).repeat(2, 1)  # each code twice, a mean of 1.5: all arithmetic is exact
    x = lattice(9, 2) / 2 - 0.5  # the codes, midpoints of edges and faces, and points outside
    assert torch.equal(nearest_code(x, codebook), slow_nearest_code(x, codebook))
    centre = torch.tensor([[1.5, 1.5]])  # as far from (2, 2), (2, 1), (1, 2) and (1, 1): codes 5, 6, 9 and 10
    assert nearest_code(centre, codebook).tolist() == [5]


def test_a_common_offset_does_not_cost_accuracy():
    codebook = random(64, 8, seed=1) + 1e4  # neighbours about 1 apart; |c|² is 8e8, with a spacing of 64
    x = random(200, 8, seed=2) + 1e4
    assert torch.equal(nearest_code(x, codebook), slow_nearest_code(x, codebook))


def test_float64_inputs_are_compared_in_float64():
    codebook = torch.tensor([[1.0], [1.0 + 4e-8], [3.0]], dtype=torch.float64)
    assert codebook[0].float() == codebook[1].float()
    assert nearest_code(codebook, codebook).tolist() == [0, 1, 2]


def test_autocast_does_not_round_the_distances():
    vectors, codebook = random(500, 8, seed=1), random(256, 8, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = nearest_code(vectors, codebook)
    assert torch.equal(under_autocast, nearest_code(vectors, codebook))


def test_strided_inputs_are_read_by_shape_and_left_as_they_were():
    x, codebook = random(6, 40, seed=1), random(12, 18, seed=2)
    pairs = [(x.T, codebook[:, ::3]), (x[::2].T, codebook.T[::6].T), (x.T.contiguous(), codebook[1::2, :6]),
             (x[:, :1].expand(6, 9).T, codebook[:, 3:9])]
    for strided_x, strided_codebook in pairs:
        assert not strided_codebook.is_contiguous()
        expected = slow_nearest_code(strided_x, strided_codebook)
        assert torch.equal(nearest_code(strided_x, strided_codebook), expected)
    assert torch.equal(x, random(6, 40, seed=1)) and torch.equal(codebook, random(12, 18, seed=2))


def test_each_code_finds_itself():
    for codes, width in [(1, 1), (512, 8), (1024, 256)]:
        codebook = random(codes, width)
        assert torch.equal(nearest_code(codebook, codebook), torch.arange(codes))


@pytest.mark.parametrize("vectors, codebook", [
    ((3, 4), (5, 3)), ((3, 4), (0, 4)), ((4,), (5, 4)), ((3, 4), (4,)), ((2, 3, 4), (5, 4))])
def test_nearest_code_refuses_shapes_that_do_not_fit(vectors, codebook):
    with pytest.raises(ValueError, match="nearest_code needs vectors"):
        nearest_code(torch.zeros(vectors), torch.zeros(codebook))


# ---- causal_attention


@BOTH_ATTENTIONS
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_attention_is_that_of_a_slow_loop(attention, dtype, tolerance):
    for shape in [  # batch, heads, queries, keys, width
            (1, 1, 1, 1, 1), (2, 3, 5, 5, 4), (2, 2, 3, 7, 8), (1, 2, 1, 6, 5), (1, 1, 17, 17, 3)]:
        inputs = attention_inputs(*shape, dtype)
        output = attention(*inputs)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), slow_causal_attention(*inputs), atol=tolerance, rtol=0)


@BOTH_ATTENTIONS
def test_gradients_are_the_numerical_derivatives(attention):
    for shape in [(1, 2, 4, 4, 3), (2, 1, 2, 5, 3), (1, 1, 1, 3, 2)]:
        assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in attention_inputs(*shape)])


@BOTH_ATTENTIONS
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e4), (torch.float32, 1e15), (torch.bfloat16, 1e4)])
def test_huge_scores_pick_the_best_key_and_stay_finite(attention, dtype, scale):
    key = torch.eye(4, dtype=dtype).view(1, 1, 4, 4) * scale
    rows = [[1, 0, 0, 0], [-1, 1, 0, 0], [1, 0, -1, 0], [0, 0, 1, 0]]
    query = torch.tensor(rows, dtype=dtype).view(1, 1, 4, 4) * scale
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = attention(*inputs)
    assert output[0, 0, :, 0].tolist() == [1, 2, 1, 3]
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


@BOTH_ATTENTIONS
def test_attention_reads_strided_inputs_by_shape(attention):
    inputs = random(2, 6, 3, 4, 5, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind()  # as in gpt.py
    assert not inputs[0].is_contiguous()
    torch.testing.assert_close(attention(*inputs), slow_causal_attention(*inputs), atol=1e-12, rtol=0)


@BOTH_ATTENTIONS
@pytest.mark.parametrize("query, key, value", [
    ((2, 3, 5, 4), (2, 3, 4, 4), (2, 3, 4, 4)),  # more queries than keys
    ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 6, 4)),
    ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 8)),
    ((2, 3, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4)),  # would broadcast
    ((1, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    ((3, 5, 4), (3, 5, 4), (3, 5, 4)),
])
def test_attention_refuses_shapes_that_do_not_fit(attention, query, key, value):
    with pytest.raises(ValueError, match="causal_attention needs query"):
        attention(torch.zeros(query), torch.zeros(key), torch.zeros(value))


def test_attention_compiles_whole_and_asks_then_only_which_kernels_fit(monkeypatch):
    asked = []
    yes = type("Yes", (), {"__bool__": lambda self: not asked.append("Is Triton here?")})()
    monkeypatch.setattr(backend, "HAS_TRITON", yes)
    whole = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    for queries in (6, 3, 1):
        inputs = attention_inputs(1, 2, queries, 6, 4)
        assert torch.equal(whole(*inputs), causal_attention(*inputs))
        before = len(asked)
        whole(*inputs)
        assert 0 < len(asked) == before


# ---- where the kernels run


@pytest.mark.skipif(not backend.HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("capability, error, fits", [
    ((9, 0), None, True), ((8, 0), None, True), ((7, 5), None, False),
    ((9, 0), RuntimeError("Failed to find C compiler"), False),
    ((9, 0), subprocess.CalledProcessError(1, "gcc"), False)])  # no Python.h
def test_gpus_before_ampere_and_machines_without_a_compiler_get_torchs_kernels(
        monkeypatch, capsys, capability, error, fits):
    def get_current_device() -> int:
        if error:
            raise error
        return 0

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=get_current_device))
    monkeypatch.setattr(backend.triton.runtime, "driver", driver)
    monkeypatch.setattr(backend, "capability", lambda device: capability)
    backend.can_launch.cache_clear()
    assert [backend.has_tf32(torch.device("cuda")) for _ in range(2)] == [fits, fits]
    assert capsys.readouterr().out.count("C compiler and Python's headers") == bool(error)  # said once
    backend.can_launch.cache_clear()
