"""Starts the training runs of `benchmarks/soak.py`."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
EPOCH_STEPS = 32
OVERRIDES = (
    f"data.train_images={16 * EPOCH_STEPS}",
    "data.val_images=64",
    "data.batch_size_per_device=16",
    "backbone.drop_path_rate=0.1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "cpu_threads=1",
    "callbacks.pictures.every_n_epochs=1000",
    "callbacks.pictures.images=2",
    "callbacks.knn.bank=256",
    "callbacks.knn.every_n_epochs=4",
)


@dataclass(frozen=True)
class RunProcess:
    """The first process of a run, and how to find the rest of the run."""

    process: subprocess.Popen[bytes]
    marker: str
    """A part of the environment that all processes of the run have."""
    folder: Path
    """`output_dir` of the run."""
    temporary: Path
    """Its folder for temporary files."""
    progress: Path
    """The file to which `soak_watch.py` writes."""


def copy_code(folder: Path) -> Path:
    """Copy the code, so that all processes run the same code even if the checkout changes meanwhile."""
    code = folder / "code"
    for name in ("src", "conf"):
        shutil.copytree(HERE.parent / name, code / name, dirs_exist_ok=True)
    for path in (HERE.parent / "train.py", HERE / "soak_watch.py"):
        shutil.copy(path, code)
    return code


def start_run(name: str, folder: Path, overrides: list[str], *, soak: Path, options: Namespace) -> RunProcess:
    """Start a training with output in `folder`, and with its log and temporary files below the folder `soak`."""
    code, temporary, progress = soak / "code", soak / "tmp" / name, soak / "progress" / f"{name}.jsonl"
    for path in (temporary, progress.parent, soak / "logs"):
        path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(code / "train.py"), *OVERRIDES, *overrides, f"output_dir={folder}"]
    command += [f"callbacks.checkpoint.every_n_minutes={options.minutes}", f"imports=[{code / 'soak_watch.py'}]"]
    mark = f"{os.getpid()}-{name}-"
    environment = {**os.environ, "SOAK_RUN": mark, "SOAK_PROGRESS": str(progress), "SOAK_PAUSE": str(options.pause)}
    environment |= {"TMPDIR": str(temporary), "WANDB_SILENT": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code / "src")}
    with (soak / "logs" / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *options.set],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return RunProcess(process, f"SOAK_RUN={mark}", folder, temporary, progress)
