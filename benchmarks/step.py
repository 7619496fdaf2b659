"""The training step beside the original's: the same crops in the same precision, in turns, on the same machine.

    python benchmarks/step.py --original DIR                               ViT-Ti/16 on a CPU, ViT-S/16 on a GPU
    python benchmarks/step.py --original DIR --precision bf16 --batch 128 --set compute.compile=true
    python benchmarks/step.py --original DIR --data IMAGES                 the whole run as well: loader and step
    python benchmarks/step.py --original DIR --sweep --record              how cost grows; into results.jsonl
    python benchmarks/step.py --json                                       ours alone

DIR is a checkout of facebookresearch/dino. What runs there is its own `train_one_epoch` with its own networks, loss,
AdamW, schedules and DDP around the student; beside it our LightningModule under the trainer that `train.py` builds,
without progress bar, k-NN, pictures and checkpoints. Each is a process of its own and stands still while the other one
trains. They take turns in pairs, the second pair the other way around, so that what drifts in the machine meets both.

A ratio is ours / original. Memory is the peak, from the first step on: on a GPU what PyTorch allocated, on a CPU the
whole process (`memory_ratio`) and beside it what the steps added to it. Utilisation is the model's operations
(`flops.py`) over those of a large matrix product in the same precision. Times are told for GPUs only; on a CPU the
speed of the original is 1.
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
from step_report import Row, figures, growth, label, show
from step_turns import FailedError, Measured, measure
from step_windows import Setting

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
"""Rows of `--sweep`: what differs from the first one, which itself differs from the command line."""


def main(words: list[str] | None = None) -> Row:
    """Measure, print, record; returns what `--json` prints."""
    words = sys.argv[1:] if words is None else words
    options = parse(words)
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
        rows.append(row | described(setting, words) | {"pairs": options.pairs, "steps": options.steps})
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
    """The step and, with `--data`, the whole run."""
    checkout = str(options.original) if options.original else None
    counts = {"pairs": options.pairs, "steps": options.steps, "warmup": options.warmup}
    measured = measure(setting, checkout, **counts)
    row = figures(measured, setting)
    if options.data:
        row |= whole_run(setting, options, checkout, counts)
    return row, measured


def parse(words: list[str]) -> argparse.Namespace:
    """The command line, with the defaults that depend on the machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--original", type=Path, help="checkout of facebookresearch/dino; without it, ours alone")
    add_setting(parser)
    add("--pairs", type=int, default=5, help="turns of each side")
    add("--steps", type=int, help="steps of a turn; 2 on a CPU, 20 on a GPU")
    add("--warmup", type=int, help="steps before the first turn; 2 on a CPU, 10 on a GPU")
    lists = ", ".join(SWEEPS)
    add("--sweep", nargs="?", const="", choices=["", *SWEEPS], metavar="LIST", help=f"how cost grows: {lists}")
    add("--data", type=Path, help="folder of class folders: the whole run as well, with loaders")
    add("--workers", type=int, help="loader processes of each side; half the cores on a CPU, all but one beside a GPU")
    add("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = with_defaults(parser.parse_args(words))
    if options.sweep is not None and options.data:
        parser.error("--sweep measures the step alone: leave out --data")
    if options.data and not options.data.is_dir():
        parser.error(f"--data={options.data} is not a folder")
    if options.sweep == "":
        options.sweep = "gpu" if options.device == "cuda" else "cpu"
    return options


def add_setting(parser: argparse.ArgumentParser) -> None:
    """The options that both this and `breakdown.py` have."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, help="vit_tiny on a CPU, vit_small on a GPU")
    add("--patch", type=int, default=16, choices=[8, 16], help="side of a patch (pixels), of ViTs")
    add("--batch", type=int, help="images per step; 16 on a CPU, 64 on a GPU")
    add("--prototypes", type=int, default=65536, help="K")
    add("--locals", type=int, default=8, help="local crops per image")
    add("--precision", choices=["32", "tf32", "bf16"], default="32")
    add("--device", choices=["cpu", "cuda"], default=there)
    add("--threads", type=int, help="of PyTorch; all cores")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours (repeatable)")
    add("--json", action="store_true", help="print one JSON object as the last line")


def with_defaults(options: argparse.Namespace, *, steps: tuple[int, int] = (2, 20)) -> argparse.Namespace:
    """Numbers that fit the device where none were given; `steps` on a CPU and on a GPU."""
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
    """That of the command line, or the rows of a sweep."""
    setting = setting_of(options)
    if not options.sweep:
        yield setting
        return
    base, *others = SWEEPS[options.sweep]
    setting = dataclasses.replace(setting, **base)
    yield setting
    for change in others:
        yield dataclasses.replace(setting, **change)


# -------------------------------------------------------------------------------------------------------- whole run


def whole_run(setting: Setting, options: argparse.Namespace, checkout: str | None, counts: dict[str, int]) -> Row:
    """Loader and step together, on images of the folder."""
    batches = counts["warmup"] + counts["pairs"] * counts["steps"] + 4 * options.workers + 4
    with enlarged(options.data, images=batches * setting.batch) as folder:
        threads = options.threads or cores()  # as `run` sets them with crops of this size
        setting = dataclasses.replace(setting, data=str(folder), workers=options.workers, threads=threads)
        row = figures(measure(setting, checkout, **counts), setting)
    kept = {f"whole{name.removeprefix('time')}": row[name] for name in row if name.startswith("time_ratio")}
    kept |= {f"whole_{name}": row[name] for name in ("images_per_second", "out_of_memory", "ratios") if name in row}
    return kept | {"whole_threads": threads, "workers": options.workers}


@contextmanager
def enlarged(images_folder: Path, *, images: int) -> Iterator[Path]:
    """A folder of links to the images, over and over until there are enough for one epoch."""
    classes = sorted(path for path in images_folder.iterdir() if path.is_dir())
    found = [(f, c.name) for c in classes for f in sorted(c.rglob("*")) if f.suffix.lower() in IMAGE_ENDINGS]
    if not found:
        sys.exit(f"{images_folder} has no class folders with images")
    with tempfile.TemporaryDirectory() as name:
        for number in range(images):
            file, label_ = found[number % len(found)]
            link = Path(name) / label_ / f"{number:07}{file.suffix}"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        yield Path(name)


# ----------------------------------------------------------------------------------------------------------- record


def described(setting: Setting, words: list[str], *, program: str = "step") -> Row:
    """What a row was measured with."""
    machine = environment()
    config = dataclasses.asdict(setting)
    for name in ("data", "workers", "most_steps", "device"):
        config.pop(name)
    device = machine["gpu"] if setting.device == "cuda" else f"{setting.threads} threads of {processor()}"
    return {
        "config": config,
        "device": device,
        "torch": machine["torch"],
        "commit": machine["commit"],
        "environment": machine,
        "command": " ".join([f"python benchmarks/{program}.py", *without_paths(words)]),
    }


def without_paths(words: list[str]) -> list[str]:
    """The command line as others would type it."""
    shown = list(words)
    for place, word in enumerate(words):
        option = word.split("=")[0]
        if option in ("--original", "--data"):
            name = "DIR" if option == "--original" else "IMAGES"
            if "=" in word:
                shown[place] = f"{option}={name}"
            else:
                shown[place + 1] = name
    return shown


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
