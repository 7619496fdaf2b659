"""The pictures of a report: the sheets of one run over its epochs, or of several runs next to each other."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from dino_lightning.report.run_folder import Run, Sheets
from dino_lightning.runtime.console import warn

MAX_EPOCHS = 12
"""Maximum number of epochs of one picture in the page, including the last."""
MAX_SHEETS = 60
"""Maximum number of sheets of one picture over all runs; with many runs each shows fewer epochs, at least one."""
MAX_WIDTH, MAX_WIDTH_COMPARED = 1400, 1000
"""Maximum width of a sheet of a single run, and of one of several runs (pixels)."""
MAX_SIDE = 16_383
"""Maximum side of a WebP image (pixels); a sheet with some hundred images is longer."""
QUALITY = 82
"""Quality of WebP or JPEG, which then has a fifth to a tenth of the PNG's bytes."""


@dataclass(frozen=True)
class Caption:
    """Title, explanation and alternative text of a picture."""

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
        "Each image next to its patch tokens: their first three principal components over all images shown, as red, "
        "green and blue. Patches of one color are alike to the network. Look for objects that stand out from what is "
        "behind them, and for parts that have the same color in several images. Colors of two epochs, or of two "
        "runs, have nothing to do with each other.",
        "Validation images, each next to its patch tokens in color",
    ),
    "crops": Caption(
        "What the network trains on",
        "Augmented crops of one training image per row, global ones first, all at one scale. What the network makes of "
        "one should tell what it makes of the others. Check that you could still tell which "
        "crops belong together: what you cannot tell, the network can hardly learn.",
        "Augmented crops of training images, one image per row",
    ),
}
"""Name of a picture -> caption, in the order of the page; other pictures follow under their own names."""


@dataclass(frozen=True)
class Frame:
    """The sheet of one run and epoch, encoded for the page."""

    epoch: int | None
    """None for the end of the run."""
    source: str
    """A data URL."""
    width: int
    height: int


@dataclass(frozen=True)
class Figure:
    """One kind of picture: for each run its frames, which a slider over `epochs` selects from."""

    caption: Caption
    epochs: list[int | None]
    columns: list[tuple[str, list[Frame]]]
    """(label of the run, empty for a single run; frames)."""


def missing_pictures(run: Run) -> str:
    """Why pictures or attention maps are missing; empty if none are missing."""
    if "attention" in run.sheets:
        return ""
    if run.sheets:
        return "There are no attention maps: only plain ViTs have them, and only after the first pictures are drawn."
    disabled = run.setting("callbacks.pictures.enabled") is False
    return f"There are no pictures: {'callbacks.pictures.enabled is false' if disabled else 'the run has drawn none'}."


def galleries(runs: Sequence[Run], labels: Sequence[str]) -> list[Figure]:
    """Every picture of the runs, next to each other; the label of a single run is empty."""
    present = {name for run in runs for name in run.sheets}
    names = [*(name for name in CAPTIONS if name in present), *sorted(present - CAPTIONS.keys())]
    return [_figure(name, runs, labels) for name in names]


def _figure(name: str, runs: Sequence[Run], labels: Sequence[str]) -> Figure:
    caption = CAPTIONS.get(name, Caption(name, "", f"Picture {name}"))
    sheets = [(label, run.sheets[name]) for run, label in zip(runs, labels, strict=True) if name in run.sheets]
    most = max(1, min(MAX_EPOCHS, MAX_SHEETS // len(sheets)))
    epochs = choose_epochs([sheets_of_run for _, sheets_of_run in sheets], most=most)
    max_width = MAX_WIDTH if len(runs) == 1 else MAX_WIDTH_COMPARED
    columns = [(label, _frames(sheets_of_run, epochs, max_width=max_width)) for label, sheets_of_run in sheets]
    return Figure(caption, epochs, columns)


def choose_epochs(sheets: Sequence[Sheets], *, most: int) -> list[int | None]:
    """At most `most` of all the runs' epochs: the last, the first, and evenly spaced ones between them."""
    distinct = {epoch for sheets_of_run in sheets for epoch, _ in sheets_of_run}
    epochs = sorted(distinct, key=lambda epoch: math.inf if epoch is None else epoch)
    if len(epochs) <= most:
        return epochs
    if most == 1:
        return epochs[-1:]
    return [epochs[round(i * (len(epochs) - 1) / (most - 1))] for i in range(most)]


def _frames(sheets: Sheets, epochs: Sequence[int | None], *, max_width: int) -> list[Frame]:
    """The sheets of these epochs, and always the run's latest sheet, which replaces a missing final one."""
    chosen = [(epoch, path) for epoch, path in sheets if epoch in epochs] or sheets[-1:]
    if chosen[-1] != sheets[-1]:
        chosen.append(sheets[-1])
    return [Frame(epoch, *encode_picture(path, max_width=max_width)) for epoch, path in chosen]


def encode_picture(path: Path, *, max_width: int) -> tuple[str, int, int]:
    """A picture's data URL, width and height (pixels); a blank picture if the file cannot be read."""
    kind = "WEBP" if features.check("webp") else "JPEG"
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, SyntaxError) as error:
        warn(f"{path} cannot be read ({error}); the report shows a blank picture instead.")
        picture = Image.new("RGB", (64, 64), (128, 128, 128))
    scale = min(max_width / picture.width, MAX_SIDE / picture.height)
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=QUALITY)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return source, picture.width, picture.height
