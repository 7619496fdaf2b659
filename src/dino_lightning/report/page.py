"""The page: figures, pictures, curves and configuration of a run in one file that loads nothing from the network.

It is made from what lies in the run's folder, so it can be made again at any time, also of a run that stopped half-way.
Whatever comes from a file is escaped.
"""

import base64
import os
import re
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from dino_lightning.report.charts import curves_html, curves_json
from dino_lightning.report.folder import Run, Sheets, finite, read_run

MOST_SHEETS = 5
"""Sheets of one kind in the page, the last included: each has up to a megabyte."""

KNN_ROWS = [
    ("knn_top1_pixels", "Raw pixels", "What colours and layout alone give away."),
    ("knn_top1_untrained", "Untrained network", "The same network with its first, random weights."),
    ("knn_top1", "Trained network", "The network that this run leaves behind."),
]
"""Key of the summary, name and meaning of the three k-NN figures."""


@dataclass(frozen=True)
class Caption:
    """The words around a picture: what it is, and what to see in it."""

    title: str
    text: str
    alt: str


CAPTIONS = {
    "attention": Caption(
        "Where the network looks",
        "How much the class token attends to each patch in the last block, from little (dark) to much (bright), every "
        "map on its own scale. One image per row: the image, the mean over all heads laid over it, then single heads. "
        "A white line, where there is one, is the object's true outline. Look for bright areas that follow the object "
        "and for heads that differ. Speckles, or the same map in every row, mean that this has not formed.",
        "Attention maps of validation images, one image per row, one head per column",
    ),
    "neighbours": Caption(
        "What the network finds alike",
        "Left, validation images; right of each, the training images with the most similar features, nearest first. "
        "Where labels are known, a green frame with a tick has the class of the query, an orange one with a cross "
        "another. Look for rows that agree on the object. Rows that share only colours or background show what the "
        "features still go by.",
        "Validation images, each with the training images nearest to it",
    ),
    "crops": Caption(
        "What the network trains on",
        "Augmented crops of one training image per row, global ones first, all at one scale. What the network makes of "
        "one should tell what it makes of the others. Check that you could still tell which "
        "crops belong together: what you cannot tell, the network can hardly learn.",
        "Augmented crops of training images, one image per row",
    ),
}
"""Pictures by name, in the order of the page; others follow under their own names."""

NO_ATTENTION = "There are no attention maps: only plain ViTs have them, and only from the first drawing on."


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `metrics.csv`, `summary.json`, `config.yaml` and `pictures/*.png`.

    Each of them may be missing. Raises `UserError` where there is no such folder or `summary.json` is no JSON object.
    """
    run = read_run(run_dir)
    parts = {
        "title": escape(str(run.summary.get("experiment") or run.setting("experiment") or run.name)),
        "verdict": escape(_verdict(run)),
        "facts": _facts(run),
        "knn": _knn(run),
        "pictures": _pictures(run),
        "curves": curves_html(run),
        "config": _config(run),
        "footer": f"Made from the files in <code>{escape(run.name)}</code>. Every number of the curves stands in "
        "<code>metrics.csv</code>, every picture in <code>pictures</code>.",
        "data": curves_json(run),
    }
    template = files("dino_lightning.report").joinpath("template.html").read_text("utf-8")
    # In one pass, so that braces in a value stay what they are.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    report = run_dir / "report.html"
    temporary = report.with_name("report.html.tmp")
    temporary.write_text(page, "utf-8")
    os.replace(temporary, report)
    return report


def results_table(summary: dict[str, Any]) -> Table:
    """The three k-NN figures of `summary.json`, for the terminal."""
    table = Table("Features", title="k-NN top-1", min_width=36)
    table.add_column("Correct", justify="right")
    for key, name, _ in KNN_ROWS:
        value = finite(summary.get(key))
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
    said = f"Judged by nearest neighbours, the trained network gets {trained:.1f} % of the validation images right"
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
            return _note("There are no k-NN figures: callbacks.knn.enabled is false.")
        return _note("There are no k-NN figures: the images have no labels, or the run has not come to its end.")
    rows = []
    for key, name, text in KNN_ROWS:
        value = values[key]
        if value is not None:
            bar = f'<span class="track"><span class="bar" style="width:{min(max(value, 0), 100):.2f}%"></span></span>'
            figure = f'<data value="{value!r}">{value:.1f} %</data>'
            kind = ' class="main"' if key == "knn_top1" else ""
            rows.append(f'<li{kind}><span class="name">{name}</span>{bar}{figure}<small>{text}</small></li>')
    k = run.setting("callbacks.knn.headline_k")
    voters = f"{k} most similar training images" if k else "most similar training images"
    missing = ", ".join(name.lower() for key, name, _ in KNN_ROWS if values[key] is None)
    intro = f"Validation images whose class the {voters} vote for. Training never sees a label."
    return (
        f'{_note(intro)}<div class="card"><ol class="bars">{"".join(rows)}</ol></div>'
        f"{_note(f'Not evaluated: {missing}.') if missing else ''}"
    )


def _pictures(run: Run) -> str:
    if not run.sheets:
        off = run.setting("callbacks.pictures.enabled") is False
        why = "callbacks.pictures.enabled is false" if off else "the run has drawn none"
        return _note(f"There are no pictures: {why}.")
    order = [*(name for name in CAPTIONS if name in run.sheets), *sorted(run.sheets.keys() - CAPTIONS.keys())]
    missing = "" if "attention" in run.sheets else _note(NO_ATTENTION)
    return missing + "".join(_figure(name, run.sheets[name]) for name in order)


def _figure(name: str, sheets: Sheets) -> str:
    caption = CAPTIONS.get(name, Caption(name, "", f"Picture {name}"))
    chosen = _spread(sheets)
    shown_epoch = chosen[-1][0]
    images, choices = [], []
    for epoch, path in chosen:
        when = "the end" if epoch is None else f"epoch {epoch}"
        source = base64.b64encode(path.read_bytes()).decode()
        alt = escape(f"{caption.alt}, after {when}" if len(chosen) > 1 else caption.alt)
        hidden, checked = ("", " checked") if epoch == shown_epoch else (" hidden", "")
        images.append(f'<img src="data:image/png;base64,{source}" alt="{alt}" data-epoch="{epoch}"{hidden}>')
        radio = f'<input type="radio" name="{escape(name)}" value="{epoch}"{checked}>'
        choices.append(f"<label>{radio}<span>{when}</span></label>")
    title = escape(caption.title)
    epochs = f'<fieldset class="epochs"><legend>After</legend>{"".join(choices)}</fieldset>' if len(chosen) > 1 else ""
    text = f"<p>{escape(caption.text)}</p>" if caption.text else ""
    enlarge = f'<button type="button" aria-pressed="false" aria-label="Enlarge: {title}">{"".join(images)}</button>'
    return (
        f'<figure class="card sheet"><figcaption><h3>{title}</h3>{text}</figcaption>{epochs}'
        f'<div class="view">{enlarge}</div></figure>'
    )


def _spread(sheets: Sheets) -> Sheets:
    """The first, the last and evenly spaced ones between, `MOST_SHEETS` at most."""
    if len(sheets) <= MOST_SHEETS:
        return sheets
    return [sheets[round(i * (len(sheets) - 1) / (MOST_SHEETS - 1))] for i in range(MOST_SHEETS)]


def _config(run: Run) -> str:
    if not run.config_text:
        return _note("The configuration is unknown: config.yaml is missing.")
    return f'<details class="card"><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>'


def _note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
