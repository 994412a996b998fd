"""Plant faults in the kernels, one at a time, and see whether the CPU tests notice.

    python results/kernels/plant_faults.py        about 30 minutes on two cores; writes faults.md beside this file

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
    (LOOKUP, "the last of equal codes in a tile", "code = start + tl.min(tl.where(scores == score[:, None], column[None, :], BLOCK_K), 1)",
     "code = start + tl.max(tl.where(scores == score[:, None], column[None, :], 0), 1)", 0),
    (LOOKUP, "the index is counted from the tile's start", "code = start + tl.min", "code = tl.min", 0),
    (LOOKUP, "the best score starts at 0", 'tl.full((BLOCK_N,), float("inf"), tl.float32)', "tl.zeros((BLOCK_N,), tl.float32)", 0),
    (LOOKUP, "the farthest code", "scores = products + tl", "scores = -products - tl", 0),
    (LOOKUP, "factor 2 forgotten", "split(-2 * c)", "split(-c)", 0),
    (LOOKUP, "norms forgotten", " + tl.load(norms_ptr + start + column)[None, :]", "", 0),
    (LOOKUP, "norms of the first codes", "norms_ptr + start + column", "norms_ptr + column", 0),
    (LOOKUP, "norms of the last dimensions only", "norms += tl.sum(c * c, 1)", "norms = tl.sum(c * c, 1)", 0),
    (LOOKUP, "norms not squared", "norms += tl.sum(c * c, 1)", "norms += tl.sum(c, 1)", 0),
    (LOOKUP, "norms of the doubled codes", "norms += tl.sum(c * c, 1)", "norms += tl.sum(high * high, 1)", 0),
    (LOOKUP, "padding codes compete", 'tl.where(codes < K, norms, float("inf"))', "norms", 0),
    (LOOKUP, "one padding code competes", "tl.where(codes < K, norms", "tl.where(codes <= K, norms", 0),
    (LOOKUP, "the last code never competes", "tl.where(codes < K, norms", "tl.where(codes < K - 1, norms", 0),
    (LOOKUP, "the first tile is skipped", "range(first, tl.minimum", "range(first + BLOCK_K, tl.minimum", 0),
    (LOOKUP, "the last tile is skipped", "tl.minimum(first + codes_per_program, K), BLOCK_K)",
     "tl.minimum(first + codes_per_program, K) - BLOCK_K + 1, BLOCK_K)", 0),
    (LOOKUP, "the last dimensions are skipped", "range(0, D, BLOCK_D)", "range(0, D - BLOCK_D + 1, BLOCK_D)", 0),
    (LOOKUP, "the first dimensions are skipped", "range(0, D, BLOCK_D)", "range(BLOCK_D, D, BLOCK_D)", 0),
    (LOOKUP, "products of the last dimensions only", "products += tl.dot", "products = tl.dot", 0),
    (LOOKUP, "one of the low parts alone", "c_low, step, input_precision", "c_low, input_precision", 0),
    (LOOKUP, "TF32 alone", "c_high, step, input_precision", "c_high, input_precision", 0),
    (LOOKUP, "products that are not waited for", "products += tl.dot(x_high, c_high, step,", "products = tl.dot(x_high, c_high, products + step,", 0),
    (LOOKUP, "the low part of the vectors is lost", "tl.dot(x_low, c_high", "tl.dot(x_low * 0, c_high", 0),
    (LOOKUP, "the low part of the codes is lost", "tl.dot(x_high, c_low", "tl.dot(x_high, c_low * 0", 0),
    (LOOKUP, "the low parts with each other", "tl.dot(x_low, c_high", "tl.dot(x_low, c_low", 0),
    (LOOKUP, "a split by truncation", "(bits + 0x1000) & ~0x1FFF", "bits & ~0x1FFF", 0),
    (LOOKUP, "a split with a bit too many", "(bits + 0x1000) & ~0x1FFF", "(bits + 0x800) & ~0xFFF", 0),
    (LOOKUP, "a split to bfloat16", "(bits + 0x1000) & ~0x1FFF", "(bits + 0x8000) & ~0xFFFF", 0),
    (LOOKUP, "nothing is left by the split", "return high, x - high", "return high, x - x", 0),
    (LOOKUP, "the offset is not taken from the vectors", "split(x - tl.load(offset_ptr + dims)[None, :])", "split(x)", 0),
    (LOOKUP, "the offset is not taken from the codes", " - tl.load(offset_ptr + dims)[None, :]\n        high", "\n        high", 0),
    (LOOKUP, "a tile's mask has no `other`", "mask=inside, other=0.0)", "mask=inside)", 0),
    (LOOKUP, "tiles are not masked", "tl.load(ptr + where, mask=inside, other=0.0)", "tl.load(ptr + where)", 0),
    (LOOKUP, "one row too many is read", "rows[:, None] < height", "rows[:, None] <= height", 0),
    (LOOKUP, "columns are not masked", "(columns[None, :] < width)", "(columns[None, :] >= 0)", 0),
    (LOOKUP, "32-bit row offsets", "rows[:, None].to(tl.int64) * strides[0]", "rows[:, None].to(tl.int32) * strides[0]", 0),
    (LOOKUP, "32-bit column offsets", "columns[None, :].to(tl.int64) * strides[1]", "columns[None, :] * strides[1]", 0),
    (LOOKUP, "32-bit offsets into the prepared codebook, written", "codes[:, None].to(tl.int64) * width", "codes[:, None] * width", 0),
    (LOOKUP, "32-bit offsets into the prepared codebook, read", "tl.cast(start, tl.int64) * width", "start * width", 0),
    (LOOKUP, "32-bit row numbers", "rows = tl.program_id(0).to(tl.int64) * BLOCK_N", "rows = tl.program_id(0) * BLOCK_N", 0),
    (LOOKUP, "32-bit offsets of the scores", "tl.program_id(1).to(tl.int64) * N + rows", "tl.program_id(1) * N.to(tl.int32) + rows", 0),
    (LOOKUP, "the row stride is taken to be the width", ".to(tl.int64) * strides[0]", ".to(tl.int64) * width", 0),
    (LOOKUP, "the column stride is taken to be 1", "columns[None, :].to(tl.int64) * strides[1]", "columns[None, :]", 0),
    (LOOKUP, "scores are stored without a mask", "best_score, mask=rows < N)", "best_score)", 0),
    (LOOKUP, "codes are stored without a mask", "best_code, mask=rows < N)", "best_code)", 0),
    (LOOKUP, "all shares write to one place", "place = tl.program_id(1).to(tl.int64) * N + rows", "place = rows", 0),
    (LOOKUP, "the farthest of the shares", "scores.argmin(0", "scores.argmax(0", 0),
    (LOOKUP, "the first share's code", "nearest.gather(0, scores.argmin(0, keepdim=True))[0]", "nearest[0]", 0),
    (LOOKUP, "one row block too few", 'cdiv(N, shape["BLOCK_N"])', '(N // shape["BLOCK_N"] or min(N, 1))', 0),
    (LOOKUP, "one share of the codes too few", "splits = cdiv(code_blocks, blocks_per_program)",
     "splits = max(1, code_blocks // blocks_per_program)", 0),
    (LOOKUP, "programs share codes", "first = tl.program_id(1) * codes_per_program", "first = 0 * tl.program_id(1)", 0),
    (LOOKUP, "an index outside the share where all is NaN", "tl.zeros((BLOCK_N,), tl.int32) + first", "tl.zeros((BLOCK_N,), tl.int32) - 1", 0),
    (LOOKUP, "the prepared codebook is not padded to tiles", "cdiv(K, block) * block", "cdiv(K, 32) * 32", 0),
    (LOOKUP, "the offset is the least code", "mean = tl.div_rn(total, tl.cast(K, tl.float32))", "mean = low", 0),
    (LOOKUP, "the mean divides by the tile", "tl.div_rn(total, tl.cast(K, tl.float32))", "total / BLOCK_K", 0),
    (LOOKUP, "padding counts as a code in the minimum", 'tl.where(codes[:, None] < K, c, float("inf"))', "c", 0),
    (LOOKUP, "the spread looks upwards only", "tl.maximum(high - mean, mean - low)", "high - mean", 0),
    (LOOKUP, "the offset is not rounded", "offset = tl.floor(mean / step + 0.5) * step", "offset = mean", 0),
    (LOOKUP, "the offset is rounded down", "offset = tl.floor(mean / step + 0.5) * step", "offset = tl.floor(mean / step) * step", 0),
    (LOOKUP, "an infinite offset is used", 'tl.where(tl.abs(offset) < float("inf"), offset, 0.0)', "offset", 0),
    (LOOKUP, "codes beyond the first tile are not averaged", "range(0, K, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)", 0),

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
    (ATTENTION, "the largest score of the last tile only", "tl.maximum(largest, tl.max(scores, 1) * scale)", "tl.max(scores, 1) * scale", 0),
    (ATTENTION, "no largest score is subtracted", "weights = tl.exp2(scores * scale - new_largest[:, None])", "weights = tl.exp2(scores * scale)", 0),
    (ATTENTION, "rescaled the wrong way", "tl.exp2(largest - new_largest)", "tl.exp2(new_largest - largest)", 0),
    (ATTENTION, "the output is not normalized", "output *= (1 / total)[:, None]", "output *= 1.0", 0),
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
    (ATTENTION, "δ not stored", "tl.store(head_of(deltas) + rows, delta, mask=rows < Tq)", "pass", 0),
    (ATTENTION, "δ stored without a mask", "tl.store(head_of(deltas) + rows, delta, mask=rows < Tq)", "tl.store(head_of(deltas) + rows, delta)", 0),
    (ATTENTION, "the first position gets rounding noise for a gradient", "tl.where(rows[:, None] + T - Tq > 0, scores_gradient, 0.0)", "scores_gradient", 0),
    (ATTENTION, "the first position gives rounding noise for a gradient", "tl.where(rows[None, :] + T - Tq > 0, scores_gradient, 0.0)", "scores_gradient", 0),
    (ATTENTION, "a position in memory is taken for a length", "tl.load(position_ptr).to(tl.int32) + 1", "tl.load(position_ptr).to(tl.int32)", 0),
    (ATTENTION, "a position in memory is not read", ", position_ptr=position)", ")", 0),
    (ATTENTION, "log-sum-exp stored without a mask", "largest + tl.log2(total), mask=rows < Tq)", "largest + tl.log2(total))", 0),
    (ATTENTION, "log-sum-exp read without `other` in dQ", "tl.load(head_of(logsumexps) + rows, mask=rows < Tq, other=0.0)", "tl.load(head_of(logsumexps) + rows, mask=rows < Tq)", 0),
    (ATTENTION, "log-sum-exp read without `other` in dK", "tl.load(head_of(logsumexps) + rows, mask=rows < Tq, other=0.0)", "tl.load(head_of(logsumexps) + rows, mask=rows < Tq)", 1),
    (ATTENTION, "δ read without `other`", "tl.load(head_of(deltas) + rows, mask=rows < Tq, other=0.0)", "tl.load(head_of(deltas) + rows, mask=rows < Tq)", 0),
    (ATTENTION, "rows read without `other`", "(columns[None, :] < WIDTH), other=0.0)", "(columns[None, :] < WIDTH))", 0),
    (ATTENTION, "rows read beyond the end", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other", "mask=(rows[:, None] >= 0) & (columns[None, :] < WIDTH), other", 0),
    (ATTENTION, "rows read beyond the width", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH), other", "mask=(rows[:, None] < length) & (columns[None, :] >= 0), other", 0),
    (ATTENTION, "rows written beyond the end", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))", "mask=(rows[:, None] >= 0) & (columns[None, :] < WIDTH))", 0),
    (ATTENTION, "rows written beyond the width", "mask=(rows[:, None] < length) & (columns[None, :] < WIDTH))", "mask=(rows[:, None] < length) & (columns[None, :] >= 0))", 0),
    (ATTENTION, "32-bit offsets between sequences", "tl.program_id(2).to(tl.int64) * x", "tl.program_id(2) * x", 0),
    (ATTENTION, "the stride between sequences is ignored", "tl.program_id(2).to(tl.int64) * x[1][0]", "tl.program_id(2).to(tl.int64) * tl.num_programs(1) * x[1][1]", 0),
    (ATTENTION, "heads in the wrong order", "tl.program_id(1).to(tl.int64) * x[1][1]", "tl.program_id(2).to(tl.int64) * x[1][1]", 0),
    (ATTENTION, "TF32 in forward", 'tl.trans(k), input_precision="ieee")', 'tl.trans(k), input_precision="tf32")', 0),
    (ATTENTION, "TF32 in dV", 'output_gradient, v_gradient, input_precision="ieee"', 'output_gradient, v_gradient, input_precision="tf32"', 0),
    (ATTENTION, "keys in place of values in dK", "tl.dot(v, tl.trans(output_gradient)", "tl.dot(k, tl.trans(output_gradient)", 0),
    (ATTENTION, "one program too few", 'else cdiv(Tq, tile["BLOCK_Q"])', 'else max(1, Tq // tile["BLOCK_Q"])', 0),
    (ATTENTION, "as many key programs as query programs", 'cdiv(T, tile["BLOCK_K"])', 'cdiv(Tq, tile["BLOCK_K"])', 0),
    (ATTENTION, "columns with a stride are read as if dense", "x if x.stride(-1) == 1 else x.contiguous() for", "x for", 0),
    (ATTENTION, "autocast is ignored", "if torch.is_autocast_enabled(query.device.type):", "if False:", 0),
    (ATTENTION, "another layout than the next linear layer reads", "x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)", "x.new_empty(x.shape)", 0),
    (ATTENTION, "gradients of key and query change places", "logsumexp, dq, delta)", "logsumexp, dk, delta)", 0),
    (ATTENTION, "the log-sum-exp is kept in half precision", "query.new_empty(query.shape[:3], dtype=torch.float32)", "query.new_empty(query.shape[:3])", 0),
    (ATTENTION, "a saved row of another query", "tl.load(head_of(logsumexps) + rows", "tl.load(head_of(logsumexps) + rows + 1", 1),
    (ATTENTION, "dQ from scores without the scale", "tl.exp2(scores * scale - logsumexp[:, None])", "tl.exp2(scores - logsumexp[:, None])", 0),
    (ATTENTION, "dK from scores without the scale", "tl.exp2(scores * scale - logsumexp[None, :])", "tl.exp2(scores - logsumexp[None, :])", 0),
    (ATTENTION, "forward's largest score without the scale", "tl.max(scores, 1) * scale)", "tl.max(scores, 1))", 0),
    (ATTENTION, "the diagonal's queries run over the end", "BLOCK_Q) * BLOCK_Q, Tq)", "BLOCK_Q) * BLOCK_Q, Tq + BLOCK_Q)", 0),
    (ATTENTION, "off a GPU, few queries are the first positions", "is_causal=bool(queries > 1))", "is_causal=True)", 0),
    (ATTENTION, "off a GPU, nothing is masked", "is_causal=bool(queries > 1))", "is_causal=False)", 0),
    (ATTENTION, "off a GPU, few queries see the next key", ".tril(keys - queries)  # (Tq, T)\n    return F", ".tril(keys - queries + 1)  # (Tq, T)\n    return F", 0),
]

WHY = {  # of those that survive
    "32-bit row numbers": "matters from 2³¹ vectors on, 16 GiB of indices",
    "32-bit offsets of the scores": "matters from 2³¹ scores on, 24 GiB",
    "the diagonal's queries run over the end": "equivalent: a tile beyond Tq adds nothing",
    "log-sum-exp read without `other` in dQ": "equivalent: rows beyond the end are not written",
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
                   "tests/test_triton.py", "tests/test_kernels.py", "tests/test_compile.py"]
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
