"""The original's networks and ours with the same weights; needs checkouts of the original repositories."""

import os
from pathlib import Path

import pytest
from original_networks import NETWORKS, SIZES, XCITS, compared
from slow_params import first

CHECKOUTS = {"DINO_ORIGINAL": "facebookresearch/dino", "XCIT_ORIGINAL": "facebookresearch/xcit"}
CASES = [("vits16", "96"), *((name, size) for name in NETWORKS for size in SIZES if (name, size) != ("vits16", "96"))]


@pytest.mark.parametrize(("name", "size"), first(CASES))
def test_features_equal_the_original(name: str, size: str, tmp_path: Path) -> None:
    """Differences come only from the order of summation in float32; the limit is relative to the largest feature."""
    variable = "XCIT_ORIGINAL" if name in XCITS else "DINO_ORIGINAL"
    checkout = os.environ.get(variable)
    if checkout is None:
        pytest.skip(f"set {variable} to a checkout of {CHECKOUTS[variable]}")
    ((_, difference, largest),) = compared(name, Path(checkout), tmp_path, sizes=[size])
    assert largest > 0.1
    assert difference <= 1e-5 * max(1, largest)
