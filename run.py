"""What every script shares: flags, processes, and the schedule of the training loop.

A config is a frozen dataclass of int, float, str and bool fields; trailing comments are its flags' help.
"""
import argparse
import contextlib
import dataclasses
import errno
import inspect
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outputs import announce, load_checkpoint, printable

STOP_SIGNALS = [each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # if there


class UsageError(ValueError):
    """A mistake in the flags: the script ends with status 2."""


def configure(presets: dict[str, Any], argv: list[str] | None) -> tuple[Any, dict | None]:
    """The config from preset and flags, and the checkpoint to resume from (None: a new run).

    With --resume the checkpoint's config replaces the preset; only `CHANGEABLE` flags may differ. UsageError.
    """
    flags = parse_flags(presets, argv)
    preset, checkpoint = flags.get("preset", "demo"), None
    check_choice("preset", preset, presets)
    config = override(presets[preset], flags)
    trains = hasattr(config, "resume") and not config.benchmark
    path = config.folder / "checkpoint.pt" if trains else None
    if path:  # now, not after encoding a data set
        there = next(filter(os.path.exists, path.parents), Path())
        if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{there} is not a folder that may be written to: name another --out")
    if path and path.exists():
        checkpoint = load_checkpoint(path, config.KIND)
        before, done = checkpoint["config"], checkpoint["step"]
        if "optimizer" not in checkpoint:
            raise UsageError(f"{path} holds weights only, as best.pt does: sample from it, or name the "
                             "checkpoint.pt of that run")
        if not config.resume:
            raise UsageError(f"{config.folder} already holds a run ({done} of {before['steps']} steps done); "
                             "add --resume to go on with it, or name another --out")
        if set(before) != set(dataclasses.asdict(config)):
            raise UsageError(f"{path} has the flags of another version of this code; name another --out")
        config = override(type(config)(**before), flags)
        for name, value in before.items():
            if name not in config.CHANGEABLE and getattr(config, name) != value:
                raise UsageError(f"{name} is {getattr(config, name)!r} but the run in {config.folder} has "
                                 f"{value!r}; leave {flag(name)} out to go on, or name another --out")
    elif path and config.resume:
        announce(f"{path} does not exist yet: starting at step 0")
    for useless, names, reason in config.without_effect():
        given = set(names.split()) & set(flags)
        if useless and given:
            raise UsageError(f"{flag(min(given))} has no effect here: {reason}")
    return config, checkpoint


def override(config: Any, flags: dict[str, Any]) -> Any:
    try:
        return dataclasses.replace(config, **flags)
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_flags(presets: dict[str, Any], argv: list[str] | None) -> dict[str, Any]:
    """The fields that the command line names: type from annotation, help from comment. Raises UsageError."""
    config_class = type(presets["demo"])
    comments = dict(re.findall(r"(?m)^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(config_class)))
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        if field.name not in comments or field.type not in (int, float, str, bool):
            raise TypeError(f"{field.name} must be int, float, str or bool, with a comment behind, its help")
        kind = ({"action": argparse.BooleanOptionalAction} if field.type is bool
                else {"type": field.type, "metavar": field.type.__name__})
        values = {name: getattr(preset, field.name) for name, preset in presets.items()}
        comment, each = comments[field.name], ", ".join(f"{name} {value}" for name, value in values.items())
        default = values["demo"] if len(set(values.values())) == 1 else each
        text = comment if field.name == "preset" or default == "" else f"{comment} [{default}]"
        parser.add_argument(flag(field.name), dest=field.name, help=text.replace("%", "%%"), **kind)

    def refuse(message: str):
        raise UsageError(f"{message}; --help lists the flags")
    parser.error = refuse
    return vars(parser.parse_args(argv))


def flag(name: str) -> str:
    """--condition-vq of the field condition_vq; --class of class_, as class is a Python keyword."""
    return "--" + name.rstrip("_").replace("_", "-")


def check_choice(name: str, value: str, choices: Iterable[str]):
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def check_at_least(config: Any, minimum: float, *names: str):
    for name in names:
        if not getattr(config, name) >= minimum:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {minimum}")


def check_training(config: Any):
    """What both training scripts ask of the flags that they share. Raises ValueError."""
    check_at_least(config, 1, "steps", "batch_size", "log_every", "eval_every", "checkpoint_every")
    check_at_least(config, -1, "workers")
    for name, end in (("beta1", 1), ("beta2", 1), ("lr", math.inf), ("warmup_steps", 1e12), ("seed", 2**63)):
        if not 0 <= getattr(config, name) < end:
            raise ValueError(f"{name} is {getattr(config, name)}; it must lie in [0, {end})")


def learning_rate(config: Any, step: int) -> float:
    """lr of step 1, 2, …: linear warm-up, then constant (VQGAN's release) or cosine decay to a twentieth."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if not config.decay:
        return config.lr
    progress = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Any, step: int) -> float:
    lr = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class Process(NamedTuple):
    """This process among those of the run: one, or those that torchrun started."""
    device: torch.device
    rank: int
    world: int

    def wait_for_all(self):
        if self.world > 1:
            torch.distributed.barrier()

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(float(flag), device=self.device)))

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others: it downloads what is missing."""
        if self.rank > 0:
            self.wait_for_all()
        yield
        if self.rank == 0:
            self.wait_for_all()

    def gather(self, values: Tensor) -> Tensor:
        """The batch (B, …) of which each process has every world-th element (B / world, …)."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    def share(self, value: Any) -> list:
        """all_gather of any picklable value: a list by rank."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products and convolutions on GPUs that compute in it, float32 elsewhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def start(config: Any) -> Process:
    """Choose the device ("auto": a GPU if any), join torchrun's other processes, seed. Raises UsageError."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.batch_size % world:
        raise UsageError(f"batch_size is {config.batch_size}, which cannot be shared evenly by {world} "
                         f"processes; choose a multiple of {world}, or another number of processes")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        dtype = torch.float64 if hasattr(config, "resume") else torch.float32  # evaluations sum up in float64
        torch.zeros(1, dtype=dtype, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise UsageError(f"device is {device!r}, which torch cannot use here ({str(error).splitlines()[0]}); "
                         "try --device cpu") from None
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD"):
        os.environ.setdefault("MKL_CBWR", "AUTO")  # else MKL takes twice as long for 2 rows (results/speed)
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None,
            timeout=timedelta(minutes=30))  # gloo's default; NCCL's 10 may be too short for a download
    torch.manual_seed(config.seed)
    return Process(device, rank, world)


class Due(NamedTuple):
    """What follows a training step."""
    evaluate: bool
    log: bool
    save: bool


def steps(config: Any, process: Process, first_step: int, batches: Iterator) -> Iterator[tuple]:
    """Yield (step, batch, due) from step first_step + 1 on; do what is due after the training step.

    Ctrl-C, SIGTERM and an error in the next batch, like a wrong picture, are deferred: one more step is made
    (on several GPUs up to ten), which saves, then KeyboardInterrupt or that error is raised.
    """
    if process.rank > 0:  # else all ranks draw the same dropout masks
        torch.manual_seed(hash((config.seed, first_step, process.rank)) % 2**63)
    step, error, needed = first_step, None, itertools.islice(batches, config.steps - first_step)
    with deferred_signals() as received:
        for step, (batch, error) in zip(range(first_step + 1, config.steps + 1), look_ahead(needed)):
            last, stop = step == config.steps, bool(received or error)
            if process.world > 1:  # all must agree; asking synchronizes a GPU: there every tenth step
                stop = (step % 10 == 0 or process.device.type == "cpu") and process.any(stop)
            evaluate = last or step % config.eval_every == 0
            save = last or stop or step % config.checkpoint_every == 0
            yield step, batch, Due(evaluate, evaluate or save or step % config.log_every == 0, save)
            if stop:
                break
    if process.any(bool(received or error)):  # also in the last step: train_gpt.py must not go on
        path, texts = config.folder / "checkpoint.pt", list(filter(None, process.share(error and str(error))))
        done = f"stopped after step {step} of {config.steps}; {path} is saved, --resume goes on"
        if texts:
            announce(done)  # a rank without an error raises the first of the others'
        raise error or (ValueError(texts[0]) if texts else KeyboardInterrupt(done))


def look_ahead(batches: Iterator) -> Iterator[tuple[Any, Exception | None]]:
    """Each batch, and the error in the next one; from such an error on always the same pair."""
    batch = next(batches)
    try:
        for following in batches:
            yield batch, None
            batch = following
        yield batch, None
    except Exception as error:  # whatever it is, the steps until now must be saved
        yield from itertools.repeat((batch, error))


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Signals to stop only append to a list, which the loop polls; a second one stops at once."""
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS
              if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(worker: int):
    """Signals reach the whole process group: the run decides when to stop, its workers go on until then."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """At exit multiprocessing would send workers SIGTERM, which they ignore, and wait for them forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports them as crashed
    for worker in multiprocessing.active_children():
        worker.kill()


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and sentence for an error that a user can mend; any other is raised again."""
    text, kind = str(error).strip(), type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return 130, text or "interrupted; checkpoints and finished code caches are intact"
    if isinstance(error, BrokenPipeError):
        return 1, "the program that reads the output has ended, and so has this one"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of stdout's file, or a library's
        return 1, f"{error.filename or 'the output'} could not be written ({error.strerror}): make room"
    if isinstance(error, (ValueError, OSError)):
        # An error in a worker process arrives with that process's traceback in front of the sentence.
        return (2 if isinstance(error, UsageError) else 1), re.split(r"(?m)^[\w.]+Error: ", text)[-1] or kind
    reason = text.partition("\n")[0]
    if torch.distributed.is_initialized() and (  # gloo's errors have no type of their own
            isinstance(error, torch.distributed.DistError) or re.search("(?i)gloo|peer", text)):
        return 1, (f"another process of this run has ended or cannot be reached ({reason}): see its message, "
                   "and go on with --resume")
    if "Inductor" in kind:
        return 1, f"torch.compile does not work here ({reason}): leave out --compile"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate" in text:
        return 1, "there is too little memory: lower --batch-size (train_vq.py: or --gradient-checkpointing)"
    raise error


def command_line(main: Callable[[], None]):
    """Run a script; a user's mistake ends with one sentence, status 2 (flag) or 1 (file), no traceback."""
    status, message, first = 0, "", os.environ.get("RANK", "0") == "0"
    if hasattr(sys.stdout, "reconfigure"):  # else it is closed, or a notebook's
        sys.stdout.reconfigure(errors="replace")  # redirected on Windows, its encoding has no → or λ
    try:
        main()
    except (KeyboardInterrupt, ValueError, OSError, RuntimeError, MemoryError) as error:
        status, message = explain(error)
    if message and (first or status != 130):
        if not first:
            time.sleep(3)  # rank 0 reports a mistake that all ranks make; torchrun then ends the others
        with contextlib.suppress(OSError):  # of `2>&1 | tee`, which Ctrl-C ends first
            print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        if status == 0:
            torch.distributed.destroy_process_group()  # after an error it could wait for the others
        kill_workers()
        os._exit(status)  # threads that gloo leaves behind can abort a process that ends as usual
    sys.exit(status)
