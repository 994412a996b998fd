"""Speed, memory and total time of training and sampling, measured before a run (`--benchmark`)."""
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

import cifar10
import scenes
from files import RESTRICTED
from gpt import Sampling
from kernels.causal_attention import OPERATORS
from outputs import announce, duration, memory, si
from run import autocast
from stages import Prior, Stages

ATEN = torch.ops.aten
FORMULAS = flop_registry | {  # attention on a CPU, and our kernels
    ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    OPERATORS.forward: sdpa_flop,
    OPERATORS.backward: lambda q, k, v, output, *_, **__: sdpa_backward_flop(output, q, k, v)}
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # FLOP/s in bfloat16, dense, NVIDIA's data sheets


class CountOperations(TorchDispatchMode):  # torch's FlopCounterMode fails at autograd.grad, for λ
    """Sums up floating-point operations: of matrix products, convolutions, and attention as if unmasked."""

    flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        formula = FORMULAS.get(operation._overloadpacket)
        self.flops += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


def benchmark_training(train_step: Callable[[], Any], config: Any, device: torch.device, unit: str,
                       units: int):
    """Print what all steps of a run will cost, from the median of five on this machine.

    `units` of each picture: 1 image, or T tokens. Share of the peak: the step's operations against the GPU's
    data sheet, or against a large matrix product where that is not known.
    """
    def measure(step: Callable[[], Any]) -> float:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    with torch.compiler.set_stance("force_eager"), CountOperations() as counted:
        train_step()
    for _ in range(2):
        measure(train_step)  # compiles and chooses algorithms; then records CUDA graphs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the steps before may have taken more
    seconds = statistics.median(measure(train_step) for _ in range(5))
    rate = counted.flops / seconds
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    peak = next((peak for gpu, peak in PEAKS.items() if gpu in name), None)
    if not peak:
        size = 8192 if device.type == "cuda" else 2048  # large enough not to measure the launch
        x = torch.rand(size, size, device=device)
        with autocast(device):
            x = x @ x  # of the dtype that steps multiply in
            peak = 2 * size**3 / min(measure(lambda: x @ x) for _ in range(5))
    announce(f"{seconds * 1e3:.4g} ms/step · {si(config.batch_size * units / seconds)} {unit}/s · "
             f"{rate / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s ({rate / peak:.0%} of {name}'s peak) · "
             f"{memory(device):.1f} GiB\n{config.steps:,} steps of {config.batch_size} pictures, "
             f"{config.steps * config.batch_size:,} in all: {duration(config.steps * seconds)}, without "
             "loading, evaluation and saving")


def random_codes(config: Any, stages: Stages) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """A batch of random codes, of the shape and in the place of what `encode_pictures` returns."""
    random, B = np.random.default_rng(config.seed), config.batch_size
    known = {"scenes": scenes.CLASSES, "cifar10": cifar10.CLASSES, "restricted-imagenet": tuple(RESTRICTED)}
    names = known.get(config.data, tuple(map(str, range(1000)))) if "class" in stages else ()
    codes = {field: random.integers(stage.codebook_size, size=(B, stage.side, stage.side)) if stage
             else random.integers(len(names), size=B) for field, stage in stages.items()}
    return codes, codes, {"classes": list(names)}


def benchmark_sampling(prior: Prior, batch_size: int, sampling: Sampling):
    """Print tokens and pictures per second, with and without the key/value cache, decoding included.

    On a GPU also without the CUDA graph of the steps with the cache.
    """
    T, length, times = sum(prior.layout.lengths), prior.layout.condition_length, {}
    condition = torch.zeros(batch_size, length, dtype=torch.int64) if length else None
    forms = {"cached": {}, "cached, no CUDA graph": {"captured": False}, "uncached": {"cached": False}}
    for name, flags in forms.items():
        if "captured" in flags and prior.device.type != "cuda":
            continue
        for attempt in range(2):  # the first warms up
            began = time.perf_counter()
            tokens = prior.sample(batch_size, condition, None, sampling, **flags)
            prior.pictures(tokens).sum().item()  # waits for the GPU
            times[name] = time.perf_counter() - began
        rate = batch_size / times[name]
        print(f"{name}: {batch_size} pictures of {T} tokens in {times[name]:.3f} s · {rate:.2f} pictures/s · "
              f"{si(rate * T)} tokens/s · {prior.device}", flush=True)
    print(f"the cache makes sampling {times['uncached'] / times['cached']:.1f} times as fast")
