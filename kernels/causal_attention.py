"""Causal attention: each position attends to itself and earlier ones (§2; [1] eq. 1 with GPT's mask).

    output_i = Σ_{j ≤ i} p_ij v_j,    p_ij = exp(s_ij) / Σ_{j' ≤ i} exp(s_ij'),    s_ij = q_i·k_j / √d

With fewer queries than keys the queries are the last positions: that is how a key/value cache is read.

The plain form writes the (Tq, T) scores and weights of every head to memory and reads them back: at T = 512
and d = 64 each has twice as many entries as q, k, v and the output together. Flash attention (Dao et al.,
2022) never stores them. A program holds one block of queries, loops over tiles of keys and keeps for each
query the largest score so far m, the sum l = Σ exp(s − m) and the output so far; when a tile brings a larger
score m', what was summed before is multiplied by exp(m − m').

Backward, from the output's gradient dO and with P recomputed from the saved log-sum-exp L_i = m_i + log l_i:

    p_ij = exp(s_ij − L_i)    dV_j = Σ_i p_ij dO_i    dP_ij = dO_i·v_j    δ_i = dO_i·output_i
    dS_ij = p_ij (dP_ij − δ_i)    dQ_i = Σ_j dS_ij k_j / √d    dK_j = Σ_i dS_ij q_i / √d

dQ sums over keys, dK and dV over queries: two kernels, each with its sum inside one program, so that the
gradient is the same to the last bit every time. All compute exp(x) as 2^(x·log₂e), as GPUs do.

    python -m kernels.causal_attention    checks the kernels and prints a table (without a GPU: plain torch's)

Limits: float32 (IEEE), float16, bfloat16; d from 1 to 128, fastest at powers of two from 16; any T, strides;
B and heads below 65,536; NVIDIA GPUs since Ampere (others get torch's).
Symbols: B batch, Tq queries, T keys, d head_dim.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.backend import cdiv, compare, describe_device, has_tf32, tl, triton


def causal_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In plain torch: query (B, heads, Tq, d), key and value (B, heads, T, d) → (B, heads, Tq, d).

    The softmax is taken in float32 at least. Differentiable. Raises ValueError for other shapes or Tq > T.
    """
    check_shapes(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    scores = query / math.sqrt(query.shape[3]) @ key.transpose(2, 3)  # (B, heads, Tq, T)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)  # (Tq, T)
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return weights @ value  # (B, heads, Tq, d)


def check_shapes(query: Tensor, key: Tensor, value: Tensor):
    if (query.ndim != 4 or key.shape != value.shape
            or query.shape[:2] + query.shape[3:] != key.shape[:2] + key.shape[3:]
            or query.shape[2] > key.shape[2]):
        raise ValueError("causal_attention needs query (B, heads, Tq, d) and key, value (B, heads, T, d) "
                         f"with Tq ≤ T, not {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")


@triton.jit
def head_of(x):
    """Pointer to this program's head in x = (pointer, strides) of (B, heads, …); grid (blocks, heads, B)."""
    return x[0] + tl.program_id(2).to(tl.int64) * x[1][0] + tl.program_id(1).to(tl.int64) * x[1][1]


@triton.jit
def load_rows(x, rows, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R,) of this head of x, (B, heads, length, WIDTH) → (R, BLOCK_D); beyond its ends zeros."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(head_of(x) + rows[:, None].to(tl.int64) * x[1][2] + columns[None, :],
                   mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(tile, x, rows, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse: writes a tile (R, BLOCK_D), rounded to the dtype of x."""
    columns = tl.arange(0, BLOCK_D)
    tl.store(head_of(x) + rows[:, None].to(tl.int64) * x[1][2] + columns[None, :],
             tile.to(x[0].dtype.element_ty),
             mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))


@triton.jit
def forward_kernel(
    queries,  # (B, heads, Tq, d); each tensor is a tuple of pointer and strides
    keys, values,  # (B, heads, T, d)
    outputs,  # (B, heads, Tq, d), written
    logsumexps,  # (B, heads, Tq) float32, written: L, to base 2
    Tq, T, scale,  # scale: log₂e / √d
    WIDTH: tl.constexpr,  # d
    BLOCK_D: tl.constexpr,  # the power of two from d up
    BLOCK_Q: tl.constexpr,  # queries per program
    BLOCK_K: tl.constexpr,  # keys per step
    position_ptr=None,  # of the last query, T − 1, if it is to be read from memory
):
    """One block of queries of one head."""
    if position_ptr is not None:
        T = tl.load(position_ptr).to(tl.int32) + 1
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last block sees the most keys: it starts first
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = block * BLOCK_Q + T - Tq  # of the first of these queries in the sequence
    q = load_rows(queries, rows, Tq, WIDTH, BLOCK_D)  # (BLOCK_Q, BLOCK_D)
    output = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)  # not yet divided by l
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)  # m
    total = tl.zeros((BLOCK_Q,), tl.float32)  # l
    seen_by_all = (position + 1) // BLOCK_K * BLOCK_K  # keys before it need no mask; in whole tiles
    seen_by_any = tl.minimum(position + BLOCK_Q, T)  # keys from it on are seen by no query
    for masked in tl.static_range(2):  # first the tiles that need no mask, then those on the diagonal
        for start in range(seen_by_all if masked else 0, seen_by_any if masked else seen_by_all, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(keys, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
            v = load_rows(values, columns, T, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K), not yet scaled
            if masked:
                scores = tl.where(columns[None, :] <= rows[:, None] + T - Tq, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores * scale - new_largest[:, None])
            total = total * rescale + tl.sum(weights, 1)
            output = tl.dot(weights.to(v.dtype), v, output * rescale[:, None], input_precision="ieee")
            largest = new_largest
    output *= (1 / total)[:, None]
    store_rows(output, outputs, rows, Tq, WIDTH, BLOCK_D)
    tl.store(head_of(logsumexps) + rows, largest + tl.log2(total), mask=rows < Tq)


@triton.jit
def query_gradient_kernel(
    queries, keys, values, outputs, output_gradients,  # as in `forward_kernel`
    logsumexps,  # (B, heads, Tq) float32
    query_gradients,  # (B, heads, Tq, d), written
    deltas,  # (B, heads, Tq) float32, written: δ, which the next kernel reads
    Tq, T, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dQ of one block of queries, by the same loops as in forward."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = block * BLOCK_Q + T - Tq
    q = load_rows(queries, rows, Tq, WIDTH, BLOCK_D)  # (BLOCK_Q, BLOCK_D)
    output = load_rows(outputs, rows, Tq, WIDTH, BLOCK_D)
    output_gradient = load_rows(output_gradients, rows, Tq, WIDTH, BLOCK_D)
    logsumexp = tl.load(head_of(logsumexps) + rows, mask=rows < Tq, other=0.0)  # (BLOCK_Q,)
    delta = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), 1)  # (BLOCK_Q,)
    tl.store(head_of(deltas) + rows, delta, mask=rows < Tq)
    q_gradient = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)  # not yet divided by √d
    seen_by_all = (position + 1) // BLOCK_K * BLOCK_K
    seen_by_any = tl.minimum(position + BLOCK_Q, T)
    for masked in tl.static_range(2):
        for start in range(seen_by_all if masked else 0, seen_by_any if masked else seen_by_all, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(keys, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
            v = load_rows(values, columns, T, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
            if masked:
                scores = tl.where(columns[None, :] <= rows[:, None] + T - Tq, scores, float("-inf"))
            weights = tl.exp2(scores * scale - logsumexp[:, None])  # p: L includes the normalization
            weights_gradient = tl.dot(output_gradient, tl.trans(v), input_precision="ieee")
            scores_gradient = weights * (weights_gradient - delta[:, None])
            if masked:  # the first position has one key, whose weight is 1 whatever its score
                scores_gradient = tl.where(rows[:, None] + T - Tq > 0, scores_gradient, 0.0)
            q_gradient = tl.dot(scores_gradient.to(k.dtype), k, q_gradient, input_precision="ieee")
    q_gradient *= scale * 0.6931471805599453  # ln 2: scale is log₂e / √d, the gradient needs 1/√d
    store_rows(q_gradient, query_gradients, rows, Tq, WIDTH, BLOCK_D)


@triton.jit
def key_value_gradient_kernel(
    queries, keys, values, output_gradients,  # as in `forward_kernel`
    logsumexps, deltas,  # (B, heads, Tq) float32
    key_gradients, value_gradients,  # (B, heads, T, d), written
    Tq, T, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dK and dV of one block of keys: loops over the queries that see it, with scores as keys by queries."""
    block = tl.program_id(0)  # the first block is seen by the most queries
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = load_rows(keys, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
    v = load_rows(values, columns, T, WIDTH, BLOCK_D)
    k_gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # not yet divided by √d
    v_gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first_row = block * BLOCK_K - (T - Tq)  # the first query that sees the first of these keys
    sees_one = tl.maximum(first_row, 0) // BLOCK_Q * BLOCK_Q
    sees_all = tl.minimum(tl.cdiv(tl.maximum(first_row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q, Tq)
    for masked in tl.static_range(2):  # first the queries that see all of these keys, then the diagonal
        for start in range(sees_one if masked else sees_all, sees_all if masked else Tq, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = load_rows(queries, rows, Tq, WIDTH, BLOCK_D)  # (BLOCK_Q, BLOCK_D)
            output_gradient = load_rows(output_gradients, rows, Tq, WIDTH, BLOCK_D)
            logsumexp = tl.load(head_of(logsumexps) + rows, mask=rows < Tq, other=0.0)  # (BLOCK_Q,)
            delta = tl.load(head_of(deltas) + rows, mask=rows < Tq, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_K, BLOCK_Q)
            if masked:
                scores = tl.where(columns[:, None] <= rows[None, :] + T - Tq, scores, float("-inf"))
            weights = tl.exp2(scores * scale - logsumexp[None, :])  # beyond Tq dO and δ are 0: adds nothing
            v_gradient = tl.dot(weights.to(q.dtype), output_gradient, v_gradient, input_precision="ieee")
            weights_gradient = tl.dot(v, tl.trans(output_gradient), input_precision="ieee")
            scores_gradient = weights * (weights_gradient - delta[None, :])
            if masked:  # as above
                scores_gradient = tl.where(rows[None, :] + T - Tq > 0, scores_gradient, 0.0)
            k_gradient = tl.dot(scores_gradient.to(q.dtype), q, k_gradient, input_precision="ieee")
    k_gradient *= scale * 0.6931471805599453  # ln 2, as above
    store_rows(k_gradient, key_gradients, columns, T, WIDTH, BLOCK_D)
    store_rows(v_gradient, value_gradients, columns, T, WIDTH, BLOCK_D)


def tiles(kernel, dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile shape and schedule: what fits registers and shared memory. Tests compile every kind."""
    if dtype == torch.float32:
        return dict(BLOCK_Q=16 if width > 64 else 32, BLOCK_K=16, num_warps=4, num_stages=2)
    if width > 64:
        return dict(BLOCK_Q=64, BLOCK_K=32, num_warps=8, num_stages=2)
    queries = 32 if kernel is key_value_gradient_kernel else 64  # backward holds two products at a time:
    keys = 32 if kernel is query_gradient_kernel else 64  # the tile that it loops over is half as long
    return dict(BLOCK_Q=queries, BLOCK_K=keys, num_warps=4, num_stages=3)


def launch(kernel, *tensors: Tensor, **options):
    """Run a kernel on query, key, … (its tensors in order): a program per block of each head."""
    if tensors[0].is_meta:  # torch.compile asks for the shapes and strides of the outputs only
        return
    (B, heads, Tq, width), T = tensors[0].shape, tensors[1].shape[2]
    tile = tiles(kernel, tensors[0].dtype, width)
    blocks = cdiv(T, tile["BLOCK_K"]) if kernel is key_value_gradient_kernel else cdiv(Tq, tile["BLOCK_Q"])
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)  # outputs already are
    with torch.cuda.device_of(tensors[0]):
        kernel[(blocks, heads, B)](
            *((x, x.stride()) for x in dense), Tq, T, math.log2(math.e) / math.sqrt(width), WIDTH=width,
            BLOCK_D=max(16, 1 << (width - 1).bit_length()), **tile, **options)


def empty_like_linear(x: Tensor) -> Tensor:
    """(B, heads, T, d), in memory (B, T, heads, d): as the linear layers before and after have it."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """→ output (B, heads, Tq, d), logsumexp (B, heads, Tq) float32."""
    output, logsumexp = empty_like_linear(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    launch(forward_kernel, query, key, value, output, logsumexp)
    return output, logsumexp


def backward(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
             output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ gradients of query, key and value."""
    dq, dk, dv = (empty_like_linear(x) for x in (query, key, value))
    delta = torch.empty_like(logsumexp)
    launch(query_gradient_kernel, query, key, value, output, output_gradient, logsumexp, dq, delta)
    launch(key_value_gradient_kernel, query, key, value, output_gradient, logsumexp, delta, dk, dv)
    return dq, dk, dv


# As operators they stay whole in torch.compile. Named after the module, which `python -m` loads twice.
LIBRARY = torch.library.Library(__name__.replace(".", "_"), "DEF")
OPERATORS = getattr(torch.ops, LIBRARY.ns)
for function in (forward, backward):
    LIBRARY.define(function.__name__ + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, logsumexp = OPERATORS.forward(query, key, value)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return OPERATORS.backward(*ctx.saved_tensors, output_gradient)


def causal_attention_triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernels, on whatever device the tensors are: query (B, heads, Tq, d), key, value (B, heads, T, d).

    → (B, heads, Tq, d) of the inputs' dtype, or of autocast's. Differentiable once; the same bits every time.
    Raises ValueError for other shapes, Tq > T, d > 128, or dtypes other than float32, float16 and bfloat16.
    """
    check_shapes(query, key, value)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    same = all((x.dtype, x.device) == (query.dtype, query.device) for x in (key, value))
    if not same or query.dtype not in (torch.float32, torch.float16, torch.bfloat16) or query.shape[3] > 128:
        given = ", ".join(f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in (query, key, value))
        raise ValueError("the causal_attention kernels take float32, float16 or bfloat16, one dtype on one "
                         f"device, with a head_dim of at most 128, not {given}")
    return Attention.apply(query, key, value)


def causal_attention_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by torch's fused attention, whose is_causal mask is right only if Tq = T."""
    check_shapes(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    if queries in (1, keys):  # one query sees all keys
        return F.scaled_dot_product_attention(query, key, value, is_causal=bool(queries > 1))
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)  # (Tq, T)
    return F.scaled_dot_product_attention(query, key, value, visible)


def attend_to_cache(query: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """One query at a position, (1,) int64, of a cache (B, heads, capacity, d) × 2 → (B, heads, 1, d). The
    kernel reads the position from memory, so that one CUDA graph serves while the cache fills."""
    output, logsumexp = empty_like_linear(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    launch(forward_kernel, query, keys, values, output, logsumexp, position_ptr=position)
    return output


def kernels_fit(device: torch.device, width: int) -> bool:
    """Whether the kernels run here: an NVIDIA GPU since Ampere (bfloat16), and a head_dim up to 128."""
    return has_tf32(device) and width <= 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, heads, Tq, d), key and value (B, heads, T, d) → (B, heads, Tq, d): by the kernels where they
    fit, else by torch's fused attention. Differentiable. Raises ValueError for other shapes or Tq > T."""
    fit = kernels_fit(query.device, query.shape[-1])
    return (causal_attention_triton if fit else causal_attention_torch)(query, key, value)


def main():
    """Check the kernels against float64, then time them beside the plain form and torch's fused attention."""
    device = describe_device()
    dtype, B, heads, d = (torch.bfloat16, 32, 16, 64) if device.type == "cuda" else (torch.float32, 2, 4, 64)
    forms = {"causal_attention": causal_attention, "plain form": causal_attention_reference}
    if device.type == "cuda":
        forms |= {"torch, flash": sdpa_kernel(SDPBackend.FLASH_ATTENTION)(causal_attention_torch),
                  "torch, cuDNN": sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(causal_attention_torch)}
    for Tq, T in ((256, 256), (341, 341), (512, 512), (1024, 1024), (1, 512)):
        *inputs, gradient = [torch.randn(B, length, heads, d, device=device, dtype=dtype).transpose(1, 2)
                             .requires_grad_() for length in (Tq, T, T, Tq)]
        pairs = B * heads * (Tq * T - Tq * (Tq - 1) // 2)  # of a query and a key that it sees
        moved = gradient.element_size() * B * heads * d * (2 * Tq + 2 * T)
        title = f"({B}, {heads}, {Tq}, {d}), {T} keys"
        with torch.no_grad():
            exact = causal_attention_reference(*(x[:4].double() for x in inputs))
            ours, plain = (float((form(*inputs)[:4] - exact).abs().max())
                           for form in (causal_attention, causal_attention_reference))
            assert ours <= 2 * plain + 1e-5, (ours, plain)
            once = {name: partial(form, *inputs) for name, form in forms.items()}
            compare(f"{title}: forward", once, 4 * d * pairs, moved, "16 bit")
        both = {name: lambda form=form: torch.autograd.grad(form(*inputs), inputs, gradient)
                for name, form in forms.items()}
        compare(f"{title}: and backward", both, 14 * d * pairs, 3 * moved, "16 bit")


if __name__ == "__main__":
    main()
