"""Whether two folders of runs have the same end, to the last bit: `benchmarks/soak.py`."""

import json
from pathlib import Path
from typing import Any

import soak_measures as measures
import torch
from safetensors import safe_open
from torch import Tensor

TIMES = ("Speed", "hyper_parameters", "datamodule_hyper_parameters")
"""Parts of a checkpoint that tell seconds, places or settings of loggers, and so differ."""
SUMMARY = ("knn_top1", "knn_top5", "knn_top1_untrained", "knn_top1_pixels", "steps", "epochs", "collapse", "bad_images")


def differences(folder: Path, reference: Path) -> list[str]:
    """In words; empty where all is equal: exported weights, checkpoint, rows of the log, summary."""
    found: list[str] = []
    for path in reference.glob("*.safetensors"):
        found += unequal(_exported(folder / path.name), _exported(path), path.name)[:3]
    found += _rows(measures.rows_of(folder), measures.rows_of(reference))
    own, other = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    found += [f"summary.json: {key} is {own[key]}, not {other[key]}" for key in SUMMARY if own[key] != other[key]]
    own, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (folder, reference))
    return found + unequal(own, other)[:5]


def unequal(own: Any, other: Any, path: str = "last.ckpt", *, without: tuple[str, ...] = TIMES) -> list[str]:
    """Places of a nested structure where two are different."""
    if isinstance(own, Tensor) and isinstance(other, Tensor):
        same = own.dtype == other.dtype and own.shape == other.shape and torch.equal(own, other)
        return [] if same else [f"{path} is different"]
    if isinstance(own, dict) and isinstance(other, dict):
        found = [
            f"{path}: {key!r} is in one only" for key in own.keys() ^ other.keys() if not _is_left_out(key, without)
        ]
        for key in own.keys() & other.keys():
            if not _is_left_out(key, without):
                found += unequal(own[key], other[key], f"{path}/{key}", without=without)
        return sorted(found)
    if isinstance(own, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(own) != len(other):
            return [f"{path} has {len(own)} entries, not {len(other)}"]
        return [
            line
            for i, (a, b) in enumerate(zip(own, other, strict=True))
            for line in unequal(a, b, f"{path}/{i}", without=without)
        ]
    return [] if own == other or (own != own and other != other) else [f"{path} is {own!r:.60}, not {other!r:.60}"]


def _exported(path: Path) -> dict[str, Any]:
    """Weights and description; the library writes the parts of the latter in any order."""
    with safe_open(path, framework="pt") as file:
        return {"description": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118  (not a dict)


def _is_left_out(key: Any, without: tuple[str, ...]) -> bool:
    return any(str(key).startswith(name) for name in without)


def _rows(own: list[dict[str, str]], other: list[dict[str, str]]) -> list[str]:
    """Rows of `metrics.csv`, without how fast the run was."""
    if len(own) != len(other):
        return [f"metrics.csv has {len(own)} rows, not {len(other)}"]
    for number, (a, b) in enumerate(zip(own, other, strict=True)):
        for key in a.keys() | b.keys():
            if not key.startswith("speed/") and (a.get(key) or "") != (b.get(key) or ""):
                return [f"metrics.csv: {key} in row {number} (step {b.get('step')}) is {a.get(key)}, not {b.get(key)}"]
    return []
