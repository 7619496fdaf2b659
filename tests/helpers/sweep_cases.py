"""Sweep folders with invented figures, and jobs to run in separate processes."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

EPOCHS = 4


def make_run(folder: Path, overrides: Mapping[str, Any], figures: Sequence[float], *, state: str = "finished") -> Path:
    """Write a run of 4 epochs with these overrides and a k-NN figure for each finished epoch.

    `state` is `finished`, `pruned`, `under way` or `failed`.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"experiment": "quick", "seed": 0, "trainer": {"max_epochs": EPOCHS}}
    for key, value in overrides.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump([f"{key}={value}" for key, value in overrides.items()]))
    rows = [f"{epoch},{10 * epoch + 9},{figure}" for epoch, figure in enumerate(figures)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,knn/top1", *rows]) + "\n")
    if state in ("finished", "pruned"):
        pruned = f"after epoch {len(figures)} of {EPOCHS}: others were better" if state == "pruned" else None
        summary = {"knn_top1": figures[-1], "knn_top1_untrained": 40.0, "pruned": pruned}
        (folder / "summary.json").write_text(json.dumps(summary))
    if state == "failed":
        (folder / "failed.txt").write_text("the loss is nan at step 3: lower optim.lr.\n")
    return folder


def arguments(cfg: Any, *, cli_overrides: list[str]) -> Any:
    """A job, in this module so that its process does not import the tests' libraries."""
    if cfg.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return [os.getpid(), sys.argv]


def group_at_wandb(cfg: Any, *, cli_overrides: list[str]) -> Any:
    """A job that returns the name of its sweep at W&B."""
    from dino_lightning.loggers.wandb import sweep_name

    return sweep_name()
