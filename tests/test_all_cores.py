"""A few small files of tests, run by two processes. Oracle: what pytest's own loop reports of them."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETTINGS = """
import os
os.sched_getaffinity = lambda process: {0, 1}
from all_cores import pytest_runtestloop
"""
TESTS = """
import os, pathlib, pytest, time, warnings
warnings.warn("of collection")
def note(text): pathlib.Path("notes").open("a").write(text + " ")
def test_passes(tmp_path): note("passed")
def test_fails(capsys):
    while "TOGETHER" in os.environ and not pathlib.Path("waiting").exists(): time.sleep(0.01)
    print("some output"); warnings.warn("of a test"); note("failed"); assert 1 == 2
def test_skips(): pytest.skip("for a reason")
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_errs(broken): pass
def test_leaves(): "LEAVES" in os.environ and os._exit(0)
def test_comes_last(): note("last")
"""
WAITS = """
import os, pathlib, time
def test_waits():
    try:
        time.sleep(0.3)  # until both processes are there: Python forgets a Ctrl-C that comes during a fork
        pathlib.Path("waiting").touch()
        time.sleep(float(os.environ["WAITS"]))
    finally:
        pathlib.Path("cleaned").touch()
def test_follows(tmp_path): pathlib.Path("followed").touch()
"""


def start(folder: Path, *flags: str, loop: bool = True, waits: float = 0, **environment: str) -> subprocess.Popen:
    files = {"conftest.py": SETTINGS if loop else "", "test_a.py": TESTS, "test_b.py": WAITS,
             "test_c.py": "def test_c(): pass", "test_d.py": "def test_d(): pass"}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "temporary").mkdir()
    environment = os.environ | environment | {
        "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DEBUG_TEMPROOT": "temporary", "WAITS": str(waits)}
    return subprocess.Popen([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags], cwd=folder,
                            env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def wait_for(condition, process: subprocess.Popen):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    raise TimeoutError


def has_ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_they_report_what_one_process_does_and_run_each_test_once(tmp_path):
    reports = []
    for loop in (True, False):
        folder = tmp_path / str(loop)
        folder.mkdir()
        process = start(folder, "-v", loop=loop)
        output, _ = process.communicate(timeout=60)
        outcomes = sorted(re.findall(r"(?m)^(test_\w+\.py::\S+ [A-Z]+)", output))
        summary = re.search(r"\d+ failed, .* 1 error", output.splitlines()[-1])[0]
        shown = [text in output for text in ("some output", "of a test", "no fixture", "for a reason")]
        reports.append((process.returncode, outcomes, summary, shown, output.count("of collection\n")))
        assert (folder / "notes").read_text() == "passed failed last "
        assert len(list(folder.glob("temporary/*/pytest-[0-9]"))) == 1  # one folder for all processes
    assert reports[0] == reports[1] and len(reports[0][1]) == 10 and all(reports[0][3])


def test_a_test_that_ends_its_process_fails_the_suite_and_is_named(tmp_path):
    process = start(tmp_path, "-q", LEAVES="1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "test_a.py::test_leaves has ended the process it ran in" in output
    assert has_ended(process.pid)


@pytest.mark.parametrize("end, waits", [("-x", 50), ("Ctrl-C", 50), ("kill -9", 1)])
def test_whatever_ends_them_leaves_no_process_behind(tmp_path, end, waits):
    process = start(tmp_path, "-q", *["-x"] * (end == "-x"), waits=waits, TOGETHER="1")
    wait_for((tmp_path / "waiting").exists, process)
    if end == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif end == "kill -9":
        process.kill()  # the others notice when they next report
    output, _ = process.communicate(timeout=60)
    wait_for(lambda: has_ended(process.pid), process)
    assert (tmp_path / "cleaned").exists() and not (tmp_path / "followed").exists()
    assert process.returncode == {"-x": 1, "Ctrl-C": 2, "kill -9": -signal.SIGKILL}[end]
    assert ("stopping after 1 failures" in output) == (end == "-x")
