"""What the kernel files share: Triton where the system has it, the GPU's size, the timing of their tables."""
import functools

import torch
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:  # macOS, Windows: the kernels stay plain functions that nothing calls
    HAS_TRITON = False

    class triton:
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = int

# TFLOP/s of tensor cores (3xTF32: a third of TF32) and TB/s: 80 % and 90 % of what the data sheets say.
ATTAINABLE = {"H200": {"3xTF32": 132, "16 bit": 790, "memory": 4.3},
              "H100": {"3xTF32": 132, "16 bit": 790, "memory": 3.0}}


def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a GPU; for CPU tensors, in Triton's interpreter, that of an H100 or H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def can_launch() -> bool:
    """Whether Triton can build its launcher, for which it needs a C compiler and Python's headers."""
    try:
        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # RuntimeError without a compiler, CalledProcessError without Python.h
        print(f"torch's kernels instead of Triton's, which need a C compiler and Python's headers: {error}",
              flush=True)
        return False
    return True


capability = functools.cache(torch.cuda.get_device_capability)  # asked for at each call of a kernel


def generation(device: torch.device) -> int:
    """Compute capability's major: 8 Ampere, 9 Hopper, 10 Blackwell; for CPU tensors 9."""
    return capability(device)[0] if device.type == "cuda" else 9


def has_tf32(device: torch.device) -> bool:
    """Whether Triton works, and tensor cores multiply TF32 and bfloat16: NVIDIA GPUs since Ampere."""
    return (HAS_TRITON and device.type == "cuda" and torch.version.hip is None
            and capability(device) >= (8, 0) and can_launch())


# For torch.compile, which asks once. torch.compiler.assume_constant_result does the same, but imports all of
# the compiler: two seconds at the start of each script.
has_tf32._dynamo_marked_constant = True


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 3 µs a call."""
    return -(-a // b)


def compare(title: str, forms: dict, flops: float, bytes_moved: float, tensor_cores: str):
    """Time several functions that do the same and print a line each; `tensor_cores` is "3xTF32" or "16 bit".

    On a GPU: memory taken, median of a call from Python, that of its kernels alone (a replayed CUDA graph),
    the latter's rate, and the share of it that attainable arithmetic or bandwidth would take (a roofline).
    The last number is the ratio to the first form's time. A form that cannot run is named.
    """
    on_gpu, first = torch.cuda.is_available(), None
    for name, function in forms.items():
        line = f"{title:42} {name:28}"
        try:
            function()  # compiles
            timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
            time = timer.blocked_autorange().median
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                function()
                taken = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
                line += f" {taken:8.1f} MiB {1e6 * time:9.1f} µs eager"
                time = triton.testing.do_bench_cudagraph(function, return_mode="median") / 1e3
                line += f" {1e6 * time:9.1f} µs graph {flops / time / 1e12:7.1f} TFLOP/s"
        except RuntimeError as error:
            print(line, str(error).splitlines()[0], flush=True)
            continue
        for gpu, rates in ATTAINABLE.items():
            if on_gpu and gpu in torch.cuda.get_device_name():
                floor = max(flops / rates[tensor_cores], bytes_moved / rates["memory"]) / 1e12
                line += f" {100 * floor / time:4.0f} % of the floor"
        first = first or time
        print(f"{line} {time / first:6.2f}×", flush=True)


def describe_device() -> torch.device:
    """The device of a table, named in its first line."""
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
        return torch.device("cuda")
    print(f"No GPU: torch {torch.__version__}, {torch.get_num_threads()} CPU threads. Ratios to the first:")
    return torch.device("cpu")
