"""Cached sampling of 256 tokens with GPT2-small's shape against the time of reading its weights once a token, on a CPU.

    python results/speed/sampling.py

The floor is a matrix–vector product over as many float32 numbers, 256 times. Medians of alternating rounds. On an AMD
MKL is set as by the three scripts (`run.start`); MKL_CBWR= before the command leaves it as it is.
"""
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import run
import sample
from gpt import GPT, GPTConfig
from rounds import alternate

ROUNDS, TOKENS = 3, 256


@torch.no_grad()
def main():
    run.start(sample.SampleConfig(device="cpu"))
    gpt = GPT(GPTConfig(1025, 256, 12, 12, 768)).eval()
    read = sum(x.numel() for name, x in gpt.named_parameters() if "embedding" not in name)
    matrix, vector = torch.randn(read // 768, 768), torch.randn(768)
    layers = [(layer, torch.randn(1, layer.in_features)) for layer in gpt.modules() if isinstance(layer, torch.nn.Linear)]
    prefix = torch.full((1, 1), 1024)
    forms = {
        "floor": lambda: [matrix @ vector for _ in range(TOKENS)],
        "linear layers": lambda: [layer(x) for _ in range(TOKENS) for layer, x in layers],
        "cached": lambda: gpt.generate(prefix, TOKENS, sampled_tokens=1024),
        "cached, guidance 2": lambda: gpt.generate(prefix, TOKENS, sampled_tokens=1024, guidance=2.0, null_prefix=prefix),
    }
    floor, linear, cached, guided = map(statistics.median, alternate(forms, ROUNDS).values())
    print(f"{torch.get_num_threads()} CPU threads, {read:,} weights read a token: cached sampling takes {cached / floor:.2f} of "
          f"the floor, with guidance {guided / cached:.2f} times that\nits linear layers alone take {linear / floor:.2f} of the floor")


if __name__ == "__main__":
    main()
