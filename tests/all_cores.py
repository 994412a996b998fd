"""The whole suite on all cores: as many processes share its files, each with a core of its own.

`conftest.py` imports `pytest_runtestloop`, which replaces pytest's loop over the tests. Like pytest-xdist, and
without it: processes are forked after the tests were collected, and send what they report to the first one.
"""
import contextlib
import itertools
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import pytest


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Share the test files out to processes; None leaves a few files, or what needs the terminal, to pytest."""
    files, option = {}, session.config.option
    for item in session.items:
        files.setdefault(item.path, []).append(item)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # only Linux has it
    interactive = option.usepdb or option.trace or option.setupshow or option.capture == "no"
    within_xdist = "PYTEST_XDIST_WORKER" in os.environ
    if len(files) < 4 or cores < 2 or interactive or within_xdist or option.collectonly or session.testsfailed:
        return None
    session.config._tmp_path_factory.getbasetemp()  # made now, it is one for all processes
    slow_first = sorted(files.values(), key=lambda items: items[0].path.stat().st_size, reverse=True)
    queue, entry = os.pipe()
    os.write(entry, bytes(range(len(files))))
    os.close(entry)
    context, processes = multiprocessing.get_context("fork"), {}  # by the connection that each reports through
    for _ in range(min(cores, 4)):
        received, sent = context.Pipe(duplex=False)
        arguments = (session, slow_first, queue, sent, [*processes, received])
        processes[received] = context.Process(target=run_files, args=arguments)
        processes[received].start()
        sent.close()
    try:
        report(session, processes)
    except session.Failed:
        for process in filter(BaseProcess.is_alive, processes.values()):
            os.kill(process.pid, signal.SIGINT)  # what Ctrl-C sends to all
        raise
    finally:
        for process in processes.values():
            process.join(5)  # a test may have to end processes of its own
            if process.is_alive():  # training, which takes the first Ctrl-C for itself
                os.kill(process.pid, signal.SIGINT)
                process.join(5)
            process.kill()
    return True


def report(session: pytest.Session, processes: dict[Connection, BaseProcess]):
    """Pass on to pytest what the processes send, until all have ended. Raises Failed where it would stop."""
    running = {}  # the test that each has last begun
    while processes:
        for connection in wait(list(processes)):
            try:
                kind, content = connection.recv()
            except EOFError:
                session.shouldfail = f"{running.get(connection)} has ended the process it ran in"
                raise session.Failed(session.shouldfail) from None
            if kind == "start":
                running[connection] = content
            elif kind == "report":
                session.config.hook.pytest_runtest_logreport(report=content)
            elif kind == "warning":
                session.config.hook.pytest_warning_recorded.call_historic(kwargs=content)
            else:
                processes.pop(connection).join()
            if session.shouldfail or session.shouldstop:
                raise session.Failed(session.shouldfail or session.shouldstop)


def run_files(session: pytest.Session, files: list[list[pytest.Item]], queue: int, connection: Connection,
              received: list[Connection]):
    """In a process of its own: the tests of the first file in the queue, then of the next that is left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for other in received:
        other.close()  # so that sending fails when the first process is gone
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Reporter(connection))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # in files that it shares with the other processes
    capture.start_global_capturing()
    capture.suspend_global_capture()
    items = (item for number in iter(lambda: os.read(queue, 1), b"") for item in files[number[0]])
    with contextlib.suppress(KeyboardInterrupt):
        for item, following in itertools.pairwise(itertools.chain(items, [None])):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        connection.send(("end", None))


class Reporter:
    """A plugin that sends what it hears of the tests to the process that has the terminal."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def pytest_runtest_logstart(self, nodeid):
        self.connection.send(("start", nodeid))

    def pytest_runtest_logreport(self, report):
        self.connection.send(("report", report))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        if when == "runtest":  # those of collection are known there
            warning_message.source = None  # may be an open file
            self.connection.send(("warning", {"warning_message": warning_message, "when": when,
                                              "nodeid": nodeid, "location": location}))
