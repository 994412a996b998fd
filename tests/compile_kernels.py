"""Compile the kernels for GPUs that are not here, as the wrappers would launch them: one JSON line a kernel.

    python tests/compile_kernels.py 80        for sm_80 (A100); 90 is H100, H200

Triton is told that such a GPU is there, and each launch stops after the compiler. So the argument types, the
tiles and the specialization to aligned strides are those of real calls. Must run without TRITON_INTERPRET.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import causal_attention_triton, nearest_code_triton  # noqa: E402

lookup = sys.modules["kernels.nearest_code"]
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes a program may have


class AbsentGPU:
    """What triton asks a driver before it compiles."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def measure(kernel, capability: int) -> dict:
    """What the assembler says about a compiled kernel, and which instructions multiply."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", source, "-o", f"{source}.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": SHARED_MEMORY[capability],
        "warps": kernel.metadata.num_warps,
        "tensor_core_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "tf32": ".tf32" in ptx,
    }


def variants():
    """(name, call): every kind of launch. The large tensors are never read: one row stands for all."""
    for dtype in (torch.float32, torch.bfloat16):
        for vectors in (3072, 65536):
            x = torch.empty(1, 256, dtype=dtype).expand(vectors, 256)
            codebook = torch.empty(1024, 256, dtype=dtype)
            yield f"{vectors} vectors, {dtype}", lambda: nearest_code_triton(x, codebook)
    precision, lookup.float32_precision = lookup.float32_precision, lambda device: "ieee"
    x, codebook = torch.empty(1, 256).expand(3072, 256), torch.empty(1024, 256)
    yield "3072 vectors, torch.float32, ieee", lambda: nearest_code_triton(x, codebook)
    lookup.float32_precision = precision
    widths = {torch.float32: (32, 64, 128), torch.bfloat16: (16, 64, 80, 128), torch.float16: (64,)}
    for dtype in widths:
        for width in widths[dtype]:
            for queries, keys in [(512, 512), (341, 351)] if width == 64 else [(512, 512)]:
                shapes = [(2, 2, queries, width), (2, 2, keys, width), (2, 2, keys, width)]
                inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
                name = f"{queries} queries, {keys} keys, d={width}, {dtype}"
                yield name, lambda: causal_attention_triton(*inputs).sum().backward()


def main(capability: int):
    triton.runtime.driver.set_active(AbsentGPU(capability))
    compiled, run = [], JITFunction.run
    JITFunction.run = lambda *args, warmup, **options: compiled.append(run(*args, warmup=True, **options))
    for name, call in variants():
        compiled.clear()
        call()
        for kernel in compiled:
            print(json.dumps({"variant": name} | measure(kernel, capability)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
