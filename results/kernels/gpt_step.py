"""A training step of GPT2-medium (§A.1) with this repository's attention, torch's, and the plain form.

    python results/kernels/gpt_step.py        on a GPU; without one a small GPT, and no kernel

The three take turns in one run; the table gives medians, and ratios to the fastest.
"""
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import gpt  # noqa: E402
from kernels import causal_attention_reference, causal_attention_triton  # noqa: E402
from kernels.causal_attention import causal_attention_torch  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FORMS = {"plain form": causal_attention_reference, "torch's fused": causal_attention_torch}
if ON_GPU:
    FORMS["this repository's"] = causal_attention_triton


def step(model, optimizer, tokens) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=ON_GPU):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    print(torch.cuda.get_device_name() if ON_GPU else f"No GPU here: {torch.get_num_threads()} CPU threads")
    for batch, length in ((12, 256), (64, 512)) if ON_GPU else ((4, 256),):
        size = dict(n_layer=24, n_head=16, n_embd=1024) if ON_GPU else dict(n_layer=4, n_head=4, n_embd=256)
        model = gpt.GPT(gpt.GPTConfig(vocab_size=1025, block_size=length, **size)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=ON_GPU)
        tokens = torch.randint(1025, (batch, length + 1), device=DEVICE)
        times = {name: [] for name in FORMS}
        for repetition in range(23 if ON_GPU else 8):
            for name, gpt.causal_attention in FORMS.items():
                try:
                    times[name].append(step(model, optimizer, tokens))
                except torch.OutOfMemoryError:  # the plain form keeps the scores of all pairs
                    times[name].append(math.inf)
        medians = {name: statistics.median(values[3:]) for name, values in times.items()}
        for name, median in medians.items():
            absolute = f" {1e3 * median:8.2f} ms" if ON_GPU else ""
            ratio = median / min(medians.values())
            print(f"batch {batch} × {length}  {name:20} {ratio:5.2f}×{absolute}", flush=True)


if __name__ == "__main__":
    main()
