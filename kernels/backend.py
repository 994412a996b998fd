"""What the kernel files share: Triton where the system has it, the GPU's size, the timing of their tables."""
import torch
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the kernels stay plain functions that nothing calls
    class triton:
        jit = staticmethod(lambda kernel: kernel)

    class tl:
        constexpr = int

MULTIPROCESSORS = 132  # of an H100 or H200; what the interpreter pretends to have
# TFLOP/s of TF32 and of 16-bit floats, TB/s of memory: 80 %, 80 % and 90 % of what the data sheets say.
ATTAINABLE = {"H200": (395, 790, 4.3), "H100": (395, 790, 3.0)}


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def float32_precision(device: torch.device) -> str:
    """How `tl.dot` multiplies float32: 3xTF32 on tensor cores (NVIDIA since Ampere) is as exact as IEEE."""
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "ieee"
    return "tf32x3"


def compare(title: str, forms: dict, flops: float, bytes_moved: float, tensor_cores: str):
    """Time several functions that do the same and print a line each; `tensor_cores` is "tf32x3" or "16 bit".

    On a GPU: medians with a cold cache (triton's timer), rates, the share of that time which the GPU needs at
    the attainable rate of its arithmetic or memory, and the memory taken. Without one: ratios to the fastest.
    """
    medians, taken = {}, {}
    for name, function in forms.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            medians[name] = triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median") / 1e3
            taken[name] = torch.cuda.max_memory_allocated() - before
        else:
            medians[name] = Timer("function()", globals={"function": function}).blocked_autorange().median
    fastest = min(medians.values())
    for name, time in medians.items():
        line = f"{title:42} {name:28} {time / fastest:6.2f}×"
        if torch.cuda.is_available():
            line += f" {1e6 * time:10.1f} µs {flops / time / 1e12:7.1f} TFLOP/s"
            line += f" {bytes_moved / time / 1e9:7.0f} GB/s"
            for rates in (ATTAINABLE[gpu] for gpu in ATTAINABLE if gpu in torch.cuda.get_device_name()):
                arithmetic = rates[0] / 3 if tensor_cores == "tf32x3" else rates[1]
                floor = max(flops / arithmetic, bytes_moved / rates[2]) / 1e12
                line += f" {100 * floor / time:4.0f} % of the floor"
            line += f" {taken[name] / 2 ** 20:8.1f} MiB"
        print(line, flush=True)


def describe_device() -> torch.device:
    """The device of a table, named in its first line."""
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
        return torch.device("cuda")
    print(f"No GPU here: the references in plain torch {torch.__version__}, on {torch.get_num_threads()} CPU "
          "threads. Ratios to the fastest:")
    return torch.device("cpu")
