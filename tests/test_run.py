"""What the scripts share. Oracles: values worked out by hand, and literal schedules."""
import dataclasses
import io
import itertools
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import run
import sample
import train_gpt
import train_vq
from helpers import ALONE, run_script, start_two, vq_flags
from outputs import announce

DEMO = train_gpt.PRESETS["demo"]
FOREVER = itertools.repeat(None)  # batches


def test_the_learning_rate_is_constant_or_warms_up_and_falls_along_a_cosine_to_a_twentieth():
    config = train_gpt.PRESETS["paper"]
    assert {run.learning_rate(config, step) for step in (1, 1000, 500_000)} == {12 * 4.5e-6}
    config = dataclasses.replace(DEMO, lr=2.0, warmup_steps=4, steps=105, decay=True)
    assert [run.learning_rate(config, step) for step in range(1, 6)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    share = (1 + math.cos(math.pi * 50 / 101)) / 2
    assert run.learning_rate(config, 5 + 50) == pytest.approx(2 * (0.05 + 0.95 * share))
    assert 0.1 <= run.learning_rate(config, 105) < 0.101
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.ones(1)]}], lr=9.0)
    assert run.set_learning_rate(optimizer, config, 2) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_on_an_amd_mkl_computes_reproducibly_which_is_faster_there_unless_the_user_has_decided(monkeypatch):
    own = {"MKL_CBWR": "COMPATIBLE"}
    for cpu, before, after in (("AMD EPYC", {}, {"MKL_CBWR": "AUTO"}), ("AMD EPYC", own, own), ("Intel Xeon", {}, {}), ("", {}, {})):
        environment = dict(before)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu} if cpu else {})
        monkeypatch.setattr(os, "environ", environment)
        run.start(dataclasses.replace(DEMO, device="cpu"))
        assert environment == after, cpu


def test_flags_override_the_preset_and_nothing_else_and_help_explains_them(capsys):
    config, checkpoint = run.configure(train_gpt.PRESETS, ["--order", "zcurve", "--lr", "0.5", "--no-decay"])
    assert config == dataclasses.replace(DEMO, order="zcurve", lr=0.5, decay=False) and checkpoint is None
    assert run.configure(train_vq.PRESETS, ["--preset", "paper"])[0] == train_vq.TrainConfig()
    with pytest.raises(run.UsageError, match="unrecognized arguments: --ord row"):  # no abbreviations
        run.parse_flags(train_gpt.PRESETS, ["--ord", "row"])
    with pytest.raises(SystemExit):
        run.parse_flags({name: dataclasses.replace(train_vq.PRESETS["demo"], codebook_size=size)
                         for name, size in (("demo", 256), ("own", 1024))}, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--codebook-size int K, codes to choose from, §A.1 [demo 256, own 1024]" in text


@dataclasses.dataclass(frozen=True)
class Unexplained:
    schedule: str = "cosine"


@dataclasses.dataclass(frozen=True)
class Optional:
    schedule: str | None = None  # of the learning rate


def test_only_a_run_needs_a_folder_that_it_may_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path or not mode & os.X_OK)
    for out in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(run.UsageError, match=f"^{tmp_path} is not a folder that may be written to: name"):
            run.configure(train_gpt.PRESETS, ["--out", str(out)])
        assert run.configure(train_gpt.PRESETS, ["--out", str(out), "--benchmark"])[1] is None


def test_a_field_that_is_no_flag_is_named():
    for config in (Unexplained(), Optional()):
        with pytest.raises(TypeError, match="schedule must be int, float, str or bool, with a comment behind"):
            run.parse_flags({"demo": config}, [])


def test_values_and_devices_that_no_run_can_have_are_refused(monkeypatch):
    for name, value in [("steps", 0), ("batch_size", 0), ("log_every", 0), ("seed", 2**63), ("seed", -1),
                        ("lr", math.inf), ("lr", math.nan), ("beta1", 1.0), ("beta2", -0.1), ("workers", -2)]:
        with pytest.raises(ValueError, match=f"^{name} is {value}; it must"):
            dataclasses.replace(DEMO, **{name: value})
    for device in ("tpu9", "meta", "hpu"):  # of the last torch does not know the module
        with pytest.raises(run.UsageError, match=f"device is '{device}'"):
            run.start(dataclasses.replace(DEMO, device=device))
    def without_float64(count, dtype, device, zeros=torch.zeros):  # as on a Mac's GPU
        if dtype == torch.float64:
            raise TypeError("no float64")
        return zeros(count, dtype=dtype, device=device)
    with monkeypatch.context() as other:
        other.setattr(torch, "zeros", without_float64)
        with pytest.raises(run.UsageError, match=r"cannot use here \(no float64\)"):
            run.start(DEMO)
        run.start(sample.PRESETS["demo"])  # needs none
    config = dataclasses.replace(DEMO, device="cpu", seed=5, batch_size=16)
    assert run.start(config) == ALONE
    drawn = torch.rand(3)
    run.start(config)
    assert torch.equal(torch.rand(3), drawn)  # seeded
    with run.autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    for computes in (True, False):  # in bfloat16; a GPU before Ampere only emulates it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
            assert run.autocast(torch.device("cuda")) == computes
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(run.UsageError, match="batch_size is 16, which cannot be shared evenly by 3"):
        run.start(config)


def test_what_is_due_after_each_step():
    config = dataclasses.replace(DEMO, steps=13, log_every=3, eval_every=4, checkpoint_every=5)
    due = {step: due for step, _, due in run.steps(config, ALONE, 2, FOREVER)}
    assert list(due) == list(range(3, 14))
    assert [step for step in due if due[step].evaluate] == [4, 8, 12, 13]
    assert [step for step in due if due[step].save] == [5, 10, 13]
    assert [step for step in due if due[step].log] == [3, 4, 5, 6, 8, 9, 10, 12, 13]
    assert list(run.steps(config, ALONE, 13, iter([]))) == []  # nothing is loaded
    draws = set()
    for rank in (0, 1, 2):  # or all processes would drop out the same activations
        torch.manual_seed(0)
        steps = run.steps(config, run.Process(torch.device("cpu"), rank, 1), 2, FOREVER)
        next(steps)
        draws.add(torch.rand(()).item())
        steps.close()
    assert len(draws) == 3


@pytest.fixture
def handled():
    """The signals as an interactive shell leaves them: a run in the background would ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_signal_is_noted_and_the_next_step_saves_and_ends_the_run(tmp_path, handled):
    config = dataclasses.replace(DEMO, steps=9, out=str(tmp_path), log_every=99, checkpoint_every=99)
    for number in handled:
        for at, saved, sentence in [(3, [4], "stopped after step 4 of 9; .*pt is saved, --resume goes on"),
                                    (8, [9], "stopped after step 9 of 9"), (9, [9], "stopped after step 9")]:
            seen = []
            with pytest.raises(KeyboardInterrupt, match=sentence):
                for step, _, due in run.steps(config, ALONE, 0, FOREVER):
                    seen += [step] if due.save else []
                    if step == at:
                        os.kill(os.getpid(), number)
            assert seen == saved and signal.getsignal(number) == signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):  # a second one stops at once
        for _ in run.steps(config, ALONE, 0, FOREVER):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal was noted only")


def test_processes_stop_at_the_same_step_and_on_gpus_ask_each_other_only_at_every_tenth():
    class One(run.Process):  # of two
        def total(self, values):
            return values + (step > 12)  # the other one got a signal in step 12

        def share(self, value):
            return [value] * 2

    class OnGPU(One):
        def any(self, flag):  # without its tensor on a GPU
            return bool(self.total(flag))

    config = dataclasses.replace(DEMO, steps=30)
    for process, last in ((One(torch.device("cpu"), 0, 2), 14), (OnGPU(torch.device("cuda"), 0, 2), 20)):
        seen, step = [], 0
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {last} of 30"):
            for step, _, due in run.steps(config, process, 0, FOREVER):
                seen += [step] if due.save else []
        assert seen == [last]


def test_an_error_in_the_next_batch_waits_for_a_step_that_saves(tmp_path, capsys):
    class OnGPUs(run.Process):  # of which one meets the error, and all stop at a tenth step or the last
        def any(self, flag):
            return step >= 4

        def share(self, value):
            return [value, "a.png has vanished"]

    def batches(count: int):
        yield from range(1, count + 1)
        raise OSError("a.png has vanished")

    on_gpus = OnGPUs(torch.device("cuda"), 0, 2)
    for process, steps, count, last, kind in (
            (ALONE, 30, 4, 4, OSError), (ALONE, 5, 4, 4, OSError), (on_gpus, 30, 4, 10, OSError),
            (on_gpus, 10, 4, 10, OSError), (on_gpus, 6, 4, 6, OSError), (on_gpus, 30, 99, 10, ValueError)):
        config = dataclasses.replace(DEMO, steps=steps, out=str(tmp_path), log_every=99, checkpoint_every=99)
        seen, step = [], 0
        with pytest.raises((kind, KeyboardInterrupt)) as raised:
            for step, batch, due in run.steps(config, process, 0, batches(count)):
                assert batch == min(step, count)
                seen += [step] if due.save else []
        assert (raised.type, str(raised.value), seen) == (kind, "a.png has vanished", [last])
        shown = f"stopped after step {last} of {steps}; {tmp_path / 'checkpoint.pt'} is saved, --resume goes on\n"
        assert capsys.readouterr().out == shown
    with pytest.raises(OSError, match="a.png has vanished"):
        next(run.steps(config, ALONE, 0, batches(0)))
    assert len(list(run.steps(config, ALONE, 0, batches(30)))) == 30  # nobody needs the one after the last


def test_a_signal_that_is_ignored_stays_ignored(handled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup, so that a run outlives its terminal
    with run.deferred_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == []


def test_a_script_ends_with_a_sentence_and_a_status(monkeypatch, capsys):
    from_worker = ValueError('Caught ValueError in DataLoader worker 0.\n  File "x"\nValueError: a.png ended')
    for error, status, sentence in [
            (None, 0, ""), (run.UsageError("no such flag"), 2, "s.py: no such flag\n"),
            (ValueError("a bad file"), 1, "s.py: a bad file\n"), (OSError("no room"), 1, "s.py: no room\n"),
            (OSError(28, "No space", "a.gif"), 1, "s.py: a.gif could not be written (No space): make room\n"),
            (BrokenPipeError(32, "Broken pipe"), 1, "s.py: the program that reads the output has ended"),
            (OSError(28, "No space"), 1, "s.py: the output could not be written (No space): make room\n"),
            (from_worker, 1, "s.py: a.png ended\n"), (KeyboardInterrupt("stopped"), 130, "s.py: stopped\n"),
            (KeyboardInterrupt(), 130,
             "s.py: interrupted; checkpoints and finished code caches are intact\n"),
            (torch.OutOfMemoryError("CUDA"), 1, "s.py: there is too little memory"),
            (RuntimeError("cannot allocate 9 bytes"), 1, "s.py: there is too little memory")]:
        def main():
            if error:
                raise error
        monkeypatch.setattr(sys, "argv", ["/somewhere/s.py"])
        with pytest.raises(SystemExit) as ending:
            run.command_line(main)
        shown = capsys.readouterr().err
        assert ending.value.code == status and shown.startswith(sentence) and len(shown.splitlines()) <= 1
    # The second is the encoding on Windows, if the output goes to a file.
    for encoding, text in (("utf-8", "λ → 1\n"), ("cp1252", "? ? 1\n")):
        output = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
        with monkeypatch.context() as redirected, pytest.raises(SystemExit):
            redirected.setattr(sys, "stdout", output)
            run.command_line(lambda: announce("λ → 1"))
        assert output.buffer.getvalue().decode(encoding) == text
    for other in (None, io.StringIO()):  # closed, or replaced as in a notebook
        with monkeypatch.context() as replaced, pytest.raises(SystemExit, match="0"):
            replaced.setattr(sys, "stdout", other)
            run.command_line(lambda: announce("no matter"))
    # Of a mistake that all processes make the first one tells: until the others do, torchrun has ended them.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", lambda seconds: sys.stderr.write(f"{seconds >= 2}, then "))
    with pytest.raises(SystemExit):
        error = ValueError("a bad file")
        run.command_line(main)
    assert capsys.readouterr().err == "True, then s.py: a bad file\n"
    with pytest.raises(SystemExit):
        error = KeyboardInterrupt("stopped after step 9")
        run.command_line(main)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("RANK")
    with pytest.raises(RuntimeError, match="a mistake of ours"):  # needs its traceback
        error = RuntimeError("a mistake of ours")
        run.command_line(main)


def train_with_a_trace(flags: list[str], trace: Path):
    """Like the script, which must never come to the end of this: threads of gloo could abort it there."""
    try:
        run_script("train_vq.py", flags)
    finally:
        trace.touch()


def test_a_process_that_dies_ends_the_others_with_a_sentence_and_only_the_first_talks(
        pictures, tmp_path):
    for steps in (3, 10**6):
        folder = tmp_path / str(steps)
        folder.mkdir()
        flags = [*vq_flags(pictures, folder), "--resume", "--steps", str(steps)]
        first, second = start_two(train_with_a_trace, flags, folder / "trace", folder=folder)
        try:
            while steps > 3 and first.is_alive() and "step 3/" not in read(folder / "0" / "out"):
                time.sleep(0.05)
            if steps > 3:
                second.kill()
            first.join(60)
            second.join(60)
        finally:
            first.kill()
            second.kill()
        out, other, errors = (read(folder / name) for name in ("0/out", "1/out", "0/err"))
        assert out.count("does not exist yet: starting at step 0") == 1 and other == ""
        if steps == 3:
            assert (first.exitcode, second.exitcode, errors) == (0, 0, "") and "done in" in out
        else:
            assert first.exitcode == 1 and second.exitcode == -signal.SIGKILL
            assert re.fullmatch(r"train_vq.py: another process of this run has ended or .*--resume\n", errors)
        assert not (folder / "trace").exists()


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
