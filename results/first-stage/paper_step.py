"""Time and memory of a training step of the `paper` preset: 256×256, f16, LPIPS, discriminator.

    python results/first-stage/paper_step.py --device cuda --batch-size 12      the preset's batch
    … --gradient-checkpointing                                                  with less memory
    OMP_NUM_THREADS=1 python results/first-stage/paper_step.py --batch-size 1   on a CPU, one thread

Random pictures and LPIPS weights: they cost the same.
"""
import argparse
import statistics

import torch
from step_time import Step  # puts the repository on the path

from outputs import memory


def main():
    parser = argparse.ArgumentParser(description="Time and memory of a step of the paper preset.")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    flags = parser.parse_args()
    step = Step(torch.device(flags.device), 256, flags.batch_size, flags.gradient_checkpointing)
    step(1)  # the first also allocates
    seconds = statistics.median(step(1) for _ in range(flags.steps))
    parameters = sum(weight.numel() for weight in step.vq.parameters())
    print(f"paper preset, batch of {flags.batch_size}{' · gradient checkpointing' * flags.gradient_checkpointing}"
          f" · {parameters:,} parameters · {flags.device}, "
          f"{torch.get_num_threads()} thread(s) · {seconds:.2f} s/step · peak memory "
          f"{memory(step.process.device):.1f} GiB")


if __name__ == "__main__":
    main()
