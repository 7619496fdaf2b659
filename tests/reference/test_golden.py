"""Today's numbers are the stored ones (see golden_trace.py), however a step is computed."""

import json

import golden_trace as golden
import pytest

from dino_lightning.config import ComputeConfig

WAYS = {
    "default": ComputeConfig(),
    "plain": ComputeConfig(fused=False),
    "small pieces": ComputeConfig(loss_rows=5),
    "checkpointed": ComputeConfig(gradient_checkpointing=True),
    "plain and checkpointed": ComputeConfig(fused=False, gradient_checkpointing=True),
    "channels last": ComputeConfig(channels_last=True),
}


def compare(now: dict[str, list[float]], *, relative: float) -> None:
    stored = json.loads(golden.FILE.read_text())
    for name, values in now.items():
        assert len(values) == 20
        assert values == pytest.approx(stored[name], rel=relative), name


@pytest.mark.parametrize("way", WAYS)
def test_trace(way: str) -> None:
    """Float64: libraries may order sums differently, which 20 steps of Adam magnify from 1e-16 to below 1e-9."""
    compare(golden.trace(WAYS[way]), relative=1e-8)


@pytest.mark.parametrize("way", ["default", "plain"])
def test_float32(way: str) -> None:
    """Rounding by 6e-8 at each of some ten operations in a row; these norms and losses are no tiny differences."""
    compare(golden.trace(WAYS[way], precision="32-true"), relative=2e-6)


@pytest.mark.slow
def test_compiled() -> None:
    """Float64 through Inductor."""
    compare(golden.trace(ComputeConfig(compile=True)), relative=1e-8)
