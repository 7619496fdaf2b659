"""Compares the results of two runs bit by bit, for `benchmarks/soak.py`."""

import json
from pathlib import Path
from typing import Any

import soak_measures as measures
import torch
from safetensors import safe_open
from torch import Tensor

NOT_COMPARED = ("Throughput", "hyper_parameters", "datamodule_hyper_parameters")
"""Parts of a checkpoint that contain times, paths or logger settings and therefore differ."""
SUMMARY = ("knn_top1", "knn_top5", "knn_top1_untrained", "knn_top1_pixels", "steps", "epochs", "collapse", "bad_images")


def differences(folder: Path, reference: Path) -> list[str]:
    """Descriptions of all differences between exported weights, checkpoint, `metrics.csv` and `summary.json`."""
    messages: list[str] = []
    for path in reference.glob("*.safetensors"):
        messages += unequal(_exported(folder / path.name), _exported(path), path.name)[:3]
    messages += _rows(measures.rows_of(folder), measures.rows_of(reference))
    ours, other = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    messages += [f"summary.json: {key} is {ours[key]}, not {other[key]}" for key in SUMMARY if ours[key] != other[key]]
    ours, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (folder, reference))
    return messages + unequal(ours, other)[:5]


def unequal(ours: Any, other: Any, path: str = "last.ckpt", *, without: tuple[str, ...] = NOT_COMPARED) -> list[str]:
    """Descriptions of the differences between two nested structures; `without`: prefixes of keys to ignore."""
    if isinstance(ours, Tensor) and isinstance(other, Tensor):
        same = ours.dtype == other.dtype and ours.shape == other.shape and torch.equal(ours, other)
        return [] if same else [f"{path} is different"]
    if isinstance(ours, dict) and isinstance(other, dict):
        compared = [key for key in ours.keys() | other.keys() if not str(key).startswith(without)]
        messages = []
        for key in compared:
            if key in ours and key in other:
                messages += unequal(ours[key], other[key], f"{path}/{key}", without=without)
            else:
                messages.append(f"{path}: {key!r} is in one of them only")
        return sorted(messages)
    if isinstance(ours, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(ours) != len(other):
            return [f"{path} has {len(ours)} entries, not {len(other)}"]
        return [
            line
            for i, (a, b) in enumerate(zip(ours, other, strict=True))
            for line in unequal(a, b, f"{path}/{i}", without=without)
        ]
    return [] if ours == other or (ours != ours and other != other) else [f"{path} is {ours!r:.60}, not {other!r:.60}"]


def _exported(path: Path) -> dict[str, Any]:
    """Weights and description, which safetensors writes in any order."""
    with safe_open(path, framework="pt") as file:
        return {"description": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118  (not a dict)


def _rows(ours: list[dict[str, str]], other: list[dict[str, str]]) -> list[str]:
    """The first difference in `metrics.csv`, except for the speed."""
    if len(ours) != len(other):
        return [f"metrics.csv has {len(ours)} rows, not {len(other)}"]
    for number, (a, b) in enumerate(zip(ours, other, strict=True)):
        for key in a.keys() | b.keys():
            if not key.startswith("speed/") and (a.get(key) or "") != (b.get(key) or ""):
                return [f"metrics.csv: {key} in row {number} (step {b.get('step')}) is {a.get(key)}, not {b.get(key)}"]
    return []
