"""What the scripts share. Oracles: values worked out by hand, and slow loops over pixels."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import run
import train_gpt
import train_vq
from train_gpt import weights_hash

DEMO = train_gpt.PRESETS["demo"]
ALONE = run.Process(torch.device("cpu"), 0, 1)


def test_the_learning_rate_is_constant_in_the_paper():
    config = train_gpt.PRESETS["paper"]
    assert {run.learning_rate(config, step) for step in (0, 1, 1000, 499_999)} == {12 * 4.5e-6}


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine_to_a_twentieth():
    config = dataclasses.replace(DEMO, lr=2.0, warmup_steps=4, steps=104, decay=True)
    assert [run.learning_rate(config, step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert run.learning_rate(config, 4 + 50) == pytest.approx(2 * 0.525)
    assert run.learning_rate(config, 4 + 25) == pytest.approx(2 * (0.05 + 0.475 * (1 + math.cos(math.pi / 4))))
    assert run.learning_rate(config, 104) == pytest.approx(0.1)


def test_flags_override_the_preset_and_nothing_else():
    config, checkpoint = run.configure(train_gpt.PRESETS, ["--order", "zcurve", "--lr", "0.5", "--no-decay"])
    assert config == dataclasses.replace(DEMO, order="zcurve", lr=0.5, decay=False) and checkpoint is None
    assert run.configure(train_vq.PRESETS, ["--preset", "paper"])[0] == train_vq.TrainConfig()


def test_a_flag_is_not_guessed_from_its_beginning():
    with pytest.raises(ValueError, match="unrecognized arguments: --ord row"):
        run.parse_flags(train_gpt.PRESETS, ["--ord", "row"])


def test_help_shows_meaning_and_every_presets_value(capsys):
    with pytest.raises(SystemExit):
        run.parse_flags(train_vq.PRESETS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--codebook-size int K, codes to choose from, §A.1 [demo 256, cifar10 1024, paper 1024]" in text


def test_numbers_are_printed_with_units():
    assert [run.si(x) for x in (7.4, 999, 1500, 80_400, 2_340_000)] == ["7", "999", "1.5k", "80.4k", "2.3M"]
    assert [run.duration(x) for x in (0, 59.6, 145)] == ["0m00s", "1m00s", "2m25s"]
    assert [run.duration(x) for x in (3600, 90_061)] == ["1h00m", "25h01m"]


def test_pixels_round_to_the_nearest_level_and_clamp():
    images = torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0, 100 / 127.5 - 1]).view(6, 1, 1, 1)
    assert run.to_pixels(images).flatten().tolist() == [0, 255, 128, 0, 255, 100]
    levels = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(torch.from_numpy(run.to_pixels(levels / 127.5 - 1)).flatten(), levels.byte().flatten())


def test_a_picture_grid_puts_each_picture_where_reading_order_does():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = np.asarray(run.picture_grid(images, columns=3, side=16))  # each enlarged twice, 2 pixels between
    assert grid.shape == (16 + 2 + 16, 16 + 2 + 16 + 2 + 16, 3)
    pixels = run.to_pixels(images)
    for i in range(5):
        for y in range(16):
            for x in range(16):
                assert (grid[i // 3 * 18 + y, i % 3 * 18 + x] == pixels[i, y // 2, x // 2]).all()
    assert (grid[18:, 36:] == 255).all() and (grid[16:18] == 255).all()  # no sixth picture; the gap


def test_a_resumed_log_drops_the_lines_after_its_checkpoint_and_a_torn_one(tmp_path):
    lines = [json.dumps({"step": step, "train": 1.0}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"step": 2, "tra')
    log = run.Log(tmp_path, ALONE, first_step=2, steps=9)
    log.line(3, "again", {"train": 2.0}, "tokens", 5)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train"]) for line in logged] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_an_evaluation_is_no_part_of_a_steps_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    log = run.Log(tmp_path, ALONE, 0, 9)
    for step in (2, 4):
        clock[0] += 3
        with log.aside():
            clock[0] += 100
        log.line(step, "", {}, "tokens", 6)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["ms_per_step"], line["tokens_per_s"]) for line in logged] == [(1500, 4)] * 2


def test_logged_values_are_means_since_the_last_line(tmp_path):
    log = run.Log(tmp_path, ALONE, 0, 9)
    for value in (1.0, 2.0, 6.0):
        log.add(loss=torch.tensor(value))
    assert log.means() == {"loss": 3.0}
    log.add(loss=torch.tensor(math.nan))
    with pytest.raises(ValueError, match="the loss loss became nan"):
        log.means()


def test_the_hash_of_a_network_changes_with_any_weight_name_or_size():
    weights = {"a": torch.arange(4.0), "b": torch.ones(2)}
    moved = weights | {"b": torch.tensor([1.0, 1.0001])}
    renamed = {"a": torch.arange(4.0), "c": torch.ones(2)}
    hashes = {weights_hash({"K": 1}, each) for each in (weights, moved, renamed)}
    hashes.add(weights_hash({"K": 2}, weights))
    assert len(hashes) == 4
    assert weights_hash({"K": 1}, dict(reversed(weights.items()))) in hashes


def test_a_restarted_code_loses_its_momentum_and_no_other_does():
    vq = train_vq.VQ(train_vq.VQConfig(3, 8, "1,1", 1, codebook_size=6, code_width=4))
    optimizer = torch.optim.Adam(vq.parameters())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (vq(images)[2] + vq.quantizer.codebook.square().sum()).backward()
    optimizer.step()
    before = vq.quantizer.codebook.detach().clone()
    uses = torch.tensor([3, 0, 5, 0, 1, 1])
    train_vq.restart_dead_codes(vq, optimizer, uses, images, ALONE)
    for moment in ("exp_avg", "exp_avg_sq"):
        moved = optimizer.state[vq.quantizer.codebook][moment].abs().sum(1) == 0
        assert moved.tolist() == [False, True, False, True, False, False]
    assert torch.equal((vq.quantizer.codebook != before).any(1), uses == 0)
