"""What the `paper` preset's step keeps for its backward pass, per picture: counted, on a CPU.

    python results/first-stage/memory.py

Autocast on a GPU runs convolutions in bfloat16 and group norms in float32; so does this, and counts the
storages that autograd holds, but for the weights. Weights, gradients, Adam's moments and the backward pass's
own buffers come on top. It is no measurement on a GPU.
"""
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import run
import train_vq
from step_time import random_perceptual_loss
from vq import VQ


def most_kept(gradient_checkpointing: bool, mixed: bool) -> int:
    """Bytes for one picture of 256×256: of the autoencoder beside LPIPS, or the discriminator's, if larger.

    Not beside both: `first_order_surrogate` in losses.py frees what the one kept before the other begins.
    """
    config, process = train_vq.PRESETS["paper"], run.Process(torch.device("cpu"), 0, 1)
    vq = VQ(config.model(), gradient_checkpointing)
    perceptual, adversary = random_perceptual_loss("vgg16"), train_vq.open_adversary(config, 3, process)
    networks = (vq, perceptual, adversary.discriminator)
    weights = {tensor.data_ptr() for network in networks
               for tensor in (*network.parameters(), *network.buffers())}

    def storages(forward: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        found = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward()
        assert result.requires_grad
        return result, found

    def autoencode() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return vq(images)[0]

    images = torch.rand(1, 3, config.image_size, config.image_size) * 2 - 1
    reconstructions, of_autoencoder = storages(autoencode)
    x = reconstructions.detach().float().requires_grad_()
    losses = [lambda: (x - images).abs().mean() + perceptual.distance(images, x).mean(),
              lambda: -adversary.discriminator(x).mean()]
    together = [of_autoencoder | storages(loss)[1] for loss in losses]  # each storage once
    return max(sum(tensor.untyped_storage().nbytes() for tensor in found.values()) for found in together)


class GroupNorm(nn.GroupNorm):
    """In float32 under autocast, as on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def main():
    nn.GroupNorm = GroupNorm
    for mixed in (False, True):
        for gradient_checkpointing in (False, True):
            size = most_kept(gradient_checkpointing, mixed) / 2**30
            print(f"{'bfloat16 as on a GPU' if mixed else 'float32'}, gradient checkpointing "
                  f"{'on' if gradient_checkpointing else 'off'}: {size:.3f} GiB a picture, "
                  f"{12 * size:.1f} GiB for 12")


if __name__ == "__main__":
    main()
