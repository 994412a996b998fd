"""Train the first stage: pictures → a grid of codes → pictures (§2, §A.1).

    python train_vq.py                                        the drawn scenes, 1 to 2 minutes on 2 CPU cores
    python train_vq.py --data folder --data-dir my_pictures   your own pictures
    python train_vq.py --target depth                         the first stage of a condition, §4
    python train_vq.py --preset paper --benchmark             what the run would cost on this machine
    torchrun --nproc-per-node 4 train_vq.py --preset paper    several GPUs

Leaves checkpoint.pt, log.jsonl and pictures in --out: inputs above reconstructions, and the use of each code
(bright: often, red: never). Ctrl-C saves; --resume goes on. files.py says which files are looked for.
"""
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import run
from benchmark import benchmark_training
from codebook import codebook_use, initialize_codebook, restart_dead_codes, use_colours
from files import FIELDS, NO_LABEL, Preparation
from losses import (SMALLEST, Adversary, PatchDiscriminator, PerceptualLoss, image_loss, mask_loss,
                    score_images, score_masks)
from outputs import Log, announce, describe_data, picture_grid, restore, save_checkpoint, save_picture
from stages import FirstStage
from vq import VQ, VQConfig, memory_format


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    out: str = ""  # folder of this run; empty: runs/vq-PRESET-DATA, or runs/vq-PRESET-DATA-TARGET
    resume: bool = False  # go on from checkpoint.pt in that folder
    seed: int = 0  # of the weights, the order of the pictures and their crops
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one
    compile: bool = False  # torch.compile the network: minutes at the start; meant for GPUs
    benchmark: bool = False  # only measure a training step on drawn scenes: speed, memory, time of all steps

    data: str = "folder"  # scenes, cifar10, folder, imagenet, restricted-imagenet, ade20k, deepfashion
    data_dir: str = "data/imagenet"  # where the files are; the paper: ImageNet, §A.2
    target: str = "image"  # what is coded: image, segmentation, depth or pose, §4
    segments: int = 0  # labels of the masks, for --target segmentation; 0: as many as are found in them
    void_label: int = 255  # in a mask: the value of pixels without a label, besides 255
    image_size: int = 256  # pixels along each side, §2
    flip: bool = False  # mirror half of the training pictures
    upscale: bool = True  # enlarge pictures that are smaller than image_size instead of refusing them
    workers: int = -1  # of the data loader; -1: one per core, at most 8 (none for data in memory)

    base_channels: int = VQConfig.base_channels  # channels of the network at full resolution
    channel_multipliers: str = VQConfig.channel_multipliers  # times base_channels; each comma halves the size
    residual_blocks: int = VQConfig.residual_blocks  # residual blocks per resolution
    codebook_size: int = VQConfig.codebook_size  # K, codes to choose from, §A.1
    code_width: int = VQConfig.code_width  # D, numbers per code, §A.1
    commitment_weight: float = VQConfig.commitment_weight  # β, weight of the commitment loss, §A.1
    quantize_after: float = 0.0  # share of all steps for a plain autoencoder, before k-means sets the codes
    restart_every: int = 100  # steps between two reinitializations of the codes unused meanwhile; 0: never

    perceptual: str = "vgg16"  # network of LPIPS, §A.1: vgg16 or alexnet; or none, as always for masks
    perceptual_weights: str = ""  # file of LPIPS weights; empty: fetched once, 553 MB (alexnet: 244 MB)
    perceptual_weight: float = 1.0  # of LPIPS; 0: only measured. This and the next: authors' release
    discriminator_weight: float = 0.8  # of the adversarial loss, times λ; 0: none, as for masks
    discriminator_start: float = 0.5  # step at which it starts to train; below 1: a share of all steps
    discriminator_ramp: float = 0.1  # length of its weight's linear ramp from 0, likewise
    discriminator_layers: int = 3  # strided layers; receptive field 70×70 with 3, 34×34 with 2, 16×16 with 1

    steps: int = 500_000  # training steps; the paper gives none
    batch_size: int = 12  # pictures per step, over all processes; §A.1 has it for the GPT
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass, to save memory
    lr: float = 12 * 4.5e-6  # learning rate: 4.5e-6 × batch size, as in their release; not scaled for you
    beta1: float = 0.5  # of Adam; this and the next as in the authors' released model
    beta2: float = 0.9  # of Adam
    warmup_steps: int = 0  # steps of linear warm-up of lr
    decay: bool = False  # cosine decay of lr to a twentieth

    log_every: int = 100  # steps between two status lines
    eval_every: int = 5000  # steps between two evaluations on all validation pictures, each with a picture
    checkpoint_every: int = 5000  # steps between two checkpoints

    KIND = "vq"
    CHANGEABLE = ("out", "resume", "device", "compile", "benchmark", "data_dir", "workers",
                  "perceptual_weights", "gradient_checkpointing", "steps", "lr", "log_every", "eval_every",
                  "checkpoint_every")

    def __post_init__(self):
        run.check_training(self)
        data.check_offered(self.data, self.target)
        run.check_choice("target", self.target, FIELDS)
        run.check_choice("perceptual", self.perceptual, ("none", *SMALLEST))
        run.check_at_least(self, 1, "image_size", "discriminator_layers")
        run.check_at_least(self, 0, "void_label", "quantize_after", "restart_every", "perceptual_weight",
                           "segments", "discriminator_weight", "discriminator_start", "discriminator_ramp")
        for name, end in (("quantize_after", 0.9), ("segments", NO_LABEL), ("codebook_size", 2**16),  # uint16
                           ("discriminator_start", 1e12), ("discriminator_ramp", 1e12)):
            if getattr(self, name) > end:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {end:g}")
        f = self.model().downsampling
        if self.image_size % f:
            raise ValueError(f"image_size is {self.image_size}, which channel_multipliers "
                             f"{self.channel_multipliers!r} cannot halve evenly; choose a multiple of {f}")
        smallest = max(SMALLEST[self.perceptual] if self.uses_lpips else 1,
                       3 * 2**self.discriminator_layers if self.adversarial else 1)
        if self.image_size < smallest:
            raise ValueError(f"image_size is {self.image_size}, too small for this perceptual loss or "
                             f"discriminator; choose at least {smallest}, or do without one of the two")

    @property
    def one_hot(self) -> bool:
        return self.target == "segmentation"

    @property
    def uses_lpips(self) -> bool:
        return self.perceptual != "none" and not self.one_hot

    @property
    def adversarial(self) -> bool:
        return self.discriminator_weight > 0 and not self.one_hot

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.image_size, (self.target,), self.flip, self.upscale, self.void_label,
                           0 if self.benchmark else self.segments)  # drawn scenes may have more labels

    @property
    def folder(self) -> Path:
        target = "" if self.target == "image" else f"-{self.target}"
        return Path(self.out or f"runs/vq-{self.preset}-{self.data}{target}")

    def model(self, channels: int = 3) -> VQConfig:
        return VQConfig(channels, self.base_channels, self.channel_multipliers, self.residual_blocks,
                        self.codebook_size, self.code_width, self.commitment_weight)

    def without_effect(self) -> list[tuple[bool, str, str]]:
        """Flags that do nothing if the first value is true, and why."""
        return [
            (self.data == "scenes", "data_dir flip upscale", "scenes are drawn; files need --data folder"),
            (self.data == "cifar10", "upscale", "CIFAR-10's pictures are 32×32"),
            (not self.one_hot or self.data == "scenes", "segments void_label", "it is for files of masks"),
            (self.one_hot, "perceptual discriminator_weight", "masks are trained with cross-entropy alone"),
            (not self.uses_lpips, "perceptual_weights perceptual_weight", "there is no --perceptual loss"),
            (not self.adversarial, "discriminator_start discriminator_ramp discriminator_layers",
             "there is no --discriminator-weight"),
            (self.benchmark, "resume log_every eval_every checkpoint_every", "it only measures steps")]


PRESETS = {
    "demo": TrainConfig(  # 32×32 → 8×8 of 256 codes
        preset="demo", data="scenes", data_dir="data", image_size=32, upscale=False, base_channels=16,
        channel_multipliers="1,2,4", residual_blocks=1, codebook_size=256, code_width=32, quantize_after=0.1,
        restart_every=25, perceptual="none", discriminator_weight=0.0, steps=1100, batch_size=8, lr=1e-3,
        beta1=0.9, beta2=0.99, warmup_steps=50, decay=True, eval_every=550, checkpoint_every=275),
    "cifar10": TrainConfig(  # §A.1, "we only downsample once": 32×32 → 16×16 of 1,024 codes; L1 alone
        preset="cifar10", data="cifar10", data_dir="data", image_size=32, flip=True, upscale=False,
        base_channels=64, channel_multipliers="1,2", perceptual="none", discriminator_weight=0.0,
        steps=30_000, batch_size=128, lr=3e-4, beta1=0.9, beta2=0.99, warmup_steps=200, decay=True,
        restart_every=50, eval_every=2500, checkpoint_every=1000),
    "paper": TrainConfig(),
}


def main(argv: list[str] | None = None) -> Path | None:
    """Train as the command line says; returns the path of the checkpoint, None for a benchmark."""
    config, checkpoint = run.configure(PRESETS, argv)
    device, rank, world = process = run.start(config)

    # A run that goes on prepares its pictures as before, and refuses masks with further labels.
    preparation = Preparation(**checkpoint["preparation"]) if checkpoint else config.preparation
    with process.first_alone():  # it may have to download
        name = "scenes" if config.benchmark else config.data  # they can be drawn in any size
        training, validation = (data.open_dataset(name, config.data_dir, split, preparation)
                                for split in ("train", "val"))
        weights = None if config.benchmark else config.perceptual_weights  # None: random numbers
        perceptual = PerceptualLoss(weights, config.perceptual).to(device) if config.uses_lpips else None
    data.check_files(validation, rank, world, config.workers)
    trained_on = describe_data(config, training, checkpoint)
    channels = (checkpoint["model_config"]["image_channels"] if checkpoint
                else input_channels(config, training, validation))

    # One forward pass of the autoencoder serves its own optimizer and the discriminator's.
    vq = VQ(config.model(channels), config.gradient_checkpointing, config.compile)
    vq.to(device, memory_format=memory_format(device, 4 * config.image_size * config.base_channels))
    stage = FirstStage(vq, config.target, preparation, trained_on)
    model = DistributedDataParallel(vq) if world > 1 else vq
    optimizer = torch.optim.Adam(vq.parameters(), config.lr, betas=(config.beta1, config.beta2), fused=True)
    adversary = open_adversary(config, channels, process)
    uses = torch.zeros(config.codebook_size, device=device)  # (K,) of each code, since dead ones were reset
    first_step = checkpoint["step"] if checkpoint else 0
    quantizes = checkpoint["quantizes"] if checkpoint else config.benchmark
    if checkpoint:
        restore(checkpoint, vq, optimizer)
        uses.copy_(checkpoint["uses"])
        if adversary:
            adversary.load_state_dict(checkpoint["adversary"], first_step)

    def train_step(images: Tensor, step: int, lr: float) -> dict[str, Tensor]:
        with run.autocast(device):
            reconstructions, codes, quantization_loss = model(images, quantizes)
        if config.one_hot:
            loss = mask_loss(images, reconstructions, process.total(images.sum()) / world)
            parts = {"cross_entropy": loss}
        else:
            loss, parts = image_loss(images, reconstructions, perceptual, config.perceptual_weight)
        if adversary and adversary.trains(step):
            generator_loss, parts["lambda"] = adversary.generator_loss(loss, reconstructions,
                                                                       vq.decoder[-1].weight, step)
            loss = loss + generator_loss
        optimizer.zero_grad(set_to_none=True)
        (loss + quantization_loss).backward()
        optimizer.step()
        if adversary and adversary.trains(step):
            parts |= adversary.train_step(images, reconstructions, lr)
        uses.index_add_(0, codes.flatten(), torch.ones(codes.numel(), device=device))  # `bincount` would sync
        return parts | {"vq": quantization_loss}

    S, side = config.image_size, stage.side
    announce(f"first stage: {len(training):,} training and {len(validation):,} validation pictures "
             f"({config.target}) of {channels}×{S}×{S} → {side}×{side} of {config.codebook_size} codes · "
             f"{sum(x.numel() for x in vq.parameters()):,} parameters · {device} · {config.folder}")
    items = data.training_batches(len(training), config.batch_size, config.seed, first_step, rank, world)
    if config.benchmark:  # with all losses, as in the last step
        images = next(load_inputs(training, items, config, channels, device))
        return benchmark_training(lambda: train_step(images, config.steps, config.lr), config, device,
                                  "images", 1)
    log = Log(config, process, first_step, "images", config.batch_size,
              lambda step: data.name_batch(training, 1, config.batch_size, config.seed, step))
    scores = {}
    batches = data.load(training, items, device, config.workers)
    for step, batch, due in run.steps(config, process, first_step, batches):
        # By k-means over 16 vectors a code; results/first-stage says why not always before the first step.
        if not quantizes and step > config.quantize_after * config.steps:
            sample = data.training_batches(len(training), config.batch_size, config.seed, step - 1)
            sample = itertools.islice(sample, 16 * config.codebook_size // (config.batch_size * side**2) + 1)
            initialize_codebook(vq, load_inputs(training, sample, config, channels, device), process)
            quantizes = True
            uses.fill_(step > 1)  # no code is dead before a whole interval
        lr = run.set_learning_rate(optimizer, config, step)
        images = data.as_input(batch[config.target], config.target, channels)  # (B, C, H, W)
        log.add(step, train_step(images, step, lr))

        # means() and check() raise if the run has diverged, before anything is drawn or saved.
        if due.log:
            numbers = log.means() | {"lr": lr}
            if due.evaluate and quantizes:  # before, there are no codes
                scores, counts = evaluate(vq, perceptual, validation, config, process)
                log.check(step, scores)
                numbers |= scores
                if rank == 0:
                    draw(vq, validation, counts, config, log.picture(step))
            log.line(step, status_text(scores | numbers, config.codebook_size), numbers)
        # Not after the last step: codes would move after they have been measured.
        if quantizes and config.restart_every and step % config.restart_every == 0 and step < config.steps:
            restart_dead_codes(vq, optimizer, uses, images, process)
        if due.save:
            process.total(uses)  # in place; later sums may count twice, but only zeros matter
            save_checkpoint(config, process, step, stage.state() | {
                "optimizer": optimizer.state_dict(), "uses": uses, "quantizes": quantizes,
                "adversary": adversary and adversary.state_dict()})

    return log.finish()


def load_inputs(dataset, items: Iterable, config: TrainConfig, channels: int,
                device: torch.device) -> Iterator[Tensor]:
    """What the autoencoder sees of each batch of items, (B, C, H, W); see `data.as_input`."""
    for batch in data.load(dataset, items, device, config.workers):
        yield data.as_input(batch[config.target], config.target, channels)


def input_channels(config: TrainConfig, training, validation) -> int:
    """Channels of what is coded; of masks, one for each label."""
    if not config.one_hot:
        return 1 if config.target == "depth" else 3
    found = validation.segments(64) if config.segments else max(training.segments(), validation.segments())
    problem = f"masks in {config.data_dir} hold no label but 0 (255: none): number the labels 0, 1, 2, …"
    if found == 1 and not config.segments:
        raise ValueError(f"the {problem}")
    if found == 1:
        announce(f"warning: the first validation {problem}")
    return config.segments or found


def open_adversary(config: TrainConfig, channels: int, process: run.Process) -> Adversary | None:
    if not config.adversarial:
        return None
    with torch.random.fork_rng(devices=[]):  # so that the codebook's k-means draws the same as without
        network = PatchDiscriminator(channels, layers=config.discriminator_layers)
    start, ramp = (round(value if value >= 1 else value * config.steps)
                   for value in (config.discriminator_start, config.discriminator_ramp))
    return Adversary(network.to(process.device), config.discriminator_weight, (config.beta1, config.beta2),
                     start, ramp, process.world)


def status_text(numbers: dict[str, float], codebook_size: int) -> str:
    """The status line's account of the losses and the last evaluation; numbers not known here come last."""
    texts = {
        "l1": "train L1 {:.4f}", "cross_entropy": "train {:.4f} nats/pixel", "perceptual": " + LPIPS {:.4f}",
        "vq": " + vq {:.4f}", "lambda": " · λ {:.3g}", "discriminator": " · discriminator {:.3f}",
        "logits_real": ", logits real {:+.2f}", "logits_fake": " fake {:+.2f}", "val_l1": " · val L1 {:.4f}",
        "val_cross_entropy": " · val {:.4f} nats/pixel", "val_accuracy": ", {:.2%} of labels right",
        "val_lpips": " LPIPS {:.4f}", "codes_used": f" · {{}} of {codebook_size} codes in use",
        "perplexity": ", perplexity {:.0f}", "lr": " · lr {:.1e}"}
    known = [name for name in texts if name in numbers]
    others = [name for name, value in numbers.items() if name not in texts and isinstance(value, float)]
    return "".join(texts.get(name, f" · {name} {{:.4g}}").format(numbers[name]) for name in known + others)


@torch.no_grad()
def evaluate(vq: VQ, perceptual: PerceptualLoss | None, validation, config: TrainConfig,
             process: run.Process) -> tuple[dict[str, float], Tensor]:
    """Over all validation pictures: losses, the codebook's use, and how often each code occurs (K,)."""
    counts = torch.zeros(config.codebook_size, device=process.device)  # (K,)
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # two scores; images or labelled pixels
    items = data.fixed_batches(len(validation), max(16, config.batch_size // process.world), None,
                               process.rank, process.world)
    vq.eval()
    for images in load_inputs(validation, items, config, vq.config.image_channels, process.device):
        with run.autocast(process.device):
            reconstructions, codes, _ = vq(images)
        sums += (score_masks(images, reconstructions) if config.one_hot
                 else score_images(images, reconstructions, perceptual))
        counts += torch.bincount(codes.flatten(), minlength=config.codebook_size)
    vq.train()
    *totals, count = process.total(sums).tolist()
    counts = process.total(counts)
    used, perplexity = codebook_use(counts)
    names = (("val_cross_entropy", "val_accuracy") if config.one_hot
             else ("val_l1", "val_lpips") if perceptual else ("val_l1",))
    scores = {name: total / count for name, total in zip(names, totals) if count}  # masks without any label
    return scores | {"codes_used": used, "perplexity": perplexity}, counts


def draw(vq: VQ, validation, counts: Tensor, config: TrainConfig, path: Path):
    """Up to 16 validation pictures in rows of 8, each above its reconstruction; a square for each code."""
    columns = min(8, len(validation))
    items = data.fixed_batches(columns * min(2, len(validation) // columns), 16)  # one row or two
    images = next(load_inputs(validation, items, config, vq.config.image_channels, counts.device))
    rows = zip(images.split(columns), vq.decode(vq.encode(images)).split(columns))
    pictures = data.as_pictures(torch.cat([torch.cat(pair) for pair in rows]), config.target)
    save_picture(picture_grid(pictures, columns), path)
    use = picture_grid(use_colours(counts), math.ceil(math.sqrt(len(counts))), side=12)
    save_picture(use, path.with_name(f"{path.stem}-codes.png"))


if __name__ == "__main__":
    run.command_line(main)
