"""Collapse signals of healthy and collapsed runs: short trainings on the built-in images.

    python benchmarks/collapse.py --output DIR                 all runs; a quarter of an hour on one core
    python benchmarks/collapse.py --output DIR --only healthy

Each run is `python train.py` with one thread and its own folder below DIR; finished runs are not repeated. Signals are
evaluated as in the alarm (`training/callbacks/collapse_alarm.py`): means over ten consecutive rows of the log, without
the first tenth of the run. This prints the table in docs/collapse.md, from which the thresholds were chosen; its last
column is the first collapse that these thresholds detect.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

from dino_lightning.methods.collapse import diagnose

ROOT = Path(__file__).parents[1]
MEAN_ROWS = 10
SIGNALS = ("mean_output_entropy", "teacher_entropy", "kl_to_uniform", "feature_std")

HEALTHY = {
    "DINO": [],
    "DINO, another seed": ["seed=1"],
    "DINO, Sinkhorn": ["method.centering=sinkhorn"],
    "DINO, teacher copied from the last epoch": ["method.teacher_update=copy_each_epoch"],
    "DINO, mean squared error": ["method.loss=mse"],
    "DINO with predictor": ["method.predictor=true"],
    "SwAV": ["method=swav"],
    "BYOL": ["method=byol"],
    "MoCo v2": ["method=moco"],
    "MoCo v3": ["method=moco", "method.version=3"],
    "supervised": ["method=supervised"],
}
COLLAPSED = {
    "no centering": ["method.centering=none"],
    "center momentum too high": ["method.center_momentum=0.999"],
    "no sharpening": ["method.teacher_temperature=0.1", "method.teacher_temperature_start=0.1"],
    "no momentum": ["method.teacher_update=copy_each_step"],
    "BYOL, no predictor, no norm": ["method=byol", "method.predictor=false", "method.head_batch_norm=false"],
    "SwAV, soft assignments": ["method=swav", "method.sinkhorn_epsilon=0.5"],
}
COMMON = [
    "trainer.max_epochs=4",
    "cpu_threads=1",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.enable_checkpointing=false",
    "callbacks.pictures.enabled=false",
    "callbacks.knn.enabled=false",
]


def main() -> None:
    """Train the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", choices=["healthy", "collapsed"])
    options = parser.parse_args()
    groups = {"healthy": HEALTHY, "collapsed": COLLAPSED}
    print("| run | information, lowest | `feature_std` · √D, lowest | effective rank, last | alarm |")
    print("|---|---|---|---|---|")
    for group in [options.only] if options.only else groups:
        for name, overrides in groups[group].items():
            print(row(name, train(name, overrides, options.output)), flush=True)


def train(name: str, overrides: list[str], output: Path) -> Path:
    """Train unless the run is finished; returns its folder."""
    folder = output / "".join(letter if letter.isalnum() else "_" for letter in name)
    if not (folder / "summary.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), *overrides, *COMMON, f"output_dir={folder}"]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def row(name: str, folder: Path) -> str:
    """The row of a run in the table."""
    width = json.loads((folder / "summary.json").read_text())["feature_dim"]
    signals = {signal: column(folder, signal) for signal in SIGNALS}
    start = signals["feature_std"][0]
    means = {signal: running_means(values) for signal, values in signals.items() if values}
    pairs = zip(means.get("mean_output_entropy", []), means.get("teacher_entropy", []), strict=True)
    information = [mean - entropy for mean, entropy in pairs]
    kinds = [
        diagnose(dict(zip(means, values, strict=True)), width=width, spread_at_start=start)
        for values in zip(*means.values(), strict=True)
    ]
    lowest = f"{min(information):.3f}" if information else "–"
    spread, rank = min(means["feature_std"]) * math.sqrt(width), column(folder, "effective_rank")[-1]
    alarm = next((kind.name for kind in kinds if kind), "–")
    return f"| {name} | {lowest} | {spread:.2f} | {rank:.1f} | {alarm} |"


def column(folder: Path, signal: str) -> list[float]:
    """A column of the log; empty if the method does not log it."""
    with (folder / "metrics.csv").open() as file:
        return [float(line[f"collapse/{signal}"]) for line in csv.DictReader(file) if line.get(f"collapse/{signal}")]


def running_means(values: list[float]) -> list[float]:
    """Means over consecutive rows, as the alarm computes them."""
    counted = values[len(values) // 10 :]
    return [sum(counted[i : i + MEAN_ROWS]) / MEAN_ROWS for i in range(len(counted) - MEAN_ROWS + 1)]


if __name__ == "__main__":
    main()
