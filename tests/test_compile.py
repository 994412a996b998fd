"""What the compiler makes of each kernel for GPUs that are not here. Oracle: the assembler's own report."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SHARED_MEMORY_OF_ALL = 101376  # bytes that consumer GPUs (sm_86, sm_89, sm_120) offer, too


@pytest.fixture(scope="module")
def reports():
    """(target, what compile_kernels.py reports of a kernel), for both targets at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {target: subprocess.Popen([sys.executable, HERE / "compile_kernels.py", target], text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
                 for target in ("80", "90")}
    lines = []
    for target, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        lines += [(target, json.loads(line)) for line in output.splitlines()]
    return lines


def test_every_kernel_compiles_for_every_dtype_and_target(reports):
    for target in ("80", "90"):
        kernels = [(report["kernel"], report["variant"].split("torch.")[1])
                   for compiled_for, report in reports if compiled_for == target]
        for dtype in ("float32", "bfloat16"):
            for kernel in ("common_offset_kernel", "nearest_code_kernel", "forward_kernel",
                           "query_gradient_kernel", "key_value_gradient_kernel"):
                assert (kernel, dtype) in kernels


def test_no_kernel_spills_registers(reports):
    assert [report for _, report in reports if report["spilled_bytes"]] == []


def test_shared_memory_suffices_on_consumer_gpus_too(reports):
    assert max(report["shared_bytes"] for _, report in reports) <= SHARED_MEMORY_OF_ALL


def test_tensor_cores_multiply(reports):
    for _, report in reports:
        ieee = "ieee" in report["variant"]
        attention_in_16_bits = "queries" in report["variant"] and "float16" in report["variant"]
        if attention_in_16_bits or report["kernel"] == "nearest_code_kernel" and not ieee:
            assert report["tensor_core_instructions"] > 0, report


def test_tf32_is_used_only_where_three_of_it_make_a_float32(reports):
    for _, report in reports:
        expected = report["kernel"] == "nearest_code_kernel" and "ieee" not in report["variant"]
        assert report["tf32"] == expected, report
