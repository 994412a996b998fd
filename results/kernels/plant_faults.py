"""Plant faults in the kernels, one at a time, and see whether the CPU tests notice.

    python results/kernels/plant_faults.py        about 15 minutes on two cores; writes faults.md beside this file

Each fault replaces one piece of one line in a copy of the repository. It counts as caught if `pytest -x` over the
kernel tests fails there (or does not end in time). The strict interpreter needs no GPU; on one it is not used.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LOOKUP, ATTENTION = "kernels/nearest_code.py", "kernels/causal_attention.py"

FAULTS = [  # file, what is wrong, old text, new text, which occurrence of it (from 0)
    (LOOKUP, "a later code wins a tie between tiles", "score < best_score", "score <= best_score", 0),
    (LOOKUP, "the index is counted from the tile's start", "start + column, best_code", "column, best_code", 0),
    (LOOKUP, "the best score starts at 0", 'tl.full((BLOCK_N,), float("inf"), tl.float32)',
     "tl.zeros((BLOCK_N,), tl.float32)", 0),
    (LOOKUP, "the farthest code", "norms[None, :] - 2 * products", "2 * products - norms[None, :]", 0),
    (LOOKUP, "factor 2 forgotten", "norms[None, :] - 2 * products", "norms[None, :] - products", 0),
    (LOOKUP, "norms forgotten", "norms[None, :] - 2 * products", "-2 * products", 0),
    (LOOKUP, "norms of the last dimensions only", "norms += tl.sum(c * c, 1)", "norms = tl.sum(c * c, 1)", 0),
    (LOOKUP, "norms not squared", "norms += tl.sum(c * c, 1)", "norms += tl.sum(c, 1)", 0),
    (LOOKUP, "padding codes compete", "real = (codes[None, :] < K) & (scores == scores)", "real = scores == scores", 0),
    (LOOKUP, "one padding code competes", "real = (codes[None, :] < K)", "real = (codes[None, :] <= K)", 0),
    (LOOKUP, "the last code never competes", "real = (codes[None, :] < K)", "real = (codes[None, :] < K - 1)", 0),
    (LOOKUP, "padding scores 0", 'scores = tl.where(real, scores, float("inf"))', "scores = tl.where(real, scores, 0.0)", 0),
    (LOOKUP, "the first tile is skipped", "range(first, last, BLOCK_K)", "range(first + BLOCK_K, last, BLOCK_K)", 0),
    (LOOKUP, "the last tile is skipped", "range(first, last, BLOCK_K)", "range(first, last - BLOCK_K + 1, BLOCK_K)", 0),
    (LOOKUP, "the last dimensions are skipped", "range(0, D, BLOCK_D)", "range(0, D - BLOCK_D + 1, BLOCK_D)", 0),
    (LOOKUP, "the first dimensions are skipped", "range(0, D, BLOCK_D)", "range(BLOCK_D, D, BLOCK_D)", 0),
    (LOOKUP, "products of the last dimensions only", "tl.trans(c), products, input_precision",
     "tl.trans(c), input_precision", 0),
    (LOOKUP, "TF32 alone", "input_precision=PRECISION", 'input_precision="tf32"', 0),
    (LOOKUP, "the offset is not taken from the vectors", "rows, dims, N, D).to(tl.float32) - offset",
     "rows, dims, N, D).to(tl.float32)", 0),
    (LOOKUP, "the offset is not taken from the codes", "codes, dims, K, D).to(tl.float32) - offset",
     "codes, dims, K, D).to(tl.float32)", 0),
    (LOOKUP, "the offset is read without a mask", "tl.load(offset_ptr + dims, mask=dims < D, other=0.0)",
     "tl.load(offset_ptr + dims)", 0),
    (LOOKUP, "the offset's mask has no `other`", "tl.load(offset_ptr + dims, mask=dims < D, other=0.0)",
     "tl.load(offset_ptr + dims, mask=dims < D)", 0),
    (LOOKUP, "a tile's mask has no `other`", "(columns[None, :] < width), other=0.0)", "(columns[None, :] < width))", 0),
    (LOOKUP, "rows are not masked", "mask=(rows[:, None] < height) & (columns[None, :] < width)",
     "mask=(columns[None, :] < width) & (rows[:, None] >= 0)", 0),
    (LOOKUP, "one row too many is read", "rows[:, None] < height", "rows[:, None] <= height", 0),
    (LOOKUP, "columns are not masked", "(rows[:, None] < height) & (columns[None, :] < width)",
     "(rows[:, None] < height) & (columns[None, :] >= 0)", 0),
    (LOOKUP, "32-bit row offsets", "rows[:, None].to(tl.int64) * strides[0]", "rows[:, None].to(tl.int32) * strides[0]", 0),
    (LOOKUP, "32-bit column offsets", "columns[None, :].to(tl.int64) * strides[1]", "columns[None, :] * strides[1]", 0),
    (LOOKUP, "the row stride is taken to be the width", ".to(tl.int64) * strides[0]", ".to(tl.int64) * width", 0),
    (LOOKUP, "the column stride is taken to be 1", "columns[None, :].to(tl.int64) * strides[1]", "columns[None, :]", 0),
    (LOOKUP, "32-bit row numbers", "rows = tl.program_id(0).to(tl.int64) * BLOCK_N", "rows = tl.program_id(0) * BLOCK_N", 0),
    (LOOKUP, "results are stored without a mask", "best_code.to(tl.int64), mask=rows < N)", "best_code.to(tl.int64))", 0),
    (LOOKUP, "joined results are stored without a mask", "key, mask=rows < N)", "key)", 0),
    (LOOKUP, "a store instead of the atomic minimum", "tl.atomic_min(result_ptr", "tl.store(result_ptr", 0),
    (LOOKUP, "negative scores are ordered backwards", "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "bits", 0),
    (LOOKUP, "the index is lost from the key", " | best_code.to(tl.int64)", "", 0),
    (LOOKUP, "score and index overlap", "<< 32", "<< 16", 0),
    (LOOKUP, "the score stays in the result", "result & 0xFFFFFFFF if splits > 1 else result", "result", 0),
    (LOOKUP, "one row block too few", "triton.cdiv(N, tiles[\"BLOCK_N\"]), triton.cdiv(K", "N // tiles[\"BLOCK_N\"] or 1, triton.cdiv(K", 0),
    (LOOKUP, "one share of the codes too few", "splits = triton.cdiv(code_blocks, blocks_per_program)",
     "splits = max(1, code_blocks // blocks_per_program)", 0),
    (LOOKUP, "programs share rows", "first = tl.program_id(1) * codes_per_program", "first = 0 * codes_per_program", 0),
    (LOOKUP, "shares reach into the next by one", "tl.minimum(first + codes_per_program, K)", "first + codes_per_program", 0),
    (LOOKUP, "the offset is the least code", "mean = total / K", "mean = low", 0),
    (LOOKUP, "the mean divides by the tile", "mean = total / K", "mean = total / BLOCK_K", 0),
    (LOOKUP, "padding counts as a code in the minimum", 'tl.min(tl.where(inside, c, float("inf")), 0)', "tl.min(c, 0)", 0),
    (LOOKUP, "the spread looks upwards only", "spread = tl.maximum(high - mean, mean - low)", "spread = high - mean", 0),
    (LOOKUP, "the offset is not rounded", "offset = tl.floor(mean / step + 0.5) * step", "offset = mean", 0),
    (LOOKUP, "the offset is rounded down", "offset = tl.floor(mean / step + 0.5) * step",
     "offset = tl.floor(mean / step) * step", 0),
    (LOOKUP, "an infinite offset is used", "tl.where(tl.abs(offset) < float(\"inf\"), offset, 0.0)", "offset", 0),
    (LOOKUP, "the offset is stored without a mask", "tl.store(offset_ptr + dims, offset, mask=dims < D)",
     "tl.store(offset_ptr + dims, offset)", 0),
    (LOOKUP, "codes beyond the first tile are not averaged", "range(0, K, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)", 0),
    (LOOKUP, "NaN scores are kept", "& (scores == scores)", "", 0),

    (ATTENTION, "forward sees the next key", "columns[None, :] <= rows[:, None] + T - Tq", "columns[None, :] <= rows[:, None] + T - Tq + 1", 0),
    (ATTENTION, "forward does not see its own key", "columns[None, :] <= rows", "columns[None, :] < rows", 0),
    (ATTENTION, "forward takes queries for the first positions", "rows[:, None] + T - Tq, scores", "rows[:, None], scores", 0),
    (ATTENTION, "dQ sees the next key", "columns[None, :] <= rows[:, None] + T - Tq", "columns[None, :] <= rows[:, None] + T - Tq + 1", 1),
    (ATTENTION, "dQ does not see its own key", "columns[None, :] <= rows", "columns[None, :] < rows", 1),
    (ATTENTION, "dK and dV see the previous query", "columns[:, None] <= rows[None, :] + T - Tq", "columns[:, None] <= rows[None, :] + T - Tq + 1", 0),
    (ATTENTION, "dK and dV do not see their own query", "columns[:, None] <= rows", "columns[:, None] < rows", 0),
    (ATTENTION, "dK and dV take queries for the first positions", "rows[None, :] + T - Tq, scores", "rows[None, :], scores", 0),
    (ATTENTION, "one tile too many goes unmasked in forward", "seen_by_all = (position + 1) // BLOCK_K * BLOCK_K",
     "seen_by_all = tl.cdiv(position + 1, BLOCK_K) * BLOCK_K", 0),
    (ATTENTION, "one tile too many goes unmasked in dQ", "seen_by_all = (position + 1) // BLOCK_K * BLOCK_K",
     "seen_by_all = tl.cdiv(position + 1, BLOCK_K) * BLOCK_K", 1),
    (ATTENTION, "unmasked keys are not rounded to tiles in forward", "seen_by_all = (position + 1) // BLOCK_K * BLOCK_K",
     "seen_by_all = position + 1", 0),
    (ATTENTION, "the walk of forward ends early", "seen_by_any = tl.minimum(position + BLOCK_Q, T)", "seen_by_any = tl.minimum(position, T)", 0),
    (ATTENTION, "the walk of dQ ends early", "seen_by_any = tl.minimum(position + BLOCK_Q, T)", "seen_by_any = tl.minimum(position, T)", 1),
    (ATTENTION, "the first query that sees a key is not rounded down", "tl.maximum(first_row, 0) // BLOCK_Q * BLOCK_Q", "tl.maximum(first_row, 0)", 0),
    (ATTENTION, "dK and dV start a tile late", "tl.maximum(first_row, 0) // BLOCK_Q * BLOCK_Q",
     "tl.cdiv(tl.maximum(first_row, 0), BLOCK_Q) * BLOCK_Q", 0),
    (ATTENTION, "one tile too many goes unmasked in dK and dV", "tl.cdiv(tl.maximum(first_row + BLOCK_K - 1, 0), BLOCK_Q) * BLOCK_Q",
     "tl.maximum(first_row + BLOCK_K - 1, 0) // BLOCK_Q * BLOCK_Q", 0),
    (ATTENTION, "the offset of few queries is forgotten in dK and dV", "first_row = block * BLOCK_K - (T - Tq)", "first_row = block * BLOCK_K", 0),
    (ATTENTION, "the offset of few queries is forgotten in forward", "position = block * BLOCK_Q + T - Tq", "position = block * BLOCK_Q", 0),
    (ATTENTION, "the output is not rescaled", "output * rescale[:, None]", "output", 0),
    (ATTENTION, "the sum is not rescaled", "total * rescale + tl.sum(weights, 1)", "total + tl.sum(weights, 1)", 0),
    (ATTENTION, "the largest score is not kept", "largest = new_largest", "largest = largest", 0),
    (ATTENTION, "the largest score of the last tile only", "tl.maximum(largest, tl.max(scores, 1))", "tl.max(scores, 1)", 0),
    (ATTENTION, "no largest score is subtracted", "weights = tl.exp2(scores - new_largest[:, None])", "weights = tl.exp2(scores)", 0),
    (ATTENTION, "rescaled the wrong way", "tl.exp2(largest - new_largest)", "tl.exp2(new_largest - largest)", 0),
    (ATTENTION, "the output is not normalized", "output = output / total[:, None]", "output = output", 0),
    (ATTENTION, "log-sum-exp without the largest score", "largest + tl.log2(total)", "tl.log2(total)", 0),
    (ATTENTION, "log-sum-exp without the sum", "largest + tl.log2(total)", "largest", 0),
    (ATTENTION, "natural logarithm", "largest + tl.log2(total)", "largest + tl.log(total)", 0),
    (ATTENTION, "powers of 2 for powers of e", "math.log2(math.e) / math.sqrt(width)", "1 / math.sqrt(width)", 0),
    (ATTENTION, "scores are not divided by √d", "math.log2(math.e) / math.sqrt(width)", "math.log2(math.e)", 0),
    (ATTENTION, "dQ without the scale", "q_gradient *= scale * 0.6931471805599453", "q_gradient *= 1.0", 0),
    (ATTENTION, "dK without the scale", "k_gradient *= scale * 0.6931471805599453", "k_gradient *= 1.0", 0),
    (ATTENTION, "dK with log₂e", "k_gradient *= scale * 0.6931471805599453", "k_gradient *= scale", 0),
    (ATTENTION, "dQ without δ", "weights * (weights_gradient - delta[:, None])", "weights * weights_gradient", 0),
    (ATTENTION, "dK without δ", "weights * (weights_gradient - delta[None, :])", "weights * weights_gradient", 0),
    (ATTENTION, "δ with the wrong sign in dK", "weights * (weights_gradient - delta[None, :])", "weights * (weights_gradient + delta[None, :])", 0),
    (ATTENTION, "δ not stored", "tl.store(delta_ptr + saved, delta, mask=rows < Tq)", "pass", 0),
    (ATTENTION, "δ stored without a mask", "tl.store(delta_ptr + saved, delta, mask=rows < Tq)", "tl.store(delta_ptr + saved, delta)", 0),
    (ATTENTION, "the first position gets rounding noise for a gradient", "tl.where(rows[:, None] + T - Tq > 0, scores_gradient, 0.0)", "scores_gradient", 0),
    (ATTENTION, "the first position gives rounding noise for a gradient", "tl.where(rows[None, :] + T - Tq > 0, scores_gradient, 0.0)", "scores_gradient", 0),
    (ATTENTION, "log-sum-exp stored without a mask", "largest + tl.log2(total), mask=rows < Tq)", "largest + tl.log2(total))", 0),
    (ATTENTION, "log-sum-exp read without `other` in dQ", "tl.load(logsumexp_ptr + saved, mask=rows < Tq, other=0.0)", "tl.load(logsumexp_ptr + saved, mask=rows < Tq)", 0),
    (ATTENTION, "log-sum-exp read without `other` in dK", "tl.load(logsumexp_ptr + saved, mask=rows < Tq, other=0.0)", "tl.load(logsumexp_ptr + saved, mask=rows < Tq)", 1),
    (ATTENTION, "δ read without `other`", "tl.load(delta_ptr + saved, mask=rows < Tq, other=0.0)", "tl.load(delta_ptr + saved, mask=rows < Tq)", 0),
    (ATTENTION, "rows read without `other`", "(columns[None, :] < WIDTH), other=0.0)", "(columns[None, :] < WIDTH))", 0),
    (ATTENTION, "rows read beyond the end", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other", "mask=(rows[:, None] >= 0) & (columns[None, :] < WIDTH), other", 0),
    (ATTENTION, "rows read beyond the width", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other", "mask=(rows[:, None] < length) & (columns[None, :] >= 0), other", 0),
    (ATTENTION, "rows written beyond the end", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))", "mask=(rows[:, None] >= 0) & (columns[None, :] < WIDTH))", 0),
    (ATTENTION, "rows written beyond the width", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))", "mask=(rows[:, None] < length) & (columns[None, :] >= 0))", 0),
    (ATTENTION, "32-bit offsets between sequences", "(head // heads).to(tl.int64)", "(head // heads)", 0),
    (ATTENTION, "32-bit offsets between written sequences", "(head // heads).to(tl.int64)", "(head // heads)", 1),
    (ATTENTION, "the stride between sequences is ignored", "(head // heads).to(tl.int64) * strides[0]", "head.to(tl.int64) * strides[1]", 0),
    (ATTENTION, "heads in the wrong order", "(head % heads).to(tl.int64) * strides[1]", "(head // heads).to(tl.int64) * strides[1]", 0),
    (ATTENTION, "TF32 in forward", 'tl.trans(k), input_precision="ieee") * scale', 'tl.trans(k), input_precision="tf32") * scale', 0),
    (ATTENTION, "TF32 in dV", 'output_gradient, v_gradient, input_precision="ieee"', 'output_gradient, v_gradient, input_precision="tf32"', 0),
    (ATTENTION, "keys in place of values in dK", "tl.dot(v, tl.trans(output_gradient)", "tl.dot(k, tl.trans(output_gradient)", 0),
    (ATTENTION, "one program too few", "blocks = triton.cdiv(Tq if per == \"BLOCK_Q\" else T, tile[per])", "blocks = max(1, (Tq if per == \"BLOCK_Q\" else T) // tile[per])", 0),
    (ATTENTION, "as many key programs as query programs", "triton.cdiv(Tq if per == \"BLOCK_Q\" else T, tile[per])", "triton.cdiv(Tq, tile[per])", 0),
    (ATTENTION, "columns with a stride are read as if dense", "return x if x.stride(3) == 1 else x.contiguous()", "return x", 0),
    (ATTENTION, "autocast is ignored", "if torch.is_autocast_enabled(query.device.type):", "if False:", 0),
    (ATTENTION, "another layout than promised to the compiler", "return empty_like_linear(query), query.new_empty", "return torch.empty_like(query), query.new_empty", 0),
    (ATTENTION, "gradients of key and value change places", "gradients[0], delta)", "gradients[1], delta)", 0),
    (ATTENTION, "the log-sum-exp is kept in half precision", "query.new_empty(query.shape[:3], dtype=torch.float32)", "query.new_empty(query.shape[:3])", 0),
    (ATTENTION, "a saved row of another head", "saved = head.to(tl.int64) * Tq + rows", "saved = head.to(tl.int64) * T + rows", 2),
]

WHY = {  # of those that survive
    "32-bit row numbers": "matters from 2³¹ vectors on, 16 GiB of indices",
    "shares reach into the next by one": "equivalent: what lies beyond K is padding, and a code compared twice stays",
    "log-sum-exp read without `other` in dQ": "equivalent: rows beyond the end are not written",
    "NaN scores are kept": "only on a GPU: the interpreter's minimum skips NaN",
}


def plant(repository: Path, fault):
    file, _, old, new, occurrence = fault
    text = (repository / file).read_text()
    places = [match.start() for match in re.finditer(re.escape(old), text)]
    assert len(places) > occurrence, f"{file} has no {old!r}"
    at = places[occurrence]
    (repository / file).write_text(text[:at] + new + text[at + len(old):])


def first_failure(fault) -> str:
    """The test that notices the fault; empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "data", "runs", "results", "__pycache__"))
        plant(copy, fault)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore",
                   "tests/test_triton.py", "tests/test_compile.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=400)
        except subprocess.TimeoutExpired:
            return "(ran out of time)"
        if result.returncode == 0:
            return ""
        found = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[.*)?(?: - |$)", result.stdout, re.MULTILINE)
        return found[1] if found else f"(the process ended with status {result.returncode})"


def main():
    for fault in FAULTS:  # all of them apply?
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernels").mkdir()
            shutil.copy(ROOT / fault[0], Path(folder) / fault[0])
            plant(Path(folder), fault)
    with ThreadPoolExecutor(2) as pool:
        caught = []
        for fault, test in zip(FAULTS, pool.map(first_failure, FAULTS)):
            caught.append(test)
            print(f"{test or 'SURVIVED':80} {fault[1]}", flush=True)
    lines = [f"# {sum(map(bool, caught))} of {len(FAULTS)} planted faults are caught on a CPU", "",
             "`python results/kernels/plant_faults.py`", "", "| file | fault | caught by |", "| --- | --- | --- |"]
    lines += [f"| {Path(fault[0]).name} | {fault[1]} | {f'`{test}`' if test else f'**survived** {WHY.get(fault[1])}'} |"
              for fault, test in zip(FAULTS, caught)]
    (Path(__file__).parent / "faults.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
