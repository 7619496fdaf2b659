"""Reads weight files as tensors, without running code that a pickle may contain."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dino_lightning.errors import UserError

try:
    from numpy._core.multiarray import scalar
except ImportError:  # NumPy 1
    from numpy.core.multiarray import scalar  # type: ignore[no-redef]

SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    # The original stores learning rates as NumPy scalars, whose module has two names.
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
]
"""Harmless types in the original's full checkpoints, allowed besides tensors."""


def read_pickle(path: Path, *, source: str) -> dict[str, Any]:
    """The content of a `.pth`, `.pt` or `.ckpt` on the CPU; `source` names it in errors."""
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{source} is refused: it contains {unsafe[1]} besides weights, and loading that could run code; save "
                "the weights again as a state dict of tensors."
            ) from error
        raise UserError(f"{source} is not a valid checkpoint: {_diagnose(path)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{source} contains a {type(content).__name__}; expected a state dict or a checkpoint.")
    return content


def _diagnose(path: Path) -> str:
    """Why PyTorch cannot read a file, judged by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    return "PyTorch cannot read it"


def check_finite(weights: Mapping[str, Tensor], *, source: str) -> None:
    """Raise `UserError` for NaN or infinite weights, which would make every feature NaN."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise UserError(
                f"{source}: {name} contains NaN or infinite values, probably because the training diverged; use an "
                "earlier checkpoint."
            )


def read_safetensors(path: Path, *, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{source} is not a valid safetensors file ({error}).") from error
