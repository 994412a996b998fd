"""256 tokens of GPT2-medium (§A.1) with and without the CUDA graph of a step: time, whether they are equal, and the kernels.

    python results/gpu/decoding.py        on a GPU; without one a small GPT, and no graph
"""
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch.profiler import profile

ROOT = Path(__file__).resolve().parents[2]  # the repository
sys.path[:0] = [str(ROOT), str(ROOT / "results" / "speed")]

import run
from gpt import GPT, GPTConfig
from rounds import alternate

ON_GPU, TOKENS, ROUNDS = torch.cuda.is_available(), 256, 2
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def draw(gpt: GPT, batch: int, captured: bool) -> torch.Tensor:
    """The tokens, on the CPU: all work is done then."""
    prefix, generator = torch.full((batch, 1), 1024, device=DEVICE), torch.Generator(DEVICE).manual_seed(1)
    with run.autocast(DEVICE):
        return gpt.generate(prefix, TOKENS, generator=generator, sampled_tokens=1024, captured=captured).cpu()


def main():
    print(torch.cuda.get_device_name() if ON_GPU else f"No GPU here: {torch.get_num_threads()} CPU threads")
    size = dict(n_layer=24, n_head=16, n_embd=1024) if ON_GPU else dict(n_layer=2, n_head=2, n_embd=64)
    gpt = GPT(GPTConfig(1025, TOKENS, **size)).to(DEVICE)
    for batch in (1, 64):
        forms = {captured: partial(draw, gpt, batch, captured) for captured in (False, True)}
        times = {captured: statistics.median(each) for captured, each in alternate(forms, ROUNDS).items()}
        equal = (forms[False]() == forms[True]()).float().mean()
        print(f"batch {batch}: {times[False]:.3f} s, as a graph {times[True]:.3f} s; {equal:.1%} of the tokens are equal", flush=True)
    with profile() as profiled:
        draw(gpt, 64, True)
    print(profiled.key_averages().table(sort_by="self_cuda_time_total" if ON_GPU else "self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
