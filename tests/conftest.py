"""What every test shares: one thread, known random states, and the real data where it is."""

import functools
import gc
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """What has been imported by now stays: Python need not look through it again and again for what is left over.

    Nor need Lightning look through all packages that are installed, for callbacks, whenever a trainer is made.
    """
    gc.freeze()
    if registry := sys.modules.get("lightning.fabric.utilities.registry"):
        registry.entry_points = functools.cache(registry.entry_points)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Also for what whole files of tests share."""
    import torch  # here, because the process that deals out the tests runs none

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _known_start() -> Iterator[None]:
    """One thread, equal random states for every test, and nothing left over of a run in another one."""
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
    """The folder of real images; the test is skipped where there is none."""
    folder = Path(os.environ.get("DINO_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}: set DINO_TEST_DATA to their folder")
    return folder
