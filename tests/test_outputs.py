"""A run's folder and its outputs. Oracles: the file before a failure, bit for bit; literal sentences."""
import copy
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_gpt
from helpers import ALONE
from outputs import (Log, claim, describe_data, duration, load_checkpoint, restore, save_checkpoint,
                     save_picture, set_random_state, si, to_pixels, writing)

DEMO = train_gpt.PRESETS["demo"]


def save(folder: Path, step: int, **parts) -> Path:
    save_checkpoint(dataclasses.replace(DEMO, out=str(folder)), ALONE, step, parts)
    return folder / "checkpoint.pt"


def test_a_checkpoint_comes_back_with_config_step_provenance_and_random_state(tmp_path):
    torch.manual_seed(3)
    path = save(tmp_path, 7, weight=torch.arange(4))
    drawn = torch.rand(5)
    checkpoint = load_checkpoint(path, "gpt")
    assert checkpoint["weight"].tolist() == [0, 1, 2, 3] and checkpoint["step"] == 7
    assert train_gpt.TrainConfig(**checkpoint["config"]) == dataclasses.replace(DEMO, out=str(tmp_path))
    assert checkpoint["provenance"]["torch"] == torch.__version__
    set_random_state(checkpoint["random"])
    assert torch.equal(torch.rand(5), drawn)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_pixels_are_rounded_and_clamped():
    images = torch.tensor([-2, -1, 0.003, 0.005, 1, 1.5]).view(6, 1, 1)
    assert to_pixels(images).flatten().tolist() == [0, 0, 128, 128, 255, 255]


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path):
    path = save(tmp_path, 1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk had room for 100 kB more
    try:
        with pytest.raises(OSError, match="could not be written .*the checkpoint before step 2 is intact"):
            save(tmp_path, 2, weight=torch.zeros(1_000_000))
        with pytest.raises(OSError, match="new/checkpoint.pt could not be .*: make room and start again"):
            save(tmp_path / "new", 2, weight=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_files_that_are_no_checkpoint_of_this_kind_end_in_a_sentence_and_run_nothing(tmp_path, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    path = save(tmp_path, 1, weight=torch.arange(1000, dtype=torch.float64))
    whole, bad = path.read_bytes(), tmp_path / "bad.pt"
    advice = "name a checkpoint.pt that train_gpt.py has written"
    flipped = bytearray(whole)
    flipped[whole.index(torch.arange(990.0, 1000, dtype=torch.float64).numpy().tobytes())] ^= 1  # in a weight
    damaged = "bad.pt is damaged, or holds more than numbers, strings and tensors"
    for content, sentence in [(whole[:5000], damaged), (b"", damaged), (bytes(flipped), damaged),
                              ({"kind": "gpt", "model": Malicious()}, damaged),
                              ([1, 2], "is of another program"),
                              ({"kind": "vq"}, "is a checkpoint of train_vq.py")]:
        bad.write_bytes(content) if isinstance(content, bytes) else torch.save(content, bad)
        with pytest.raises(ValueError, match=f"{sentence}.*; {advice}"):
            load_checkpoint(bad, "gpt")
    with pytest.raises(FileNotFoundError, match=f"none.pt does not exist; {advice}"):
        load_checkpoint(tmp_path / "none.pt", "gpt")
    with pytest.raises(FileNotFoundError, match=f"is a folder; {advice}"):
        load_checkpoint(tmp_path, "gpt")
    assert not (tmp_path / "it ran").exists()

    def refuse(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(ValueError, match=r"bad.pt cannot be read \(Permission denied\)"):
        load_checkpoint(bad, "gpt")


def try_to_claim(folder: Path) -> str:
    try:
        claim(folder, 0).close()
    except ValueError as error:
        return str(error)
    return "claimed"


def test_a_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "run"
    with multiprocessing.get_context("fork").Pool(1) as other:
        log = Log(dataclasses.replace(DEMO, out=str(folder)), ALONE, 0, "tokens", 1, str)  # holds the lock
        assert f"another process is training in {folder}: wait" in other.apply(try_to_claim, [folder])
        del log
        assert other.apply(try_to_claim, [folder]) == "claimed"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # of a GPU's weights
    torch.save({"step": 5, "weight": torch.ones(3)}, folder / "checkpoint.pt")  # after the other looked
    refused = f"another process trained in {folder} while this one started: start again with --resume"
    assert refused in try_to_claim(folder)
    claim(folder, 5).close()


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claim(tmp_path, 0).close()


def test_a_file_in_the_place_of_a_folder_ends_in_a_sentence(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="a/b.png could not be written .*: make room"):
        save_picture(Image.new("RGB", (1, 1)), tmp_path / "a" / "b.png")


def test_a_folder_that_may_not_be_written_needs_no_room():
    for number, advice in ((errno.EACCES, "make it writable"), (errno.EROFS, "make it writable"),
                           (errno.ENOSPC, "make room"), (errno.EIO, "make room")):
        with pytest.raises(OSError, match=rf"run could not be written \(why\): {advice}, or name another"):
            with writing(Path("run"), "make room, or name another --out"):
                raise OSError(number, "why")


def test_a_claimed_folder_keeps_the_log_up_to_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "train": 1.0}) + "\n" for step in (1, 2, 3)]
    torn = ('{"step": 2, "tra', '{"step": 2, "train": 1.0}')  # by a crash, the second only before its newline
    for (first_step, kept), end in itertools.product(((2, [1, 2]), (0, [])), torn):
        damaged = '{torn, too\n{"step": null}\n'
        (tmp_path / "log.jsonl").write_text(lines[0] + damaged + "".join(lines[1:]) + end)
        for name in ("checkpoint.pt", "best.pt", "step-000003-codes.png", "another_program's"):
            (tmp_path / f"{name}.part").write_bytes(b"half")
        (tmp_path / "checkpoint.pt").unlink(missing_ok=True)
        if first_step:
            torch.save({"step": first_step}, tmp_path / "checkpoint.pt")
        claim(tmp_path, first_step).close()
        lines_left = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines_left] == kept
        names = ["another_program's.part", *["checkpoint.pt"] * bool(first_step), "lock", "log.jsonl"]
        assert sorted(file.name for file in tmp_path.iterdir()) == names


class Pictures:
    classes = ()
    def __init__(self, digest: str):
        self.digest = lambda: digest


def test_a_data_set_is_known_again_by_its_pictures_not_by_its_place(capsys, monkeypatch):
    def describe(data_dir: str, digest: str, checkpoint: dict | None) -> dict:
        config = dataclasses.replace(DEMO, data="folder", data_dir=data_dir)
        return describe_data(config, Pictures(digest), checkpoint)

    known = describe("here", "same", None)
    assert known == {"data": "folder", "data_dir": "here", "digest": "same", "classes": []}
    checkpoint = {"trained_on": known}
    assert describe("here", "same", checkpoint) == known
    assert describe("moved", "same", checkpoint) == known | {"data_dir": "moved"}
    assert capsys.readouterr().out == ""
    for spelled in ("here", "./there/../here"):
        assert describe(spelled, "more", checkpoint) == known | {"data_dir": spelled, "digest": "more"}
        said = f"pictures in {spelled} have changed: training goes on with"
        assert said in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    describe("here", "more", checkpoint)
    assert capsys.readouterr().out == ""  # the first of several processes says it
    with pytest.raises(ValueError, match="elsewhere holds other pictures than here, on which this run was"):
        describe("elsewhere", "more", checkpoint)


def test_numbers_are_printed_with_units():
    assert [si(x) for x in (7.4, 999, 1500, 80_400, 2_340_000)] == ["7", "999", "1.5k", "80.4k", "2.3M"]
    assert [duration(x) for x in (0, 59.6, 145)] == ["0m00s", "1m00s", "2m25s"]
    assert [duration(x) for x in (3600, 90_061)] == ["1h00m", "25h01m"]


def open_log(folder, first_step: int = 0, units: int = 5, **settings) -> Log:
    config = dataclasses.replace(DEMO, out=str(folder), steps=9, **settings)
    return Log(config, ALONE, first_step, "tokens", units, lambda step: f"the pictures of {step}")


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_repeats_its_numbers_and_evaluations_do_not_count_as_steps(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    log = open_log(tmp_path, first_step=1, units=6)
    for step in (3, 5):
        clock[0] += 3
        log.means()
        clock[0] += 100
        log.line(step, "loss 2.5", {"loss": 2.5})
    numbers = {"loss": 2.5, "ms_per_step": 1500.0, "tokens_per_s": 4.0}
    assert read_log(tmp_path) == [{"step": 3} | numbers, {"step": 5} | numbers]
    first, second = capsys.readouterr().out.splitlines()
    assert second.startswith("step 5/9 · loss 2.5 · 1500 ms/step · 4 tokens/s · ") and "GiB" in second
    assert first.endswith("eta 5m09s") and second.endswith("eta 3m26s")  # which evaluations do lengthen
    assert log.finish() == tmp_path / "checkpoint.pt"
    assert re.fullmatch(r"done in 3m26s · .*checkpoint.pt · .*step-000009.png\n", capsys.readouterr().out)
    open_log(tmp_path / "again", first_step=9).finish()
    assert capsys.readouterr().out.endswith("checkpoint.pt · all steps were done before\n")


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path, monkeypatch):
    """Ctrl-C ends `| tee` as well, before the run has saved."""
    reading, writing = os.pipe()
    with open(writing, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        log = open_log(tmp_path)
        os.close(reading)
        for step in (1, 2):
            log.means()
            log.line(step, "loss 2.5", {})
        log.finish()
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_logged_values_are_means_since_the_last_line_and_a_diverged_one_is_named(tmp_path):
    log = open_log(tmp_path)
    for step, value in enumerate((1.0, 2.0, 6.0), 1):
        log.add(step, {"loss": torch.tensor(value, requires_grad=True)})
    log.add(4, {"rare": torch.tensor(5.0)})
    assert not any(value.requires_grad for added in log.added.values() for value in added.values())
    assert log.means() == {"loss": 3.0, "rare": 5.0} and log.means() == {}
    log.add(5, {})
    log.line(5, "", {})
    for value, first_step, every, advice in [
            (math.nan, 0, 9, "there is no checkpoint yet, start again with a lower --lr"),
            (math.inf, 2, 7, "go on from .*checkpoint.pt of step 2 with --resume and a lower --lr"),
            (-math.inf, 2, 6, "go on from .*checkpoint.pt of step 6 with --resume and a lower --lr")]:
        log = open_log(tmp_path / str(value), first_step, checkpoint_every=every)
        for step in range(first_step + 1, 10):
            log.add(step, {"l1": torch.tensor(math.nan if step > 7 else 1.0),
                           "vq": torch.tensor(value if step > 6 else 1.0)})
        with pytest.raises(ValueError, match=f"^the vq loss became {value} in step 7 with the pictures of 7: "
                                             + advice):
            log.means()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    for start in ("start again with", "go on from .*checkpoint.pt with --resume and"):
        sentence = f"^the weights of step 2 are not finite .*: {start} a lower --lr"
        with pytest.raises(ValueError, match=sentence):
            save(tmp_path, 2, model={"count": torch.tensor(3), "weight": torch.tensor([1.0, math.nan])})
        save(tmp_path, 1, model={"count": torch.tensor(3), "weight": torch.ones(2)})
    assert load_checkpoint(tmp_path / "checkpoint.pt", "gpt")["step"] == 1


def test_a_folder_that_cannot_be_written_is_named_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run could not be written \(Not a directory\): .* another --out"):
        claim(tmp_path / "file" / "run", 0)
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n' * 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # as if the disk had room for 20 bytes more
    try:
        with pytest.raises(OSError, match=r"log.jsonl could not be written \(File too large\): make room"):
            claim(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_text() == '{"step": 1}\n' * 9


@pytest.mark.parametrize("kind, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})])
def test_a_run_goes_on_with_the_moments_of_any_optimizer(kind, options):
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    (model, optimizer), (other, its_own) = ((each, kind(each.parameters(), lr=0.1, **options)) for each in
                                            (torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)))
    step(model, optimizer)
    restore(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                           "random": {"cpu": torch.get_rng_state()}}), other, its_own)
    step(model, optimizer)
    step(other, its_own)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    log = open_log(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log.means()
    with pytest.raises(OSError, match=r"log.jsonl could not be written \(No space left on device\)"):
        log.line(1, "", {})
