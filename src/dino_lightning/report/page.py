"""The page of one run: figures, evaluations, pictures, curves and configuration, in a file that loads nothing.

It is made from what lies in the run's folder, so it can be made again at any time, also before the run's end.
Whatever comes from a file is escaped.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_lightning.report.curves import MAX_POINTS, curves_html, curves_json, plot_run
from dino_lightning.report.evaluations import EvalResult, find_results, results_html
from dino_lightning.report.gallery import gallery
from dino_lightning.report.markup import bar, note, page, section
from dino_lightning.report.run_folder import Run, read_run, to_finite
from dino_lightning.report.runs import run_status
from dino_lightning.runtime.files import write_atomically

KNN_ROWS = [
    ("knn_top1_pixels", "Raw pixels", "What colors and layout alone give away."),
    ("knn_top1_untrained", "Untrained network", "The same network before its first step."),
    ("knn_top1", "Trained network", "The network that this run leaves behind."),
]
"""Key of the summary, name and meaning of the three k-NN figures."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `metrics.csv`, `summary.json`, `config.yaml` and `pictures/*.png`.

    Each of them may be missing. Raises `UserError` where there is no such folder or `summary.json` is no JSON object.
    """
    run = read_run(run_dir)
    (results,) = find_results([run])
    report = run_dir / "report.html"
    write_atomically(report, run_page(run, results))
    return report


def run_page(run: Run, results: Iterable[EvalResult]) -> str:
    """The page, as HTML."""
    charts = plot_run(run)
    collapse = run.summary.get("collapse")
    return page(
        kind="dino-lightning run",
        title=run.title,
        lead=f'<p class="lead">{escape(_verdict(run))}</p>{_facts(run)}',
        parts=[
            section("What was learned", _knn(run)),
            section("Evaluations", results_html([list(results)], [run.name])),
            section("Pictures", gallery(run)),
            curves_html(charts, collapse=str(collapse) if collapse else None),
            section("Configuration", _config(run)),
        ],
        footer=f"Made from the files in <code>{escape(run.name)}</code>. Of a curve of more than {MAX_POINTS:,} "
        "points, the least and the greatest value of each of equal parts are shown; every number stands in "
        "<code>metrics.csv</code>, every picture in <code>pictures</code>.",
        data=curves_json(charts, epochs=run.epochs),
    )


def results_table(summary: dict[str, Any]) -> Table:
    """The three k-NN figures of `summary.json`, for the terminal."""
    table = Table("Features", title="k-NN top-1", min_width=36)
    table.add_column("Correct", justify="right")
    for key, name, _ in KNN_ROWS:
        value = to_finite(summary.get(key))
        shown = "not evaluated" if value is None else f"{value:.1f} %"
        table.add_row(name, shown, style="bold" if key == "knn_top1" else None)
    return table


def _verdict(run: Run) -> str:
    trained, before = run.number("knn_top1"), run.number("knn_top1_untrained")
    if trained is None and not run.sheets and not run.curves:
        return "This run has left nothing to judge it by."
    collapse = run.summary.get("collapse")
    warning = f" A collapse was seen ({collapse}): look at its signs below." if collapse else ""
    if trained is None:
        return f"There are no k-NN figures, so look at the pictures and curves to judge this run.{warning}"
    said = f"Judged by nearest neighbors, the trained network gets {trained:.1f} % of the validation images right"
    if before is None:
        return f"{said}.{warning}"
    gained = round(trained, 1) - round(before, 1)  # so that it agrees with the figures as shown
    return f"{said}: {abs(gained):.1f} points {'more' if gained >= 0 else 'fewer'} than before training.{warning}"


def _facts(run: Run) -> str:
    def count(key: str, unit: str = "") -> str | None:
        value = run.number(key)
        return None if value is None else f"{value:,.10g} {unit}".strip()

    commit, batch = run.summary.get("commit"), run.setting("data.batch_size_per_device")
    facts = {
        "State": None if run.summary else run_status(run),
        "Network": _network(run),
        "Images": run.setting("data.path") or run.setting("data.name") or _builtin(run),
        "Length": ", ".join(part for part in (count("epochs", "epochs"), count("steps", "steps")) if part),
        "Batch": batch and f"{batch} images per device",
        "Prototypes": run.setting("method.out_dim"),
        "Speed": count("images_per_second", "images/s"),
        "Seed": run.summary.get("seed", run.setting("seed")),
        "Commit": commit and str(commit)[:10] + (" and changes" if str(commit).endswith("+") else ""),
        "Unreadable images": f"{run.number('bad_images'):,.0f} (bad_images.txt)" if run.number("bad_images") else None,
    }
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in known.items())
    return f'<dl class="facts">{items}</dl>' if items else ""


def _network(run: Run) -> str | None:
    depth, width, patch = (run.setting(f"backbone.{key}") for key in ("depth", "width", "patch_size"))
    return run.setting("backbone.name") or (depth and f"ViT: {depth} blocks, width {width}, patch {patch}")


def _builtin(run: Run) -> str | None:
    return None if run.setting("data.draw_seed") is None else "built in"


def _knn(run: Run) -> str:
    values = {key: run.number(key) for key, _, _ in KNN_ROWS}
    if all(value is None for value in values.values()):
        if run.setting("callbacks.knn.enabled") is False:
            return note("There are no k-NN figures: callbacks.knn.enabled is false.")
        return note("There are no k-NN figures: the images have no labels, or the run has not come to its end.")
    rows = []
    for key, name, text in KNN_ROWS:
        value = values[key]
        if value is not None:
            figure = f'<data value="{value!r}">{value:.1f} %</data>'
            kind = ' class="main"' if key == "knn_top1" else ""
            rows.append(f'<li{kind}><span class="name">{name}</span>{bar(value)}{figure}<small>{text}</small></li>')
    k = run.setting("callbacks.knn.headline_k")
    voters = f"{k} most similar training images" if k else "most similar training images"
    missing = ", ".join(name.lower() for key, name, _ in KNN_ROWS if values[key] is None)
    intro = f"Validation images whose class the {voters} vote for. Training never sees a label."
    return (
        f'{note(intro)}<div class="card"><ol class="bars">{"".join(rows)}</ol></div>'
        f"{note(f'Not evaluated: {missing}.') if missing else ''}"
    )


def _config(run: Run) -> str:
    if not run.config_text:
        return note("The configuration is unknown: config.yaml is missing.")
    return f'<details class="card"><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>'
