"""Train the first stage: pictures → a grid of codes → pictures (§2, §A.1).

    python train_vq.py                                        the drawn scenes, about 2 minutes on 2 CPU cores
    python train_vq.py --preset cifar10 --data-dir data       CIFAR-10 as in §2
    python train_vq.py --data folder --data-dir my_pictures   your own pictures
    python train_vq.py --target depth                         the first stage of a condition, §4
    torchrun --nproc-per-node 4 train_vq.py --preset paper    several GPUs

Leaves checkpoint.pt, log.jsonl and pictures in --out: inputs above reconstructions, and the use of each code
(bright: often, red: never). Ctrl-C saves; --resume goes on. layouts.py says which files are looked for.
"""
import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import run
from losses import (SMALLEST, Adversary, PatchDiscriminator, PerceptualLoss, autoencoder_loss,
                    score_sums)
from vq import VQ, VQConfig, as_vectors, codebook_use, colours_of_use


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    out: str = ""  # folder of this run; empty: runs/vq-PRESET-DATA, or runs/vq-PRESET-DATA-TARGET
    resume: bool = False  # go on from checkpoint.pt in that folder
    seed: int = 0  # of the weights, the order of the pictures and their crops
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one

    data: str = "folder"  # scenes, cifar10, folder, imagenet, restricted-imagenet, ade20k, deepfashion
    data_dir: str = "data/imagenet"  # where the files are; the paper: ImageNet, §A.2
    target: str = "image"  # what is coded: image, segmentation, depth or pose, §4
    segments: int = 0  # labels of the masks, for --target segmentation; 0: as many as are found in them
    void_label: int = 255  # in the masks: pixels that have no label (255 always means that, too)
    image_size: int = 256  # pixels along each side, §2
    flip: bool = False  # mirror half of the training pictures
    upscale: bool = True  # enlarge pictures that are smaller than image_size instead of refusing them
    workers: int = -1  # processes that prepare pictures; -1: as many as help

    base_channels: int = VQConfig.base_channels  # channels of the network at full resolution
    channel_multipliers: str = VQConfig.channel_multipliers  # times base_channels; each comma halves the size
    residual_blocks: int = VQConfig.residual_blocks  # residual blocks per resolution
    codebook_size: int = VQConfig.codebook_size  # K, codes to choose from, §A.1
    code_width: int = VQConfig.code_width  # D, numbers per code, §A.1
    commitment_weight: float = VQConfig.commitment_weight  # beta, pull of the encoder towards its code, §A.1
    restart_every: int = 100  # steps after which codes that were not used move onto encoder outputs; 0: never

    perceptual: str = "vgg16"  # LPIPS beside L1, §A.1, by vgg16 or alexnet; or none, as always for masks
    perceptual_weights: str = ""  # file of LPIPS weights; empty: fetched once, 553 MB (alexnet: 244 MB)
    perceptual_weight: float = 1.0  # of LPIPS; 0: only measured. As the next three: the authors' release
    discriminator_weight: float = 0.8  # of its gradient beside that of L1 + LPIPS; 0: none, as for masks
    discriminator_start: float = 0.5  # share of the steps after which the autoencoder hears it; 1: never
    discriminator_warmup: float = 0.02  # share of the steps, before its start, in which it trains unheard
    discriminator_ramp: float = 0.1  # share of the steps, from its start on, over which its weight grows
    discriminator_layers: int = 3  # its depth: 3 judges patches of 70×70 pixels, 2 of 34×34, 1 of 16×16

    steps: int = 500_000  # training steps; the paper gives none
    batch_size: int = 12  # pictures per step, over all processes, §A.1
    accumulate: int = 1  # parts of each process's share, each with its own λ, that pass singly: less memory
    gradient_checkpointing: bool = False  # compute parts again in the backward pass, to save memory
    lr: float = 12 * 4.5e-6  # learning rate, §A.1
    beta1: float = 0.5  # of Adam; this and the next as in the authors' released model
    beta2: float = 0.9  # of Adam
    warmup_steps: int = 0  # steps of linear warm-up of lr
    decay: bool = False  # let lr fall to a twentieth along a cosine

    log_every: int = 100  # steps between two status lines
    eval_every: int = 5000  # steps between two evaluations on all validation pictures, each with a picture
    checkpoint_every: int = 5000  # steps between two checkpoints

    KIND = "vq"
    CHANGEABLE = ("out", "resume", "device", "workers", "perceptual_weights", "gradient_checkpointing",
                  "steps", "lr", "log_every", "eval_every", "checkpoint_every")

    def __post_init__(self):
        run.check_choice("data", self.data, data.DATASETS)
        data.check_offered(self.data, self.target)
        run.check_choice("perceptual", self.perceptual, ("none", *SMALLEST))
        run.check_at_least(self, 1, "image_size", "discriminator_layers", "steps", "batch_size", "accumulate",
                           "log_every", "eval_every", "checkpoint_every")
        run.check_at_least(self, 0, "seed", "segments", "void_label", "restart_every", "perceptual_weight",
                           "discriminator_weight", "discriminator_start", "discriminator_warmup",
                           "discriminator_ramp", "lr", "warmup_steps")
        run.check_at_least(self, -1, "workers")
        run.check_betas(self)
        for name, most, reason in (("codebook_size", 65536, "codes are stored in 16 bits"),
                                   ("segments", data.NO_LABEL, "labels end at 254")):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; {reason}, so it must be at most {most}")
        if self.image_size % self.model().downsampling:
            raise ValueError(f"image_size is {self.image_size}, which channel_multipliers "
                             f"{self.channel_multipliers!r} cannot halve evenly; choose a multiple of "
                             f"{self.model().downsampling}")
        smallest = max(SMALLEST[self.perceptual] if self.perceives else 1,
                       3 * 2**self.discriminator_layers if self.adversarial else 1)
        if self.image_size < smallest:
            raise ValueError(f"image_size is {self.image_size}, too small for this perceptual loss or "
                             f"discriminator; choose at least {smallest}, or do without one of the two")

    @property
    def one_hot(self) -> bool:
        return self.target == "segmentation"

    @property
    def perceives(self) -> bool:
        return self.perceptual != "none" and not self.one_hot

    @property
    def adversarial(self) -> bool:
        return self.discriminator_weight > 0 and self.discriminator_start < 1 and not self.one_hot

    @property
    def discriminator_steps(self) -> tuple[int, int, int]:
        """The first steps in which the discriminator trains, in which it is heard, and at its full weight."""
        start = self.discriminator_start
        shares = (max(0.0, start - self.discriminator_warmup), start, start + self.discriminator_ramp)
        return tuple(round(share * self.steps) + 1 for share in shares)

    @property
    def folder(self) -> Path:
        target = "" if self.target == "image" else f"-{self.target}"
        return Path(self.out or f"runs/vq-{self.preset}-{self.data}{target}")

    def model(self, channels: int = 3) -> VQConfig:
        return VQConfig(channels, self.base_channels, self.channel_multipliers, self.residual_blocks,
                        self.codebook_size, self.code_width, self.commitment_weight)


PRESETS = {
    "demo": TrainConfig(  # 32×32 → 8×8 of 256 codes
        preset="demo", data="scenes", data_dir="data", image_size=32, upscale=False, base_channels=16,
        channel_multipliers="1,2,4", residual_blocks=1, codebook_size=256, code_width=32, restart_every=25,
        perceptual="none", discriminator_weight=0.0, steps=1100, batch_size=8, lr=1e-3, beta1=0.9, beta2=0.99,
        warmup_steps=50, decay=True, log_every=50, eval_every=500, checkpoint_every=250),
    "cifar10": TrainConfig(  # §2, "we only downsample once": 32×32 → 16×16 of 1,024 codes
        preset="cifar10", data="cifar10", data_dir="data", image_size=32, flip=True, upscale=False,
        base_channels=64, channel_multipliers="1,2", perceptual="none", discriminator_weight=0.0,
        steps=30_000, batch_size=128, lr=3e-4, beta1=0.9, beta2=0.99, warmup_steps=200, decay=True,
        restart_every=50, eval_every=2500, checkpoint_every=1000),
    "paper": TrainConfig(),
}


def main(argv: list[str] | None = None) -> Path:
    """Train as the command line says; returns the path of the checkpoint."""
    config, checkpoint = run.configure(PRESETS, argv)
    process = run.start(config.device, config.seed)
    device, rank, world = process
    run.check_shared_evenly(config.batch_size, world, config.accumulate)
    path = config.folder / "checkpoint.pt"

    training, validation = (
        data.open_dataset(config.data, config.data_dir, split, config.image_size, config.flip, config.upscale,
                          (config.target,), config.void_label)
        for split in ("train", "val"))
    workers = data.worker_count(config.workers, config.data)
    perceptual = open_perceptual_loss(config, process)
    model_config = (VQConfig(**checkpoint["model_config"]) if checkpoint
                    else config.model(input_channels(config, training, validation)))
    config.folder.mkdir(parents=True, exist_ok=True)

    vq = VQ(model_config, config.gradient_checkpointing).to(device)
    model = DistributedDataParallel(vq) if world > 1 else vq
    optimizer = torch.optim.Adam(vq.parameters(), config.lr, betas=(config.beta1, config.beta2),
                                 fused=device.type == "cuda")
    adversary = open_adversary(config, vq, process)
    uses = torch.zeros(config.codebook_size, dtype=torch.int64, device=device)  # (K,) recent uses of a code
    first_step = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        vq.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        uses.copy_(checkpoint["uses"])
        if adversary:
            adversary.load_state_dict(checkpoint["adversary"], first_step)
        run.set_random_state(checkpoint["random"])

    def save(step: int):
        if rank == 0:
            run.save_checkpoint(path, {
                "kind": "vq", "config": asdict(config), "model_config": asdict(model_config),
                "model": vq.state_dict(), "optimizer": optimizer.state_dict(), "uses": uses, "step": step,
                "adversary": adversary and adversary.state_dict(), "random": run.random_state()})

    if rank == 0:
        parameters = sum(weight.numel() for weight in vq.parameters())
        side = config.image_size // model_config.downsampling
        print(f"first stage: {len(training):,} training and {len(validation):,} validation pictures "
              f"({config.target}) of {model_config.image_channels}×{config.image_size}×{config.image_size} → "
              f"{side}×{side} of {config.codebook_size} codes · {parameters:,} parameters · {device} · "
              f"{config.folder}", flush=True)
    order = data.training_order(len(training), config.batch_size, config.seed, first_step, rank, world)
    batches = data.load(training, order, device, workers, config.target, model_config.image_channels)
    if first_step == 0:
        initialize_codebook(vq, training, config, process)
    log = run.Log(config.folder, process, first_step, config.steps)
    picture, scores = "nothing was left to do", {}

    with run.stop_signal(process) as stopping:
        for step in range(first_step + 1, config.steps + 1):
            lr = run.learning_rate(config, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            adversarial_weight = adversary.weight_at(step) if adversary else 0.0
            trains = adversary if adversary and step >= adversary.trains_from else None
            optimizer.zero_grad(set_to_none=True)
            batch = next(batches)  # (B, C, H, W)
            labelled = process.total(batch.sum()) / world / config.accumulate if config.one_hot else None
            for images in batch.chunk(config.accumulate):  # (B / accumulate, C, H, W)
                with process.autocast():
                    reconstructions, codes, quantization_loss = model(images)  # once, for both optimizers
                reconstructions = reconstructions.float()
                loss, parts = autoencoder_loss(images, reconstructions, quantization_loss, perceptual,
                                               config.perceptual_weight, adversary, adversarial_weight,
                                               vq.decoder[-1].weight, labelled)
                (loss / config.accumulate).backward()
                if trains:
                    parts |= trains.backward(images, reconstructions, share=1 / config.accumulate)
                log.add(**parts)
                uses += process.total(torch.bincount(codes.flatten(), minlength=config.codebook_size))
            optimizer.step()
            if trains:
                trains.step(lr)

            last, stop = step == config.steps, stopping()
            evaluating = step % config.eval_every == 0 or last
            saving = step % config.checkpoint_every == 0 or last or stop
            if evaluating:
                picture = config.folder / f"step-{step:06d}.png"
                with log.aside():
                    scores = evaluate(vq, perceptual, validation, config, process, picture)
            if evaluating or saving or step % config.log_every == 0:
                means = log.means()
                text = status_text(means, scores, config.codebook_size)
                numbers = means | {"lr": lr} | (scores if evaluating else {})
                log.line(step, f"{text} · lr {lr:.1e}", numbers, "images", config.batch_size)
            if config.restart_every and step % config.restart_every == 0 and not last:
                restart_dead_codes(vq, optimizer, uses, batch, process)
                uses.zero_()
            if saving:
                save(step)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {step} of {config.steps}; {path} is saved, "
                                        "--resume goes on")
    if rank == 0:
        print(f"done in {log.elapsed()} · {path} · {picture}")
    return path


def input_channels(config: TrainConfig, training, validation) -> int:
    """Channels of what is coded; of masks, one for each label."""
    if config.one_hot:
        segments = config.segments or max(training.segments(), validation.segments())
        if segments == 1 and not config.segments:
            raise ValueError(f"the masks in {config.data_dir} hold no label but 0, and 255, which means that "
                             "a pixel has none: number the labels 0, 1, 2, …")
        return segments
    return 1 if config.target == "depth" else 3


def open_perceptual_loss(config: TrainConfig, process: run.Process) -> PerceptualLoss | None:
    if config.perceptual == "none" and config.perceptual_weights:
        raise run.flag_error("perceptual_weights names a file but perceptual is 'none'; "
                             "add --perceptual vgg16 or alexnet, whichever it is for")
    if not config.perceives:
        return None
    if process.rank > 0:
        process.wait_for_all()  # until the first has fetched the weights
    perceptual = PerceptualLoss(config.perceptual_weights, config.perceptual).to(process.device)
    if process.rank == 0:
        process.wait_for_all()
    return perceptual


def open_adversary(config: TrainConfig, vq: VQ, process: run.Process) -> Adversary | None:
    if not config.adversarial:
        return None
    with torch.random.fork_rng(devices=[]):  # the autoencoder starts as it would without
        network = PatchDiscriminator(vq.config.image_channels, layers=config.discriminator_layers)
    return Adversary(network.to(process.device), config.discriminator_weight, (config.beta1, config.beta2),
                     config.discriminator_steps, process.world)


def status_text(means: dict[str, float], scores: dict[str, float], codebook_size: int) -> str:
    """The status line's account of the losses that this run has by now, and of the last evaluation."""
    texts = {"l1": "train L1 {:.4f}", "cross_entropy": "train {:.4f} nats/pixel",
             "perceptual": " + LPIPS {:.4f}", "vq": " + vq {:.4f}", "lambda": " · λ {:.3g}",
             "discriminator": " · discriminator {:.3f}", "logits_real": ", logits real {:+.2f}",
             "logits_fake": " fake {:+.2f}",
             "val_l1": " · val L1 {:.4f}", "val_cross_entropy": " · val {:.4f} nats/pixel",
             "val_accuracy": ", {:.2%} of labels right", "val_lpips": " LPIPS {:.4f}",
             "codes_used": f" · {{}} of {codebook_size} codes in use", "perplexity": ", perplexity {:.0f}"}
    numbers = means | scores
    return "".join(text.format(numbers[name]) for name, text in texts.items() if name in numbers)


def initialize_codebook(vq: VQ, training, config: TrainConfig, process: run.Process):
    """Codes start where the encoder's outputs are: at random, most of the 1,024 would never be chosen."""
    cells = (config.image_size // vq.config.downsampling) ** 2  # codes per picture
    enough = 16 * config.codebook_size // cells // config.batch_size + 1
    order = itertools.islice(data.training_order(len(training), config.batch_size, config.seed), enough)
    images = data.load(training, order, process.device, 0, config.target, vq.config.image_channels)
    with torch.no_grad():
        vq.quantizer.initialize(torch.cat([as_vectors(vq.latents(batch)) for batch in images]))  # (N, D)
    if process.world > 1:  # sums on a GPU differ in the last bit from process to process
        torch.distributed.broadcast(vq.quantizer.codebook.data, src=0)


@torch.no_grad()
def restart_dead_codes(vq: VQ, optimizer: torch.optim.Optimizer, uses: Tensor, images: Tensor,
                       process: run.Process):
    """Give codes that no picture used lately, uses (K,) == 0, another start, without the old momentum."""
    dead, codebook = uses == 0, vq.quantizer.codebook  # (K,) and (K, D)
    if dead.any():
        vectors = as_vectors(vq.latents(images))  # (N, D)
        if vectors.isfinite().all():  # else the run has diverged, and its log says so
            vq.quantizer.restart(dead, vectors)
        if process.world > 1:
            torch.distributed.broadcast(codebook.data, src=0)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[codebook][moment][dead] = 0


@torch.no_grad()
def evaluate(vq: VQ, perceptual: PerceptualLoss | None, validation, config: TrainConfig, process: run.Process,
             picture: Path) -> dict[str, float]:
    """Codebook use over all validation pictures, and how well they come back: see `score_sums`.

    Writes some inputs above their reconstructions, and the use of each code; warns if hardly any is used.
    """
    counts = torch.zeros(config.codebook_size, device=process.device)  # (K,)
    names = ["val_cross_entropy", "val_accuracy"] if config.one_hot else ["val_l1", "val_lpips"]
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # of both scores, and their number
    batch_size = max(16, config.batch_size // process.world)
    order = data.fixed_order(len(validation), batch_size, rank=process.rank, world=process.world)
    workers = data.worker_count(config.workers, config.data)
    batches = data.load(validation, order, process.device, workers, config.target, vq.config.image_channels)
    for i, images in enumerate(batches):
        with process.autocast():
            reconstructions, codes, _ = vq(images)
        sums += score_sums(images, reconstructions.float(), perceptual, config.one_hot)
        counts += torch.bincount(codes.flatten(), minlength=config.codebook_size)
        if i == 0 and process.rank == 0:
            columns = min(8, len(images))
            rows = zip(*(data.as_pictures(x[:16], config.target).split(columns)
                         for x in (images, reconstructions)))
            rows = [row for pair in rows if len(pair[0]) == columns for row in pair]
            run.save_picture(run.picture_grid(torch.cat(rows), columns), picture)
    *totals, count = process.total(sums).tolist()
    counts = process.total(counts)
    used, perplexity = codebook_use(counts)
    if process.rank == 0:
        use = run.picture_grid(colours_of_use(counts), math.ceil(math.sqrt(len(counts))), side=12)
        run.save_picture(use, picture.with_name(f"{picture.stem}-codes.png"))
        if used < 0.05 * min(len(counts), int(counts.sum())):
            print(f"warning: {used} of {len(counts)} codes in use; what helps: --restart-every 25 to 100, "
                  "a smaller --code-width or --codebook-size, a lower --lr", flush=True)
    scores = {name: total / count for name, total in zip(names, totals)
              if count and (name != "val_lpips" or perceptual)}  # masks may have no label at all
    return scores | {"codes_used": used, "perplexity": perplexity}


if __name__ == "__main__":
    run.command_line(main)
