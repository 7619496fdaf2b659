"""The golden trace: 20 steps of DINO in float64 from fixed numbers.

Running this file (`python tests/reference/golden_trace.py`) rewrites the stored numbers.

Weights and images come from numpy's PCG64, whose streams are fixed, so the trace does not depend on torch's version.
Rewrite it only for a change that is meant to change results, and say so under "Numerics" in CHANGELOG.md.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import tiny
import torch

from dino_lightning.config import AdamWConfig, ComputeConfig
from dino_lightning.optim.ema import follow

FILE = Path(__file__).with_suffix(".json")
PER_EPOCH, EPOCHS = 10, 2


def trace(compute: ComputeConfig | None = None, *, precision: str = "64-true") -> dict[str, list[float]]:
    """Loss of each step, norms of center and teacher after it."""
    numbers = np.random.default_rng(0)
    module = tiny.dino(
        compute=compute,
        optim=AdamWConfig(lr=0.032, lr_warmup="5it", clip_grad=0.1),
        norm_last_layer=False,
        freeze_last_layer="1ep",
        teacher_temperature_start=0.04,
        teacher_temperature=0.07,
        teacher_temperature_warmup="2ep",
        teacher_momentum=0.95,
    )
    with torch.no_grad():
        for parameter in module.student.parameters():
            parameter.copy_(torch.from_numpy(numbers.standard_normal(parameter.shape) * 0.2))
    follow(module.teacher, module.student)
    shapes = [(8, 3, side, side) for side in (32, 32, 16, 16)]
    batches = [[torch.from_numpy(numbers.standard_normal(shape)) for shape in shapes] for _ in range(PER_EPOCH)]
    if precision != "64-true":
        batches = [[crop.float() for crop in crops] for crops in batches]
    record = tiny.fit(module, batches, max_epochs=EPOCHS, precision=precision)
    return {
        "loss": record.losses,
        "center_norm": [center.norm().item() for center in record.centers],
        "teacher_norm": [
            torch.cat([weight.flatten() for weight in weights.values()]).norm().item() for weights in record.teachers
        ],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({"made_with": f"torch {torch.__version__}, CPU", **trace()}, indent=1) + "\n")
