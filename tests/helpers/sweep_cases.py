"""Sweep folders with invented figures, and jobs to run in separate processes."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig

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


def process_state(cfg: Any, *, cli_overrides: list[str]) -> Any:
    """A job that returns what its process knows of itself and of the sweep, or that kills its process.

    It is in this module so that its process does not import the libraries of the tests.
    """
    if cfg.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = {"mode": hydra.mode.name, "folder": hydra.sweep.dir} if hydra else {}
    return {"pid": os.getpid(), "argv": sys.argv, **sweep}
