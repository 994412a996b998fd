"""What the tests of the scripts share: flags of tiny runs, the shell's view of a script, and bit equality."""
import sys
from pathlib import Path

import pytest
import torch

import run
import sample
import train_gpt
import train_vq

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_vq.py": train_vq, "train_gpt.py": train_gpt, "sample.py": sample}
ALONE = run.Process(torch.device("cpu"), 0, 1)
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


def shell(script: str, flags: list, monkeypatch, capsys) -> tuple[int, str, str]:
    """What the shell sees of a script: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run.command_line(SCRIPTS[script].main)
    out, err = capsys.readouterr()
    return ending.value.code, out, err
