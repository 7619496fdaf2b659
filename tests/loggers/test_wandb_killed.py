"""A run continues if W&B's process is killed."""

from pathlib import Path

import pytest
from programs import Completed, run_program

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs Linux: its process is looked up in /proc"
)

SCRIPT = """
import os, signal, sys, time
from contextlib import suppress
from pathlib import Path
from dino_lightning.loggers.wandb import FaultTolerantWandbLogger

def children():
    return [int(word) for task in Path("/proc/self/task").iterdir() for word in (task / "children").read_text().split()]

logger = FaultTolerantWandbLogger(project="test", name="test", mode="offline", save_dir=sys.argv[1])
logger.log_hyperparams({"seed": 0})
logger.log_metrics({"loss": 1.0}, 0)
assert not logger.disconnected
if sys.argv[2] == "kill":
    services = children()
    for pid in services:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert services
    time.sleep(1)
for step in range(1, 4):
    logger.log_metrics({"loss": 1.0}, step)
logger.finish()
print("disconnected" if logger.disconnected else "connected", flush=True)
os._exit(0)  # like a run that a signal ends
"""


def run(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> Completed:
    # The variable names W&B's process of an earlier test, which the run would use.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    (folder / "script.py").write_text(SCRIPT)
    done = run_program(str(folder / "script.py"), str(folder), what, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "kill", monkeypatch)
    assert done.stdout.endswith("disconnected\n")
    assert done.stderr.count("W&B's process does not respond") == 1


@pytest.mark.slow
def test_a_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "leave", monkeypatch)
    assert done.stdout.splitlines()[-1] == "connected"
    assert "does not respond" not in done.stderr
