"""This repository beside its peers on one machine: equal results from equal weights, then times.

    python -m venv peers && peers/bin/pip install -r requirements.txt torchvision einops transformers==4.38.2 tqdm \\
        torch-einops-utils loguru einx
    peers/bin/pip install --no-deps taming-transformers-rom1504==0.0.6 vector-quantize-pytorch==1.32.0
    peers/bin/python results/peers/compare.py

Peers: the authors' taming-transformers (its networks, losses and sampling functions; its Lightning modules, which need a
Lightning of 2021, are put together here as they do it), GPT-2 of Hugging Face's transformers, and lucidrains'
vector-quantize-pytorch. Weights are random, LPIPS's too. Times are medians of alternating rounds; a ratio above 1 means
that ours is faster. Of 256 codes transformers draws 255: its 256 positions hold the prefix and the last token, too.
"""
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.losses import lpips, vqperceptual
from taming.modules.transformer import mingpt
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from vector_quantize_pytorch import VectorQuantize

for name in [name for name in sys.modules if name.split(".")[0] == "taming"]:
    del sys.modules[name]  # ours is a module of that name
ROOT = Path(__file__).resolve().parents[2]  # the repository
sys.path[:0] = [str(ROOT), str(ROOT / "results" / "speed")]

import losses
from gpt import GPT
from rounds import alternate
from vq import VQ, Quantizer, VQConfig

ROUNDS, TOKENS = 3, 256
NETWORK = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
           "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}  # the released f16


class TamingVQ(nn.Module):
    """taming.models.vqgan.VQModel without Lightning."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(**NETWORK), Decoder(**NETWORK)
        self.quantize = VectorQuantizer2(1024, 256, beta=0.25, sane_index_shape=True)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)
        nn.init.normal_(self.quantize.embedding.weight, std=0.2)  # else all vectors get the same few codes

    def encode(self, images: Tensor):
        return self.quantize(self.quant_conv(self.encoder(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quantized, loss, _ = self.encode(images)
        return self.decoder(self.post_quant_conv(quantized)), loss


def ours_of(network: type[VQ] | type[GPT], weights: dict[str, Tensor]) -> nn.Module:
    """Our network with the weights of a file of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.ckpt"
        torch.save({"state_dict": weights}, path)
        return network.from_taming(path)


def compare(title: str, forms: dict[str, Callable[[], object]], rounds: int = ROUNDS):
    """Print each form's time; ratios of the other forms to ours, which is the first, from the same round."""
    times = alternate(forms, rounds)
    ours, *others = times
    text = f"{title}: {ours} {statistics.median(times[ours]):.3g} s"
    for name in others:
        ratios = sorted(a / b for a, b in zip(times[name], times[ours]))
        text += f" · {name} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(text, flush=True)


def taming_step(vq: TamingVQ, loss: nn.Module, images: Tensor) -> Callable[[], None]:
    """VQModel.training_step under Lightning: both optimizers run the autoencoder and LPIPS anew."""
    groups = [list(vq.parameters()), list(loss.discriminator.parameters())]
    optimizers = [torch.optim.Adam(group, 4.5e-6, betas=(0.5, 0.9)) for group in groups]

    def step():
        for index, optimizer in enumerate(optimizers):
            for other, group in enumerate(groups):  # Lightning's toggle_optimizer
                for weight in group:
                    weight.requires_grad_(other == index)
            reconstructions, quantization = vq(images)
            value, _ = loss(quantization, images, reconstructions, index, 1, last_layer=vq.decoder.conv_out.weight)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return step


def our_step(vq: VQ, perceptual: losses.PerceptualLoss, images: Tensor) -> Callable[[], None]:
    """The step of train_vq.py with LPIPS and discriminator."""
    optimizer = torch.optim.Adam(vq.parameters(), 4.5e-6, betas=(0.5, 0.9), fused=True)
    adversary = losses.Adversary(losses.PatchDiscriminator(), 0.8, (0.5, 0.9), start=1, ramp=0)

    def step():
        reconstructions, _, quantization = vq(images)
        nll, _ = losses.image_loss(images, reconstructions, perceptual, 1.0)
        generator, _ = adversary.generator_loss(nll, reconstructions, vq.decoder[-1].weight, 1)
        optimizer.zero_grad(set_to_none=True)
        (nll + generator + quantization).backward()
        optimizer.step()
        adversary.train_step(images, reconstructions, 4.5e-6)
    return step


def first_stage():
    theirs = TamingVQ().eval()
    ours = ours_of(VQ, theirs.state_dict()).to(memory_format=torch.channels_last)  # as stages.py on a CPU
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    with torch.no_grad():
        codes, (_, _, (_, _, their_codes)) = ours.encode(images), theirs.encode(images)
        difference = (ours(images)[0] - theirs(images)[0]).abs().max()
        print(f"first stage, equal weights: {(codes == their_codes).float().mean():.1%} of {codes.numel()} codes equal "
              f"({codes.unique().numel()} different ones), largest difference of a reconstruction {difference:.1e}")
        compare("  encode 256×256", {"ours": lambda: ours.encode(images), "taming": lambda: theirs.encode(images)})
        compare("  encode and decode", {"ours": lambda: ours(images), "taming": lambda: theirs(images)})
    lpips.LPIPS.load_from_pretrained = lambda self: None  # random weights cost the same time
    lpips.models.vgg16 = lambda pretrained, make=lpips.models.vgg16: make()
    perceptual = losses.PerceptualLoss(None, "vgg16")
    loss = vqperceptual.VQLPIPSWithDiscriminator(disc_start=0, disc_weight=0.8)
    ours.to(memory_format=torch.contiguous_format)  # as train_vq.py for pictures of this size
    compare("  training step, LPIPS and discriminator", {
        "ours": our_step(ours.train(), perceptual, images), "taming": taming_step(theirs.train(), loss, images)})


def quantizer():
    latents = torch.randn(12, 256, 16, 16)  # the paper preset's batch
    codebook = torch.randn(1024, 256)
    ours = Quantizer(VQConfig())
    theirs = VectorQuantizer2(1024, 256, beta=0.25)
    lucidrains = VectorQuantize(256, 1024, accept_image_fmap=True, learnable_codebook=True, ema_update=False,
                                rotation_trick=False)
    for weight in (ours.codebook, theirs.embedding.weight, lucidrains.codebook):
        weight.data.copy_(codebook.reshape(weight.shape))

    def step(module: nn.Module) -> Callable[[], None]:
        def run():
            x = latents.clone().requires_grad_()
            quantized, *others = module(x)
            (quantized.square().mean() + sum(part.sum() for part in others if torch.is_tensor(part)
                                             and part.is_floating_point())).backward()
        return run

    compare("quantizer, 12×256 vectors, forward and backward", {
        "ours": step(ours), "taming": step(theirs), "lucidrains": step(lucidrains)}, 15)


def second_stage():
    theirs = mingpt.GPT(1025, TOKENS, n_layer=12, n_head=12, n_embd=768).eval()
    ours = ours_of(GPT, {f"transformer.{name}": weight for name, weight in theirs.state_dict().items()})
    hugging_face = GPT2LMHeadModel(GPT2Config(1025, TOKENS, 768, 12, 12, bos_token_id=1024, eos_token_id=None)).eval()
    tokens, prefix = torch.randint(1024, (2, TOKENS)), torch.full((1, 1), 1024)
    with torch.no_grad():
        difference = (ours.eval()(tokens) - theirs(tokens)[0]).abs().max()
    print(f"second stage of GPT2-small's shape, equal weights: largest difference of a logit {difference:.1e}")

    def step(model: nn.Module, logits: Callable[[Tensor], Tensor], fused: bool) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), 5.4e-5, betas=(0.9, 0.95), fused=fused)

        def run():
            optimizer.zero_grad()
            F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return run

    compare(f"  training step, 2×{TOKENS - 1} tokens", {
        "ours": step(ours.train(), ours, True), "taming": step(theirs.train(), lambda x: theirs(x)[0], False),
        "transformers": step(hugging_face.train(), lambda x: hugging_face(x).logits, False)})
    for model in (ours, theirs, hugging_face):
        model.eval()
    compare(f"  sampling {TOKENS} codes, key/value cache", {
        "ours": lambda: ours.generate(prefix, TOKENS, sampled_tokens=1024),
        "taming": lambda: mingpt.sample_with_past(prefix, theirs, TOKENS, top_k=100, top_p=1.0),
        "transformers": lambda: hugging_face.generate(prefix, do_sample=True, top_k=100, max_new_tokens=TOKENS - 1,
                                                      attention_mask=torch.ones_like(prefix), pad_token_id=0)})
    compare(f"  sampling {TOKENS} codes: ours with, taming's `sample` without a cache", {
        "ours": lambda: ours.generate(prefix, TOKENS, sampled_tokens=1024),
        "taming": lambda: mingpt.sample(theirs, prefix, TOKENS, sample=True, top_k=100)}, 1)


def main():
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    second_stage()
    quantizer()
    first_stage()


if __name__ == "__main__":
    main()
