"""Where healthy and collapsed runs lie: short trainings on the built-in images, and the lowest of their signals.

    python benchmarks/collapse.py --output DIR                 all of them; a quarter of an hour of one core
    python benchmarks/collapse.py --output DIR --only healthy

Every run is `python train.py` with one thread, in a folder of its own below DIR; one that is there already is not
repeated. Signals are judged as the alarm does it (`callbacks/collapse.py`): means of ten rows of the log in a row, the
first tenth of the run left out. The table is the one in docs/collapse.md, from which the thresholds come; its last
column has what those thresholds make of the first rows that show a collapse.
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
ROWS = 10
SIGNALS = ("mean_output_entropy", "teacher_entropy", "kl_to_uniform", "feature_std")

HEALTHY = {
    "DINO": [],
    "DINO, another seed": ["seed=1"],
    "DINO, Sinkhorn": ["method.centering=sinkhorn"],
    "DINO, teacher of the last epoch": ["method.teacher_update=copy_each_epoch"],
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
    "center too slow": ["method.center_momentum=0.999"],
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
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", choices=["healthy", "collapsed"])
    options = parser.parse_args()
    groups = {"healthy": HEALTHY, "collapsed": COLLAPSED}
    print("| run | information, lowest | spread · √D, lowest | effective rank, last | alarm |\n|---|---|---|---|---|")
    for group in [options.only] if options.only else groups:
        for name, words in groups[group].items():
            print(row(name, run(name, words, options.output)), flush=True)


def run(name: str, words: list[str], output: Path) -> Path:
    """The folder of this run, made if it is not there."""
    folder = output / "".join(letter if letter.isalnum() else "_" for letter in name)
    if not (folder / "summary.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), *words, *COMMON, f"output_dir={folder}"]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def row(name: str, folder: Path) -> str:
    """Its line of the table."""
    width = json.loads((folder / "summary.json").read_text())["feature_dim"]
    signals = {signal: column(folder, signal) for signal in SIGNALS}
    start = signals["feature_std"][0]
    means = {signal: judged(values) for signal, values in signals.items() if values}
    pairs = zip(means.get("mean_output_entropy", []), means.get("teacher_entropy", []), strict=True)
    information = [mean - entropy for mean, entropy in pairs]
    kinds = [
        diagnose(dict(zip(means, values, strict=True)), width=width, spread_at_start=start)
        for values in zip(*means.values(), strict=True)
    ]
    lowest = f"{min(information):.3f}" if information else "–"
    spread, rank = min(means["feature_std"]) * math.sqrt(width), column(folder, "effective_rank")[-1]
    named = next((kind.name for kind in kinds if kind), "–")
    return f"| {name} | {lowest} | {spread:.2f} | {rank:.1f} | {named} |"


def column(folder: Path, signal: str) -> list[float]:
    """A column of the log; empty where the method has none."""
    with (folder / "metrics.csv").open() as file:
        return [float(line[f"collapse/{signal}"]) for line in csv.DictReader(file) if line.get(f"collapse/{signal}")]


def judged(values: list[float]) -> list[float]:
    """Means of rows in a row, as the alarm sees them."""
    counted = values[len(values) // 10 :]
    return [sum(counted[i : i + ROWS]) / ROWS for i in range(len(counted) - ROWS + 1)]


if __name__ == "__main__":
    main()
