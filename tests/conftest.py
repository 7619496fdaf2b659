"""Fixtures for all tests: one thread, fixed random states, and the folder of real images."""

import functools
import gc
import importlib
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import HAS_GPU, PRELOADED_MODULES, start_fork_server
from forked_workers import run_in_workers

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: waiting threads of OpenBLAS cost time
PROJECT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Save time in all tests.

    Objects from imports are never freed, so the garbage collector need not visit them. Lightning searches all installed
    packages for callbacks whenever a trainer is created; the cache makes it search once.
    """
    gc.enable()
    gc.freeze()
    if registry := sys.modules.get("lightning.fabric.utilities.registry"):
        registry.entry_points = functools.cache(registry.entry_points)  # type: ignore[attr-defined]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, help="processes that run files of tests (0: this process)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Use one thread before test modules are imported.

    If an import computed with several threads, OpenMP would start them here, and a forked process would wait for them
    forever.
    """
    gc.disable()  # most objects of imports stay
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all cases after the first n of a test with `slow_after_first(n)` as slow."""
    cases: Counter[tuple[Path, str]] = Counter()
    for item in items:
        if mark := item.get_closest_marker("slow_after_first"):
            cases[name := (item.path, item.name.split("[")[0])] += 1
            if cases[name] > mark.args[0]:
                item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in workers, or prepare this process to run them."""
    option = session.config.option
    if option.collectonly or (session.testsfailed and not option.continue_on_collection_errors):
        return None
    files = len({item.path for item in session.items})
    if min(option.workers, files) > 1 and not (HAS_GPU or option.usepdb or option.capture == "no"):
        for module in PRELOADED_MODULES:
            importlib.import_module(module)
        run_in_workers(session, min(option.workers, files), prepare=start_fork_server)
        return True
    start_fork_server()
    return None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Set one thread before session and module fixtures run."""
    import torch  # not at the top: collection sets its threads before

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _known_start() -> Iterator[None]:
    """Start every test with one thread, the same random states, and no variables or signal handlers of other tests."""
    import numpy as np
    import torch

    os.environ.pop("DINO_LIGHTNING_RUN", None)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    os.environ.pop("DINO_LIGHTNING_RUN", None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; tests that use it are skipped if it does not exist."""
    folder = Path(os.environ.get("DINO_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set DINO_TEST_DATA to their folder")
    return folder
