"""§2's efficiency: sampling a picture as 1,024 pixel tokens against 16×16 codes, with and without the key/value cache.

    python results/efficiency/times.py                                  6 layers × 256, one picture at a time
    python results/efficiency/times.py --n-layer 24 --n-embd 1024 --batch-size 16 --device cuda

Same shape of GPT for both, random weights, alternating rounds in one run. The codes are decoded by CIFAR-10's
first stage, which is part of their time. Arithmetic: floating-point operations of both, counted while they run, without
what the causal mask hides.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import data
import train_vq
from benchmark import CountOperations
from gpt import GPT, GPTConfig
from orderings import TokenLayout
from stages import FirstStage, Prior, Sampling
from vq import VQ, Palette


def build(image: FirstStage, arguments: argparse.Namespace) -> Prior:
    layout = TokenLayout(image.codebook_size, image.side, image.side)
    gpt = GPT(GPTConfig(layout.vocab_size, layout.block_size, arguments.n_layer, arguments.n_embd // 64,
                        arguments.n_embd))
    return Prior(gpt, layout, {"image": image}, {}).to(torch.device(arguments.device))


def sample(prior: Prior, batch: int, cached: bool):
    prior.pictures(prior.sample(batch, None, None, Sampling(), None, cached)).sum().item()  # waits for a GPU


def hidden(prior: Prior) -> int:
    """Operations of attention that the mask hides where the whole sequence is run anew for each token: the counter's excess."""
    config = prior.gpt.config
    return sum(2 * config.n_layer * config.n_embd * T * (T - 1) for T in range(1, config.block_size + 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("n-layer", 6), ("n-embd", 256), ("batch-size", 1), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config, preparation = train_vq.PRESETS["cifar10"], data.Preparation(32)
    priors = {"pixels": build(FirstStage(Palette(torch.rand(512, 3)), "image", preparation, {}), arguments),
              "codes": build(FirstStage(VQ(config.model()), "image", preparation, {}), arguments)}
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.n_layer} layers × {arguments.n_embd}, batches of {arguments.batch_size}, {where}")
    for cached in (True, False):
        times = {name: [] for name in priors}
        for attempt in range(arguments.rounds + 1):  # the first warms up
            for name, prior in priors.items():
                began = time.perf_counter()
                sample(prior, arguments.batch_size, cached)
                times[name].append((time.perf_counter() - began) / arguments.batch_size)
        flops = {}
        for name, prior in priors.items():
            with CountOperations() as counted:
                sample(prior, 1, cached)
            flops[name] = counted.flops - (0 if cached else hidden(prior))
        pixels, codes = (statistics.median(each[1:]) for each in times.values())
        arithmetic = flops["pixels"] / flops["codes"]
        ratios = sorted(a / b for a, b in zip(times["pixels"][1:], times["codes"][1:]))
        print(f"{'with' if cached else 'without'} the cache: {pixels:.3g} s a picture of pixels, {codes:.3g} s of codes: "
              f"{pixels / codes:.2f} times as long ({ratios[0]:.2f} to {ratios[-1]:.2f}) for {arithmetic:.2f} times as many "
              f"operations, {arithmetic * codes / pixels:.2f} times as many a second", flush=True)


if __name__ == "__main__":
    main()
