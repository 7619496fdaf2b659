"""The report of one run: a single HTML file with results, pictures, curves and configuration that loads nothing else.

It is made from the files in the run's folder, so it can be made again at any time, also before the run ends.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_lightning.report.curves import MAX_POINTS, chart_context, plot_run
from dino_lightning.report.evaluations import EvalResult, evaluation_table, find_results
from dino_lightning.report.gallery import galleries, missing_pictures
from dino_lightning.report.markup import render
from dino_lightning.report.run_folder import Run, read_run, to_finite
from dino_lightning.report.runs import run_status
from dino_lightning.runtime.files import write_atomically

KNN_ROWS = [
    ("knn_top1_pixels", "Raw pixels", "The accuracy from colors and layout alone."),
    ("knn_top1_untrained", "Untrained network", "The same network before its first step."),
    ("knn_top1", "Trained network", "The network at the end of this run."),
]
"""Key in the summary, name and meaning of the three k-NN figures."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `metrics.csv`, `summary.json`, `config.yaml` and `pictures/*.png`.

    Any of these may be missing. Raises `UserError` if the folder does not exist or `summary.json` is no JSON object.
    """
    run = read_run(run_dir)
    (results,) = find_results([run])
    report = run_dir / "report.html"
    write_atomically(report, run_page(run, results))
    return report


def run_page(run: Run, results: Iterable[EvalResult]) -> str:
    """The page, as HTML."""
    values = {key: run.number(key) for key, _, _ in KNN_ROWS}
    knn = [(name, values[key], text, key == "knn_top1") for key, name, text in KNN_ROWS if values[key] is not None]
    k = run.setting("callbacks.knn.headline_k")
    return render(
        "run.html",
        kind="dino-lightning run",
        title=run.title,
        verdict=_verdict(run),
        facts=_facts(run),
        knn=knn,
        neighbors=f"{k} most similar training images" if k else "most similar training images",
        missing_knn=", ".join(name.lower() for key, name, _ in KNN_ROWS if values[key] is None),
        no_knn_reason=_no_knn_reason(run),
        results=evaluation_table([list(results)], [run.name]),
        pictures=galleries([run], [""]),
        missing_pictures=missing_pictures(run),
        collapse=run.summary.get("collapse"),
        config_text=run.config_text,
        folder=run.name,
        max_points=MAX_POINTS,
        **chart_context(plot_run(run), epochs=run.epochs),
    )


def results_table(summary: dict[str, Any]) -> Table:
    """The three k-NN figures of `summary.json`, for the terminal."""
    table = Table("Features", title="k-NN top-1", min_width=36)
    table.add_column("Correct", justify="right")
    for key, name, _ in KNN_ROWS:
        value = to_finite(summary.get(key))
        formatted = "not evaluated" if value is None else f"{value:.1f} %"
        table.add_row(name, formatted, style="bold" if key == "knn_top1" else None)
    return table


def _verdict(run: Run) -> str:
    trained, untrained = run.number("knn_top1"), run.number("knn_top1_untrained")
    if trained is None and not run.sheets and not run.curves:
        return "This run has written nothing to judge it by."
    collapse = run.summary.get("collapse")
    warning = f" A collapse was detected ({collapse}): see its signs below." if collapse else ""
    if trained is None:
        return f"There are no k-NN figures; judge this run by its pictures and curves.{warning}"
    verdict = f"With k-NN, the trained network classifies {trained:.1f} % of the validation images correctly"
    if untrained is None:
        return f"{verdict}.{warning}"
    gain = round(trained, 1) - round(untrained, 1)  # so that it agrees with the rounded figures
    return f"{verdict}: {abs(gain):.1f} points {'more' if gain >= 0 else 'fewer'} than before training.{warning}"


def _facts(run: Run) -> dict[str, str]:
    def count(key: str, unit: str = "") -> str | None:
        value = run.number(key)
        return None if value is None else f"{value:,.10g} {unit}".strip()

    commit, batch = run.summary.get("commit"), run.setting("data.batch_size_per_device")
    builtin = None if run.setting("data.draw_seed") is None else "built in"
    facts = {
        "State": None if run.summary else run_status(run),
        "Network": _network(run),
        "Images": run.setting("data.path") or run.setting("data.name") or builtin,
        "Length": ", ".join(part for part in (count("epochs", "epochs"), count("steps", "steps")) if part),
        "Batch": batch and f"{batch} images per device",
        "Prototypes": run.setting("method.out_dim"),
        "Speed": count("images_per_second", "images/s"),
        "Seed": run.summary.get("seed", run.setting("seed")),
        "Commit": commit and str(commit)[:10] + (" and changes" if str(commit).endswith("+") else ""),
        "Unreadable images": f"{run.number('bad_images'):,.0f} (bad_images.txt)" if run.number("bad_images") else None,
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _network(run: Run) -> str | None:
    depth, width, patch = (run.setting(f"backbone.{key}") for key in ("depth", "width", "patch_size"))
    return run.setting("backbone.name") or (depth and f"ViT: {depth} blocks, width {width}, patch {patch}")


def _no_knn_reason(run: Run) -> str:
    if run.setting("callbacks.knn.enabled") is False:
        return "There are no k-NN figures: callbacks.knn.enabled is false."
    return "There are no k-NN figures: the images have no labels, or the run has not ended."
