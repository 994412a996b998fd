"""Train the second stage: a GPT over grids of codes in one of five orders, after any condition (§2 to §4).

    python train_gpt.py --order spiral                        the drawn scenes, 3 to 6 minutes on 2 CPU cores
    python train_gpt.py --condition segmentation              masks → pictures; also class, depth, pose
    python train_gpt.py --multiscale                          coarse to fine, §3
    python train_gpt.py --preset cifar10 --pixels             on 1,024 pixels of 512 colours, §2's baseline
    python train_gpt.py --preset paper --benchmark            what the run would cost on this machine
    python train_gpt.py --data folder --data-dir my_pictures  your own pictures
    torchrun --nproc-per-node 4 train_gpt.py --preset paper   several GPUs

Trains the first stages that are missing. Leaves in --out checkpoint.pt, best.pt (of the lowest validation
loss), log.jsonl, samples and a map of the loss. Ctrl-C saves; --resume goes on.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import run
import train_vq
from benchmark import benchmark_training, random_codes
from cache import encode_pictures
from codebook import entropy
from files import FIELDS
from gpt import GPT, GPTConfig, Sampling
from orderings import TokenLayout
from outputs import Log, announce, draw_loss_map, picture_grid, restore, save_checkpoint, save_picture
from stages import FirstStage, Prior, Stages, stages_from_state
from vq import VQ

MAPS = FIELDS[1:]  # conditions with a first stage of their own: segmentation, depth and pose


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    out: str = ""  # folder of this run; empty: runs/gpt-PRESET-DATA-ORDER[-CONDITION][-multiscale or -pixels]
    resume: bool = False  # go on from checkpoint.pt in that folder
    seed: int = 0  # of the weights, the order of the pictures, dropout and the sampled pictures
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one
    compile: bool = False  # torch.compile the network: a minute at the start; on one GPU as CUDA graphs
    benchmark: bool = False  # only measure a training step on random codes: speed, memory, time of all steps

    data: str = "folder"  # scenes, cifar10, folder, imagenet, restricted-imagenet, ade20k, deepfashion
    data_dir: str = "data/imagenet"  # where the files are; the paper: ImageNet, §A.2
    workers: int = -1  # of the data loader; -1: one per core, at most 8 (none for data in memory)
    vq: str = ""  # first stage: by train_vq.py, or the authors' (vqgan.ckpt); empty: runs/vq-PRESET-DATA/
    views: int = 1  # encodings of a training picture: its center, then crops and flips as the first stage had
    codes_dir: str = "runs/codes"  # folder of the code cache, which all runs share

    order: str = "row"  # row, spiral, zcurve, subsample or alternate: how a grid is unrolled, §3, Fig. 2
    multiscale: bool = False  # coarse to fine: grids of all smaller powers of two come first, §3
    pixels: bool = False  # no first stage: each pixel is a code, one of 512 colours; the baseline of §2
    condition: str = "none"  # class, segmentation, depth or pose: its tokens come before the image's, §4
    condition_vq: str = ""  # first stage of a condition map; empty: runs/vq-PRESET-DATA-CONDITION/
    condition_dropout: float = 0.0  # share of training sequences without their condition, for guidance

    n_layer: int = GPTConfig.n_layer  # layers, §A.1
    n_head: int = GPTConfig.n_head  # attention heads
    n_embd: int = GPTConfig.n_embd  # width
    dropout: float = GPTConfig.dropout  # dropout probability
    gelu: str = GPTConfig.gelu  # tanh: GPT-2's approximation; none: the exact function, faster on a CPU

    steps: int = 500_000  # training steps; the paper gives none
    batch_size: int = 12  # pictures per step, over all processes, §A.1
    lr: float = 12 * 4.5e-6  # learning rate, §A.1: 4.5e-6 × batch size; not scaled for you
    beta1: float = 0.9  # of AdamW; this and the next two as in the authors' released model
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.01  # of the weights of linear layers
    clip: float = 0.0  # gradient clipping by norm; 0: none
    warmup_steps: int = 0  # steps of linear warm-up of lr
    decay: bool = False  # cosine decay of lr to a twentieth

    temperature: float = 1.0  # of the sampled pictures, §A.1
    top_k: int = 100  # most probable codes that are sampled from, §A.1; 0: all
    log_every: int = 100  # steps between two status lines
    eval_every: int = 5000  # steps between two evaluations on all validation pictures, each with samples
    checkpoint_every: int = 5000  # steps between two checkpoints

    KIND = "gpt"
    CHANGEABLE = ("out", "resume", "device", "compile", "benchmark", "data_dir", "workers", "codes_dir",
                  "steps", "lr", "temperature", "top_k", "log_every", "eval_every", "checkpoint_every")

    def __post_init__(self):
        run.check_training(self)
        run.check_choice("condition", self.condition, ("none", "class", *MAPS))
        run.check_at_least(self, 1, "views")
        run.check_at_least(self, 0, "weight_decay", "clip")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout is {self.condition_dropout}; it must lie in [0, 1)")
        data.check_offered(self.data, "image" if self.condition == "none" else self.condition)
        if self.pixels and self.preset == "paper":
            raise ValueError("256×256 pixels are too many tokens: try --preset demo or cifar10, of 32×32")
        if self.pixels and (self.multiscale or self.vq):
            raise ValueError("pixels have neither a first stage (--vq) nor coarser scales (--multiscale)")
        self.sampling  # this line and the next raise ValueError for invalid values
        self.model(TokenLayout(codebook_size=1, height=1, width=1, order=self.order))

    @property
    def folder(self) -> Path:
        condition = "" if self.condition == "none" else f"-{self.condition}"
        kind = "-multiscale" if self.multiscale else "-pixels" if self.pixels else ""
        return Path(self.out or f"runs/gpt-{self.preset}-{self.data}-{self.order}{condition}{kind}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k)

    def model(self, layout: TokenLayout) -> GPTConfig:
        return GPTConfig(layout.vocab_size, layout.block_size, self.n_layer, self.n_head, self.n_embd,
                         self.dropout, self.gelu)

    def without_effect(self) -> list[tuple[bool, str, str]]:
        """Flags that do nothing if the first value is true, and why."""
        return [
            (self.data == "scenes", "data_dir views", "scenes are drawn; files need --data folder"),
            (self.condition not in MAPS, "condition_vq", "only segmentation, depth and pose have one"),
            (self.condition == "none", "condition_dropout", "there is no condition to drop; add --condition"),
            (self.benchmark, "resume views codes_dir temperature top_k log_every eval_every checkpoint_every",
             "a benchmark only measures training steps")]


PRESETS = {  # each name also in train_vq.py, whose first stage it takes
    "demo": TrainConfig(  # 2 CPU cores: 1m34s to 3m23s, about twice with a map; a first stage 46 s to 2m04s
        preset="demo", data="scenes", data_dir="data", n_layer=4, n_head=4, n_embd=160, gelu="none",
        steps=1900, batch_size=16, lr=3e-3, weight_decay=0.1, clip=1.0, warmup_steps=100, decay=True,
        eval_every=950, checkpoint_every=475),
    "cifar10": TrainConfig(
        preset="cifar10", data="cifar10", data_dir="data", views=2, n_layer=12, n_head=8, n_embd=256,
        dropout=0.1, gelu="none", steps=40_000, batch_size=128, lr=1e-3, weight_decay=0.1, clip=1.0,
        warmup_steps=500, decay=True, eval_every=2500, checkpoint_every=1000),
    "paper": TrainConfig(),
}


def main(argv: list[str] | None = None) -> Path | None:
    """Train as the command line says; returns the path of the checkpoint, None for a benchmark."""
    config, checkpoint = run.configure(PRESETS, argv)
    device, rank, world = process = run.start(config)

    # The frozen first stages, and each picture's codes, which are computed once and cached.
    stages = open_stages(config, checkpoint, process)
    token_layout(config, stages, int(config.condition == "class"))  # what does not fit raises before encoding
    training, validation, trained_on = (random_codes(config, stages) if config.benchmark else
                                        encode_pictures(config, stages, checkpoint, process))
    layout = token_layout(config, stages, classes=len(trained_on["classes"]))

    # Seeded again: the weights must not depend on whether a first stage was trained just before.
    torch.manual_seed(config.seed)
    gpt = GPT(config.model(layout)).to(device)
    # CUDA graphs on one GPU, where small kernels are launch-bound; untried on several.
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else "default"
    model = torch.compile(gpt, mode=mode) if config.compile else gpt
    model = DistributedDataParallel(model) if world > 1 else model
    prior = Prior(gpt, layout, stages, trained_on)
    optimizer = torch.optim.AdamW(gpt.parameter_groups(config.weight_decay), config.lr,
                                  betas=(config.beta1, config.beta2), fused=True)
    first_step, best = (checkpoint["step"], checkpoint["best"]) if checkpoint else (0, (math.inf, 0))
    if checkpoint:
        restore(checkpoint, gpt, optimizer)

    def train_step(index: list[int]) -> dict[str, Tensor]:
        tokens = prior.tokens(training, index, config.condition_dropout)  # (B, P + T)
        with run.autocast(device):
            loss = layout.loss(model(tokens[:, :-1]), tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.clip)
        optimizer.step()
        return {"train": loss}

    describe(config, prior, training, validation, device)
    if config.benchmark:
        batch = list(range(config.batch_size // world))
        return benchmark_training(lambda: train_step(batch), config, device, "tokens", sum(layout.lengths))
    count, T = len(training["image"]), sum(layout.lengths)
    batches = data.training_batches(count, config.batch_size, config.seed, first_step, rank, world)
    log = Log(config, process, first_step, "tokens", config.batch_size * T, lambda step: data.name_batch(
        training["image"].dataset, config.views, config.batch_size, config.seed, step))
    scores = {}
    for step, batch, due in run.steps(config, process, first_step, batches):
        lr = run.set_learning_rate(optimizer, config, step)
        log.add(step, train_step([index for index, _ in batch]))

        # means() and check() raise if the run has diverged, before it is sampled from or saved.
        if due.log:
            numbers = log.means() | {"lr": lr}
            if due.evaluate:
                scores = evaluate(prior, validation, config, process)
                log.check(step, scores)
                numbers |= scores
                if rank == 0:
                    draw_samples(prior, validation, config, log.picture(step))
                    draw_loss_map(scores["val_by_cell"], config.folder / "loss-map.png")
                if scores["val"] < best[0]:  # small data sets overfit early
                    best = scores["val"], step  # the lowest, and after which step it was
                    save_checkpoint(config, process, step, prior.state(), "best.pt")
            log.line(step, status_text(scores | numbers, layout), numbers)
        if due.save:
            save_checkpoint(config, process, step,
                            prior.state() | {"optimizer": optimizer.state_dict(), "best": best})

    if 0 < best[1] < config.steps:  # overfitting: best.pt is the one to sample from
        announce(f"lowest validation loss {best[0]:.3f} after step {best[1]}: {config.folder / 'best.pt'}")
    return log.finish()


def open_stages(config: TrainConfig, checkpoint: dict | None, process: run.Process) -> Stages:
    """First stages of image and condition (None: class): the checkpoint's, the flags', or the preset's."""
    stages = stages_from_state(checkpoint["stages"]) if checkpoint else {}
    for field, path in {"image": config.vq, config.condition: config.condition_vq}.items():
        if field not in ("none", *stages):
            stages[field] = (FirstStage.load(path, field) if path else
                             default_stage(config, field, process, stages.get("image")))
    return {field: stage and stage.to(process.device) for field, stage in stages.items()}


def default_stage(config: TrainConfig, field: str, process: run.Process,
                  image: FirstStage | None = None) -> FirstStage | None:
    """This preset's first stage of a field, at the size of the image's, trained if missing; or of pixels."""
    if field == "class":
        return None
    own = replace(train_vq.PRESETS[config.preset], data=config.data, target=field)
    size = image.preparation.size if image else own.image_size
    if size != own.image_size and size // own.model().downsampling != image.side:
        raise ValueError(f"at {size} pixels the preset's first stage of {field} has another number of codes "
                         "than the image's: train one with train_vq.py, and name it with --condition-vq")
    if config.pixels and field == "image":
        return FirstStage.of_pixels(config, replace(own.preparation, upscale=True), process)
    if config.benchmark:  # only its sizes matter
        return FirstStage(VQ(own.model()), field, replace(own.preparation, size=size), {})
    path = own.folder / "checkpoint.pt"
    finished = FirstStage.is_finished(path)
    process.wait_for_all()  # no process writes it before all have read it
    if not finished:
        announce(f"no finished first stage in {path.parent}: training it first")
        flags = (f"--preset {config.preset} --data {config.data} --target {field} --image-size "
                 f"{size} --device {config.device} --workers {config.workers}").split()
        flags += [] if config.data == "scenes" else ["--data-dir", config.data_dir]
        try:
            train_vq.main(flags + ["--resume"] * path.exists())
        except run.UsageError as error:  # of flags that the user has not given
            raise run.UsageError(f"{error} (of the first stage in {path.parent}: train one with train_vq.py, "
                                 "and name it with --vq or --condition-vq)") from None
        process.wait_for_all()
    stage = FirstStage.load(path, field)
    if stage.vq.config != own.model(stage.vq.config.image_channels):  # by other flags, or an earlier preset
        announce(f"{path} has other settings than this preset's first stage: to train that, remove it")
    if not stage.was_trained_on(config.data, config.data_dir):
        raise ValueError(f"{path} was trained on {stage.trained_on['data_dir']}, not on {config.data_dir}: "
                         f"name it with --{'vq' if field == 'image' else 'condition-vq'} to use it "
                         "anyway, or train another with train_vq.py --out and name that")
    return stage


def token_layout(config: TrainConfig, stages: Stages, classes: int) -> TokenLayout:
    """The image's tokens behind the condition's; a null token where something must stand for no condition."""
    image, condition = stages["image"], stages.get(config.condition)
    scales = tuple(2**i for i in range((image.side - 1).bit_length()))  # 1, 2, 4, … below the finest
    return TokenLayout(
        image.codebook_size, image.side, image.side, config.order, scales if config.multiscale else (),
        condition.codebook_size if condition else classes,
        condition.side**2 if condition else int(config.condition == "class"),
        null_token=config.condition == "none" or config.condition_dropout > 0)


def untrained_prior(preset: str) -> Prior:
    """A preset's networks with random weights, unconditional, for a benchmark of sampling."""
    config, own = PRESETS[preset], train_vq.PRESETS[preset]
    stages = {"image": FirstStage(VQ(own.model()), "image", own.preparation, {})}
    layout = token_layout(config, stages, classes=0)
    return Prior(GPT(config.model(layout)), layout, stages, {})


def describe(config: TrainConfig, prior: Prior, training: dict, validation: dict, device: torch.device):
    """The first lines on screen: sizes, and the baselines that a loss is to be compared with."""
    layout, parameters = prior.layout, sum(weight.numel() for weight in prior.gpt.parameters())
    sizes = " + ".join(f"{h}×{w}" for h, w in layout.sizes)
    condition = f"{layout.condition_length} tokens of {config.condition} before " if prior.condition else ""
    announce(f"second stage: {condition}{sizes} codes in the order {config.order} · vocabulary of "
             f"{layout.vocab_size:,}, {layout.block_size} positions, {parameters:,} parameters · {device} · "
             f"{config.folder}")
    if not config.benchmark:
        unigram = entropy(torch.from_numpy(np.bincount(validation["image"].flatten())))
        announce(f"{len(training['image'].dataset):,} training and {len(validation['image']):,} validation "
                 f"pictures; baselines: {math.log(layout.codebook_size):.3f} nats/token for a uniform guess, "
                 f"{unigram:.3f} for the frequency of each code of the finest grid")


@torch.no_grad()
def evaluate(prior: Prior, codes: dict[str, np.ndarray], config: TrainConfig, process: run.Process) -> dict:
    """Nats per token over all validation pictures: the mean, by scale, by cell, and without the condition."""
    layout, count = prior.layout, len(codes["image"])
    dropouts = (0.0, 1.0) if config.condition_dropout else (0.0,)
    nats = torch.zeros(len(dropouts), sum(layout.lengths), device=process.device).double()  # (1 or 2, T)
    prior.gpt.eval()
    for batch in data.fixed_batches(count, config.batch_size, rank=process.rank, world=process.world):
        for i, dropout in enumerate(dropouts):
            tokens = prior.tokens(codes, [index for index, _ in batch], dropout)  # (B, P + T)
            with run.autocast(process.device):
                nats[i] += layout.loss(prior.gpt(tokens[:, :-1]), tokens).sum(0)
    prior.gpt.train()
    nats = process.total(nats) / count
    scores = {"val": nats[0].mean().item(), "nats_per_picture": nats[0].sum().item()}
    if config.condition_dropout:
        scores["val_null"] = nats[1].mean().item()
    grids = [grid[0] for grid in layout.grids(nats[:1])]  # (h, w) each
    if layout.scales:
        scores |= {f"val_{len(grid)}": grid.mean().item() for grid in grids}
    return scores | {"val_by_cell": [grid.round(decimals=4).tolist() for grid in grids]}


def status_text(numbers: dict, layout: TokenLayout) -> str:
    """The status line's account of the training loss and of the last evaluation, if there was one."""
    text = f"train {numbers['train']:.3f} nats/token"
    if "val" in numbers:
        text += f" · val {numbers['val']:.3f}"
    if "val_null" in numbers:
        text += f" (without condition {numbers['val_null']:.3f})"
    if "val" in numbers and layout.scales:
        each = ", ".join(f"{h}×{w} {numbers[f'val_{h}']:.3f}" for h, w in layout.sizes)
        text += f" ({each}; {numbers['nats_per_picture']:.1f} nats/picture)"
    return f"{text} · lr {numbers['lr']:.1e}"


def draw_samples(prior: Prior, validation: dict[str, np.ndarray], config: TrainConfig, path: Path):
    """32 samples, or rows of 4 to each of 8 validation conditions; the same random numbers each time."""
    generator = torch.Generator(prior.device).manual_seed(config.seed)
    count, condition, columns = 32, None, 8
    if prior.condition:
        first = torch.from_numpy(validation[prior.condition][:8].astype(np.int64))  # (8, h, w) or (8,)
        count, condition, columns = 4 * len(first), first.repeat_interleave(4, 0), 4
    pictures = prior.pictures(prior.sample(count, condition, None, config.sampling, generator))
    if prior.condition in MAPS:  # each before its samples
        maps = prior.stages[prior.condition].decode(first.to(prior.device)).expand(-1, 3, -1, -1)
        pictures, columns = torch.cat([maps[:, None], pictures.unflatten(0, (-1, 4))], 1).flatten(0, 1), 5
    save_picture(picture_grid(pictures, columns), path)


if __name__ == "__main__":
    run.command_line(main)
