"""Causal attention: each position looks at itself and what came before (§2; [1] eq. 1 with GPT's mask).

    output_i = Σ_{j ≤ i} p_ij v_j,    p_ij = exp(s_ij) / Σ_{j' ≤ i} exp(s_ij'),    s_ij = q_i·k_j / √d

With fewer queries than keys the queries are the last positions: that is how a key/value cache is read.

The plain form writes the (Tq, T) scores and weights of every head to memory and reads them back several
times: with T = 512 and d = 64 each of these matrices has twice as many entries as q, k, v and the output
together. Flash attention (Dao et al., 2022) never stores them. A program holds one block of queries, walks
over the keys tile by tile and keeps per query the largest score so far m, the sum l = Σ exp(s − m) and the
output so far; when a tile brings a larger score m', what was summed before is multiplied by exp(m − m').

Backward, from the output's gradient dO and with P recomputed from the saved log-sum-exp L_i = m_i + log l_i:

    p_ij = exp(s_ij − L_i)    dV_j = Σ_i p_ij dO_i    dP_ij = dO_i·v_j    δ_i = dO_i·output_i
    dS_ij = p_ij (dP_ij − δ_i)    dQ_i = Σ_j dS_ij k_j / √d    dK_j = Σ_i dS_ij q_i / √d

dQ sums over keys, dK and dV over queries: two kernels, each with its sum inside one program. So no two
programs add to one address, and the gradient is the same to the last bit every time.

The kernels work with powers of two, exp(x) = 2^(x·log₂e), because that is what a GPU computes.

    python -m kernels.causal_attention    checks the kernels and prints a table (without a GPU: plain torch's)

Limits: float32 (IEEE), float16, bfloat16; d from 1 to 128, fastest at powers of two from 16; any T, strides.
Symbols: B batch, Tq queries, T keys, d head_dim.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import compare, describe_device, tl, triton



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
def load_rows(ptr, strides, head, heads, rows, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (R,) of one head of a (B, heads, length, WIDTH) tensor → (R, BLOCK_D); beyond its ends zeros.

    `head` counts the heads of all sequences, `strides` has those of B, heads and length; that of WIDTH is 1.
    """
    columns = tl.arange(0, BLOCK_D)
    ptr += (head // heads).to(tl.int64) * strides[0] + (head % heads).to(tl.int64) * strides[1]
    return tl.load(ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :],
                   mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(x, ptr, strides, head, heads, rows, length, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse: writes x (R, BLOCK_D), rounded to the tensor's dtype."""
    columns = tl.arange(0, BLOCK_D)
    ptr += (head // heads).to(tl.int64) * strides[0] + (head % heads).to(tl.int64) * strides[1]
    tl.store(ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :], x.to(ptr.dtype.element_ty),
             mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))


# ---- forward


@triton.jit
def forward_kernel(
    query_ptr, query_strides,  # (B, heads, Tq, d); strides of the first three axes, in elements
    key_ptr, key_strides, value_ptr, value_strides,  # (B, heads, T, d)
    output_ptr, output_strides,  # (B, heads, Tq, d), written
    logsumexp_ptr,  # (B, heads, Tq) float32, written: L, to base 2
    heads, Tq, T,
    scale,  # log₂e / √d
    WIDTH: tl.constexpr,  # d
    BLOCK_D: tl.constexpr,  # the power of two from d up
    BLOCK_Q: tl.constexpr,  # queries per program
    BLOCK_K: tl.constexpr,  # keys looked at at a time
):
    """One block of queries of one head."""
    blocks = tl.cdiv(Tq, BLOCK_Q)
    head = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks  # the last block sees the most keys: it starts first
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = block * BLOCK_Q + T - Tq  # of the first of these queries in the sequence
    q = load_rows(query_ptr, query_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)  # (BLOCK_Q, BLOCK_D)

    output = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)  # not yet divided by l
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)  # m
    total = tl.zeros((BLOCK_Q,), tl.float32)  # l
    seen_by_all = (position + 1) // BLOCK_K * BLOCK_K
    seen_by_any = tl.minimum(position + BLOCK_Q, T)
    for masked in tl.static_range(2):  # first the keys that all these queries see, then some of them
        for start in range(seen_by_all if masked else 0, seen_by_any if masked else seen_by_all, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(key_ptr, key_strides, head, heads, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
            v = load_rows(value_ptr, value_strides, head, heads, columns, T, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_K)
            if masked:
                scores = tl.where(columns[None, :] <= rows[:, None] + T - Tq, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])
            total = total * rescale + tl.sum(weights, 1)
            output = tl.dot(weights.to(v.dtype), v, output * rescale[:, None], input_precision="ieee")
            largest = new_largest

    output = output / total[:, None]
    store_rows(output, output_ptr, output_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)
    saved = head.to(tl.int64) * Tq + rows
    tl.store(logsumexp_ptr + saved, largest + tl.log2(total), mask=rows < Tq)


# ---- backward


@triton.jit
def query_gradient_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,  # as in `forward_kernel`
    output_ptr, output_strides, output_gradient_ptr, output_gradient_strides,  # (B, heads, Tq, d)
    logsumexp_ptr,  # (B, heads, Tq) float32
    query_gradient_ptr, query_gradient_strides,  # (B, heads, Tq, d), written
    delta_ptr,  # (B, heads, Tq) float32, written: δ, which the next kernel reads
    heads, Tq, T, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dQ of one block of queries: the walk of forward once more."""
    blocks = tl.cdiv(Tq, BLOCK_Q)
    head = tl.program_id(0) // blocks
    block = blocks - 1 - tl.program_id(0) % blocks
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = block * BLOCK_Q + T - Tq
    q = load_rows(query_ptr, query_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)  # (BLOCK_Q, BLOCK_D)
    output = load_rows(output_ptr, output_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)
    output_gradient = load_rows(output_gradient_ptr, output_gradient_strides, head, heads, rows, Tq,
                                WIDTH, BLOCK_D)
    saved = head.to(tl.int64) * Tq + rows
    logsumexp = tl.load(logsumexp_ptr + saved, mask=rows < Tq, other=0.0)  # (BLOCK_Q,)
    delta = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), 1)  # (BLOCK_Q,)
    tl.store(delta_ptr + saved, delta, mask=rows < Tq)

    q_gradient = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)  # not yet divided by √d
    seen_by_all = (position + 1) // BLOCK_K * BLOCK_K
    seen_by_any = tl.minimum(position + BLOCK_Q, T)
    for masked in tl.static_range(2):
        for start in range(seen_by_all if masked else 0, seen_by_any if masked else seen_by_all, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            k = load_rows(key_ptr, key_strides, head, heads, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
            v = load_rows(value_ptr, value_strides, head, heads, columns, T, WIDTH, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_K)
            if masked:
                scores = tl.where(columns[None, :] <= rows[:, None] + T - Tq, scores, float("-inf"))
            weights = tl.exp2(scores - logsumexp[:, None])  # p: L has the normalization in it
            weights_gradient = tl.dot(output_gradient, tl.trans(v), input_precision="ieee")
            scores_gradient = weights * (weights_gradient - delta[:, None])
            if masked:  # the first position has one key, whose weight is 1 whatever its score
                scores_gradient = tl.where(rows[:, None] + T - Tq > 0, scores_gradient, 0.0)
            q_gradient = tl.dot(scores_gradient.to(k.dtype), k, q_gradient, input_precision="ieee")

    q_gradient *= scale * 0.6931471805599453  # ln 2: scale is log₂e / √d, the gradient needs 1/√d
    store_rows(q_gradient, query_gradient_ptr, query_gradient_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)


@triton.jit
def key_value_gradient_kernel(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides,  # as in `forward_kernel`
    output_gradient_ptr, output_gradient_strides,  # (B, heads, Tq, d)
    logsumexp_ptr, delta_ptr,  # (B, heads, Tq) float32
    key_gradient_ptr, key_gradient_strides, value_gradient_ptr, value_gradient_strides,  # written
    heads, Tq, T, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dK and dV of one block of keys: a walk over the queries that see it, with scores as keys by queries."""
    blocks = tl.cdiv(T, BLOCK_K)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks  # the first block is seen by the most queries
    columns = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = load_rows(key_ptr, key_strides, head, heads, columns, T, WIDTH, BLOCK_D)  # (BLOCK_K, BLOCK_D)
    v = load_rows(value_ptr, value_strides, head, heads, columns, T, WIDTH, BLOCK_D)

    k_gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # not yet divided by √d
    v_gradient = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    first_row = block * BLOCK_K - (T - Tq)  # the first query that sees the first of these keys
    sees_one = tl.maximum(first_row, 0) // BLOCK_Q * BLOCK_Q
    sees_all = tl.cdiv(tl.maximum(first_row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q
    for masked in tl.static_range(2):  # first the queries that see all of these keys, then some of them
        last = tl.minimum(sees_all, Tq) if masked else Tq
        for start in range(sees_one if masked else sees_all, last, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = load_rows(query_ptr, query_strides, head, heads, rows, Tq, WIDTH, BLOCK_D)
            output_gradient = load_rows(output_gradient_ptr, output_gradient_strides, head, heads, rows, Tq,
                                        WIDTH, BLOCK_D)
            saved = head.to(tl.int64) * Tq + rows
            logsumexp = tl.load(logsumexp_ptr + saved, mask=rows < Tq, other=0.0)  # (BLOCK_Q,)
            delta = tl.load(delta_ptr + saved, mask=rows < Tq, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_K, BLOCK_Q)
            if masked:
                scores = tl.where(columns[:, None] <= rows[None, :] + T - Tq, scores, float("-inf"))
            weights = tl.exp2(scores - logsumexp[None, :])  # a row beyond Tq adds nothing: its dO and δ are 0
            v_gradient = tl.dot(weights.to(q.dtype), output_gradient, v_gradient, input_precision="ieee")
            weights_gradient = tl.dot(v, tl.trans(output_gradient), input_precision="ieee")
            scores_gradient = weights * (weights_gradient - delta[None, :])
            if masked:  # as above
                scores_gradient = tl.where(rows[None, :] + T - Tq > 0, scores_gradient, 0.0)
            k_gradient = tl.dot(scores_gradient.to(q.dtype), q, k_gradient, input_precision="ieee")

    k_gradient *= scale * 0.6931471805599453  # ln 2, as above
    store_rows(k_gradient, key_gradient_ptr, key_gradient_strides, head, heads, columns, T, WIDTH, BLOCK_D)
    store_rows(v_gradient, value_gradient_ptr, value_gradient_strides, head, heads, columns, T,
               WIDTH, BLOCK_D)


# ---- from torch


def tiles(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Tile shape and schedule: what fits registers and shared memory (tests compile every kind)."""
    wide = width > 64
    if dtype == torch.float32:
        return dict(BLOCK_Q=16 if wide else 32, BLOCK_K=16, num_warps=4, num_stages=2)
    return dict(BLOCK_Q=64, BLOCK_K=32 if wide else 64, num_warps=8 if wide else 4,
                num_stages=2 if wide else 3)


def launch(kernel, per: str, *tensors: Tensor):
    """Run a kernel on query, key, … (its pointers in order): a program per BLOCK_Q or BLOCK_K and head."""
    query, key = tensors[:2]
    B, heads, Tq, width = query.shape
    T = key.shape[2]
    tile = tiles(query.dtype, width)
    blocks = triton.cdiv(Tq if per == "BLOCK_Q" else T, tile[per])
    pointers = sum(([x, x.stride()[:3]] if x.ndim == 4 else [x] for x in tensors), [])
    with torch.cuda.device_of(query):
        kernel[(B * heads * blocks,)](
            *pointers, heads, Tq, T, math.log2(math.e) / math.sqrt(width), WIDTH=width,
            BLOCK_D=max(16, triton.next_power_of_2(width)), **tile)


def empty_like_linear(x: Tensor) -> Tensor:
    """(B, heads, T, d), in memory (B, T, heads, d): as the linear layers before and after have it."""
    B, heads, T, width = x.shape
    return x.new_empty(B, T, heads, width).transpose(1, 2)


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op("kernels::causal_attention", mutates_args=())
def forward_op(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """→ output (B, heads, Tq, d), logsumexp (B, heads, Tq) float32. torch.compile sees one operator."""
    query, key, value = map(with_dense_rows, (query, key, value))
    output, logsumexp = forward_fake(query, key, value)
    launch(forward_kernel, "BLOCK_Q", query, key, value, output, logsumexp)
    return output, logsumexp


@forward_op.register_fake
def forward_fake(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like_linear(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kernels::causal_attention_backward", mutates_args=())
def backward_op(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ gradients of query, key and value."""
    query, key, value, output_gradient = map(with_dense_rows, (query, key, value, output_gradient))
    gradients = backward_fake(query, key, value, output, logsumexp, output_gradient)
    delta = torch.empty_like(logsumexp)
    launch(query_gradient_kernel, "BLOCK_Q", query, key, value, output, output_gradient, logsumexp,
           gradients[0], delta)
    launch(key_value_gradient_kernel, "BLOCK_K", query, key, value, output_gradient, logsumexp, delta,
           *gradients[1:])
    return gradients


@backward_op.register_fake
def backward_fake(query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
                  output_gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_linear(query), empty_like_linear(key), empty_like_linear(value)


def save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # nobody asks for the gradient of the log-sum-exp
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, output_gradient: Tensor, _) -> tuple[Tensor, Tensor, Tensor]:
    return backward_op(*ctx.saved_tensors, output_gradient)


forward_op.register_autograd(backward, setup_context=save_for_backward)


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
        raise ValueError(
            "the causal_attention kernels take float32, float16 or bfloat16, one dtype on one device, with a "
            f"head_dim of at most 128, not {tuple(query.shape)} of {query.dtype} on {query.device}, "
            f"{key.dtype} on {key.device} and {value.dtype} on {value.device}")
    return forward_op(query, key, value)[0]


def causal_attention_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by torch's fused attention, whose own causal mask is right only for as many queries as keys."""
    check_shapes(query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if queries == 1:  # it sees all keys
        return F.scaled_dot_product_attention(query, key, value)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)  # (Tq, T)
    return F.scaled_dot_product_attention(query, key, value, visible)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, heads, Tq, d), key and value (B, heads, T, d) → (B, heads, Tq, d); differentiable.

    The kernels on a GPU, torch's fused attention elsewhere. Raises ValueError for other shapes or Tq > T.
    """
    attend = causal_attention_triton if query.is_cuda else causal_attention_torch
    return attend(query, key, value)


def main():
    """Check the kernels against float64, then time them beside the plain form and torch's fused attention."""
    device = describe_device()
    dtype, B, heads, d = (torch.bfloat16, 32, 16, 64) if device.type == "cuda" else (torch.float32, 2, 4, 64)

    def draw(T: int) -> Tensor:
        return torch.randn(B, T, heads, d, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    forms = {"causal_attention_reference": causal_attention_reference, "torch's fused attention": causal_attention_torch}
    if device.type == "cuda":
        forms["causal_attention_triton"] = causal_attention_triton
    for Tq, T in ((256, 256), (341, 341), (512, 512), (1024, 1024), (1, 512)):
        inputs, gradient = [draw(Tq), draw(T), draw(T)], draw(Tq).detach()
        pairs = B * heads * (Tq * T - Tq * (Tq - 1) // 2)  # of a query and a key that it sees
        moved = gradient.element_size() * B * heads * d * (2 * Tq + 2 * T)
        name = f"({B}, {heads}, {Tq}, {d}), {T} keys"
        with torch.no_grad():
            exact = causal_attention_reference(*(x[:4].double() for x in inputs))
            errors = {form: float((forms[form](*inputs)[:4] - exact).abs().max()) for form in forms}
            assert max(errors.values()) <= 2 * errors["causal_attention_reference"] + 1e-5, errors
            compare(f"{name}: forward", {form: partial(forms[form], *inputs) for form in forms},
                    4 * d * pairs, moved, "16 bit")
        if Tq > 1:
            both = {form: lambda form=form: torch.autograd.grad(forms[form](*inputs), inputs, gradient)
                    for form in forms}
            compare(f"{name}: and backward", both, 14 * d * pairs, 3 * moved, "16 bit")


if __name__ == "__main__":
    main()
