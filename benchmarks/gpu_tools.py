"""Small commands of `gpu_suite.sh`, and a pytest plugin that keeps only the tests that need a GPU.

python benchmarks/gpu_tools.py figures FILE.json            the results of a benchmark in one line
python benchmarks/gpu_tools.py jpegs FOLDER --count N       JPEG files made from the built-in images
python benchmarks/gpu_tools.py augmentation FOLDER          `data_gpu.py` with these files; without a GPU, `data.py`
python -m pytest -p gpu_tools                               with benchmarks/ on PYTHONPATH
"""

import argparse
import json
from pathlib import Path
from typing import Any

PRINTED = (
    "time_ratio",
    "memory_ratio",
    "complete_run_ratio",
    "images_per_second",
    "utilization",
    "memory_mb",
    "share",
    "failed",
)


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("figures").add_argument("path", type=Path)
    jpegs = commands.add_parser("jpegs")
    jpegs.add_argument("path", type=Path)
    jpegs.add_argument("--count", type=int, default=128)
    commands.add_parser("augmentation").add_argument("path", type=Path)
    options = parser.parse_args()
    match options.command:
        case "figures":
            row = json.loads(options.path.read_text())
            print(" ".join(f"{name}={short(row[name])}" for name in PRINTED if name in row))
        case "jpegs":
            from data import make_jpegs

            options.path.mkdir(parents=True)
            make_jpegs(options.path, None, count=options.count)
        case "augmentation":
            print(json.dumps(augmentation(sorted(options.path.glob("*.jpg")))))


def short(value: Any) -> str:
    """A result as short text."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{short(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def augmentation(files: list[Path]) -> dict[str, Any]:
    """Milliseconds per batch on a GPU; on a CPU the results of one short round."""
    import torch

    if torch.cuda.is_available():
        from data_gpu import measure_gpu

        return measure_gpu(files)
    from data import per_core

    return per_core(files, batch=2, rounds=1)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Select the tests that are skipped on machines without a GPU."""
    selected, others = [], []
    for item in items:
        reasons = [str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif")]
        (selected if any("GPU" in reason or "CUDA" in reason for reason in reasons) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = selected


if __name__ == "__main__":
    main()
