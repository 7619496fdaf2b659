"""Run the tests in several forks of the process that has collected them.

Imports and collection take longer than many files of tests; pytest-xdist repeats both in every process.
"""

import atexit
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import pytest
from fork_server import forget_cleanups, redirect_library_logs

EXIT_TIMEOUT_S = 10.0


def run_in_workers(session: pytest.Session, workers: int, *, prepare: Callable[[], None] = lambda: None) -> None:
    """Run each file of tests in one of the workers, each of which calls `prepare` first.

    Files with most tests are first, so that no long one is last. If a worker ends in a test, that test fails and is the
    last one.

    Raises:
        pytest.Session.Failed: `--exitfirst` or `--maxfail` applies, or a worker ended.
    """
    files = sorted(
        (list(items) for _, items in groupby(session.items, key=lambda item: item.path)), key=len, reverse=True
    )
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one folder for all workers
    with _forks(session, workers, prepare) as connections:
        running: dict[Connection, str] = {}
        for connection in connections:
            _assign(connection, files, running)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                try:
                    event, data = connection.recv()
                except EOFError:
                    event, data = "error", "The process of this test ended."
                hook = session.config.hook
                if event == "start":
                    running[connection] = data["nodeid"]
                    hook.pytest_runtest_logstart(**data)
                elif event == "report":
                    report = hook.pytest_report_from_serializable(config=session.config, data=data)
                    hook.pytest_runtest_logreport(report=report)
                elif event == "finish":
                    hook.pytest_runtest_logfinish(**data)
                elif event == "warning":
                    hook.pytest_warning_recorded.call_historic(kwargs=_unpack_warning(**data))
                elif event == "error":
                    test = running[connection]
                    hook.pytest_runtest_logreport(
                        report=pytest.TestReport(test, ("", 0, ""), {}, "failed", data, "call")
                    )
                    raise session.Failed
                else:
                    _assign(connection, files, running)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)


def _assign(connection: Connection, files: list[list[pytest.Item]], running: dict[Connection, str]) -> None:
    """Send the names of the tests of the next file; without one, the worker ends."""
    names = [item.nodeid for item in files.pop(0)] if files else []
    connection.send(names)
    running[connection] = names[0] if names else ""
    if not names:
        del running[connection]


@contextmanager
def _forks(session: pytest.Session, workers: int, prepare: Callable[[], None]) -> Iterator[list[Connection]]:
    """Connections to new workers, which have ended when the context ends."""
    pids, connections = [], []
    try:
        for number in range(workers):
            ours, theirs = Pipe()
            if not (pid := os.fork()):
                for connection in (*connections, ours):
                    connection.close()  # otherwise the workers would not notice the end of the first process
                _run_worker(session, theirs, number, prepare)
            theirs.close()
            pids.append(pid)
            connections.append(ours)
        yield connections
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        until = time.monotonic() + EXIT_TIMEOUT_S
        while pids and time.monotonic() < until:
            pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(0.01)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _run_worker(session: pytest.Session, connection: Connection, number: int, prepare: Callable[[], None]) -> None:
    """Run files of tests until an empty list comes; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the first process reports it
        forget_cleanups()
        _separate(session.config, number)
        session.config.pluginmanager.register(_Reporter(connection))
        prepare()
        items = {item.nodeid: item for item in session.items}
        while names := connection.recv():
            file = [items[name] for name in names]
            for item, following in zip(file, [*file[1:], None], strict=True):
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            connection.send(("next file", None))
        atexit._run_exitfuncs()
    except BaseException:
        connection.send(("error", traceback.format_exc()))
    finally:
        os._exit(0)


def _separate(config: pytest.Config, number: int) -> None:
    """Give a worker its own temporary folder and its own files for captured output, and no terminal."""
    factory = config._tmp_path_factory  # type: ignore[attr-defined]
    factory._basetemp = factory.getbasetemp() / f"worker{number}"
    factory._basetemp.mkdir()
    config.pluginmanager.unregister(name="terminalreporter")
    if torch := sys.modules.get("torch"):
        torch.cuda._is_in_bad_fork = lambda: False  # tests have asked for GPUs before the fork, and there are none
    capture = config.pluginmanager.get_plugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    redirect_library_logs(sys.stderr)
    capture.suspend_global_capture()


class _Reporter:
    """Sends what the terminal shows to the first process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def pytest_runtest_logstart(self, nodeid: str, location: tuple) -> None:
        self.connection.send(("start", {"nodeid": nodeid, "location": location}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.connection.send(("report", {**report._to_json(), "$report_type": "TestReport"}))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple) -> None:
        self.connection.send(("finish", {"nodeid": nodeid, "location": location}))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str, nodeid: str) -> None:
        # Some warnings cannot be pickled.
        warning = (str(warning_message.message), warning_message.category.__name__)
        place = (warning_message.filename, warning_message.lineno)
        self.connection.send(("warning", {"warning": warning, "place": place, "when": when, "nodeid": nodeid}))


def _unpack_warning(warning: tuple[str, str], place: tuple[str, int], when: str, nodeid: str) -> dict:
    """Arguments of `pytest_warning_recorded`."""
    text, category = warning
    message = warnings.WarningMessage(text, type(category, (Warning,), {}), *place)
    return {"warning_message": message, "when": when, "nodeid": nodeid, "location": None}
