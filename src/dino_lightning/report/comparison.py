"""The report of several runs: their k-NN accuracies, differing settings, evaluations, pictures and curves."""

from collections.abc import Sequence

from markupsafe import Markup

from dino_lightning.report.curves import COLORS, chart_context, max_points, plot_runs
from dino_lightning.report.evaluations import EvalResult, evaluation_table
from dino_lightning.report.gallery import galleries
from dino_lightning.report.markup import Cell, Table, bar, code, figure, render
from dino_lightning.report.run_folder import Run
from dino_lightning.report.runs import differing_settings, relative_folders, run_labels, run_status

MAX_RUNS = 4 * COLORS
"""Combinations of colors and dashes that a reader can distinguish."""
MAX_SETTING_CHARS = 60
"""Longer settings are truncated in the table of differences."""
BASELINES = {"knn_top1_untrained": "untrained", "knn_top1_pixels": "raw pixels"}


def comparison_page(runs: Sequence[Run], results: Sequence[Sequence[EvalResult]]) -> str:
    """The page of at most `MAX_RUNS` runs, as HTML; `results` has the results of each run."""
    assert len(runs) <= MAX_RUNS
    labels = run_labels(runs)
    titles = list(dict.fromkeys(run.title for run in runs))
    knn, baselines = _knn(runs, labels)
    folders = relative_folders(runs)
    return render(
        "comparison.html",
        kind=f"{len(runs)} dino-lightning runs",
        title=", ".join(titles[:3]) + (", …" if len(titles) > 3 else ""),
        verdict=_verdict(runs, labels),
        knn=knn,
        baselines=baselines,
        differences=_differences(runs, folders),
        unreadable=", ".join(folder for run, folder in zip(runs, folders, strict=True) if not run.config),
        results=evaluation_table(results, labels),
        pictures=galleries(runs, labels),
        labels=labels,
        folders=[run.name for run in runs],
        max_points=max_points(runs),
        **chart_context(plot_runs(runs, labels), epochs=[]),
    )


def _verdict(runs: Sequence[Run], labels: Sequence[str]) -> str:
    known = [(value, label) for run, label in zip(runs, labels, strict=True) if (value := run.knn) is not None]
    if not known:
        return "None of these runs has a k-NN figure yet; compare their pictures and curves."
    best, label = max(known, key=lambda pair: pair[0])
    worst, _ = min(known, key=lambda pair: pair[0])
    verdict = f"{label} has the best k-NN accuracy, {best:.1f} % of the validation images"
    if len(known) < 2:
        return f"{verdict}; no other run has a figure yet."
    difference = round(best, 1) - round(worst, 1)  # so that it agrees with the rounded figures
    return f"{verdict}, {difference:.1f} points more than the worst run."


def _knn(runs: Sequence[Run], labels: Sequence[str]) -> tuple[Table, str]:
    """The table of k-NN accuracies, and a sentence with the baselines that all runs share."""
    best = max((value for run in runs if (value := run.knn) is not None), default=None)
    baselines = {key: [run.number(key) for run in runs] for key in BASELINES}
    distinct = {key: set(values) - {None} for key, values in baselines.items()}
    shared = {key: next(iter(values), None) for key, values in distinct.items() if len(values) < 2}
    rows = []
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        value = run.knn
        accuracy = Markup("") if value is None else bar(value) + figure(value, f"{value:.1f} %")
        numbers = [
            _format(max((v for _, v in run.curves.get("knn/top1", [])), default=None), ".1f", " %"),
            *(_format(values[number], ".1f", " %") for key, values in baselines.items() if key not in shared),
            _format(run.last_value("train/loss_epoch", "train/loss"), ".3f"),
            _format(run.number("images_per_second") or run.last_value("speed/images_per_second"), ",.0f"),
        ]
        swatch = Markup('<i class="swatch d{}" style="border-top-color:var(--s{})"></i>{}')
        rows.append(
            [
                Cell(swatch.format(number // COLORS, number % COLORS, label)),
                Cell(accuracy, "figure main" if value is not None and value == best else "figure"),
                *(Cell(text, "figure") for text in numbers),
                Cell(run_status(run), "words"),
            ]
        )
    columns = [name for key, name in BASELINES.items() if key not in shared]
    header = ["Run", "k-NN top-1", "highest", *columns, "loss", "images/s", "state"]
    figures = [f"{BASELINES[key]} {value:.1f} %" for key, value in shared.items() if value is not None]
    return Table(header, rows), f"Without training: {', '.join(figures)}." if figures else ""


def _format(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _differences(runs: Sequence[Run], folders: Sequence[str]) -> Table | None:
    """The settings that differ, with the longer dimension as rows."""
    differences = differing_settings(runs)
    cells = {key: [_setting(value) for value in values] for key, values in differences.items()}
    if not cells:
        return None
    if len(runs) > len(cells):
        rows = [[Cell(folder), *row] for folder, *row in zip(folders, *cells.values(), strict=True)]
        return Table(["Run", *cells], rows)
    return Table(["Setting", *folders], [[Cell(code(key)), *row] for key, row in cells.items()])


def _setting(value: str) -> Cell:
    if not value:
        return Cell(Markup('<span class="soft">not set</span>'))
    return Cell(code(value if len(value) <= MAX_SETTING_CHARS else value[: MAX_SETTING_CHARS - 1] + "…"))
