"""A run's folder and its outputs. Oracles: the file before a failure, bit for bit; literal sentences."""
import dataclasses
import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

import run
import train_gpt
from outputs import claim, describe_data, load_checkpoint, save_checkpoint, set_random_state
from helpers import ALONE

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


def test_a_full_disk_leaves_the_checkpoint_before_intact(tmp_path):
    path = save(tmp_path, 1)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk had room for 100 kB more
    try:
        with pytest.raises(OSError, match="step 2 could not be written .*the checkpoint before it is intact"):
            save(tmp_path, 2, weight=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_files_that_are_no_checkpoint_of_this_kind_end_in_a_sentence_and_run_nothing(tmp_path):
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
    assert not (tmp_path / "it ran").exists()


def try_to_claim(folder: Path) -> str:
    try:
        claim(folder, 0).close()
    except ValueError as error:
        return str(error)
    return "claimed"


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with multiprocessing.get_context("fork").Pool(1) as other:
        log = run.Log(dataclasses.replace(DEMO, out=str(folder)), ALONE, 0, "tokens", 1)  # holds the lock
        assert f"another process is training in {folder}: wait" in other.apply(try_to_claim, [folder])
        del log
        assert other.apply(try_to_claim, [folder]) == "claimed"


def test_a_claimed_folder_keeps_the_log_up_to_its_checkpoint(tmp_path):
    lines = [json.dumps({"step": step, "train": 1.0}) + "\n" for step in (1, 2, 3)]
    for first_step, kept in ((2, [1, 2]), (0, [])):
        (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 2, "tra')  # torn by a crash
        (tmp_path / "checkpoint.99.part").write_bytes(b"half")
        (tmp_path / "checkpoint.pt").write_bytes(b"whole")
        claim(tmp_path, first_step).close()
        lines_left = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines_left] == kept
        assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "lock", "log.jsonl"]


class Pictures:
    classes = ()
    def __init__(self, digest: str):
        self.digest = lambda: digest


def test_a_data_set_is_known_again_by_its_pictures_not_by_its_place(capsys):
    def describe(data_dir: str, digest: str, checkpoint: dict | None) -> dict:
        config = dataclasses.replace(DEMO, data="folder", data_dir=data_dir)
        return describe_data(config, Pictures(digest), checkpoint)

    known = describe("here", "same", None)
    assert known == {"data": "folder", "data_dir": "here", "digest": "same", "classes": []}
    checkpoint = {"trained_on": known}
    assert describe("here", "same", checkpoint) == known
    assert describe("moved", "same", checkpoint) == known | {"data_dir": "moved"}
    assert capsys.readouterr().out == ""
    assert describe("here", "more", checkpoint) == known | {"digest": "more"}
    assert "pictures were added to here or removed: training goes on with" in capsys.readouterr().out
    with pytest.raises(ValueError, match="elsewhere holds other pictures than here, on which this run was"):
        describe("elsewhere", "more", checkpoint)
