"""Train the first stage: pictures → a grid of codes → pictures (§2, §A.1).

    python train_vq.py                                        the drawn scenes, about 2 minutes on 2 CPU cores
    python train_vq.py --preset cifar10 --data-dir data       CIFAR-10 as in §2
    python train_vq.py --data folder --data-dir my_pictures   your own pictures
    torchrun --nproc-per-node 4 train_vq.py --preset paper    several GPUs

Leaves checkpoint.pt, log.jsonl and pictures (inputs above reconstructions) in --out. Ctrl-C saves; --resume
goes on.
"""
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import run
from vq import VQ, VQConfig, as_vectors, codebook_use


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    out: str = ""  # folder of this run; empty: runs/vq-PRESET-DATA
    resume: bool = False  # go on from checkpoint.pt in that folder
    seed: int = 0  # of the weights, the order of the pictures and their crops
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one

    data: str = "folder"  # scenes (drawn, no files), cifar10, or folder (any folder of pictures)
    data_dir: str = "data/imagenet"  # where the files are; the paper: ImageNet, §A.2
    image_size: int = 256  # pixels along each side, §2
    flip: bool = False  # mirror half of the training pictures
    upscale: bool = False  # enlarge pictures that are smaller than image_size instead of refusing them
    workers: int = -1  # processes that prepare pictures; -1: as many as help

    base_channels: int = VQConfig.base_channels  # channels of the network at full resolution
    channel_multipliers: str = VQConfig.channel_multipliers  # times base_channels; each comma halves the size
    residual_blocks: int = VQConfig.residual_blocks  # residual blocks per resolution
    codebook_size: int = VQConfig.codebook_size  # K, codes to choose from, §A.1
    code_width: int = VQConfig.code_width  # D, numbers per code, §A.1
    commitment_weight: float = VQConfig.commitment_weight  # beta, pull of the encoder towards its code, §A.1
    restart_every: int = 100  # steps after which codes that were not used move onto encoder outputs; 0: never

    steps: int = 500_000  # training steps; the paper gives none
    batch_size: int = 12  # pictures per step, over all processes, §A.1
    lr: float = 12 * 4.5e-6  # learning rate, §A.1
    beta1: float = 0.5  # of Adam; this and the next as in the authors' released model
    beta2: float = 0.9  # of Adam
    warmup_steps: int = 0  # steps of linear warm-up of lr
    decay: bool = False  # let lr fall to a twentieth along a cosine

    log_every: int = 100  # steps between two status lines
    eval_every: int = 5000  # steps between two evaluations on all validation pictures, each with a picture
    checkpoint_every: int = 5000  # steps between two checkpoints

    KIND = "vq"
    CHANGEABLE = ("out", "resume", "device", "workers", "steps", "lr", "log_every", "eval_every",
                  "checkpoint_every")

    def __post_init__(self):
        run.check_choice("data", self.data, data.DATASETS)
        run.check_at_least(self, 1, "image_size", "steps", "batch_size", "log_every", "eval_every",
                           "checkpoint_every")
        run.check_at_least(self, 0, "seed", "restart_every", "warmup_steps", "lr")
        run.check_at_least(self, -1, "workers")
        run.check_betas(self)
        if self.codebook_size > 65536:
            raise ValueError(f"codebook_size is {self.codebook_size}; codes are stored in 16 bits, "
                             "so it must be at most 65536")
        if self.image_size % self.model.downsampling:
            raise ValueError(f"image_size is {self.image_size}, which channel_multipliers "
                             f"{self.channel_multipliers!r} cannot halve evenly; choose a multiple of "
                             f"{self.model.downsampling}")

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/vq-{self.preset}-{self.data}")

    @property
    def model(self) -> VQConfig:
        return VQConfig(3, self.base_channels, self.channel_multipliers, self.residual_blocks,
                        self.codebook_size, self.code_width, self.commitment_weight)


PRESETS = {
    # 32×32 → 8×8 of 256 codes.
    "demo": TrainConfig(
        preset="demo", data="scenes", data_dir="data", image_size=32, base_channels=16,
        channel_multipliers="1,2,4", residual_blocks=1, codebook_size=256, code_width=32, restart_every=25,
        steps=1100, batch_size=8, lr=1e-3, beta1=0.9, beta2=0.99, warmup_steps=50, decay=True, log_every=50,
        eval_every=500, checkpoint_every=250),
    # §2: "we only downsample once": 32×32 → 16×16 of 1,024 codes.
    "cifar10": TrainConfig(
        preset="cifar10", data="cifar10", data_dir="data", image_size=32, flip=True, base_channels=64,
        channel_multipliers="1,2", steps=30_000, batch_size=128, lr=3e-4, beta1=0.9, beta2=0.99,
        warmup_steps=200, decay=True, restart_every=50, eval_every=2500, checkpoint_every=1000),
    "paper": TrainConfig(),
}


def main(argv: list[str] | None = None) -> Path:
    """Train as the command line says; returns the path of the checkpoint."""
    config, checkpoint = run.configure(PRESETS, argv)
    process = run.start(config.device, config.seed)
    device, rank, world = process
    run.check_shared_evenly(config.batch_size, world)
    path = config.folder / "checkpoint.pt"

    training, validation = (
        data.open_dataset(config.data, config.data_dir, split, config.image_size, config.flip, config.upscale)
        for split in ("train", "val"))
    workers = data.worker_count(config.workers, config.data)
    config.folder.mkdir(parents=True, exist_ok=True)

    vq = VQ(config.model).to(device)
    model = DistributedDataParallel(vq) if world > 1 else vq
    optimizer = torch.optim.Adam(vq.parameters(), config.lr, betas=(config.beta1, config.beta2),
                                 fused=device.type == "cuda")
    uses = torch.zeros(config.codebook_size, dtype=torch.int64, device=device)  # (K,) recent uses of a code
    first_step = 0
    if checkpoint:
        first_step = checkpoint["step"]
        vq.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        uses.copy_(checkpoint["uses"])
        run.set_random_state(checkpoint["random"])

    def save(step: int):
        if rank == 0:
            run.save_checkpoint(path, {
                "kind": "vq", "config": asdict(config), "model_config": asdict(config.model),
                "model": vq.state_dict(), "optimizer": optimizer.state_dict(), "uses": uses, "step": step,
                "random": run.random_state()})

    if rank == 0:
        parameters = sum(weight.numel() for weight in vq.parameters())
        side = config.image_size // config.model.downsampling
        print(f"first stage: {len(training):,} training and {len(validation):,} validation pictures of "
              f"{config.image_size}×{config.image_size} → {side}×{side} of {config.codebook_size} codes · "
              f"{parameters:,} parameters · {device} · {config.folder}", flush=True)
    log = run.Log(config.folder, process, first_step, config.steps)
    order = data.training_order(len(training), config.batch_size, config.seed, first_step, rank, world)
    batches = data.load(training, order, device, workers)
    if first_step == 0:
        initialize_codebook(vq, training, config, process)
    picture, scores_text = "nothing was left to do", ""

    with run.stop_signal(process) as stopping:
        for step in range(first_step + 1, config.steps + 1):
            lr = run.learning_rate(config, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = next(batches)  # (B, C, H, W)
            with process.autocast():
                reconstructions, codes, quantization_loss = model(images)
            pixel_loss = F.l1_loss(reconstructions.float(), images)
            optimizer.zero_grad(set_to_none=True)
            (pixel_loss + quantization_loss).backward()
            optimizer.step()

            log.add(l1=pixel_loss, vq=quantization_loss)
            uses += torch.bincount(codes.flatten(), minlength=config.codebook_size)
            if config.restart_every and step % config.restart_every == 0:
                restart_dead_codes(vq, optimizer, process.total(uses), images, process)
                uses.zero_()

            last, stop = step == config.steps, stopping()
            evaluating = step % config.eval_every == 0 or last
            saving = step % config.checkpoint_every == 0 or last or stop
            if evaluating:
                picture = config.folder / f"step-{step:06d}.png"
                scores = evaluate(vq, validation, config, process, picture)
                scores_text = (f" · val L1 {scores['val_l1']:.4f} · {scores['codes_used']} of "
                               f"{config.codebook_size} codes in use, perplexity {scores['perplexity']:.0f}")
            if evaluating or saving or step % config.log_every == 0:
                means = log.means()
                text = f"train L1 {means['l1']:.4f} + vq {means['vq']:.4f}{scores_text} · lr {lr:.1e}"
                numbers = means | {"lr": lr} | (scores if evaluating else {})
                log.line(step, text, numbers, "images", config.batch_size)
            if saving:
                save(step)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {step} of {config.steps}; {path} is saved, "
                                        "--resume goes on")
    if rank == 0:
        print(f"done in {log.elapsed()} · {path} · {picture}")
    return path


def initialize_codebook(vq: VQ, training, config: TrainConfig, process: run.Process):
    """Codes start where the encoder's outputs are: at random, most of the 1,024 would never be chosen."""
    cells = (config.image_size // config.model.downsampling) ** 2  # codes per picture
    enough = 16 * config.codebook_size // cells // config.batch_size + 1
    order = itertools.islice(data.training_order(len(training), config.batch_size, config.seed), enough)
    images = data.load(training, order, process.device, workers=0)
    with torch.no_grad():
        vq.quantizer.initialize(torch.cat([as_vectors(vq.latents(batch)) for batch in images]))  # (N, D)
    if process.world > 1:  # sums on a GPU differ in the last bit from process to process
        torch.distributed.broadcast(vq.quantizer.codebook.data, src=0)


def restart_dead_codes(vq: VQ, optimizer: torch.optim.Optimizer, uses: Tensor, images: Tensor,
                       process: run.Process):
    """Give codes that no picture used lately, uses (K,) == 0, another start, without the old momentum."""
    dead = uses == 0  # (K,)
    if dead.any():
        codebook = vq.quantizer.codebook
        with torch.no_grad():
            vq.quantizer.restart(dead, as_vectors(vq.latents(images)))
        if process.world > 1:
            torch.distributed.broadcast(codebook.data, src=0)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[codebook][moment][dead] = 0


@torch.no_grad()
def evaluate(vq: VQ, validation, config: TrainConfig, process: run.Process,
             picture: Path) -> dict[str, float]:
    """L1 and codebook use over all validation pictures; writes some inputs above their reconstructions."""
    counts = torch.zeros(config.codebook_size, device=process.device)  # (K,)
    error = torch.zeros(2, device=process.device)  # sum over pictures, number of pictures
    batch_size = max(16, config.batch_size // process.world)
    order = data.fixed_order(len(validation), batch_size, rank=process.rank, world=process.world)
    workers = data.worker_count(config.workers, config.data)
    for i, images in enumerate(data.load(validation, order, process.device, workers)):
        with process.autocast():
            reconstructions, codes, _ = vq(images)
        error[0] += (reconstructions - images).abs().mean((1, 2, 3)).sum()
        error[1] += len(images)
        counts += torch.bincount(codes.flatten(), minlength=config.codebook_size)
        if i == 0 and process.rank == 0:
            columns = min(8, len(images))
            rows = zip(images[:16].split(columns), reconstructions[:16].split(columns))
            rows = [row for pair in rows if len(pair[0]) == columns for row in pair]
            run.save_picture(run.picture_grid(torch.cat(rows), columns), picture)
    total, pictures = process.total(error).tolist()
    used, perplexity = codebook_use(process.total(counts))
    return {"val_l1": total / pictures, "codes_used": used, "perplexity": perplexity}


if __name__ == "__main__":
    run.command_line(main)
