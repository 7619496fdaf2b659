"""Train a network.

usage: dino train [PATH] [group=option] [group.key=value]

PATH is data.path: a folder, zip, tar, file list or parquet of your images. Settings are then chosen for them
and for this machine. Without PATH: small built-in images.

Examples:
  dino train                                       the built-in images, a few minutes on a CPU
  dino train ~/photos                              your images, settings chosen for them and this machine
  dino train experiment=vits16_100ep data.path=DIR     the paper's recipe on ImageNet
  dino train ~/photos backbone=resnet50 trainer.devices=8     any key can be changed
  dino train --multirun seed=0,1,2                 several runs; dino table compares them
  dino train --multirun sweep=table7 preset=quick  the paper's ablations, small
  dino train output_dir=SAME_FOLDER resume=true    continue a run
  eval "$(dino train -sc install=bash)"            completion of all verbs by Tab; also zsh, fish
"""

import os
import sys
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dino_lightning.cli.overrides import prepare_training
from dino_lightning.cli.plugins import import_one
from dino_lightning.cli.program import attempt, run
from dino_lightning.cli.sweeps import concurrent_jobs, in_own_process
from dino_lightning.config import register
from dino_lightning.runtime import signals
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED


def main(words: list[str]) -> None:
    """Train as the words say."""
    try:
        run(words, task, verb="train", root="config", prepare=prepare)
    except SystemExit as error:
        if error.code in (PREEMPTED, INTERRUPTED):
            # Everything is saved. Python can take ten seconds to unload the libraries, and a scheduler gives few.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code)
        raise
    signals.ignore_at_shutdown()


def prepare(words: list[str]) -> list[str]:
    """Hydra's overrides."""
    # Completion does not look for a GPU, which takes seconds.
    return prepare_training(words, fast=False if "COMP_LINE" in os.environ else None)


def task(cfg: DictConfig) -> float | None:
    """One run as Hydra composed it."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    job = partial(train_one, cli_overrides=overrides)
    if hydra.mode == RunMode.MULTIRUN and (count := concurrent_jobs(hydra.launcher)):
        job = partial(in_own_process, train_one, cli_overrides=overrides, concurrent_runs=count)
    return attempt(job, cfg, verb="train", overrides=overrides)


def train_one(cfg: DictConfig, **options: Any) -> float | None:
    """`training.run.train`, in any process: a new one has neither resolvers nor the user's modules yet."""
    register()
    for name in cfg.imports:
        import_one(name)
    from dino_lightning.training.run import train  # torch and lightning take seconds to import

    return train(cfg, **options)
