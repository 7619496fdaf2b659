"""The picture of what a search found."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from dino_lightning.config import DataConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.evaluation.features.images import ImageFiles
from dino_lightning.report.pictures.sheets import PAPER, neighbor_sheet

CELL = 128
"""Side of a picture (pixels)."""


@dataclass(frozen=True)
class Row:
    """A query and what was found for it, nearest first."""

    query: int
    """Position among the queries."""
    caption: str
    found: list[int]
    """Positions in the database."""
    verdicts: list[bool | None]
    """Right, wrong, or None for neither."""


def found_sheet(rows: Sequence[Row], *, queries: ImageFiles, database: ImageFiles) -> Image.Image:
    """One row for each query, its findings framed green (right), orange (wrong) or gray (neither). All are readable."""
    return neighbor_sheet(
        [_cell(queries, row.query) for row in rows],
        [[_cell(database, i) for i in row.found] for row in rows],
        query_labels=[row.caption for row in rows],
        verdicts=[row.verdicts for row in rows],
        cell=CELL,
    )


def _cell(files: ImageFiles, index: int) -> Image.Image:
    """The whole image on a white square."""
    image = Decoder(DataConfig()).pil(files.read(index))
    return ImageOps.pad(image, (CELL, CELL), color=PAPER)
