"""Today's numbers are the stored ones (see golden_trace.py)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import golden_trace as golden


def test_trace() -> None:
    stored = json.loads(golden.FILE.read_text())
    now = golden.trace()
    for name, values in now.items():
        assert len(values) == 20
        # Float64: libraries may order sums differently, which 20 steps of Adam magnify from 1e-16 to below 1e-9.
        assert values == pytest.approx(stored[name], rel=1e-8), name
