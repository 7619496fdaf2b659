"""The results and the table of `step.py`."""

import statistics
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from step_batches import Setting
from step_sides import SIDES
from step_turns import Measured

Row = dict[str, Any]


def figures(measured: Measured, setting: Setting) -> Row:
    """The results of a measurement."""
    row: Row = {"gflop_per_image": round(measured.flops / 1e9, 2) or None}
    if measured.no_memory:
        row["out_of_memory"] = measured.no_memory
    if measured.apart:
        row["apart"] = True
    row["memory_mb"] = {
        name: {kind: round(size, 1) for kind, size in kinds.items()} for name, kinds in measured.memory.items()
    }
    rates = {name: setting.batch / statistics.median(times) for name, times in measured.seconds.items() if times}
    if measured.flops and measured.matrix_rate:
        row["utilization"] = {n: round(rate * measured.flops / measured.matrix_rate, 4) for n, rate in rates.items()}
    if setting.device == "cuda":
        row["images_per_second"] = {name: round(rate, 1) for name, rate in rates.items()}
        row["matrix_tflops"] = round(measured.matrix_rate / 1e12, 1)
    return row | compared(measured)


def compared(measured: Measured) -> Row:
    """Ratios ours / original, if both sides ran."""
    ours, original = (measured.seconds.get(name, []) for name in SIDES)
    if not ours or not original:
        return {}
    ratios = [a / b for a, b in zip(ours, original, strict=True)]
    row = {"time_ratio": statistics.median(ratios), "time_ratio_min": min(ratios), "time_ratio_max": max(ratios)}
    memory = [measured.memory[name] for name in SIDES]
    kind = "allocated" if "allocated" in memory[0] else "resident"
    row["memory_ratio"] = memory[0][kind] / memory[1][kind]
    if "over_start" in memory[0]:
        row["memory_over_start_ratio"] = memory[0]["over_start"] / max(memory[1]["over_start"], 1e-9)
    return {name: round(value, 4) for name, value in row.items()} | {"ratios": [round(ratio, 4) for ratio in ratios]}


def growth(measured: Measured, setting: Setting, first: Measured, first_setting: Setting) -> dict[str, float]:
    """Time per image of each side, relative to the first setting."""
    costs = [
        {name: statistics.median(times) / each_setting.batch for name, times in each.seconds.items() if times}
        for each, each_setting in ((measured, setting), (first, first_setting))
    ]
    return {name: round(cost / costs[1][name], 3) for name, cost in costs[0].items() if name in costs[1]}


def show(rows: list[Row]) -> None:
    """Print the table."""
    speed = "images / s" if any("images_per_second" in row for row in rows) else "speed (original = 1)"
    columns = ["peak MB", "added by steps, MB", "of matrix rate", "time / image", "time ratio", "memory ratio"]
    table = Table("Setting", "Side", speed, *columns)
    for row in rows:
        if "failed" in row:
            table.add_row(label(row["config"]), "failed")
            continue
        for name in SIDES:
            cells = side_cells(row, name)
            if cells:
                ratios = ratio_cells(row) if name == "ours" else ["", ""]
                table.add_row(label(row["config"]) if name == "ours" else "", name, *cells, *ratios)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def side_cells(row: Row, name: str) -> list[str]:
    """Speed, memory and utilization of one side."""
    if name in row.get("out_of_memory", []):
        return ["out of memory", "", "", "", ""]
    if name not in row["memory_mb"]:
        return []
    memory = row["memory_mb"][name]
    speed = ""
    if "images_per_second" in row:
        speed = str(row["images_per_second"][name])
    elif "time_ratio" in row:
        speed = f"{1 / row['time_ratio']:.2f}" if name == "ours" else "1"
    share, grown = row.get("utilization", {}).get(name), row.get("growth", {}).get(name)
    return [
        speed,
        f"{memory.get('allocated', memory.get('resident')):.0f}",
        f"{memory['over_start']:.0f}" if "over_start" in memory else "",
        "" if share is None else f"{100 * share:.1f} %",
        "" if grown is None else f"x {grown}",
    ]


def ratio_cells(row: Row) -> list[str]:
    """The two ratios, ours / original."""
    if "time_ratio" not in row:
        return ["", ""]
    spread = f"{row['time_ratio']:.3f} ({row['time_ratio_min']:.3f} to {row['time_ratio_max']:.3f}, n={row['pairs']})"
    memory = f"{row['memory_ratio']:.3f}"
    if "memory_over_start_ratio" in row:
        memory += f" (added: {row['memory_over_start_ratio']:.3f})"
    return [spread, memory]


def label(config: Row) -> str:
    """A short name of a setting."""
    patch = "" if config["backbone"] == "resnet50" else f"/{config['patch']}"
    name = f"{config['backbone']}{patch} B={config['batch']} K={config['prototypes']} 2+{config['local_crops']} crops"
    return " ".join([name, config["precision"], *config["overrides"]])
