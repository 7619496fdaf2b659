"""Folders of sweeps with made-up figures, and a job for a process of its own."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

EPOCHS = 4


def make_run(folder: Path, words: Mapping[str, Any], figures: Sequence[float], *, state: str = "finished") -> Path:
    """A run of 4 epochs with the settings `words` and a k-NN figure for each epoch it has done.

    `state` is `finished`, `pruned`, `under way` or `failed`.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"experiment": "quick", "seed": 0, "trainer": {"max_epochs": EPOCHS}}
    for key, value in words.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump([f"{key}={value}" for key, value in words.items()]))
    rows = [f"{epoch},{10 * epoch + 9},{figure}" for epoch, figure in enumerate(figures)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,step,knn/top1", *rows]) + "\n")
    if state in ("finished", "pruned"):
        pruned = f"after epoch {len(figures)} of {EPOCHS}: others were better" if state == "pruned" else None
        summary = {"knn_top1": figures[-1], "knn_top1_untrained": 40.0, "pruned": pruned}
        (folder / "summary.json").write_text(json.dumps(summary))
    if state == "failed":
        (folder / "failed.txt").write_text("the loss is nan at step 3: lower optim.lr.\n")
    return folder


def arguments(cfg: Any, *, given: list[str]) -> Any:
    """A job; it stands here so that its process need not import what tests do."""
    if cfg.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return [os.getpid(), sys.argv]


def group_at_wandb(cfg: Any, *, given: list[str]) -> Any:
    """A job that tells which sweep it belongs to."""
    from dino_lightning.loggers.wandb import sweep_name

    return sweep_name()
