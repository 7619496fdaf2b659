"""submitit jobs: their request to SLURM, and a job that is interrupted and resumed without a difference.

There is no SLURM here: jobs of submitit's local executor have the same handlers of signals, and are started again.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from launches import HERE, end_all, members, run, start, train
from omegaconf import OmegaConf
from test_elastic import LONG, assert_same

from dino_lightning.cli.program import run_name
from dino_lightning.config import register
from dino_lightning.runtime.files import CONF

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'dino-lightning[submitit]'")


def launcher(*words: str) -> Any:
    """The launcher of `--multirun WORDS`."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=[*words], return_hydra_config=True).hydra.launcher


def test_a_process_per_device_is_requested() -> None:
    one = launcher("hydra/launcher=submitit_one_node", "trainer.devices=8")
    assert (one.nodes, one.tasks_per_node, one.gpus_per_node) == (1, 8, 8)
    two = launcher("hydra/launcher=submitit_two_nodes", "trainer.devices=4", "trainer.num_nodes=2")
    assert (two.nodes, two.tasks_per_node, two.gpus_per_node) == (2, 4, 4)
    for asked in (one, two):
        assert asked._target_.endswith("SlurmLauncher")
        assert asked.signal_delay_s >= 60
        assert asked.max_num_timeout > 0
        assert asked.timeout_min > 60
        assert asked.setup == ["export SLURM_KILL_BAD_EXIT=1"]
    assert launcher("hydra/launcher=submitit_local_test")._target_.endswith("LocalLauncher")


def test_sbatch_receives_the_requests(tmp_path: Path) -> None:
    """The script that submitit writes for SLURM."""
    slurm = pytest.importorskip("submitit.slurm.slurm")
    asked = launcher("hydra/launcher=submitit_two_nodes", "trainer.devices=4", "trainer.num_nodes=2")
    names = {"tasks_per_node": "ntasks_per_node", "timeout_min": "time", "name": "job_name"}
    kept = (
        "nodes",
        "tasks_per_node",
        "gpus_per_node",
        "cpus_per_task",
        "timeout_min",
        "name",
        "signal_delay_s",
        "setup",
    )
    options = {names.get(key, key): OmegaConf.to_container(asked, resolve=True)[key] for key in kept}
    script = slurm._make_sbatch_string(command="RUN", folder=tmp_path, **options)
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=USR2@300", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in script
    assert script.index("export SLURM_KILL_BAD_EXIT=1") < script.index("\nsrun ")


@pytest.mark.slow
def test_an_interrupted_job_has_the_same_result(tmp_path: Path) -> None:
    """submitit's signal arrives in the second epoch."""
    words = ["trainer.devices=1", *LONG]
    alone = run(train(f"output_dir={tmp_path}/undisturbed", *words), log=tmp_path / "alone", timeout=240)
    assert alone.status == 0, alone.said
    command = train(
        "hydra/launcher=submitit_local_test",
        f"output_dir={tmp_path}/jobs",
        *words,
        f"imports=[{HERE}/faulty_rank.py]",
        "--multirun",
    )
    mark = tmp_path / "mark"
    process = start(command, log=tmp_path / "log", FAULT="noted", FAULTY="0", FAULT_STEP="6", MARK=str(mark))
    try:
        until = time.monotonic() + 180
        while not mark.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        (job,) = [number for number in members(process.pid) if "submitit.core._submit" in _words(number)]
        os.kill(job, signal.SIGUSR2)  # as its controller does when the time is over
        assert process.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    finally:
        end_all(process.pid)
    logs = "".join(path.read_text() for path in (tmp_path / "jobs" / ".submitit").rglob("*_log.*"))
    assert "SIGUSR2: saving after this step" in logs
    assert "Requeued job" in logs
    assert_same(tmp_path / "jobs" / "0", tmp_path / "undisturbed", steps=24)


def _words(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
