"""What the compiler makes of each kernel for GPUs that are not here. Oracle: the assembler's own report."""
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SHARED_MEMORY_OF_ALL = 101376  # bytes that consumer GPUs (sm_86, sm_89, sm_120) offer, too


@pytest.fixture(scope="module")
def reports():
    """What compile_kernels.py reports of each kernel, for both targets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script, lines = Path(__file__).with_name("compile_kernels.py"), []
    processes = {target: subprocess.Popen([sys.executable, script, target], text=True, env=environment,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for target in ("80", "90")}
    for target, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        lines += [{"target": target} | json.loads(line) for line in output.splitlines()]
    return lines


this_compiler = pytest.mark.skipif(version("triton") != "3.7.1", reason="another compiler makes other code")


def test_every_kernel_compiles_for_every_target(reports):
    for target in ("80", "90"):
        assert {report["kernel"] for report in reports if report["target"] == target} == {
            "common_offset_kernel", "prepare_codebook_kernel", "nearest_code_kernel", "forward_kernel",
            "query_gradient_kernel", "key_value_gradient_kernel"}


@this_compiler
def test_no_kernel_spills_registers(reports):
    assert [report for report in reports if report["spills"]] == []


def test_no_register_is_overwritten_while_tensor_cores_read_it(reports):
    assert [report for report in reports if report["overwritten"]] == []


def test_shared_memory_suffices_on_consumer_gpus_too(reports):
    assert max(report["shared_bytes"] for report in reports) <= SHARED_MEMORY_OF_ALL


def test_tensor_cores_multiply_and_in_tf32_only_what_was_split_for_it(reports):
    for report in reports:
        lookup = report["kernel"] == "nearest_code_kernel"
        attention_in_16_bits = "T=" in report["variant"] and "bfloat16" in report["variant"]
        assert (report["tensor_core_instructions"] > 0) == (lookup or attention_in_16_bits), report
        assert report["tf32"] == lookup, report


@this_compiler
@pytest.mark.parametrize("kernel, variant, most", [
    ("nearest_code_kernel", "65536 vectors, torch.float32", 320),  # 160 for 16 dimensions
    ("query_gradient_kernel", "T=341, d=64, torch.bfloat16", 190),
    ("key_value_gradient_kernel", "T=341, d=64, torch.bfloat16", 235)])
def test_the_inner_step_is_short_on_an_h100(reports, kernel, variant, most):
    step, = [report for report in reports if (report["target"], report["kernel"], report["variant"])
             == ("90", kernel, variant)]
    assert 0 < step["step"] <= most and step["step_tensor_cores"] > 0, step
    assert kernel != "nearest_code_kernel" or step["step_conversions"] == 0, step  # no pass for NaN either
