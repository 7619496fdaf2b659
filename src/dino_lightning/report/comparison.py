"""The page of several runs: their k-NN figures, what differs in their settings, evaluations, pictures and curves."""

from collections.abc import Sequence
from html import escape

from dino_lightning.report.curves import COLORS, curves_html, curves_json, max_points, plot_runs
from dino_lightning.report.evaluations import EvalResult, results_html
from dino_lightning.report.gallery import compare_galleries
from dino_lightning.report.markup import Cell, bar, note, page, section, table
from dino_lightning.report.run_folder import Run
from dino_lightning.report.runs import differing_settings, relative_folders, run_labels, run_status

MAX_RUNS = 4 * COLORS
"""Colors and dashes that can be told apart."""
MAX_SETTING_CHARS = 60
"""Characters of a setting in the table of differences."""


def comparison_page(runs: Sequence[Run], results: Sequence[Sequence[EvalResult]]) -> str:
    """The page, as HTML; `results` are each run's own. There may be `MOST_RUNS` of them."""
    assert len(runs) <= MAX_RUNS
    names = run_labels(runs)
    charts = plot_runs(runs, names)
    titles = list(dict.fromkeys(run.title for run in runs))
    return page(
        kind=f"{len(runs)} dino-lightning runs",
        title=", ".join(titles[:3]) + (", …" if len(titles) > 3 else ""),
        lead=f'<p class="lead">{escape(_verdict(runs, names))}</p>',
        parts=[
            section("What was learned", _knn(runs, names)),
            section("What differs", _differences(runs, relative_folders(runs))),
            section("Evaluations", results_html(results, names)),
            section("Pictures", compare_galleries(runs, names)),
            curves_html(charts, runs=names),
        ],
        footer="Made from the files in " + ", ".join(f"<code>{escape(run.name)}</code>" for run in runs) + ". "
        f"Of a curve of more than {max_points(runs):,} points, the least and the greatest value of each of equal "
        "parts are shown; every number stands in <code>metrics.csv</code>.",
        data=curves_json(charts, epochs=[]),
    )


def _accuracy(run: Run) -> float | None:
    """k-NN top-1 in percent: the run's or, before its end, the latest."""
    known = run.number("knn_top1")
    return run.last_value("knn/top1") if known is None else known


def _verdict(runs: Sequence[Run], names: Sequence[str]) -> str:
    known = [(value, name) for run, name in zip(runs, names, strict=True) if (value := _accuracy(run)) is not None]
    if not known:
        return "None of these runs has a k-NN figure yet, so compare their pictures and curves."
    best, name = max(known, key=lambda each: each[0])
    worst, _ = min(known, key=lambda each: each[0])
    said = f"Judged by nearest neighbors, {name} is ahead with {best:.1f} % of the validation images right"
    if len(known) < 2:
        return f"{said}; no other run has a figure yet."
    apart = round(best, 1) - round(worst, 1)  # so that it agrees with the figures as shown
    return f"{said}; the runs lie {apart:.1f} points apart."


BASELINES = {"knn_top1_untrained": "untrained", "knn_top1_pixels": "raw pixels"}


def _knn(runs: Sequence[Run], names: Sequence[str]) -> str:
    known = [value for run in runs if (value := _accuracy(run)) is not None]
    baselines = {key: [run.number(key) for run in runs] for key in BASELINES}
    # What is the same for all runs that know it is said once, above the table.
    distinct = {key: set(values) - {None} for key, values in baselines.items()}
    shared = {key: next(iter(values), None) for key, values in distinct.items() if len(values) < 2}
    rows = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        value = _accuracy(run)
        swatch = f'<i class="swatch d{number // COLORS}" style="border-top-color:var(--s{number % COLORS})"></i>'
        shown = "" if value is None else f'{bar(value)}<data value="{value!r}">{value:.1f} %</data>'
        loss, speed = (
            (run.last_value("train/loss_epoch"), run.last_value("train/loss")),
            run.last_value("speed/images_per_second"),
        )
        figures = [
            _number(max((v for _, v in run.curves.get("knn/top1", [])), default=None), ".1f", " %"),
            *(_number(values[number], ".1f", " %") for key, values in baselines.items() if key not in shared),
            _number(next((each for each in loss if each is not None), None), ".3f"),
            _number(run.number("images_per_second") or speed, ",.0f"),
        ]
        first = [Cell(f"{swatch}{escape(name)}"), Cell(shown, figure=True, main=bool(known) and value == max(known))]
        rows.append([*first, *(Cell(each, figure=True) for each in figures), Cell(escape(run_status(run)), words=True)])
    columns = [name for key, name in BASELINES.items() if key not in shared]
    header = ["Run", "k-NN top-1", "highest", *columns, "loss", "images/s", "state"]
    said = [f"{BASELINES[key]} {value:.1f} %" for key, value in shared.items() if value is not None]
    intro = (
        "Validation images whose class the most similar training images vote for; before a run's end, the latest. "
        + (f"Without training: {', '.join(said)}." if said else "")
    )
    return note(intro) + table("k-NN and state of each run", header, rows)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    found = differing_settings(runs)
    unknown = [name for run, name in zip(runs, names, strict=True) if not run.config]
    said = note(f"config.yaml is missing or broken: {', '.join(unknown)}.") if unknown else ""
    if not found:
        return said + note("The settings of these runs are the same.")
    shown = {key: [_setting(value) for value in values] for key, values in found.items()}
    # The longer side goes down the page.
    if len(runs) > len(shown):
        rows = [[Cell(escape(name)), *cells] for name, *cells in zip(names, *shown.values(), strict=True)]
        return said + table("Settings that differ", ["Run", *shown], rows)
    rows = [[Cell(f"<code>{escape(key)}</code>"), *cells] for key, cells in shown.items()]
    return said + table("Settings that differ", ["Setting", *names], rows)


def _setting(value: str) -> Cell:
    short = value if len(value) <= MAX_SETTING_CHARS else value[: MAX_SETTING_CHARS - 1] + "…"
    return Cell(f"<code>{escape(short)}</code>" if short else '<span class="soft">not there</span>')
