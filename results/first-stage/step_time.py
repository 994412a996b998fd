"""What one forward pass of the autoencoder for both optimizers saves, against two as in the authors' loop.

    OMP_NUM_THREADS=1 python results/first-stage/step_time.py        --help lists the sizes

The paper's networks and losses on small random pictures: a step is the autoencoder's with LPIPS and λ, then
the discriminator's. The authors' training loop calls the model anew for each optimizer, so that the second
call computes the reconstructions and LPIPS again. Both steps run in turn; medians. Weights are random: they
cost the same.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import run
import train_vq
from losses import TAPS, PerceptualLoss, backbone_layers, image_loss
from vq import VQ


def random_perceptual_loss(backbone: str) -> PerceptualLoss:
    """LPIPS with weights drawn at random, by way of a file, as the class takes them from nowhere else."""
    weights = {f"features.{name}": weight for name, weight in backbone_layers(backbone).state_dict().items()}
    weights |= {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1)
                for i, width in enumerate(TAPS[backbone].values())}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder) / "random.pth")
        return PerceptualLoss(Path(folder) / "random.pth", backbone)


class Step:
    """The networks of the `paper` preset and one training step, late in training: everything is on."""

    def __init__(self, device: torch.device, image_size: int, batch_size: int,
                 gradient_checkpointing: bool = False):
        torch.manual_seed(0)
        self.config, self.process = train_vq.PRESETS["paper"], run.Process(device, 0, 1)
        self.vq = VQ(self.config.model(), gradient_checkpointing).to(device)
        self.perceptual = random_perceptual_loss(self.config.perceptual).to(device)
        self.adversary = train_vq.open_adversary(self.config, 3, self.process)
        self.optimizer = torch.optim.Adam(self.vq.parameters(), self.config.lr, fused=device.type == "cuda")
        self.images = torch.rand(batch_size, 3, image_size, image_size, device=device) * 2 - 1

    def autoencode(self) -> tuple[torch.Tensor, torch.Tensor]:
        with run.autocast(self.process.device):
            reconstructions, _, quantization_loss = self.vq(self.images)
        return reconstructions.float(), quantization_loss

    def __call__(self, forward_passes: int) -> float:
        """Seconds of one step whose autoencoder runs once, or once for each of the two optimizers."""
        self.synchronize()
        began = time.perf_counter()
        reconstructions, quantization_loss = self.autoencode()
        loss, _ = image_loss(self.images, reconstructions, self.perceptual, self.config.perceptual_weight)
        generator_loss, _ = self.adversary.generator_loss(loss, reconstructions, self.vq.decoder[-1].weight,
                                                          self.config.steps)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + generator_loss + quantization_loss).backward()
        self.optimizer.step()
        if forward_passes == 2:
            with torch.no_grad():  # in the authors' loop too, the other optimizer's weights are frozen here
                reconstructions, _ = self.autoencode()
                self.perceptual.distance(self.images, reconstructions)
        self.adversary.train_step(self.images, reconstructions, self.config.lr)
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self):
        if self.process.device.type == "cuda":
            torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description="One forward pass of the autoencoder against two.")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    step = Step(torch.device(flags.device), flags.image_size, flags.batch_size)
    step(1)
    step(2)  # the first of each also allocates
    times = {1: [], 2: []}
    for _ in range(flags.rounds):
        for forward_passes, seconds in times.items():
            seconds.append(step(forward_passes))
    once, twice = (statistics.median(seconds) for seconds in times.values())
    ratios = [two / one for one, two in zip(*times.values())]
    print(f"{flags.batch_size} pictures of {flags.image_size}×{flags.image_size} · {flags.rounds} rounds · "
          f"{flags.device}, {torch.get_num_threads()} thread(s)\n"
          f"one forward pass {once * 1e3:.0f} ms/step · two {twice * 1e3:.0f} ms/step · one is "
          f"{twice / once:.2f} times as fast (single rounds {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
