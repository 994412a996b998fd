"""A stricter Triton interpreter: `with strict(): kernel[grid](...)`. Needs TRITON_INTERPRET=1 (conftest.py).

Triton's own interpreter runs a kernel on the CPU, but forgives what a GPU does not. This one

  * checks each address against the tensors of the launch: IndexError;
  * notices when two programs write one address, or one reads what another wrote: RuntimeError;
  * fills masked lanes of a load that gives no `other` with NaN, a large negative and a large positive number;
  * turns an int32 overflow into an AssertionError (triton's own sanitizer, switched on);
  * rounds to bfloat16 as hardware does, multiplies real bfloat16 numbers, refuses other arithmetic on them;
  * drops the bits that TF32 drops where `input_precision="tf32"` is asked for, and sums a dot in float64;
  * wants 16 numbers or more to be summed in `tl.dot`, as the compiler does;
  * runs the programs of the grid in random order, or only some: `strict(only=lambda programs: {0})`.

Triton raises them as InterpreterError, with their names in the message.

It replaces private parts of triton.runtime.interpreter, of the version that requirements.txt pins.
"""
import contextlib
import dataclasses
import random
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = type(interpreter.interpreter_builder)
Executor = interpreter.GridExecutor
# The stock methods, before anything is replaced:
init_arguments, call = Executor._init_args_hst, Executor.__call__
load, store = Builder.create_masked_load, Builder.create_masked_store
cast, arithmetic = Builder.cast_impl, Builder.binary_op
set_grid, set_program = Builder.set_grid_dim, Builder.set_grid_idx
patch_language, get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
np_dtypes = {}  # by the names of triton's


def float_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bfloat16_from_float(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as the hardware does; the interpreter would truncate."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def tf32_from_float(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def numbers(handle) -> np.ndarray:
    """A handle's values as float32 (float16 and bfloat16 lose nothing)."""
    return float_from_bfloat16(handle.data) if is_bfloat16(handle) else handle.data.astype(np.float32)


def garbage(shape, dtype) -> interpreter.TensorHandle:
    """What masked lanes may hold: something that a sum, a minimum, a maximum or a product notices."""
    kind = interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        values = np.array([0x7FC0, 0xF149, 0x7149], np.uint16)  # NaN, −1e30, 1e30
    elif np.issubdtype(kind, np.floating):
        large = 6e4 if kind == np.float16 else 1e30
        values = np.array([np.nan, -large, large], kind)
    elif np.issubdtype(kind, np.integer):
        values = np.array([np.iinfo(kind).max, np.iinfo(kind).min], kind)
    else:
        values = np.array([True, False])
    return interpreter.TensorHandle(np.resize(values, shape).astype(kind), dtype)


class Memory:
    """One tensor of a launch: the addresses it spans and, per element, which program wrote it (−1: none)."""

    def __init__(self, tensor):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.size = tensor.element_size()
        self.first = tensor.data_ptr()
        self.end = self.first + elements * self.size
        self.writer = np.full(elements, -1, np.int32) if elements < 2 ** 26 else None

    def touch(self, addresses: np.ndarray, size: int, program: int, what: str) -> np.ndarray:
        """Which of the addresses lie here. Raises RuntimeError for a race, and notes who writes."""
        here = (addresses >= self.first) & (addresses + np.uint64(size) <= self.end)
        if self.writer is not None and here.any():
            elements = (addresses[here] - np.uint64(self.first)) // np.uint64(self.size)
            writers = self.writer[elements.astype(np.int64)]
            others = writers[(writers >= 0) & (writers != program)]
            if others.size:
                raise RuntimeError(f"race: program {program} {what}s what program {others[0]} wrote")
            if what == "store":
                self.writer[elements.astype(np.int64)] = program
        return here


class Launches:
    """What the strict interpreter knows about the launch that is running; its methods replace triton's."""

    def __init__(self, only, seed: int):
        self.only = only
        self.seed = seed
        self.memory = []
        self.program = 0  # that runs now, as a number
        self.grid = self.loop = (1, 1, 1)  # what the kernel is told; what is really looped over
        self.order = [0]  # the programs, in the order of that loop
        self.patched = set()  # modules of functions that the launch has called

    def tensors(self, arguments) -> list:
        found = []
        for argument in arguments:
            argument = getattr(argument, "base", argument)
            if isinstance(argument, tuple):
                found += self.tensors(argument)
            elif hasattr(argument, "data_ptr") and argument.numel():
                found.append(argument)
        return found

    def patches(self) -> list:
        """(class, name of its method, what it does here)."""

        def init(executor, arguments, options):
            arguments, options = init_arguments(executor, arguments, options)
            self.memory = [Memory(tensor) for tensor in self.tensors([*arguments, *options.values()])]
            return arguments, options

        def launch(executor, *arguments, **options):
            whole = executor.grid

            def grid_of_some(meta):
                grid = tuple(whole(meta) if callable(whole) else whole)
                self.grid = grid + (1,) * (3 - len(grid))
                programs = int(np.prod(self.grid))
                self.order = sorted(self.only(programs)) if self.only else list(range(programs))
                random.Random(self.seed).shuffle(self.order)
                return (len(self.order),)

            self.patched.clear()
            with mock.patch.object(executor, "grid", grid_of_some):
                return call(executor, *arguments, **options)

        def patch_once(function):  # not at each call of a function, which takes a third of the time
            if id(function.__globals__) not in self.patched:
                self.patched.add(id(function.__globals__))
                return patch_language(function)

        def set_real_grid(builder, *loop):
            set_grid(builder, *self.grid)

        def set_real_program(builder, x, y, z):
            self.program = self.order[x]
            rest, last = divmod(self.program, self.grid[2])
            set_program(builder, *divmod(rest, self.grid[1]), last)

        def checked_load(builder, pointers, mask, other, *rest):
            self.touch(pointers, mask, "load")
            if other is None and not np.asarray(mask.data).all():
                other = garbage(np.shape(pointers.data), pointers.get_element_ty())
            return load(builder, pointers, mask, other, *rest)

        def checked_store(builder, pointers, value, mask, *rest):
            self.touch(pointers, mask, "store")
            return store(builder, pointers, value, mask, *rest)

        return [(Executor, "_init_args_hst", init), (Executor, "__call__", launch),
                (Executor, "_restore_args_dev", lambda *_: None),  # CPU tensors were not copied
                (interpreter, "_patch_lang", patch_once), (interpreter, "_get_np_dtype", known_np_dtype),
                (Builder, "set_grid_dim", set_real_grid), (Builder, "set_grid_idx", set_real_program),
                (Builder, "create_masked_load", checked_load),
                (Builder, "create_masked_store", checked_store), (Builder, "cast_impl", rounding_cast),
                (Builder, "create_dot", exact_dot), (Builder, "binary_op", refusing_arithmetic)]

    def touch(self, pointers, mask, what: str):
        addresses, lanes = np.broadcast_arrays(np.asarray(pointers.data), np.asarray(mask.data))
        addresses = addresses[lanes]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        known = np.zeros(addresses.shape, bool)
        for memory in self.memory:
            known |= memory.touch(addresses, size, self.program, what)
        if not known.all():
            raise IndexError(f"out-of-bounds {what} of {int((~known).sum())} element(s)")


def known_np_dtype(dtype) -> np.dtype:
    """The stock function builds a table at each call, a fifth of all time."""
    name = dtype.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = get_np_dtype(dtype)
    return np_dtypes[name]


def rounding_cast(builder, source, target):
    if is_bfloat16(source) and target.scalar != tl.bfloat16:
        real = interpreter.TensorHandle(float_from_bfloat16(source.data), tl.float32)
        return real if target.scalar == tl.float32 else cast(builder, real, target)
    if target.scalar == tl.bfloat16 and not is_bfloat16(source):
        return interpreter.TensorHandle(bfloat16_from_float(np.asarray(source.data, np.float32)), tl.bfloat16)
    return cast(builder, source, target)


def exact_dot(builder, x, y, accumulator, precision, *rest):
    left, right = numbers(x), numbers(y)
    if x.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
        left, right = tf32_from_float(left), tf32_from_float(right)
    # In float64, for a BLAS may sum the same numbers in another order where they stand in another column.
    total = np.matmul(left.astype(np.float64), right.astype(np.float64)) + accumulator.data
    return interpreter.TensorHandle(total.astype(accumulator.data.dtype), accumulator.dtype.scalar)


def refusing_arithmetic(builder, left, right, operation):
    if is_bfloat16(left) or is_bfloat16(right):
        raise TypeError("arithmetic on bfloat16: cast to float32 first")
    return arithmetic(builder, left, right, operation)


@contextlib.contextmanager
def strict(only=None, seed: int = 0):
    """Kernels launched inside run strictly; `only` maps the number of programs to the set of those to run."""
    builder = interpreter.interpreter_builder
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in Launches(only, seed).patches():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        sanitizing = dataclasses.replace(builder.options, debug=True)
        stack.enter_context(mock.patch.object(builder, "options", sanitizing))
        stack.enter_context(mock.patch.dict(builder.codegen_fns, min_dot_size=lambda left, right: (1, 1, 16)))
        yield
