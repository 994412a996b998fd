"""Compile the kernels for a GPU that is not here, as the wrappers would launch them: one JSON line a kernel.

    python tests/compile_kernels.py 80        for sm_80 (A100); 90 is H100, H200

Triton is told that such a GPU is there, and each launch stops after the compiler. So the argument types, the
tiles and the specialization to aligned strides are those of real calls. Must run without TRITON_INTERPRET.
"""
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import causal_attention_triton, nearest_code_triton  # noqa: E402
from kernels.causal_attention import attend_to_cache  # noqa: E402

TOOLS = Path(nvidia.__file__).parent / "bin"
TENSOR_CORES = ("HMMA", "HGMMA")  # the instructions that multiply there


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


def machine_code(cubin: bytes) -> bytes:
    """The section .text of a kernel's ELF file."""
    headers, = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)  # names: which section holds all names
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    return next(cubin[start:start + length] for name, start, length in sections
                if cubin[sections[names][1] + name:].startswith(b".text."))


def disassemble(cubins: list[bytes], capability: int) -> list[list[tuple[int, str, str]]]:
    """(address, opcode, operands) of each instruction of each kernel; at once, for the start takes long."""
    codes = list(map(machine_code, cubins))
    text = run_tool("nvdisasm", b"".join(codes), "--binary", f"SM{capability}" + "a" * (capability >= 90))
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", text)
    assert len(found) == sum(map(len, codes)) // 16, f"{len(found)} instructions, which have 16 bytes each"
    instructions = iter([(int(address, 16), opcode, operands) for address, opcode, operands in found])
    return [list(itertools.islice(instructions, len(code) // 16)) for code in codes]


def run_tool(name: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True,
                              check=True).stdout


def loops(instructions) -> list[list[tuple[str, str]]]:
    """Opcodes and operands of each loop, shortest first: from the target of a jump backwards to the jump."""
    found = []
    for end, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < end:
            found.append([x for address, *x in instructions if int(target[1], 16) <= address <= end])
    return sorted(found, key=len)


def overwritten(loop) -> set[int]:
    """Registers that a loop writes to while Hopper's tensor cores may still be reading them.

    HGMMA runs on while the next instructions do, and takes its first factor from four registers. Only after
    a DEPBAR that leaves at most n groups of products running, those that `gsb0` closed, may these be written.
    """
    groups, found = [set()], set()  # registers of each group, the last one is not closed yet
    for opcode, operands in 2 * loop:  # the second time, what the end of the loop has left running
        written = re.match(r"(?:P\w, )?R(\d+)", operands)
        if opcode.startswith("HGMMA"):
            factor = re.match(r"R\d+, R(\d+), ", operands)
            groups[-1] |= set(range(int(factor[1]), int(factor[1]) + 4)) if factor else set()
            groups += [set()] if "gsb0" in operands else []
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            running = int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)
            groups = groups[-1 - running:]
        elif written:
            four, two = re.search(r"\.128|\.4$", opcode), re.search(r"\.64|WIDE|\.2$|^CS2R$", opcode)
            after = int(written[1]) + (4 if four else 2 if two else 1)
            found |= set(range(int(written[1]), after)) & set().union(*groups)
    return found


def measure(kernel, instructions: list) -> dict:
    """What became of a kernel, and of its inner step: the shortest loop that multiplies on tensor cores."""
    usage = run_tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    whole = [x for _, *x in instructions]
    step = next((loop for loop in loops(instructions)
                 if any(name.startswith(TENSOR_CORES) for name, _ in loop)), [])
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": sum(name.startswith(("STL", "LDL")) for _, name, _ in instructions),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "tensor_core_instructions": sum(name.startswith(TENSOR_CORES) for _, name, _ in instructions),
        "step": len(step),
        "step_tensor_cores": sum(name.startswith(TENSOR_CORES) for name, _ in step),
        "step_conversions": sum(name.startswith(("F2F", "FSETP", "FMNMX")) for name, _ in step),
        "overwritten": len(set().union(*map(overwritten, [*loops(instructions), whole]))),
        "tf32": ".tf32" in kernel.asm["ptx"],
    }


def variants():
    """(name, call): the kinds of launches. float16 has the tiles and instructions of bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        x, codebook = torch.empty(1, 256, dtype=dtype).expand(65536, 256), torch.empty(1024, 256, dtype=dtype)
        yield f"65536 vectors, {dtype}", lambda: nearest_code_triton(x, codebook)
    odd = torch.empty(65536, 33, dtype=torch.bfloat16)  # loaded without asynchronous copies
    yield "65536 vectors of 33 numbers, torch.bfloat16", lambda: nearest_code_triton(odd, odd[:1024])
    for dtype, length, width in [
            (torch.bfloat16, 341, 64), (torch.bfloat16, 512, 128), (torch.bfloat16, 512, 16),
            (torch.float32, 512, 64), (torch.float32, 341, 128)]:
        inputs = [torch.empty(2, 2, length, width, dtype=dtype, requires_grad=True) for _ in range(3)]
        yield f"T={length}, d={width}, {dtype}", lambda: causal_attention_triton(*inputs).sum().backward()
    query, cache = (torch.empty(2, 2, length, 64, dtype=torch.bfloat16) for length in (1, 256))
    position = torch.zeros(1, dtype=torch.int64)
    yield "T= in memory, d=64, torch.bfloat16", lambda: attend_to_cache(query, cache, cache, position)


def main(capability: int):
    triton.runtime.driver.set_active(AbsentGPU(capability))
    sys.modules["kernels.nearest_code"].generation = lambda device: capability // 10
    kernels, run = [], JITFunction.run
    JITFunction.run = lambda *args, warmup, **options: kernels.append((name, run(*args, warmup=True, **options)))
    for name, call in variants():
        call()
    code = disassemble([kernel.asm["cubin"] for _, kernel in kernels], capability)
    for (name, kernel), instructions in zip(kernels, code):
        print(json.dumps({"variant": name} | measure(kernel, instructions)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
