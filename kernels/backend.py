"""What the kernel files share: Triton where the system has it, the GPU's size, the timing of their tables."""
import statistics
import time

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels stay plain functions that nothing calls
    class triton:
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = int

MULTIPROCESSORS = 132  # of an H100 or H200; what the interpreter pretends to have
# Of one GPU: TFLOP/s of dense TF32, TFLOP/s of dense 16-bit floats, TB/s of memory (NVIDIA's data sheets).
PEAKS = {"H200": (494.7, 989.4, 4.8), "H100": (494.7, 989.4, 3.35), "A100": (156.0, 312.0, 2.04)}


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at one a multiprocessor."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def float32_precision(device: torch.device) -> str:
    """How `tl.dot` multiplies float32: 3xTF32 on tensor cores (NVIDIA since Ampere) is as exact as IEEE."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "ieee"
    return "tf32x3"


def peaks() -> tuple[float, float, float] | None:
    """This GPU's row of `PEAKS`; None if it is not listed."""
    name = torch.cuda.get_device_name()
    return next((PEAKS[key] for key in PEAKS if key in name), None)


def seconds(function) -> float:
    """Median time of a call: on a GPU triton's timer (with a cold L2 cache), else a stop-watch over 5 calls."""
    if torch.cuda.is_available():
        return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median") / 1e3
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
