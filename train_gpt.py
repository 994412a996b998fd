"""Train the second stage: a GPT that writes grids of codes in one of five orders (§2, §3, §A.1).

    python train_gpt.py --order spiral                        the drawn scenes, about 4 minutes on 2 CPU cores
    python train_gpt.py --preset cifar10 --data-dir data      CIFAR-10 as in §2
    python train_gpt.py --data folder --data-dir my_pictures  your own pictures
    torchrun --nproc-per-node 4 train_gpt.py --preset paper   several GPUs

Trains the first stage before if there is none. Leaves checkpoint.pt, log.jsonl and pictures (samples) in
--out. Ctrl-C saves; --resume goes on.
"""
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import run
import taming
import train_vq
from gpt import GPT, GPTConfig, check_sampling
from orderings import ORDERINGS, roll_up, unroll
from vq import VQ, VQConfig, entropy


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's; `PRESETS` says what differs. Raises ValueError for unworkable values."""
    preset: str = "paper"  # demo, cifar10 or paper: which set of defaults the other flags change
    out: str = ""  # folder of this run; empty: runs/gpt-PRESET-DATA-ORDER
    resume: bool = False  # go on from checkpoint.pt in that folder
    seed: int = 0  # of the weights, the order of the pictures, dropout and the sampled pictures
    device: str = "auto"  # cpu, cuda, cuda:1, …; auto: a GPU if there is one

    data: str = "folder"  # scenes, cifar10, folder, imagenet, restricted-imagenet, ade20k, deepfashion
    data_dir: str = "data/imagenet"  # where the files are; the paper: ImageNet, §A.2
    workers: int = -1  # processes that prepare pictures for the encoder; -1: as many as help
    vq: str = ""  # first stage: by train_vq.py, or the authors' (vqgan.ckpt); empty: runs/vq-PRESET-DATA/
    views: int = 1  # cached versions of each training picture: plain, then cropped or flipped as in training
    codes_dir: str = "runs/codes"  # folder of the code cache, which all runs share

    order: str = "row"  # row, spiral, zcurve, subsample or alternate: how the grid is unrolled, §3, Fig. 2
    n_layer: int = GPTConfig.n_layer  # layers, §A.1
    n_head: int = GPTConfig.n_head  # attention heads
    n_embd: int = GPTConfig.n_embd  # width
    dropout: float = GPTConfig.dropout  # share of activations dropped in training

    steps: int = 500_000  # training steps; the paper gives none
    batch_size: int = 12  # pictures per step, over all processes, §A.1
    lr: float = 12 * 4.5e-6  # learning rate, §A.1
    beta1: float = 0.9  # of AdamW; this and the next two as in the authors' released model
    beta2: float = 0.95  # of AdamW
    weight_decay: float = 0.01  # of the weights of linear layers
    clip: float = 0.0  # largest norm of the gradient; 0: no limit
    warmup_steps: int = 0  # steps of linear warm-up of lr
    decay: bool = False  # let lr fall to a twentieth along a cosine

    temperature: float = 1.0  # of the sampled pictures, §A.1
    top_k: int = 100  # likeliest codes that are sampled from, §A.1; 0: all
    log_every: int = 100  # steps between two status lines
    eval_every: int = 5000  # steps between two evaluations on all validation pictures, each with samples
    checkpoint_every: int = 5000  # steps between two checkpoints

    KIND = "gpt"
    CHANGEABLE = ("out", "resume", "device", "workers", "codes_dir", "steps", "lr", "temperature", "top_k",
                  "log_every", "eval_every", "checkpoint_every")

    def __post_init__(self):
        run.check_choice("data", self.data, data.DATASETS)
        run.check_choice("order", self.order, ORDERINGS)
        run.check_at_least(self, 1, "views", "steps", "batch_size", "log_every", "eval_every",
                           "checkpoint_every")
        run.check_at_least(self, 0, "seed", "lr", "weight_decay", "clip", "warmup_steps")
        run.check_at_least(self, -1, "workers")
        run.check_betas(self)
        check_sampling(self.temperature, self.top_k, top_p=1.0)
        self.model(codebook_size=1, length=1)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/gpt-{self.preset}-{self.data}-{self.order}")

    @property
    def first_stage(self) -> Path:
        return Path(self.vq or f"runs/vq-{self.preset}-{self.data}/checkpoint.pt")

    def model(self, codebook_size: int, length: int) -> GPTConfig:
        """One token more than there are codes, the start token; positions for it and all codes but one."""
        return GPTConfig(codebook_size + 1, length, self.n_layer, self.n_head, self.n_embd, self.dropout)


PRESETS = {
    "demo": TrainConfig(
        preset="demo", data="scenes", data_dir="data", n_layer=4, n_head=4, n_embd=160, dropout=0.0,
        steps=2600, batch_size=16, lr=2e-3, weight_decay=0.1, clip=1.0, warmup_steps=100, decay=True,
        log_every=100, eval_every=650, checkpoint_every=650),
    "cifar10": TrainConfig(
        preset="cifar10", data="cifar10", data_dir="data", views=2, n_layer=12, n_head=8, n_embd=256,
        dropout=0.1, steps=40_000, batch_size=128, lr=1e-3, weight_decay=0.1, clip=1.0, warmup_steps=500,
        decay=True, eval_every=2500, checkpoint_every=1000),
    "paper": TrainConfig(),
}


def main(argv: list[str] | None = None) -> Path:
    """Train as the command line says; returns the path of the checkpoint."""
    config, checkpoint = run.configure(PRESETS, argv)
    process = run.start(config.device, config.seed)
    device, rank, world = process
    run.check_shared_evenly(config.batch_size, world)
    path = config.folder / "checkpoint.pt"

    first_stage = open_first_stage(config, checkpoint, process)
    vq = VQ(VQConfig(**first_stage["model_config"])).to(device)
    vq.load_state_dict(first_stage["model"])
    side = first_stage["config"]["image_size"] // vq.config.downsampling
    p = ORDERINGS[config.order](side, side)  # (T,)
    codes, validation_codes = encode_pictures(config, vq, first_stage, process)  # (N, h, w) each
    K, (h, w) = vq.config.codebook_size, codes.shape[1:]
    unigram = entropy(torch.from_numpy(np.bincount(validation_codes.flatten(), minlength=K)))
    config.folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)  # again: the weights must not depend on whether a first stage was trained
    model_config = config.model(K, length=h * w)
    gpt = GPT(model_config).to(device)
    model = DistributedDataParallel(gpt) if world > 1 else gpt
    optimizer = torch.optim.AdamW(parameter_groups(gpt, config.weight_decay), config.lr,
                                  betas=(config.beta1, config.beta2), fused=device.type == "cuda")
    first_step = checkpoint["step"] if checkpoint else 0
    if checkpoint:
        gpt.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        run.set_random_state(checkpoint["random"])

    def save(step: int):
        if rank == 0:
            run.save_checkpoint(path, {
                "kind": "gpt", "config": asdict(config), "model_config": asdict(model_config),
                "model": gpt.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "random": run.random_state(), "grid": [h, w], "first_stage": first_stage})

    if rank == 0:
        parameters = sum(weight.numel() for weight in gpt.parameters())
        print(f"second stage: {len(codes):,} training and {len(validation_codes):,} validation grids of "
              f"{h}×{w} codes in the order {config.order} · {parameters:,} parameters · {device} · "
              f"{config.folder}\nwhat is good: {math.log(K):.3f} nats/token is a uniform guess, "
              f"{unigram:.3f} knows how frequent each code is", flush=True)
    log = run.Log(config.folder, process, first_step, config.steps)
    order = data.training_order(len(codes), config.batch_size, config.seed, first_step, rank, world)
    picture, scores_text = "nothing was left to do", ""

    with run.stop_signal(process) as stopping:
        for step in range(first_step + 1, config.steps + 1):
            lr = run.learning_rate(config, step - 1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            tokens = as_tokens(codes[[index for index, _ in next(order)]], p, K).to(device)  # (B, 1 + T)
            with process.autocast():
                loss = next_token_loss(model(tokens[:, :-1]), tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(gpt.parameters(), config.clip)
            optimizer.step()
            log.add(train=loss)

            last, stop = step == config.steps, stopping()
            evaluating = step % config.eval_every == 0 or last
            saving = step % config.checkpoint_every == 0 or last or stop
            if evaluating:
                picture = config.folder / f"step-{step:06d}.png"
                with log.aside():
                    scores = {"val": evaluate(gpt, validation_codes, p, config, process), "unigram": unigram}
                    if rank == 0:
                        samples = sample(gpt, vq, p, (h, w), config, process)
                        run.save_picture(run.picture_grid(samples, columns=8), picture)
                scores_text = f" · val {scores['val']:.3f}"
            if evaluating or saving or step % config.log_every == 0:
                means = log.means()
                text = f"train {means['train']:.3f} nats/token{scores_text} · lr {lr:.1e}"
                numbers = means | {"lr": lr} | (scores if evaluating else {})
                log.line(step, text, numbers, "tokens", config.batch_size * h * w)
            if saving:
                save(step)
            if stop and not last:
                raise KeyboardInterrupt(f"stopped after step {step} of {config.steps}; {path} is saved, "
                                        "--resume goes on")
    if rank == 0:
        print(f"done in {log.elapsed()} · {path} · {picture}")
    return path


def open_first_stage(config: TrainConfig, checkpoint: dict | None, process: run.Process) -> dict:
    """The first stage's config and weights, and their hash.

    Out of a run that goes on if the file is gone, else from its own checkpoint, trained if need be.
    """
    path = config.first_stage
    if checkpoint is None and not config.vq and not finished(path):
        process.wait_for_all()  # nobody writes the file before all have seen that it is not there
        if process.rank == 0:
            print(f"no finished first stage in {path.parent}: training it first", flush=True)
        resume = ["--resume"] if path.exists() else []
        train_vq.main(["--preset", config.preset, "--data", config.data, "--data-dir", config.data_dir,
                       "--device", config.device, "--workers", str(config.workers), "--out", str(path.parent),
                       *resume])
        process.wait_for_all()
    if checkpoint is not None and not path.exists():
        return checkpoint["first_stage"]  # moved or removed since, but a run keeps a copy
    found = released_first_stage(path) if taming.recognizes(path) else run.load_checkpoint(path, "vq")
    target, channels = found["config"].get("target", "image"), found["model_config"]["image_channels"]
    if target != "image" or channels != 3:
        raise ValueError(f"{path} is a first stage of another target ({target}, {channels} channels); "
                         "name one of pictures with --vq")
    first_stage = {key: found[key] for key in ("config", "model_config", "model")}
    first_stage |= {"path": str(path), "hash": weights_hash(found["model_config"], found["model"])}
    if checkpoint is not None and checkpoint["first_stage"]["hash"] != first_stage["hash"]:
        raise ValueError(
            f"{path} is not the first stage that the run in {config.folder} was trained on; start another "
            "run with --out, or move that file away to go on with the copy in the run's checkpoint")
    trained_on = found["config"]["data_dir"]
    if (config.data in data.LAYOUTS and not config.vq
            and Path(trained_on).resolve() != Path(config.data_dir).resolve()):
        raise ValueError(f"{path} was trained on {trained_on}, not on {config.data_dir}: name it with --vq "
                         "to use it all the same, or train another with train_vq.py --out and name that")
    return first_stage


def released_first_stage(path: Path) -> dict:
    """What a file of the authors' has in common with a checkpoint of train_vq.py: config and weights.

    It does not tell the size of the pictures. 16×16 codes are assumed, which is 256×256 for all of f16.
    Smaller ones are enlarged, as the authors' data sets do.
    """
    vq = VQ.from_taming(path)
    known = {name: value for name, value in asdict(vq.config).items() if hasattr(train_vq.TrainConfig, name)}
    config = replace(train_vq.TrainConfig(), data_dir="", image_size=16 * vq.config.downsampling, **known)
    return {"config": asdict(config), "model_config": asdict(vq.config), "model": vq.state_dict()}


def weights_hash(model_config: dict, weights: dict[str, Tensor]) -> str:
    """SHA-256 of a network: of its config and of every weight's name and value."""
    digest = hashlib.sha256(json.dumps(model_config, sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def finished(path: Path) -> bool:
    if not path.exists():
        return False
    checkpoint = run.load_checkpoint(path, "vq")
    return checkpoint["step"] >= checkpoint["config"]["steps"]


def encode_pictures(config: TrainConfig, vq: VQ, first_stage: dict,
                    process: run.Process) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the training pictures, all views, and of the validation pictures, cached: (N, h, w) uint16."""
    options = first_stage["config"]
    side = options["image_size"] // vq.config.downsampling
    caches = []
    for split, views in (("train", config.views), ("val", 1)):
        dataset = data.open_dataset(config.data, config.data_dir, split, options["image_size"],
                                    options["flip"], options["upscale"])
        codes = data.code_cache(
            Path(config.codes_dir), dataset, views, config.seed, first_stage["hash"], vq.encode, (side, side),
            batch_size=64, device=process.device, workers=data.worker_count(config.workers, config.data),
            rank=process.rank, world=process.world)
        caches.append(codes.reshape(-1, side, side))  # (views, N, h, w) → (views * N, h, w)
    return tuple(caches)


def parameter_groups(gpt: GPT, weight_decay: float) -> list[dict]:
    """Weights of linear layers decay; biases, norms and embeddings do not."""
    linear = [module.weight for module in gpt.modules() if isinstance(module, nn.Linear)]
    chosen = {id(weight) for weight in linear}
    others = [parameter for parameter in gpt.parameters() if id(parameter) not in chosen]
    return [{"params": linear, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def as_tokens(codes: np.ndarray, p: Tensor, start_token: int) -> Tensor:
    """Grids for the GPT: (B, h, w) → (B, 1 + T) int64, start token, then the codes in the order p (T,)."""
    sequence = unroll(torch.from_numpy(codes.astype(np.int64)), p)  # (B, T)
    return F.pad(sequence, (1, 0), value=start_token)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy, nats per image token: logits (B, T, V) against tokens[:, 1:], no start token."""
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(gpt: GPT, codes: np.ndarray, p: Tensor, config: TrainConfig, process: run.Process) -> float:
    """Nats per token over all validation grids."""
    gpt.eval()
    nats = torch.zeros(2, dtype=torch.float64, device=process.device)  # sum over pictures, number of pictures
    for batch in data.fixed_order(len(codes), config.batch_size, rank=process.rank, world=process.world):
        grids = codes[[index for index, _ in batch]]  # (B, h, w)
        tokens = as_tokens(grids, p, gpt.config.vocab_size - 1).to(process.device)  # (B, 1 + T)
        with process.autocast():
            nats[0] += next_token_loss(gpt(tokens[:, :-1]), tokens) * len(tokens)
        nats[1] += len(tokens)
    gpt.train()
    total, pictures = process.total(nats).tolist()
    return total / pictures


def sample(gpt: GPT, vq: VQ, p: Tensor, grid: tuple[int, int], config: TrainConfig,
           process: run.Process) -> Tensor:
    """32 pictures, with the same random numbers at each evaluation: (32, C, H, W)."""
    start_token = gpt.config.vocab_size - 1
    prefix = torch.full((32, 1), start_token, device=process.device)
    generator = torch.Generator(process.device).manual_seed(config.seed)
    with process.autocast():
        tokens = gpt.generate(prefix, len(p), config.temperature, config.top_k, generator,
                              sampled_tokens=start_token)
        return vq.decode(roll_up(tokens[:, 1:], p.to(tokens.device), *grid))


if __name__ == "__main__":
    run.command_line(main)
