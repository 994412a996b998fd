"""The strict interpreter sees what triton's own lets pass. Oracle: small kernels with one fault each."""
import contextlib

import pytest
import torch
import triton
import triton.language as tl

from triton.runtime.errors import InterpreterError

from strict_interpreter import strict

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels run natively")


def refused(match):
    return pytest.raises(InterpreterError, match=match)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, GUARD: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if GUARD == "store":
        x = tl.load(x_ptr + i)
    elif GUARD == "without other":
        x = tl.load(x_ptr + i, mask=i < n)
    else:
        x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if GUARD == "store" or GUARD == "both":
        tl.store(y_ptr + i, x, mask=i < n)
    else:
        tl.store(y_ptr + i, x)


@triton.jit
def same_place_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def chain_kernel(y_ptr):
    before = tl.load(y_ptr + tl.maximum(tl.program_id(0) - 1, 0))
    tl.store(y_ptr + tl.program_id(0), before + 1)


@triton.jit
def offset_kernel(y_ptr, n, WIDE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    tl.store(y_ptr + i * n, 1.0)


@triton.jit
def product_kernel(x_ptr, y_ptr, z_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    where = i[:, None] * SIZE + i[None, :]
    product = tl.dot(tl.load(x_ptr + where), tl.load(y_ptr + where), input_precision=PRECISION)
    tl.store(z_ptr + where, product.to(z_ptr.dtype.element_ty))


@triton.jit
def sum_kernel(x_ptr, y_ptr, z_ptr, UPCAST: tl.constexpr):
    i = tl.arange(0, 16)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if UPCAST:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(z_ptr + i, (x + y).to(z_ptr.dtype.element_ty))


def test_an_address_outside_every_tensor_is_an_error():
    memory = torch.arange(100.0)  # so that the fault, where it is let pass, hurts nothing
    with strict():
        copy_kernel[(3,)](memory[:10], memory[50:60], 10, BLOCK=4, GUARD="both")
    assert torch.equal(memory[:10], memory[50:60])
    for guard, what in [("load", "store"), ("store", "load")]:
        with strict(), refused(f"IndexError.*out-of-bounds {what} of 2 element"):
            copy_kernel[(3,)](memory[:10], memory[50:60], 10, BLOCK=4, GUARD=guard)


def test_masked_lanes_without_other_hold_garbage():
    y = torch.zeros(16)
    with strict():
        copy_kernel[(1,)](torch.ones(16), y, 4, BLOCK=16, GUARD="without other")
    assert torch.equal(y[:4], torch.ones(4))
    assert y[4:].isnan().any() and (y[4:] > 1e29).any() and (y[4:] < -1e29).any()


def test_writing_or_reading_what_another_program_wrote_is_a_race():
    with strict(), refused("RuntimeError.*race"):
        same_place_kernel[(2,)](torch.zeros(1))
    with strict(), refused("RuntimeError.*race: program .* loads what program"):
        chain_kernel[(4,)](torch.zeros(4))


def test_offsets_beyond_32_bits_overflow_unless_they_are_wide():
    y = torch.empty(2 ** 31 + 8, dtype=torch.int8)  # never touched: costs no memory
    with strict(only=lambda programs: {programs - 1}), refused("AssertionError.*overflow"):
        offset_kernel[(2 ** 16 + 1,)](y, 2 ** 15, WIDE=False)
    with strict(only=lambda programs: {programs - 1}):
        offset_kernel[(2 ** 16 + 1,)](y, 2 ** 15, WIDE=True)
    assert y[2 ** 31] == 1


def test_only_the_named_programs_run_and_all_see_the_whole_grid():
    x, y = torch.arange(1.0, 13.0), torch.zeros(12)
    with strict(only=lambda programs: {0, programs - 1}):
        copy_kernel[(3,)](x, y, 12, BLOCK=4, GUARD="both")
    assert y.tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 11, 12]


def test_bfloat16_is_multiplied_and_rounded_as_hardware_does():
    x, y = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    product = torch.empty(16, 16, dtype=torch.bfloat16)
    with strict():
        product_kernel[(1,)](x, y, product, SIZE=16, PRECISION="ieee")
    assert torch.equal(product, (x.float() @ y.float()).bfloat16())
    total = torch.empty(16, dtype=torch.bfloat16)
    with strict():
        sum_kernel[(1,)](x[0], y[0], total, UPCAST=True)
        assert torch.equal(total, x[0] + y[0])
        with refused("TypeError.*arithmetic on bfloat16"):
            sum_kernel[(1,)](x[0], y[0], total, UPCAST=False)


def test_tf32_drops_13_bits_and_a_dot_does_not_depend_on_the_column_it_stands_in():
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    y[:, 1:] = y[:, :1]
    product = torch.empty(32, 32)
    for precision, left, right in [("ieee", x, y), ("tf32x3", x, y), ("tf32", truncated(x), truncated(y))]:
        with strict():
            product_kernel[(1,)](x, y, product, SIZE=32, PRECISION=precision)
        torch.testing.assert_close(product.double(), left.double() @ right.double(), atol=2e-6, rtol=0)
        assert (product == product[:, :1]).all()


def truncated(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_a_product_over_fewer_than_16_is_refused():
    x = torch.ones(8, 8)
    with strict(), refused("AssertionError.*K >= 16"):
        product_kernel[(1,)](x, x, x.clone(), SIZE=8, PRECISION="ieee")


def test_afterwards_triton_is_as_it_was():
    with contextlib.suppress(ValueError), strict():
        raise ValueError
    memory = torch.zeros(100)
    copy_kernel[(3,)](memory[:10], memory[50:60], 10, BLOCK=4, GUARD="load")  # out of bounds, unnoticed
