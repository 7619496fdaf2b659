"""The timeout of collectives, and the handling of SLURM's signal."""

from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
from composing import SMALL, composed
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf
from programs import run_program

from dino_lightning.config import TrainConfig
from dino_lightning.errors import UserError
from dino_lightning.runtime.launcher import Launcher
from dino_lightning.training.build import build_trainer
from dino_lightning.training.callbacks.rank_consistency import RankConsistencyCheck
from dino_lightning.training.strategy import DataParallel, FullySharded, cluster_plugins


@pytest.mark.parametrize(("strategy", "kind"), [("ddp", DataParallel), ("fsdp", FullySharded)])
def test_the_timeout_and_the_launcher(strategy: str, kind: type, tmp_path: Path) -> None:
    words = [*SMALL, "collective_timeout_s=77", f"trainer.strategy={strategy}", "trainer.devices=2"]
    config = cast(TrainConfig, OmegaConf.to_object(composed(*words, "trainer.precision=32", output_dir=tmp_path)))
    trainer = build_trainer(config, hyperparameters={})
    assert isinstance(trainer.strategy, kind)
    assert trainer.strategy._timeout == timedelta(seconds=77)  # type: ignore[attr-defined]
    assert isinstance(trainer.strategy.launcher, Launcher)
    assert isinstance(trainer.callbacks[0], RankConsistencyCheck)  # type: ignore[attr-defined]


def test_slurm_is_detected_without_lightnings_signal_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_NAME", "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert cluster_plugins() == []
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "dino")
    with pytest.raises(UserError, match="--ntasks-per-node"):
        cluster_plugins()
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    (found,) = cluster_plugins()
    assert isinstance(found, SLURMEnvironment)
    assert not found.auto_requeue
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")  # torchrun within a SLURM job
    assert cluster_plugins() == []


def test_a_job_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("SLURM_NNODES", "1")
    launcher = Launcher(SLURMEnvironment(auto_requeue=False), 2, 1)
    with pytest.raises(UserError, match=r"^trainer\.devices=2 and trainer\.num_nodes=1 do not match the SLURM job: "):
        launcher.launch(lambda: None)


TWO = """
import os, sys, time
if os.environ.get("LOCAL_RANK") == "1":
    sys.exit(3 if os.environ["DINO_LIGHTNING_STARTED_BY"] == str(os.getppid()) else 4)
from lightning.fabric.plugins.environments import LightningEnvironment
from dino_lightning.runtime.launcher import Launcher
Launcher(LightningEnvironment(), 2, 1).launch(time.sleep, 60)
"""


def test_the_launcher_starts_a_second_process_and_ends_with_its_status(tmp_path: Path) -> None:
    program = tmp_path / "two.py"
    program.write_text(TWO)
    ended = run_program(str(program), cwd=tmp_path, timeout=50)
    assert ended.returncode == 3, ended.stderr
    assert "process 1 of this machine has ended with status 3" in ended.stderr
