"""The original's networks and ours from one file of weights; needs checkouts of the original's repositories."""

import os
from pathlib import Path

import pytest
from original_networks import NETWORKS, SIZES, XCITS, compared
from slow_params import first

CHECKOUTS = {"DINO_ORIGINAL": "facebookresearch/dino", "XCIT_ORIGINAL": "facebookresearch/xcit"}
CASES = [("vits16", "96"), *((name, size) for name in NETWORKS for size in SIZES if (name, size) != ("vits16", "96"))]


@pytest.mark.parametrize(("name", "size"), first(CASES))
def test_features_are_the_original_s(name: str, size: str, tmp_path: Path) -> None:
    """Up to the order of summation in float32, relative to the largest feature."""
    variable = "XCIT_ORIGINAL" if name in XCITS else "DINO_ORIGINAL"
    checkout = os.environ.get(variable)
    if checkout is None:
        pytest.skip(f"set {variable} to a checkout of {CHECKOUTS[variable]}")
    ((_, apart, largest),) = compared(name, Path(checkout), tmp_path, sizes=[size])
    assert largest > 0.1
    assert apart <= 1e-5 * max(1, largest)
