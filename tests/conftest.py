"""Settings and fixtures for all tests, and a loop that runs them on all cores.

One thread each: the tensors are small, and more threads wait for each other on a busy machine. Without a GPU
the kernels run in Triton's interpreter.
"""
import itertools
import multiprocessing
import os
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else who asks for a GPU cannot fork any more

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Share the files of the whole suite out to processes, a core for each, where there is no GPU."""
    files = [list(items) for _, items in itertools.groupby(session.items, key=lambda item: item.path)]
    files.sort(key=lambda items: items[0].path.stat().st_size, reverse=True)  # the slow ones first
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # Linux has it
    option, shared = session.config.option, "PYTEST_XDIST_WORKER" in os.environ  # out by xdist
    if (len(files) < 4 or cores == 1 or torch.cuda.is_available() or shared or session.testsfailed
            or option.collectonly or option.usepdb or option.capture == "no"):
        return None  # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()  # one folder for all
    queue, entry = os.pipe()
    os.write(entry, bytes(range(len(files))))
    os.close(entry)
    context, hook, processes, running = multiprocessing.get_context("fork"), session.config.hook, {}, {}
    for _ in range(min(cores, 4)):
        received, sent = context.Pipe(duplex=False)
        processes[received] = context.Process(target=run_files, args=(session, files, queue, sent))
        processes[received].start()
        sent.close()
    try:
        while processes:
            for connection in wait(list(processes)):
                try:
                    kind, content = connection.recv()
                except EOFError:
                    process = processes.pop(connection)
                    process.join()
                    if process.exitcode:
                        raise session.Failed(f"{running.get(connection)} has ended its process with status "
                                             f"{process.exitcode}")
                    continue
                if kind == "start":
                    running[connection] = content
                elif kind == "report":
                    hook.pytest_runtest_logreport(report=content)
                else:
                    hook.pytest_warning_recorded.call_historic(kwargs=content)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
    finally:
        for process in processes.values():
            process.kill()
    return True


def run_files(session: pytest.Session, files: list[list[pytest.Item]], queue: int, connection: Connection):
    """In a process of its own: the tests of the first file in the queue, then of the next that is left."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Reporter(connection))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # in files that it shares with the other processes
    capture.start_global_capturing()
    items = (item for number in iter(lambda: os.read(queue, 1), b"") for item in files[number[0]])
    for item, following in itertools.pairwise(itertools.chain(items, [None])):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


class Reporter:
    """A plugin that sends what it hears of the tests to the process that has the terminal."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def pytest_runtest_logstart(self, nodeid):
        self.connection.send(("start", nodeid))

    def pytest_runtest_logreport(self, report):
        self.connection.send(("report", report))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        self.connection.send(("warning", {"warning_message": warning_message, "when": when, "nodeid": nodeid,
                                          "location": location}))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """16 training and 4 validation pictures of 16×16: a bright square on a dark ground."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = np.full((16, 16, 3), 40, np.uint8)
            y, x = random.integers(0, 8, 2)
            pixels[y:y + 8, x:x + 8] = random.integers(100, 255, 3)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def first_stage(pictures, tmp_path_factory) -> Path:
    """A checkpoint of train_vq.py after 12 steps."""
    import train_vq
    from helpers import vq_flags
    return train_vq.main([*vq_flags(pictures, tmp_path_factory.mktemp("vq")), "--steps", "12"])


@pytest.fixture(scope="session")
def second_stage(pictures, first_stage, tmp_path_factory) -> Path:
    """A checkpoint of train_gpt.py after 4 steps, in the order spiral."""
    import train_gpt
    from helpers import gpt_flags
    flags = gpt_flags(pictures, first_stage, tmp_path_factory.mktemp("gpt"))
    return train_gpt.main([*flags, "--order", "spiral", "--steps", "4"])
