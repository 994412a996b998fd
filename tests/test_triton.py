"""The Triton kernels: natively where there is a GPU, else in the strict interpreter (strict_interpreter.py).

Oracles: integer lattices, on which all arithmetic is exact, searched in float64; float64 attention of the
inputs as rounded, which a kernel may miss by at most twice what plain torch does in its dtype; identities.
"""
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import (causal_attention, causal_attention_reference, causal_attention_triton, nearest_code,
                     nearest_code_reference, nearest_code_triton)
from strict_interpreter import strict

lookup = sys.modules["kernels.nearest_code"]
attention = sys.modules["kernels.causal_attention"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows that tests want
here = contextlib.nullcontext if DEVICE.type == "cuda" else strict  # where a kernel runs
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="needs the interpreter")


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def small_integers(*shape, seed=0, dtype=torch.float32, low=-3, high=4):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


# ---- nearest_code


def nearest(vectors, codebook):
    with here():
        return nearest_code_triton(vectors, codebook)


def assert_exact(vectors, codebook):
    """The first code at the smallest distance, where distances are exact."""
    codes = nearest(vectors, codebook)
    assert codes.dtype == torch.int64
    distances = torch.stack([(vectors.double() - code).square().sum(1) for code in codebook.double()], 1)
    assert torch.equal(codes, (distances == distances.amin(1, keepdim=True)).int().argmax(1))


def best_scores(vectors, codebook):
    """(N,) float32: the least |c|² − 2x·c, c and x less the offset, that the kernel notes beside the code."""
    N, K = len(vectors), len(codebook)
    scores, codes = torch.empty(1, N, device=DEVICE), torch.empty(1, N, dtype=torch.int64, device=DEVICE)
    tile = lookup.tile(DEVICE)
    with here():
        offset, high, low, norms = lookup.prepare_codebook(codebook)
        lookup.nearest_code_kernel[(-(-N // tile["BLOCK_N"]), 1)](
            vectors, vectors.stride(), offset, high, low, norms, scores, codes, N, K, vectors.shape[1],
            high.shape[1], len(high), **tile)
    return scores[0], offset[:vectors.shape[1]]


def assert_near(vectors, codebook):
    """Scores are as exact as the docstring says, and the chosen code is as near as that allows."""
    scores, offset = best_scores(vectors, codebook)
    x, c = vectors.double() - offset, codebook.double() - offset
    exact = c.square().sum(1) - 2 * x @ c.T  # (N, K)
    lost_by_split = 2 ** -21 * (x.abs() @ (2 * c.abs()).T)
    steps = 4 * math.sqrt(x.shape[1])
    rounding = 2 ** -24 * (steps * x.norm(dim=1)[:, None] * c.norm(dim=1) + 2 * c.square().sum(1))
    bound = (lost_by_split + rounding).amax(1)  # (N,)
    error = (scores - exact.amin(1)).abs()
    assert (error <= bound).all(), float((error / bound).max())
    codes = nearest(vectors, codebook)
    assert 0 <= codes.min() and codes.max() < len(codebook)
    assert (exact.gather(1, codes[:, None])[:, 0] - exact.amin(1) <= 2 * bound).all()


SHAPES = [(1, 1, 1), (1, 1024, 16), (65, 64, 32), (130, 200, 48), (7, 1000, 20), (100, 33, 100), (2, 3, 257),
          (129, 129, 1), (63, 1, 5)]  # N, K, D


def test_on_a_lattice_the_lowest_of_the_nearest_is_found():
    for N, K, D in [(0, 3, 4), *SHAPES]:
        assert_exact(small_integers(N, D, seed=1), small_integers(K, D, seed=2))
    for vectors in DTYPES:
        for codes in DTYPES:
            assert_exact(small_integers(65, 33, dtype=vectors), small_integers(70, 33, seed=2, dtype=codes))


@pytest.mark.parametrize("programs, generation", [(1, 9), (3, 8), (1000, 9)])
def test_however_many_programs_share_the_codes_and_on_whatever_gpu(monkeypatch, programs, generation):
    monkeypatch.setattr(lookup, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(lookup, "generation", lambda device: generation)
    for low, high in [(-3, 4), (100, 103)]:  # scores of either sign, and a common offset
        codes = small_integers(400, 20, seed=2, low=low, high=high)
        codebook = torch.cat([codes[:200], codes])  # some codes twice
        assert_exact(small_integers(150, 20, seed=1, low=low, high=high), codebook)
        assert_exact(codebook[-70:] * 4, codebook)


def test_on_floats_the_score_is_exact_but_for_rounding():
    for N, K, D in SHAPES:
        assert_near(random(N, D, seed=1), random(K, D, seed=2))
    codebook = random(200, 8, seed=1)
    for vectors in (10 * codebook, 0.01 * codebook):  # |c|² − 2x·c far below 0, and above
        assert_near(vectors, codebook)
    codebook = random(300, 16, seed=1) * torch.logspace(-1.5, 1.5, 300, device=DEVICE)[:, None]
    assert_near(codebook[::3] + 0.05 * random(100, 16, seed=2), codebook)  # norms over three decades
    offset = torch.linspace(-1000, 1000, 40, device=DEVICE)
    assert_near(random(150, 40, seed=1) / 8 + offset, random(200, 40, seed=2) / 8 + offset)


@pytest.mark.parametrize("K, D", [(1, 1), (5, 33), (128, 64), (1100, 20)])
def test_the_prepared_codebook_is_centred_split_and_padded(K, D):
    columns = torch.linspace(-50, 50, D, device=DEVICE)
    for codebook in (random(K, D), random(K, D) + columns, torch.ones(K, D, device=DEVICE) * columns,
                     torch.zeros(K, D, device=DEVICE), small_integers(K, D, low=90, high=99),
                     (random(K, D) + columns).T.contiguous().T, random(K, D, dtype=torch.bfloat16)):
        with here():
            offset, high, low, norms = lookup.prepare_codebook(codebook)
        torch.testing.assert_close(offset[:D], lookup.common_offset(codebook.float()), atol=0, rtol=1e-4)
        assert (offset[D:] == 0).all() and (norms[K:] == math.inf).all()
        assert (high[:, D:] == 0).all() and (low[:, D:] == 0).all()
        centred = codebook.float() - offset[:D]
        assert torch.equal((high + low)[:K, :D], -2 * centred)
        assert (high.view(torch.int32) & 0x1FFF == 0).all()  # TF32 keeps all of it, and of low all but a bit
        assert (low.abs() <= 2 ** -11 * high.abs()).all()
        torch.testing.assert_close(norms[:K].double(), centred.double().square().sum(1), atol=0, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 150, 299])
def test_a_code_whose_norm_overflows_never_wins_and_disturbs_no_other(place):
    for value in (1e25, 1e38, math.inf, math.nan):
        codebook = random(300, 20, seed=1)
        vectors = codebook + 0.01
        codebook[place] = value
        for search in (nearest, nearest_code_reference):
            codes = search(vectors, codebook)
            assert codes[:place].tolist() + codes[place + 1:].tolist() == [k for k in range(300) if k != place]


def test_not_a_number_gives_an_index_in_range_and_disturbs_no_other_vector(monkeypatch):
    vectors, codebook = random(70, 20, seed=1), random(200, 20, seed=2)
    for programs in (1, 132):
        monkeypatch.setattr(lookup, "multiprocessors", lambda device: programs)
        whole = nearest(vectors, codebook)
        broken = vectors.clone()
        broken[3, 5], broken[66] = math.nan, math.inf
        codes = nearest(broken, codebook)
        assert 0 <= codes.min() and codes.max() < 200
        assert all(codes[i] == whole[i] for i in range(70) if i not in (3, 66))


def test_any_strides_are_read_and_nothing_is_written():
    wide, tall = small_integers(90, 160, seed=1), small_integers(300, 70, seed=2)
    copies = wide.clone(), tall.clone()
    for vectors, codebook in [(wide[:, ::2], tall.T[:, :80]), (wide.T[:, :70], tall),
                              (wide[::3, :70], tall[::2]), (wide[:1, :70].expand(90, 70), tall),
                              (wide[:, :1].expand(90, 70), tall),
                              (wide[:, 70:140], tall[:1].expand(65, 70))]:
        assert_exact(vectors, codebook)
    assert torch.equal(wide, copies[0]) and torch.equal(tall, copies[1])


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_more_than_two_to_the_31_elements(transposed):
    N, D = 2 ** 23 + 64, 256
    vectors = torch.empty(D, N).T if transposed else torch.empty(N, D)  # memory that is never touched
    codebook = random(70, D)
    prepared = lookup.prepare_codebook(codebook)
    vectors[-64:] = codebook[3:67]
    scores, codes = torch.empty(1, N), torch.empty(1, N, dtype=torch.int64)
    with strict(only=lambda programs: {programs - 1}):
        tile = lookup.tile(DEVICE)
        lookup.nearest_code_kernel[(-(-N // tile["BLOCK_N"]), 1)](
            vectors, vectors.stride(), *prepared, scores, codes, N, 70, D, 256, len(prepared[1]), **tile)
    last = min(64, tile["BLOCK_N"])  # of the last program, the only one that runs
    assert codes[0, -last:].tolist() == list(range(67 - last, 67))


@interpreted
def test_a_codebook_of_more_than_two_to_the_31_elements():
    K, D = 2 ** 16, 2 ** 15 + 1024
    offset, high, low, norms = torch.zeros(D), torch.empty(K, D), torch.empty(K, D), torch.empty(K)
    scores, codes = torch.empty(512, 1), torch.empty(512, 1, dtype=torch.int64)
    for codebook in (torch.empty(D, K).T, torch.empty(K, D)):
        codebook[-128:] = 1.0
        codebook[-5] = 0.0
        with strict(only=lambda programs: {programs - 1}):
            lookup.prepare_codebook_kernel[(K // 128,)](
                codebook, codebook.stride(), offset, high, low, norms, K, D, D, BLOCK_K=128, BLOCK_D=1024)
    with strict(only=lambda programs: {programs - 1}):
        lookup.nearest_code_kernel[(1, 512)](
            torch.zeros(1, D), (D, 1), offset, high, low, norms, scores, codes, 1, K, D, D, 128,
            BLOCK_N=16, BLOCK_K=128, BLOCK_D=1024)
    assert codes[-1] == K - 5


def test_the_lookup_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="nearest_code needs vectors"):
        nearest_code_triton(random(3, 4), random(5, 3))
    for vectors, codebook in [(torch.float64, torch.float32), (torch.float32, torch.int64)]:
        with pytest.raises(ValueError, match="takes float32, float16 or bfloat16 on one device"):
            nearest_code_triton(random(3, 4).to(vectors), random(5, 4).to(codebook))
    with pytest.raises(ValueError, match="on one device, not torch.float32 on .* and torch.float32 on meta"):
        nearest_code_triton(random(3, 4), torch.empty(5, 4, device="meta"))


# ---- causal_attention


def attend(*inputs, form=causal_attention_triton):
    with here() if form is causal_attention_triton else contextlib.nullcontext():
        return form(*inputs)


def draw(B, heads, Tq, T, d, dtype=torch.float32):
    """query, key, value as gpt.py makes them (d contiguous, then heads), and a gradient for the output."""
    shapes = [(B, Tq, heads, d), (B, T, heads, d), (B, T, heads, d), (B, Tq, heads, d)]
    return [random(*shape, seed=i, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes)]


def output_and_gradients(inputs, output_gradient, form=causal_attention_triton):
    inputs = [x.detach().requires_grad_() for x in inputs]
    with here() if form is causal_attention_triton else contextlib.nullcontext():
        output = form(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, output_gradient)]


def worst_row(ours, exact):
    """The largest error of a row, in units of the row's and the mean row's length."""
    length = exact.norm(dim=-1)
    return float(((ours.double() - exact).norm(dim=-1) / (length + length.mean() + 0.01)).max())


SLACK = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZES = [(1, 1, 32), (64, 64, 32), (65, 65, 32), (130, 150, 32), (33, 257, 32), (1, 70, 32), (70, 129, 32),
         (16, 32, 32), (40, 70, 16), (70, 70, 20), (90, 100, 64), (33, 65, 80), (65, 65, 128)]  # Tq, T, d


@pytest.mark.parametrize("dtype, sizes", [  # float16 has the tiles of bfloat16
    (torch.float32, SIZES), (torch.bfloat16, SIZES), (torch.float16, SIZES[10:11])])
def test_output_and_gradients_err_at_most_twice_as_much_as_torch(dtype, sizes):
    for Tq, T, d in sizes:
        *inputs, gradient = draw(2 if T < 100 else 1, 1 if d > 32 else 2, Tq, T, d, dtype)
        exact = output_and_gradients([x.double() for x in inputs], gradient.double(),
                                     causal_attention_reference)
        torchs = output_and_gradients(inputs, gradient, causal_attention_reference)
        ours = output_and_gradients(inputs, gradient)
        for name, a, b, c in zip(("output", "dq", "dk", "dv"), ours, torchs, exact):
            assert a.dtype == dtype and a.shape == c.shape
            assert worst_row(a, c) <= 2 * worst_row(b, c) + SLACK[dtype], (name, Tq, T, d)


def test_few_dimensions_are_padded():
    for d in (1, 3, 9):
        *inputs, gradient = draw(1, 2, 20, 25, d)
        exact = output_and_gradients([x.double() for x in inputs], gradient.double(),
                                     causal_attention_reference)
        for ours, theirs in zip(output_and_gradients(inputs, gradient), exact):
            torch.testing.assert_close(ours.double(), theirs, atol=3e-6, rtol=0)


def test_what_comes_later_changes_no_bit_of_what_came_before_in_the_kernel():
    query, key, value, _ = draw(1, 2, 150, 150, 32, torch.bfloat16)
    before = attend(query, key, value)
    key[:, :, 100:] += 3
    value[:, :, 100:] -= 2
    after = attend(query, key, value)
    assert torch.equal(after[:, :, :100], before[:, :, :100])
    assert (after[:, :, 100:] != before[:, :, 100:]).any(3).all()


def test_huge_scores_pick_the_best_key_and_stay_finite_in_the_kernel():
    key = 100 * torch.eye(16, device=DEVICE).expand(1, 1, 16, 16)
    value, gradient = random(1, 1, 16, 16), random(1, 1, 16, 16, seed=1)
    results = output_and_gradients([100 * key, key, value], gradient)
    rounding = 0 if DEVICE.type == "cpu" else 1e-6  # a GPU fuses score · scale − m
    torch.testing.assert_close(results[0], value, atol=0, rtol=rounding)
    assert all(result.isfinite().all() for result in results)


def test_any_strides_of_inputs_and_gradient_are_read():
    *inputs, gradient = draw(2, 3, 20, 20, 16, torch.float16)
    expected = output_and_gradients(inputs, gradient)
    qkv = torch.stack([x.transpose(1, 2) for x in inputs], 2)  # (B, T, 3, heads, d), as gpt.py has them
    strided = [[x.transpose(1, 2) for x in qkv.unbind(2)], [x.contiguous() for x in inputs],
               [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]]
    for views in strided:
        assert attend(*views).transpose(1, 2).is_contiguous()  # as the next linear layer reads it
        for ours, theirs in zip(output_and_gradients(views, gradient.contiguous()), expected):
            assert torch.equal(ours, theirs)
    one = torch.ones((), dtype=torch.float16, device=DEVICE).expand(gradient.shape)  # strides 0, as of sum()
    for ours, theirs in zip(output_and_gradients(inputs, one), output_and_gradients(inputs, one.clone())):
        assert torch.equal(ours, theirs)


def test_a_position_in_memory_is_as_good_as_a_shorter_cache():
    for dtype, capacity in ((torch.float16, 130), (torch.float32, 40)):
        query, keys, values, _ = draw(2, 2, 1, capacity, 16, dtype)
        for position in (0, 15, 16, 31, capacity - 1):
            unused = (torch.arange(capacity, device=DEVICE) > position)[:, None]
            cache = [x.masked_fill(unused, math.nan) for x in (keys, values)]
            with here():
                output = attention.attend_to_cache(query, *cache, torch.tensor([position], device=DEVICE))
            assert torch.equal(output, attend(query, *(x[:, :, :position + 1] for x in cache)))


def test_a_gradient_can_be_asked_for_of_one_input_alone():
    *inputs, gradient = draw(1, 2, 33, 40, 16, torch.float16)
    expected = output_and_gradients(inputs, gradient)
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        with here():
            causal_attention_triton(*leaves).backward(gradient)
        assert [x.grad is not None for x in leaves] == [i == j for j in range(3)]
        assert torch.equal(leaves[i].grad, expected[1 + i])


def test_nothing_in_nothing_out():
    for B, Tq, T in [(0, 5, 5), (2, 0, 5), (2, 0, 0)]:
        *inputs, gradient = draw(B, 2, Tq, T, 16)
        results = output_and_gradients(inputs, gradient)
        assert [result.shape for result in results] == [x.shape for x in (gradient, *inputs)]
        assert all((result == 0).all() for result in results)


def test_autocast_decides_the_dtype():
    query, key, value, gradient = draw(1, 2, 20, 20, 16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output = attend(query, key.bfloat16(), value)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, attend(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_compiled_it_is_one_operator_and_computes_the_same():
    *inputs, gradient = draw(2, 2, 33, 40, 16)
    expected = output_and_gradients(inputs, gradient)
    whole = torch.compile(causal_attention_triton, fullgraph=True,
                          backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    with here():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = whole(*leaves)
        compiled = [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))


def test_the_operators_keep_the_rules_of_torch_and_are_differentiable_once():
    query, key, value, gradient = draw(1, 2, 5, 7, 16, torch.float16)
    with here():
        torch.library.opcheck(attention.OPERATORS.forward.default, (query, key, value))
        output, logsumexp = attention.OPERATORS.forward(query, key, value)
        torch.library.opcheck(attention.OPERATORS.backward.default,
                              (query, key, value, output, logsumexp, gradient))
        loss = causal_attention_triton(query.requires_grad_(), key, value).square().sum()
        first, = torch.autograd.grad(loss, query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@interpreted
def test_more_than_two_to_the_31_elements_of_a_batch():
    B, T, heads, d = 2 ** 14 + 1, 64, 32, 64
    qkv = torch.empty(B, T, 3, heads, d, dtype=torch.float16)  # 2³² elements of memory that is never touched
    qkv[-1] = random(T, 3, heads, d, dtype=torch.float16)
    inputs = [x.transpose(1, 2) for x in qkv.unbind(2)]
    output = torch.empty(B, T, heads, d, dtype=torch.float16).transpose(1, 2)
    gradients = [torch.empty_like(output) for _ in inputs]
    logsumexp, delta = torch.empty(B, heads, T), torch.empty(B, heads, T)
    with strict(only=lambda programs: {programs - 1}):
        attention.launch(attention.forward_kernel, *inputs, output, logsumexp)
        attention.launch(attention.query_gradient_kernel, *inputs, output, output, logsumexp,
                         gradients[0], delta)
        attention.launch(attention.key_value_gradient_kernel, *inputs, output, logsumexp, delta,
                         *gradients[1:])
    last = [x[-1:, -1:].clone() for x in inputs]
    expected = output_and_gradients(last, attend(*last))
    for ours, theirs in zip((output, *gradients), expected):
        assert torch.equal(ours[-1:, -1:], theirs)


def test_attention_refuses_what_it_cannot_compute():
    for inputs in (draw(1, 1, 3, 3, 129)[:3], draw(1, 1, 3, 3, 8, torch.float64)[:3],
                   [x.to(dtype) for x, dtype in zip(draw(1, 1, 3, 3, 8), DTYPES)]):
        with pytest.raises(ValueError, match="the causal_attention kernels take float32"):
            causal_attention_triton(*inputs)
    with pytest.raises(ValueError, match="causal_attention needs query"):
        causal_attention_triton(*draw(1, 1, 5, 4, 8)[:3])


# ---- both


def test_the_same_bits_every_time():
    vectors, codebook = random(300, 48, seed=1), random(500, 48, seed=2)
    *inputs, gradient = draw(2, 2, 70, 90, 32, torch.bfloat16)
    runs = [[nearest(vectors, codebook), *output_and_gradients(inputs, gradient)]
            for _ in range(10 if DEVICE.type == "cuda" else 2)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


@interpreted
def test_the_kernels_run_in_the_plain_interpreter_too():
    vectors, codebook = small_integers(130, 33, seed=1), small_integers(200, 33, seed=2)
    assert torch.equal(nearest_code_triton(vectors, codebook), nearest(vectors, codebook))
    inputs = draw(1, 1, 70, 90, 32, torch.float16)[:3]
    torch.testing.assert_close(causal_attention_triton(*inputs), attend(*inputs), atol=2e-3, rtol=0)


def test_without_triton_the_references_work():
    script = ("import sys; sys.modules['triton'] = None; import torch, kernels; x = torch.randn(5, 4);"
              "assert 'torch._dynamo' not in sys.modules;"  # the compiler, slow to import
              "assert kernels.nearest_code(x, x).tolist() == [0, 1, 2, 3, 4];"
              "q = torch.randn(1, 1, 3, 4); assert kernels.causal_attention(q, q, q).shape == q.shape;"
              "Cuda = type('Cuda', (torch.Tensor,), {'is_cuda': True, 'device': torch.device('cuda')});"
              "q = q.as_subclass(Cuda); assert kernels.causal_attention(q, q, q).shape == q.shape;"
              "torch.cuda.get_device_capability = lambda device: (9, 0);"
              "assert not kernels.backend.has_tf32(q.device)")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parent.parent)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU")
def test_on_a_gpu_the_public_names_are_the_kernels():
    *inputs, _ = draw(2, 2, 33, 40, 16)
    assert torch.equal(causal_attention(*inputs), causal_attention_triton(*inputs))
    x, codebook = random(60, 6, seed=1), random(30, 6, seed=2)
    assert torch.equal(nearest_code(x, codebook), nearest_code_triton(x, codebook))
    assert torch.equal(nearest_code(x, codebook), nearest_code_reference(x, codebook))
