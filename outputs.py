"""What a run leaves in its folder: checkpoint, log and pictures, each written whole or not at all.

A checkpoint is a dict of plain values and tensors. Besides what the script puts there it has "kind" (vq or
gpt), the config, the step, the random states and where it comes from. Reading one executes no code.
"""
import contextlib
import dataclasses
import errno
import json
import math
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

try:
    import fcntl
    import resource
except ImportError:  # Windows: no locks, unfinished files of killed runs stay, peak memory is unknown
    fcntl = resource = None


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """An OSError within, or torch.save's RuntimeError, becomes a sentence with path and advice."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = advice.replace("make room", "make it writable")
        raise OSError(f"{path} could not be written ({reason}): {advice}") from None


@contextlib.contextmanager
def replacing(path: Path, advice: str) -> Iterator[Path]:
    """A temporary file which becomes `path` if nothing fails, so that none is ever seen half written."""
    part = path.with_name(path.name + ".part")
    try:
        with writing(path, advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def printable(text: str) -> str:
    """On one line: newlines, and invalid UTF-8, which file names may contain, are replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def announce(text: str, from_all: bool = False):
    """Print a line, from the first process only or from all, as long as somebody reads it."""
    if from_all or os.environ.get("RANK", "0") == "0":
        try:
            print(text, flush=True)
        except OSError:  # Ctrl-C has ended `| tee` first, or a terminal was closed: a run must still save
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def claim(folder: Path, first_step: int) -> TextIO:
    """Lock a run's folder until the returned file is closed, and clean it up to go on after `first_step`.

    Temporary files of a killed run are removed, and lines of log.jsonl that are torn or of later steps.
    Raises ValueError if another process holds the folder or has trained in it since this one read the
    checkpoint, OSError if it cannot be written.
    """
    advice = "make room, or name another --out"
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, depending on the system
            raise ValueError(f"another process is training in {folder}: wait for it, stop it, or name "
                             "another --out") from None
        except OSError:  # a file system may have no locks
            pass
    path = folder / "checkpoint.pt"
    saved = path.exists() and torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if saved and saved["step"] != first_step:
        raise ValueError(f"another process trained in {folder} while this one started: start again with "
                         "--resume, or name another --out")
    for name in ("checkpoint.pt", "best.pt", "log.jsonl", "step-*.png", "loss-map.png"):
        for part in folder.glob(f"{name}.part"):
            part.unlink()
    log, kept = folder / "log.jsonl", []
    lines = log.read_text(errors="replace").splitlines(keepends=True) if first_step and log.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # torn, maybe just before its newline
            if line.endswith("\n") and json.loads(line)["step"] <= first_step:
                kept.append(line)
    with replacing(log, advice) as part:
        part.write_text("".join(kept))
    return file


def save_checkpoint(config: Any, process: Any, step: int, parts: dict, name: str = "checkpoint.pt"):
    """Write a checkpoint from the first process: `parts` and what every run has, plain values and tensors.

    A crash or a full disk leaves the previous file intact. Raises OSError, or ValueError if the weights,
    parts["model"], are not finite: the loss, computed before the step, may be finite still.
    """
    path, former = config.folder / name, config.folder / "checkpoint.pt"
    if not all(weight.isfinite().all() for weight in parts.get("model", {}).values()):
        advice = f"go on from {former} with --resume and" if former.exists() else "start again with"
        raise ValueError(f"the weights of step {step} are not finite and not saved: {advice} a lower --lr")
    if process.rank > 0:
        return
    provenance = {"command": " ".join(sys.argv), "torch": str(torch.__version__),
                  "python": platform.python_version(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    shared = {"kind": config.KIND, "config": dataclasses.asdict(config), "step": step,
              "random": random_state(), "provenance": provenance}
    advice = "make room and " + (f"go on with --resume; the checkpoint before step {step} is intact"
                                 if former.exists() else "start again")
    with replacing(path, advice) as part, part.open("wb") as file:
        torch.save(shared | parts, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """Read a checkpoint ("vq", "gpt") onto the CPU. Raises FileNotFoundError; ValueError for another file."""
    advice = f"name a checkpoint.pt that train_{kind}.py has written, or train one in another --out"
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}; {advice}")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # CRC checksums, which torch.load does not verify
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged, or holds more than numbers, strings and tensors "
                         f"({type(error).__name__}); {advice}") from None
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if found != kind:
        origin = f"a checkpoint of train_{found}.py" if found else "of another program"
        raise ValueError(f"{path} is {origin}; {advice}")
    return checkpoint


def restore(checkpoint: dict, model: nn.Module, optimizer: torch.optim.Optimizer):
    """Go on as after the checkpoint's step: weights, the optimizer's moments and random states."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for weight, values in optimizer.state.items():
        for name, moment in moments(optimizer, weight).items():  # fused Adam reads plain memory: same format
            values[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)
    set_random_state(checkpoint["random"])


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for each element of a weight, by name: Adam's exp_avg and exp_avg_sq."""
    return {name: value for name, value in optimizer.state.get(weight, {}).items()
            if getattr(value, "shape", None) == weight.shape}


def describe_data(config: Any, dataset, checkpoint: dict | None) -> dict:
    """The identity of a data set, for the checkpoint; on resume compared with the one there.

    A moved folder is accepted silently; changed pictures only in the same folder, with a message.
    Raises ValueError for other pictures elsewhere, or other classes.
    """
    known = {"data": config.data, "data_dir": config.data_dir, "digest": dataset.digest(),
             "classes": list(dataset.classes)}
    before = checkpoint["trained_on"] if checkpoint else known
    if known["classes"] != before["classes"]:
        raise ValueError(f"{config.data_dir} has other classes than this run; start another with --out")
    if known["digest"] != before["digest"]:
        if Path(known["data_dir"]).resolve() != Path(before["data_dir"]).resolve():
            raise ValueError(f"{config.data_dir} holds other pictures than {before['data_dir']}, on which "
                             "this run was trained; name the folder to which those were moved")
        announce(f"pictures in {config.data_dir} have changed: training goes on with those that are there "
                 "now, in a new random order")
    return known


def memory(device: torch.device) -> float:
    """Peak memory in GiB: torch's on a GPU, the process's on a CPU (nan where it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if not resource:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def random_state() -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_random_state(state: dict[str, Tensor]):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def to_pixels(images: Tensor) -> np.ndarray:
    """images (..., C, H, W) in [−1, 1], clamped → (..., H, W, C) uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def picture_grid(images: Tensor, columns: int, side: int = 96) -> Image.Image:
    """images (N, 1 or 3, H, W) in [−1, 1] → one picture, row by row; small ones enlarged to about `side`."""
    pixels = to_pixels(images.expand(-1, 3, -1, -1))  # (N, H, W, 3)
    times, gap, empty = max(1, round(side / pixels.shape[1])), 2, -len(pixels) % columns
    pixels = pixels.repeat(times, axis=1).repeat(times, axis=2)
    cells = np.pad(pixels, ((0, empty), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, H, W, _ = cells.shape
    rows = cells.reshape(-1, columns, H, W, 3).swapaxes(1, 2)  # (rows, H, columns, W, 3)
    return Image.fromarray(rows.reshape(-1, columns * W, 3)[:-gap, :-gap])


def save_picture(picture: Image.Image, path: Path, **options):
    """Write a picture, whole or not at all. Raises OSError."""
    with replacing(path, "make room, or name another file") as part:
        kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
        picture.save(part, format=kind, **options)


def draw_loss_map(cells: list[list[list[float]]], path: Path):
    """Validation loss by grid cell, (h, w) nats: a panel for each scale, brighter is higher."""
    grids = [torch.tensor(grid)[None, None] for grid in cells]  # (1, 1, h, w) each
    most = max(grid.max() for grid in grids)
    panels = [F.interpolate(grid / most * 2 - 1, size=grids[-1].shape[2:], mode="nearest") for grid in grids]
    save_picture(picture_grid(torch.cat(panels), len(panels), side=256), path)


class Log:
    """Status lines on screen and in log.jsonl. Holds the lock on the run's folder.

    `name_batch` tells which pictures a step was made of.
    """

    def __init__(self, config: Any, process: Any, first_step: int, unit: str, units_per_step: int,
                 name_batch: Callable[[int], str]):
        self.path, self.process, self.steps = config.folder / "log.jsonl", process, config.steps
        self.unit, self.units_per_step, self.checkpoint_every = unit, units_per_step, config.checkpoint_every
        self.began = self.last = self.stopped = time.perf_counter()  # run's start; last line; means()
        self.first_step = self.last_step = first_step  # step at the run's start; at the last line
        self.name_batch, self.added = name_batch, {}  # name → step → value
        if process.rank == 0:
            self.lock = claim(config.folder, first_step)

    def add(self, step: int, values: dict[str, Tensor]):
        """Collect values of a step for the mean on the next line; reads nothing back from the GPU."""
        for name, value in values.items():
            self.added.setdefault(name, {})[step] = value.detach()

    def means(self) -> dict[str, float]:
        """Means of what was added since the last call, over all processes. ValueError if not finite.

        Stops the clock until the next line is printed: evaluation is no part of a step.
        """
        means, wrong = {}, []
        for name, added in self.added.items():
            values = self.process.total(torch.stack(list(added.values()))) / self.process.world  # (steps,)
            means[name] = values.mean().item()
            wrong += [(step, name, value) for step, value in zip(added, values.tolist())
                      if not math.isfinite(value)]
        self.added = {}
        if wrong:
            step, name, value = min(wrong)  # the first; later ones follow from it
            self.check(step, {name: value}, f" with {self.name_batch(step)}")
        self.stopped = time.perf_counter()
        return means

    def check(self, step: int, losses: dict, batch: str = ""):
        """Raises ValueError, before anything is drawn or saved, if a run has diverged in this step."""
        saved = max(self.first_step, (step - 1) // self.checkpoint_every * self.checkpoint_every)
        advice = (f"go on from {self.path.with_name('checkpoint.pt')} of step {saved} with --resume and"
                  if saved else "there is no checkpoint yet, start again with")
        for name, value in losses.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the {name} loss became {value} in step {step}{batch}: {advice} a lower "
                                 "--lr")

    def picture(self, step: int) -> Path:
        return self.path.with_name(f"step-{step:06d}.png")

    def finish(self) -> Path:
        """Print the last line; returns the path of the checkpoint."""
        path, seconds = self.path.with_name("checkpoint.pt"), time.perf_counter() - self.began
        made = self.picture(self.steps) if self.last_step > self.first_step else "all steps were done before"
        announce(f"done in {duration(seconds)} · {path} · {made}")
        return path

    def line(self, step: int, text: str, values: dict):
        """Print `step … · text · speed · memory · time left`, and append the values to log.jsonl.

        The speed is that of the steps before `means` was called.
        """
        seconds = (self.stopped - self.last) / (step - self.last_step)
        self.last, self.last_step = time.perf_counter(), step
        left = (self.last - self.began) / (step - self.first_step) * (self.steps - step)
        if self.process.rank == 0:
            rate, peak = self.units_per_step / seconds, memory(self.process.device)
            speed = f"{seconds * 1e3:.0f} ms/step · {si(rate)} {self.unit}/s · {peak:.1f} GiB"
            announce(f"step {step}/{self.steps} · {text} · {speed} · eta {duration(left)}")
            numbers = {"step": step} | values | {"ms_per_step": seconds * 1e3, f"{self.unit}_per_s": rate}
            advice = "make room and go on from the last checkpoint with --resume"
            with writing(self.path, advice), self.path.open("a") as file:
                file.write(json.dumps(numbers) + "\n")


def si(number: float) -> str:
    thousands = f"{number / 1e3:.1f}k" if number < 1e6 else f"{number / 1e6:.1f}M"
    return f"{number:.0f}" if number < 1e3 else thousands


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
