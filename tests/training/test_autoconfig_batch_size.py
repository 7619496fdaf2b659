"""The batch-size finder, in a process with little memory."""

import os
import sys
from pathlib import Path
from typing import cast

import pytest
from composing import composed
from omegaconf import OmegaConf
from programs import run_code

from dino_lightning.config import TrainConfig
from dino_lightning.training.autoconfig.batch_size import RESULT_VARIABLE, fits_in_memory, largest_batch, listed_devices

WORDS = ["experiment=quick", "trainer.accelerator=cpu"]

LITTLE_MEMORY = """
import ctypes, os, resource, sys
import torch
from composing import composed
from omegaconf import OmegaConf
from dino_lightning.training.autoconfig.batch_size import RESULT_VARIABLE, fits_in_memory, largest_batch
torch.set_num_threads(1)
torch.backends.mkldnn.enabled = False  # which has an error of its own for memory
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors do not reuse memory that the process has freed
small, large = (OmegaConf.to_object(composed(*sys.argv[2:], f"data.batch_size_per_device={n}")) for n in (4, 512))
fits_in_memory(small, batch=2)  # libraries are loaded now
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[1]), resource.RLIM_INFINITY))
print("fits", largest_batch(small), os.environ.pop(RESULT_VARIABLE), largest_batch(large), os.environ[RESULT_VARIABLE])
"""


def config(*words: str) -> TrainConfig:
    return cast(TrainConfig, OmegaConf.to_object(composed(*WORDS, *words)))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_batch_is_halved_until_it_fits(tmp_path: Path) -> None:
    """With 30 MB of free memory, a batch that needs more than 70 MB is halved, and a small one is kept."""
    done = run_code(LITTLE_MEMORY, str(30 << 20), *WORDS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("fits ")[1].split()
    small, variable, large, variable_of_large = map(int, words)
    assert (small, large) == (variable, variable_of_large), "the processes of other devices read the variable"
    assert small == 4
    assert large in (32, 64, 128, 256)


@pytest.mark.parametrize("method", ["dino", "byol", "moco", "swav", "supervised"])
@pytest.mark.slow_after_first(2)
def test_every_method_takes_its_trial_steps(method: str) -> None:
    assert fits_in_memory(config(f"method={method}"), batch=3)


def test_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Output size is too small"):
        fits_in_memory(config("backbone=vovnet_micro", "crops.global_size=2", "crops.local_count=0"), batch=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert largest_batch(config("data.batch_size_per_device=9")) == 9, "each process might find another batch size"


def test_only_processes_of_other_devices_take_over_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `--multirun` in one process, and those of a notebook, each search separately."""
    monkeypatch.setenv(RESULT_VARIABLE, "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert largest_batch(config("data.batch_size_per_device=4")) == 2
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert largest_batch(config("data.batch_size_per_device=4")) == 4
    assert os.environ[RESULT_VARIABLE] == "4"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert largest_batch(config("data.batch_size_per_device=3")) == 3
    assert os.environ[RESULT_VARIABLE] == "3", "not the result of an earlier run"


def test_the_finder_uses_a_device_of_the_training() -> None:
    assert [listed_devices(devices) for devices in ("auto", 2, "-1")] == [[]] * 3
    assert [listed_devices(devices)[:1] for devices in ([3, 1], "3,1", "3,", "[3]")] == [["3"], ["3"], ["3"], []]
