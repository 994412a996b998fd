"""What the tests share: flags of tiny runs, the shell's view of a script, bit equality, random networks."""
import json
import multiprocessing
import os
import re
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import data
import run
import sample
import scenes
import train_gpt
import train_vq
from gpt import GPT, GPTConfig
from orderings import TokenLayout
from stages import FirstStage, Prior
from vq import VQ, VQConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_vq.py": train_vq, "train_gpt.py": train_gpt, "sample.py": sample}
ALONE = run.Process(torch.device("cpu"), 0, 1)
SCENES = {"data": "scenes", "data_dir": "data", "digest": ""}
# 16×16 pixels ↔ 8×8 of 16 codes.
NETWORK = ("--image-size 16 --base-channels 8 --channel-multipliers 1,2 --codebook-size 16 --code-width 4 "
           "--batch-size 4 --log-every 1 --eval-every 20 --workers 0 --device cpu").split()
VQ_FLAGS = ["--data", "folder", *NETWORK, "--restart-every", "3"]
GPT_FLAGS = ("--data folder --n-layer 2 --n-head 2 --n-embd 16 --batch-size 4 --dropout 0.1 --log-every 1 "
             "--eval-every 20 --top-k 10 --workers 0 --device cpu").split()


def vq_flags(pictures: Path, out: Path) -> list[str]:
    return [*VQ_FLAGS, "--data-dir", str(pictures), "--out", str(out)]


def gpt_flags(pictures: Path, first_stage: Path, out: Path) -> list[str]:
    return [*GPT_FLAGS, "--data-dir", str(pictures), "--vq", str(first_stage), "--out", str(out),
            "--codes-dir", str(first_stage.parent / "codes")]


def tensors(tree, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested dict or list, by path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{name}/{key}").items()}


def assert_bit_equal(path: Path, other: Path):
    """Two checkpoints hold the same tensors: weights, optimizer, random states."""
    a, b = (tensors(torch.load(file, weights_only=True)) for file in (path, other))
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def log_of(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]


def shell(script: str, flags: list, monkeypatch, capsys) -> tuple[int, str, str]:
    """What the shell sees of a script: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run.command_line(SCRIPTS[script].main)
    out, err = capsys.readouterr()
    return ending.value.code, out, err


def start(function: Callable, *arguments, folder: Path, **environment: str) -> BaseProcess:
    """A process of a group of its own, which writes `out` and `err` in a folder. It need not import torch."""
    folder.mkdir(exist_ok=True)
    server = multiprocessing.get_context("forkserver")  # some of torch's threads do not survive a plain fork
    server.set_forkserver_preload(["helpers", "torch._dynamo"])  # an optimizer imports it
    process = server.Process(target=enter, args=(function, arguments, folder, dict(os.environ) | environment))
    process.start()
    return process


def start_two(function: Callable, *arguments, folder: Path) -> list[BaseProcess]:
    """The two processes of one run, as torchrun starts them: the first in `folder`/0, the other in 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(function, *arguments, folder=folder / str(rank), RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in (0, 1)]


def enter(function: Callable, arguments: tuple, folder: Path, environment: dict[str, str]):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)  # the server has that of its own start
    sys.stdout, sys.stderr = ((folder / name).open("w") for name in ("out", "err"))  # as buffered as a pipe
    function(*arguments)


def run_script(name: str, flags: list[str]):
    sys.argv = [name, *flags]
    run.command_line(SCRIPTS[name].main)


def without_log_of_torch(errors: str) -> str:
    """Standard error without torch's logged warnings, as that a machine has a CUDA toolkit and no GPU."""
    return re.sub(r"(?m)^W\d{4} .*\n", "", errors)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_stage_of(field: str) -> FirstStage:
    """Of 8×8 pixels and 4×4 of 16 codes, with random weights."""
    torch.manual_seed(1)
    channels = {"segmentation": 8, "depth": 1}.get(field, 3)
    vq = VQ(VQConfig(channels, 8, "1,2", 1, codebook_size=16, code_width=4))
    return FirstStage(vq, field, data.Preparation(8, (field,)), SCENES)


def build(condition: str = "none", order: str = "row", scales: tuple = (), null_token: bool = True) -> Prior:
    """A prior with random weights, so large that each token depends on all before it."""
    image = first_stage_of("image")
    stage = first_stage_of(condition) if condition not in ("none", "class") else None
    parts = {} if condition == "none" else {condition: stage}
    size, length = {"none": (0, 0), "class": (4, 1)}.get(condition, (16, 16))
    layout = TokenLayout(16, 4, 4, order, scales, size, length, null_token)
    gpt = GPT(GPTConfig(layout.vocab_size, layout.block_size, 2, 2, 16)).double()
    random = seeded(0)
    for weight in gpt.parameters():
        weight.data.normal_(std=0.5, generator=random)
    classes = list(scenes.CLASSES) if condition == "class" else []
    return Prior(gpt, layout, {"image": image} | parts, SCENES | {"classes": classes})
