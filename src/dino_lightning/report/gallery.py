"""The pictures of a report: over the epochs of one run, and of several runs side by side."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, features

from dino_lightning.report.markup import note
from dino_lightning.report.run_folder import Run, Sheets
from dino_lightning.runtime.console import warn

MAX_EPOCHS = 12
"""Epochs of one picture in the page, the last included."""
MAX_SHEETS = 60
"""Sheets of one picture over all runs; with many runs each shows fewer epochs, one at the least."""
WIDEST, WIDEST_BESIDE = 1400, 1000
"""Pixels of a sheet's width: alone, and beside those of other runs."""
MAX_SIDE = 16_383
"""Pixels of the longest side that WebP takes: a sheet of some hundred images is longer."""
QUALITY = 82
"""Of WebP or JPEG: a fifth to a tenth of the PNG's bytes."""


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
    "neighbors": Caption(
        "What the network finds alike",
        "Left, validation images; right of each, the training images with the most similar features, nearest first. "
        "Where labels are known, a green frame with a tick has the class of the query, an orange one with a cross "
        "another. Look for rows that agree on the object. Rows that share only colors or background show what the "
        "features still go by.",
        "Validation images, each with the training images nearest to it",
    ),
    "pca": Caption(
        "What the patches know",
        "Each image beside its patch tokens: their first three principal components over all images shown, as red, "
        "green and blue. Patches of one color are alike to the network. Look for objects that stand out from what is "
        "behind them, and for parts with a color of their own in several images. Colors of two epochs, or of two "
        "runs, have nothing to do with each other.",
        "Validation images, each beside its patch tokens in color",
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


@dataclass(frozen=True)
class Frame:
    """A sheet of a run, ready for the page."""

    epoch: int | None
    """None for the end of the run."""
    source: str
    """A data address."""
    width: int
    height: int


def gallery(run: Run) -> str:
    """Every picture of a run, with a slider over its epochs."""
    if not run.sheets:
        off = run.setting("callbacks.pictures.enabled") is False
        why = "callbacks.pictures.enabled is false" if off else "the run has drawn none"
        return note(f"There are no pictures: {why}.")
    missing = "" if "attention" in run.sheets else note(NO_ATTENTION)
    return missing + "".join(_figure(name, [run], [""]) for name in _order([run]))


def compare_galleries(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Every picture of the runs beside each other, with one slider over the epochs of all."""
    figures = [_figure(name, runs, names) for name in _order(runs)]
    return "".join(figures) or note("There are no pictures: the runs have drawn none.")


def _order(runs: Sequence[Run]) -> list[str]:
    present = {name for run in runs for name in run.sheets}
    return [*(name for name in CAPTIONS if name in present), *sorted(present - CAPTIONS.keys())]


def _figure(name: str, runs: Sequence[Run], names: Sequence[str]) -> str:
    caption = CAPTIONS.get(name, Caption(name, "", f"Picture {name}"))
    shown = [(run, called) for run, called in zip(runs, names, strict=True) if name in run.sheets]
    most = max(1, min(MAX_EPOCHS, MAX_SHEETS // len(shown)))
    epochs = choose_epochs([run.sheets[name] for run, _ in shown], most=most)
    widest = WIDEST if len(runs) == 1 else WIDEST_BESIDE
    columns = []
    for run, called in shown:
        frames = _frames(run.sheets[name], epochs, widest=widest)
        alt = f"{caption.alt}, {called}" if called else caption.alt
        head = f"<h4>{escape(called)}</h4>" if called else ""
        several = len(epochs) > 1
        images = "".join(_frame(frame, alt=alt, several=several, now=frame is frames[-1]) for frame in frames)
        label = escape(f"Enlarge: {caption.title}" + (f", {called}" if called else ""))
        columns.append(
            f'<div class="column">{head}<div class="view"><button type="button" aria-pressed="false" '
            f'aria-label="{label}">{images}</button></div></div>'
        )
    text = f"<p>{escape(caption.text)}</p>" if caption.text else ""
    return (
        f'<figure class="card sheet"><figcaption><h3>{escape(caption.title)}</h3>{text}</figcaption>'
        f'{_slider(caption.title, epochs)}<div class="columns{" several" if len(columns) > 1 else ""}">'
        f"{''.join(columns)}</div></figure>"
    )


def choose_epochs(sheets: Sequence[Sheets], *, most: int) -> list[int | None]:
    """Of all the runs' epochs the last, and the first and evenly spaced ones between as far as there is room."""
    every = sorted({epoch for some in sheets for epoch, _ in some}, key=_place)
    if len(every) <= most:
        return every
    if most == 1:
        return every[-1:]
    return [every[round(i * (len(every) - 1) / (most - 1))] for i in range(most)]


def _place(epoch: int | None) -> float:
    return math.inf if epoch is None else epoch


def _frames(sheets: Sheets, epochs: Sequence[int | None], *, widest: int) -> list[Frame]:
    """Those of the epochs; of a run that has none of them its latest."""
    wanted = [(epoch, path) for epoch, path in sheets if epoch in epochs] or sheets[-1:]
    # A run that has not come to its end shows its latest in the end's place.
    if wanted[-1] != sheets[-1]:
        wanted.append(sheets[-1])
    return [Frame(epoch, *encode_picture(path, widest=widest)) for epoch, path in wanted]


def encode_picture(path: Path, *, widest: int) -> tuple[str, int, int]:
    """A picture's data address, width and height (pixels); a blank one where the file cannot be read."""
    kind = "WEBP" if features.check("webp") else "JPEG"
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError) as error:
        warn(f"{path} cannot be read ({error}); the report shows a blank picture in its place.")
        picture = Image.new("RGB", (64, 64), (128, 128, 128))
    scale = min(widest / picture.width, MAX_SIDE / picture.height)
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=QUALITY)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return source, picture.width, picture.height


def _frame(frame: Frame, *, alt: str, several: bool, now: bool) -> str:
    when = _when(frame.epoch)
    said = escape(f"{alt}, after {when}" if several else alt)
    head = f'<span class="when">After {when}</span>' if several else ""
    return (
        f'<span class="frame{" now" if now else ""}" data-epoch="{"" if frame.epoch is None else frame.epoch}">{head}'
        f'<img src="{frame.source}" alt="{said}" width="{frame.width}" height="{frame.height}"></span>'
    )


def _when(epoch: int | None) -> str:
    return "the end" if epoch is None else f"epoch {epoch}"


def _slider(title: str, epochs: Sequence[int | None]) -> str:
    if len(epochs) < 2:
        return ""
    stops = " ".join("" if epoch is None else str(epoch) for epoch in epochs)
    return (
        f'<label class="epochs script">After <output>{_when(epochs[-1])}</output><input type="range" min="0" '
        f'max="{len(epochs) - 1}" value="{len(epochs) - 1}" data-stops="{stops}" '
        f'aria-label="Epoch of: {escape(title)}" aria-valuetext="{_when(epochs[-1])}"></label>'
    )
