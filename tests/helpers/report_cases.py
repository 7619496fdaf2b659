"""A run folder with invented figures, and a parser of report pages."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

SUMMARY = {
    "knn_top1": 76.66666412353516,
    "knn_top5": 92.25,
    "knn_top1_untrained": 53.91666793823242,
    "knn_top1_pixels": 27.66666603088379,
    "images_per_second": 1312.4,
    "steps": 1395,
    "epochs": 15,
    "commit": "3f2a9c1e8b7d6540a1b2c3d4e5f60718293a4b5c+",
    "seed": 0,
    "experiment": "quick",
    "feature_dim": 64,
    "bad_images": 0,
}
CONFIG: dict[str, Any] = {
    "backbone": {"width": 64, "depth": 2, "heads": 2, "patch_size": 8},
    "method": {"out_dim": 256},
    "data": {"batch_size_per_device": 64, "draw_seed": 0},
    "callbacks": {"knn": {"enabled": True, "headline_k": 20}, "pictures": {"enabled": True}},
}
VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """A parsed page: tags with their attributes, text outside scripts and styles. Checks that all tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.css = "", [], ""
        self.open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" in self.open:
            self.css += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[1])

    def curves(self) -> dict[str, list[list[float]]]:
        return {series["name"]: series["points"] for chart in self.data["charts"] for series in chart["series"]}

    def references(self) -> dict[str, float]:
        return {line["label"]: line["value"] for chart in self.data["charts"] for line in chart["references"]}


def rows() -> list[dict[str, Any]]:
    """Sparse rows as Lightning writes them: some per step, some per epoch."""
    rows: list[dict[str, Any]] = []
    for step in range(9, 400, 10):
        rows.append(
            {
                "epoch": step // 100,
                "step": step,
                "train/loss": 5.5 - step / 200,
                "schedule/lr": 0.002 * (1 - step / 400),
                "collapse/teacher_entropy": 5.4 - step / 300,
                "collapse/mean_output_entropy": 5.5 - step / 600,
                "collapse/kl_to_uniform": 0.05 + step / 600,
                "collapse/teacher_student_kl": 0.01 + step / 400,
                "collapse/feature_std": 0.06 + step / 10000,
                "collapse/alarm": float(step > 300),
            }
        )
        if step % 100 == 99:
            knn = {"knn/top1": 50 + step / 20, "knn/top5": 70 + step / 20}
            by_k = {"knn/top1_k10": 49 + step / 20, "knn/top1_k20": 50 + step / 20, "knn/top5_k10": 1.0}
            rows.append({"epoch": step // 100, "step": step, "train/loss_epoch": 5.6 - step / 200, **knn, **by_k})
            rows[-1] |= {"collapse/effective_rank": 9 - step / 100, "collapse/dead_prototypes": step / 1000}
    return rows


def write_metrics(run: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(run: Path, *names: str) -> None:
    (run / "pictures").mkdir(exist_ok=True)
    for number, name in enumerate(names):
        # Uniform grays, which WebP stores exactly.
        Image.new("RGB", (24, 16), (20 + 40 * (number % 6),) * 3).save(run / "pictures" / f"{name}.png")
