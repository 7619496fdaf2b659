"""Compares speed and memory of a training step with the original's, for the same crops, precision and machine.

    python benchmarks/step.py --original DIR                               ViT-Ti/16 on a CPU, ViT-S/16 on a GPU
    python benchmarks/step.py --original DIR --precision bf16 --batch 128 --set compute.compile=true
    python benchmarks/step.py --original DIR --data IMAGES                 also the complete run: loader and step
    python benchmarks/step.py --original DIR --sweep --record              how the cost grows; append to results.jsonl
    python benchmarks/step.py --json                                       without the original

DIR is a checkout of facebookresearch/dino. One side runs the original's `train_one_epoch` with its own networks, loss,
AdamW, schedules and DDP around the student. The other side runs our LightningModule with the trainer that `train.py`
builds, without progress bar, k-NN, pictures and checkpoints. Each side has its own process, which waits while the other
side trains. They alternate in pairs whose order is reversed every time, so that drifts of the machine affect both.

Ratios are ours / original. Memory is the peak since the first step: on a GPU the memory allocated by PyTorch, on a CPU
that of the process (`memory_ratio`) and the part that the steps added. Utilization is the rate of the model's
operations (`flops.py`) divided by the rate of a large matrix product in the same precision. Times are reported for GPUs
only; on a CPU the speed of the original is 1.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from step_batches import Setting
from step_report import Row, figures, growth, label, show
from step_turns import FailedError, Measured, measure

from dino_lightning.runtime.provenance import environment

RESULTS = Path(__file__).parent / "results.jsonl"
BACKBONES = ("vit_tiny", "vit_small", "vit_base", "vit_large", "resnet50")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "cpu": [
        {"backbone": "vit_tiny", "batch": 8},
        {"batch": 4},
        {"batch": 16},
        {"prototypes": 4096},
        {"prototypes": 16384},
        {"local_crops": 2},
        {"local_crops": 4},
        {"patch": 8, "batch": 2},
        {"backbone": "vit_small", "batch": 4},
        {"backbone": "vit_base", "batch": 2},
        {"backbone": "resnet50", "batch": 4},
    ],
    "gpu": [
        {"backbone": "vit_small", "batch": 64},
        {"batch": 32},
        {"batch": 128},
        {"batch": 256},
        {"prototypes": 8192},
        {"prototypes": 131072},
        {"local_crops": 0},
        {"local_crops": 4},
        {"local_crops": 12},
        {"patch": 8, "batch": 32},
        {"backbone": "vit_base"},
        {"backbone": "vit_base", "patch": 8, "batch": 16},
        {"backbone": "resnet50"},
    ],
    "short": [
        {"backbone": "vit_small", "batch": 64},
        {"batch": 256},
        {"prototypes": 8192},
        {"backbone": "resnet50"},
    ],
    "quick": [
        {"backbone": "vit_tiny", "batch": 2, "prototypes": 256, "local_crops": 1},
        {"backbone": "resnet50", "batch": 1},
    ],
}
"""Rows of `--sweep`: changes of the first row, which itself changes the settings of the command line."""


def main(arguments: list[str] | None = None) -> Row:
    """Measure, print and record; returns the object that `--json` prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    rows: list[Row] = []
    first: tuple[Measured, Setting] | None = None
    for setting in settings(options):
        print(label(dataclasses.asdict(setting)), file=sys.stderr, flush=True)
        try:
            row, measured = measure_row(setting, options)
        except FailedError as error:
            print(error, file=sys.stderr)
            row, measured = Row(failed=str(error).strip().splitlines()[-1]), None
        if options.sweep and measured:
            first = first or (measured, setting)
            row["growth"] = growth(measured, setting, *first)
        rows.append(row | described(setting, arguments) | {"pairs": options.pairs, "steps": options.steps})
        if options.record and measured:
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    show(rows)
    result = rows[0] if len(rows) == 1 else {**rows[0], "rows": rows}
    if options.json:
        print(json.dumps(result))
    if any("failed" in row for row in rows):
        sys.exit(1)
    return result


def measure_row(setting: Setting, options: argparse.Namespace) -> tuple[Row, Measured]:
    """Measure the step and, with `--data`, the complete run."""
    checkout = str(options.original) if options.original else None
    counts = {"pairs": options.pairs, "steps": options.steps, "warmup": options.warmup}
    measured = measure(setting, checkout, **counts)
    row = figures(measured, setting)
    if options.data:
        row |= complete_run(setting, options, checkout, counts)
    return row, measured


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, with defaults that depend on the machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--original", type=Path, help="checkout of facebookresearch/dino; default: only ours")
    add_setting(parser)
    add("--pairs", type=int, default=5, help="number of turns of each side")
    add("--steps", type=int, help="steps in a turn; default: 2 on a CPU, 20 on a GPU")
    add("--warmup", type=int, help="steps before the first turn; default: 2 on a CPU, 10 on a GPU")
    sweeps = ", ".join(SWEEPS)
    add("--sweep", nargs="?", const="", choices=["", *SWEEPS], metavar="LIST", help=f"how the cost grows: {sweeps}")
    add("--data", type=Path, help="folder of class folders: also measure the complete run, with loaders")
    add("--workers", type=int, help="loader processes of each side; default: half the cores, with a GPU all but one")
    add("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = with_defaults(parser.parse_args(arguments))
    if options.sweep is not None and options.data:
        parser.error("--sweep measures only the step: remove --data")
    if options.data and not options.data.is_dir():
        parser.error(f"--data={options.data} is not a folder")
    if options.sweep == "":
        options.sweep = "gpu" if options.device == "cuda" else "cpu"
    return options


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the options that `step.py`, `breakdown.py` and `kernels.py` share."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, help="default: vit_tiny on a CPU, vit_small on a GPU")
    add("--patch", type=int, default=16, choices=[8, 16], help="side of a patch in pixels, for ViTs")
    add("--batch", type=int, help="images per step; default: 16 on a CPU, 64 on a GPU")
    add("--prototypes", type=int, default=65536, help="number of prototypes")
    add("--locals", type=int, default=8, help="local crops per image")
    add("--precision", choices=["32", "tf32", "bf16"], default="32")
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--threads", type=int, help="threads of PyTorch; default: all cores")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of our side (repeatable)")
    add("--json", action="store_true", help="print one JSON object as the last line")


def with_defaults(options: argparse.Namespace, *, steps: tuple[int, int] = (2, 20)) -> argparse.Namespace:
    """Set missing options to defaults for the device; `steps`: the defaults on a CPU and on a GPU."""
    on_cpu = {"backbone": "vit_tiny", "batch": 16, "steps": steps[0], "warmup": 2, "workers": max(1, cores() // 2)}
    on_gpu = {"backbone": "vit_small", "batch": 64, "steps": steps[1], "warmup": 10, "workers": max(1, cores() - 1)}
    for name, value in (on_gpu if options.device == "cuda" else on_cpu).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting of the command line."""
    return Setting(
        backbone=options.backbone,
        patch=options.patch,
        batch=options.batch,
        prototypes=options.prototypes,
        local_crops=options.locals,
        precision=options.precision,
        device=options.device,
        threads=options.threads or cores(),
        overrides=tuple(options.set),
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """The setting of the command line, or the rows of a sweep."""
    setting = setting_of(options)
    if not options.sweep:
        yield setting
        return
    base, *others = SWEEPS[options.sweep]
    setting = dataclasses.replace(setting, **base)
    yield setting
    for change in others:
        yield dataclasses.replace(setting, **change)


# ----------------------------------------------------------------------------------------------------- complete run


def complete_run(setting: Setting, options: argparse.Namespace, checkout: str | None, counts: dict[str, int]) -> Row:
    """Measure loader and step together, on the images of `--data`."""
    batches = counts["warmup"] + counts["pairs"] * counts["steps"] + 4 * options.workers + 4
    with enlarged(options.data, images=batches * setting.batch) as folder:
        threads = options.threads or cores()  # as `train` does for crops of this size
        setting = dataclasses.replace(setting, data=str(folder), workers=options.workers, threads=threads)
        row = figures(measure(setting, checkout, **counts), setting)
    result = {f"complete_run{name.removeprefix('time')}": row[name] for name in row if name.startswith("time_ratio")}
    copied = ("images_per_second", "out_of_memory", "ratios")
    result |= {f"complete_run_{name}": row[name] for name in copied if name in row}
    return result | {"complete_run_threads": threads, "workers": options.workers}


@contextmanager
def enlarged(images_folder: Path, *, images: int) -> Iterator[Path]:
    """A folder of links to the images, repeated until there are enough for one epoch."""
    classes = sorted(path for path in images_folder.iterdir() if path.is_dir())
    files = [(f, c.name) for c in classes for f in sorted(c.rglob("*")) if f.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        sys.exit(f"{images_folder} has no class folders with images")
    with tempfile.TemporaryDirectory() as name:
        for number in range(images):
            file, class_name = files[number % len(files)]
            link = Path(name) / class_name / f"{number:07}{file.suffix}"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        yield Path(name)


# ----------------------------------------------------------------------------------------------------------- record


def described(setting: Setting, arguments: list[str], *, program: str = "step") -> Row:
    """How a row was measured: settings, machine, versions, command."""
    machine = environment()
    config = dataclasses.asdict(setting)
    for name in ("data", "workers", "max_steps", "device"):
        config.pop(name)
    device = machine["gpu"] if setting.device == "cuda" else f"{setting.threads} threads of {processor()}"
    return {
        "config": config,
        "device": device,
        "torch": machine["torch"],
        "commit": machine["commit"],
        "environment": machine,
        "command": " ".join([f"python benchmarks/{program}.py", *without_paths(arguments)]),
    }


def without_paths(arguments: list[str]) -> list[str]:
    """The command line with placeholders for paths of this machine."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        option = argument.split("=")[0]
        if option in ("--original", "--data"):
            name = "DIR" if option == "--original" else "IMAGES"
            if "=" in argument:
                result[i] = f"{option}={name}"
            else:
                result[i + 1] = name
    return result


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
