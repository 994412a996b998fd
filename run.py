"""What every script shares: the command line's config, device, checkpoints, log, pictures, and how it ends.

A config is a frozen dataclass of int, float, str and bool fields; trailing comments are its flags' help.
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def configure(presets: dict[str, Any], argv: list[str] | None) -> tuple[Any, dict | None]:
    """The config that the command line asks for, and the checkpoint to go on from (None: start anew).

    Flags override the preset, or with --resume the checkpoint's config, if `CHANGEABLE`. Raises ValueError.
    """
    try:
        config_class = type(presets["demo"])
        flags = parse_flags(presets, argv)
        preset = flags.get("preset", "demo")
        check_choice("preset", preset, presets)
        config = dataclasses.replace(presets[preset], **flags)
        if not hasattr(config, "resume"):
            return config, None
        path = config.folder / "checkpoint.pt"
        if not path.exists():
            if config.resume:
                print(f"{path} does not exist yet: starting at step 0")
            return config, None
        checkpoint = load_checkpoint(path, config.KIND)
        if not config.resume:
            done = f"{checkpoint['step']} of {checkpoint['config']['steps']} steps done"
            raise ValueError(f"{config.folder} already holds a run ({done}); "
                             "add --resume to go on with it, or name another --out")
        if set(checkpoint["config"]) != {field.name for field in dataclasses.fields(config_class)}:
            raise ValueError(f"{path} was written by another version of this code, whose flags differ; "
                             "start another run with --out")
        config = dataclasses.replace(config_class(**checkpoint["config"]), **flags)
        for name, value in checkpoint["config"].items():
            if name not in config.CHANGEABLE and getattr(config, name) != value:
                raise ValueError(
                    f"{name} is {getattr(config, name)!r} but the run in {config.folder} has {value!r}; "
                    f"leave --{name.replace('_', '-')} out to go on with it, or start another run with --out")
        return config, checkpoint
    except ValueError as error:
        error.exit_status = 2
        raise


def parse_flags(presets: dict[str, Any], argv: list[str] | None) -> dict[str, Any]:
    """The fields that the command line names: type from annotation, help from comment. Raises ValueError."""
    config_class = type(presets["demo"])
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        kind = ({"action": argparse.BooleanOptionalAction} if field.type is bool
                else {"type": field.type, "metavar": field.type.__name__})
        values = {name: getattr(preset, field.name) for name, preset in presets.items()}
        comment, each = comments[field.name], ", ".join(f"{name} {value}" for name, value in values.items())
        default = values["demo"] if len(set(values.values())) == 1 else each
        text = comment if field.name == "preset" or default == "" else f"{comment} [{default}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text.replace("%", "%%"), **kind)

    def refuse(message: str):
        raise ValueError(f"{message}; --help lists the flags")
    parser.error = refuse
    return vars(parser.parse_args(argv))


def check_choice(name: str, value: str, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_at_least(config: Any, minimum: float, *names: str):
    for name in names:
        if not getattr(config, name) >= minimum:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {minimum}")


def check_betas(config: Any):
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must lie in [0, 1)")


def check_shared_evenly(batch_size: int, world: int, accumulate: int = 1):
    if batch_size % (world * accumulate):
        parts = f", in {accumulate} parts each" if accumulate > 1 else ""
        raise flag_error(f"batch_size is {batch_size}, which cannot be shared evenly by {world} process(es)"
                         f"{parts}; choose a multiple of {world * accumulate}")


def flag_error(message: str) -> ValueError:
    """For a mistake in the flags that shows only after they have been read: the script ends with status 2."""
    error = ValueError(message)
    error.exit_status = 2
    return error


def learning_rate(config: Any, step: int) -> float:
    """lr: linear over `warmup_steps`, then constant (the paper), or with `decay` a cosine to a twentieth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if not config.decay:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


class Process(NamedTuple):
    """This process among those of the run: one, or those that torchrun started."""
    device: torch.device
    rank: int
    world: int

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products and convolutions on a GPU, float32 elsewhere."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def wait_for_all(self):
        if self.world > 1:
            torch.distributed.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values


def start(device: str, seed: int) -> Process:
    """Choose the device ("auto": a GPU if any), join torchrun's other processes, seed. Raises ValueError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise flag_error(f"device is {device!r}, which torch cannot use here ({str(error).splitlines()[0]}); "
                         "try --device cpu") from None
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(seed)
    return Process(device, rank, world)


def random_state() -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_random_state(state: dict[str, Tensor]):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def stop_signal(process: Process) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM only take a note: `with stop_signal(process) as stopping: … if stopping(): save`."""
    asked = threading.Event()

    def note(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        asked.set()

    def stopping() -> bool:  # all processes of a run get the same answer
        if process.world == 1:
            return asked.is_set()
        return process.total(torch.tensor(float(asked.is_set()), device=process.device)).item() > 0
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_line(main: Callable[[], None]):
    """Run a script; a user's mistake ends with one sentence, status 2 (flag) or 1 (file), no traceback."""
    try:
        main()
    except KeyboardInterrupt as error:
        status, message = 130, str(error) or "interrupted; what was written so far is intact"
    except torch.OutOfMemoryError:
        status, message = 1, "the GPU's memory is too small for this run; --help lists what saves memory"
    except (ValueError, OSError) as error:
        # An error in a worker process arrives with that process's traceback in front of the sentence.
        status, message = getattr(error, "exit_status", 1), str(error).strip().splitlines()[-1]
        message = message.removeprefix("ValueError: ").removeprefix("FileNotFoundError: ")
    else:
        status, message = 0, None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def save_checkpoint(path: Path, checkpoint: dict):
    """Write a dict of plain values and tensors; a crash or full disk leaves the old file. Raises OSError."""
    part = path.with_suffix(f".{os.getpid()}.part")
    provenance = {"command": " ".join(sys.argv), "torch": str(torch.__version__),
                  "python": platform.python_version(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with part.open("wb") as file:
            torch.save(checkpoint | {"provenance": provenance}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"{path} of step {checkpoint['step']} could not be written ({str(error).splitlines()[0]}): "
            "make room and go on with --resume; the checkpoint before it is intact") from None


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """Read a checkpoint ("vq", "gpt") onto the CPU. Raises FileNotFoundError; ValueError for another file."""
    advice = f"name a checkpoint.pt that train_{kind}.py has written"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {advice}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is damaged, or holds more than numbers, strings and tensors "
                         f"({type(error).__name__}); {advice}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != kind:
        found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
        origin = f"a checkpoint of train_{found}.py" if found else "of another program"
        raise ValueError(f"{path} is {origin}; {advice}")
    return checkpoint


class Log:
    """Status lines on screen and in log.jsonl; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, folder: Path, process: Process, first_step: int, steps: int):
        self.path, self.process, self.steps = folder / "log.jsonl", process, steps
        self.began = self.last = time.perf_counter()
        self.first_step = self.last_step = first_step
        self.sums, self.counts = {}, {}
        if process.rank == 0:
            text = self.path.read_text() if self.path.exists() and first_step else ""
            part = self.path.with_suffix(".part")
            part.write_text("".join(line for line in text.splitlines(keepends=True)
                                    if line.endswith("\n") and json.loads(line)["step"] <= first_step))
            part.replace(self.path)

    def add(self, **values: Tensor):
        """Collect values of this step for the mean on the next line; reads nothing back from the GPU."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of what was added since the last call, over all processes. ValueError if not finite."""
        means = {name: float(self.process.total(value)) / self.counts[name] / self.process.world
                 for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        for name, value in means.items():
            if not math.isfinite(value):
                raise ValueError(f"the {name} loss became {value}: go on from the last checkpoint with "
                                 "--resume and a lower --lr")
        return means

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens meanwhile does not count as a step's time."""
        began = time.perf_counter()
        yield
        self.last += time.perf_counter() - began

    def elapsed(self) -> str:
        return duration(time.perf_counter() - self.began)

    def line(self, step: int, text: str, values: dict[str, float], unit: str, units_per_step: int):
        """Print `step … · text · speed · memory · time left`, and append the values to log.jsonl."""
        now = time.perf_counter()
        seconds = (now - self.last) / max(1, step - self.last_step)
        left = (now - self.began) / max(1, step - self.first_step) * (self.steps - step)
        self.last, self.last_step = now, step
        if self.process.rank == 0:
            rate, peak = units_per_step / seconds, memory(self.process.device)
            speed = f"{seconds * 1e3:.0f} ms/step · {si(rate)} {unit}/s · {peak:.1f} GiB"
            print(f"step {step}/{self.steps} · {text} · {speed} · eta {duration(left)}", flush=True)
            with self.path.open("a") as file:
                numbers = {"step": step} | values | {"ms_per_step": seconds * 1e3, f"{unit}_per_s": rate}
                file.write(json.dumps(numbers) + "\n")


def si(number: float) -> str:
    thousands = f"{number / 1e3:.1f}k" if number >= 1e3 else f"{number:.0f}"
    return f"{number / 1e6:.1f}M" if number >= 1e6 else thousands


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def memory(device: torch.device) -> float:
    """Peak memory in GiB: torch's on a GPU, the process's on a CPU (nan where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource  # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def to_pixels(images: Tensor) -> np.ndarray:
    """images (..., C, H, W) in [−1, 1], clamped → (..., H, W, C) uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def picture_grid(images: Tensor, columns: int, side: int = 96) -> Image.Image:
    """images (N, C, H, W) in [−1, 1], row by row; small ones enlarged to about `side` pixels, to be seen."""
    pixels = to_pixels(images)  # (N, H, W, C)
    pixels = pixels.repeat(3, axis=3) if pixels.shape[3] == 1 else pixels
    times = max(1, round(side / pixels.shape[1]))
    pixels = pixels.repeat(times, axis=1).repeat(times, axis=2)
    count, height, width, _ = pixels.shape
    gap = 2
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top:top + height, left:left + width] = picture
    return Image.fromarray(grid)


def save_picture(picture: Image.Image, path: Path, **options):
    """Write a picture through a temporary file, so that none is ever seen half written. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        picture.save(part, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"), **options)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
