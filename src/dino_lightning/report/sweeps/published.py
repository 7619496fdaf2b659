"""The paper's own figures for its ablations: ViT-S/16 on ImageNet (Caron et al., ICCV 2021), in its order."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperResult:
    """A row of one of the paper's tables; top-1 in percent, None where the paper has none."""

    name: str
    knn: float | None = None
    linear: float | None = None

    @property
    def figures(self) -> str:
        """k-NN and linear accuracy, as written in a table."""
        if self.knn is None and self.linear is None:
            return ""
        return " / ".join("–" if value is None else f"{value:.1f}" for value in (self.knn, self.linear))


TABLES: dict[str, dict[str, PaperResult]] = {
    "Tables 7, 14, 15 and the teacher: 300 epochs": {
        "dino": PaperResult("DINO", 72.8, 76.1),
        "no_momentum": PaperResult("no momentum (teacher: the student)", 0.1, 0.1),
        "teacher_previous_step": PaperResult("teacher: the student one step before", 0.1),
        "teacher_previous_epoch": PaperResult("teacher: the student one epoch before", 66.6),
        "sinkhorn": PaperResult("Sinkhorn-Knopp", 72.2, 76.0),
        "softmax_batch": PaperResult("softmax over the batch", None, 75.8),
        "no_multicrop": PaperResult("no multi-crop", 67.9, 72.5),
        "mse": PaperResult("MSE", 52.6, 62.4),
        "predictor": PaperResult("with predictor", 71.8, 75.6),
        "byol": PaperResult("BYOL", 66.6, 71.4),
        "byol_no_predictor": PaperResult("BYOL, no predictor", None, 0.1),
        "byol_multicrop": PaperResult("BYOL, multi-crop", None, 64.8),
        "moco_v2": PaperResult("MoCo v2", 62.0, 71.6),
        "moco_multicrop": PaperResult("MoCo v2, multi-crop", None, 73.4),
        "swav": PaperResult("SwAV", 64.7, 71.8),
    },
    "Figure 7: centering and sharpening": {
        "no_centering": PaperResult("no centering"),
        "no_sharpening": PaperResult("no sharpening"),
    },
    "Prototypes: 100 epochs": {
        "dino method.out_dim=1024": PaperResult("K = 1,024", 67.8),
        "dino method.out_dim=4096": PaperResult("K = 4,096", 69.3),
        "dino method.out_dim=16384": PaperResult("K = 16,384", 69.2),
        "dino method.out_dim=65536": PaperResult("K = 65,536", 69.7),
        "dino method.out_dim=262144": PaperResult("K = 262,144", 69.1),
    },
    "Momentum of the center: 100 epochs": {
        "dino method.center_momentum=0": PaperResult("center's momentum 0", 69.1),
        "dino method.center_momentum=0.9": PaperResult("center's momentum 0.9", 69.7),
        "dino method.center_momentum=0.99": PaperResult("center's momentum 0.99", 69.4),
        "dino method.center_momentum=0.999": PaperResult("center's momentum 0.999", 0.1),
    },
    "Temperature of the teacher: 100 epochs": {
        "dino method.teacher_temperature=0.02": PaperResult("teacher's temperature 0.02", 66.7),
        "dino method.teacher_temperature=0.04": PaperResult("teacher's temperature 0.04", 69.6),
        "dino method.teacher_temperature=0.06": PaperResult("teacher's temperature 0.06", 68.7),
        "dino method.teacher_temperature=0.08": PaperResult("teacher's temperature 0.08", 0.1),
        "teacher_temperature_warmup": PaperResult("teacher's temperature 0.04 to 0.07", 69.7),
    },
    "Table 9, batch without multi-crop: 100 epochs": {
        "no_multicrop data.batch_size_per_device=16": PaperResult("batch 8 × 16", 57.9),
        "no_multicrop data.batch_size_per_device=32": PaperResult("batch 8 × 32", 59.1),
        "no_multicrop data.batch_size_per_device=64": PaperResult("batch 8 × 64", 59.6),
        "no_multicrop data.batch_size_per_device=128": PaperResult("batch 8 × 128", 59.9),
    },
    "Head: 100 epochs": {
        "dino method.head_layers=1": PaperResult("head of 2 layers", 62.2),
        "dino method.head_layers=2": PaperResult("head of 3 layers", 68.0),
        "dino method.head_layers=3": PaperResult("head of 4 layers", 69.3),
        "head_no_l2": PaperResult("head without L2 bottleneck", 0.1),
        "head_batch_norm": PaperResult("head with batch norm", 68.6),
        "head_relu": PaperResult("head with ReLU", 68.9),
    },
}
"""Title -> experiment of `ablation/`, with the value of a key for a point of a grid -> what the paper reports."""

PUBLISHED = {f"ablation/{name}": row for rows in TABLES.values() for name, row in rows.items()}
"""Experiment, or experiment and value of a key -> its row, in the paper's order."""

GRIDS = {
    "prototypes": "method.out_dim",
    "center_momentum": "method.center_momentum",
    "teacher_temperature": "method.teacher_temperature",
    "batch_size": "data.batch_size_per_device",
    "head_layers": "method.head_layers",
}
"""Sweep -> the key that it changes."""


def paper_row(experiment: str, overrides: Mapping[str, str]) -> str:
    """The key in `PUBLISHED` of a run with these overrides; the experiment if the run is no point of a grid.

    The points are those of the sweeps in `GRIDS`, and single runs with `preset=paper100`.
    """
    sweep = overrides.get("sweep", "")
    for key in [GRIDS[sweep]] if sweep in GRIDS else GRIDS.values() if overrides.get("preset") == "paper100" else ():
        point = f"{experiment} {key}={_number(overrides.get(key, ''))}"
        if point in PUBLISHED:
            return point
    return experiment


def _number(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
