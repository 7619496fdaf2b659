"""The picture of the images that a search retrieved."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from dino_lightning.config import DataConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.evaluation.features.images import ListedFiles
from dino_lightning.report.pictures.sheets import PAPER, neighbor_sheet

CELL = 128
"""Side of a picture (pixels)."""


@dataclass(frozen=True)
class RetrievedRow:
    """A query and the retrieved images, nearest first."""

    query: int
    """Index among the queries."""
    caption: str
    retrieved: list[int]
    """Indices in the database."""
    verdicts: list[bool | None]
    """Correct, wrong, or None for neither."""


def retrieval_sheet(rows: Sequence[RetrievedRow], *, queries: ListedFiles, database: ListedFiles) -> Image.Image:
    """One row per query, with retrieved images framed green (correct), orange (wrong) or gray (neither).

    All images must be readable.
    """
    return neighbor_sheet(
        [_cell(queries, row.query) for row in rows],
        [[_cell(database, i) for i in row.retrieved] for row in rows],
        query_labels=[row.caption for row in rows],
        verdicts=[row.verdicts for row in rows],
        cell=CELL,
    )


def _cell(files: ListedFiles, index: int) -> Image.Image:
    """The whole image on a white square."""
    image = Decoder(DataConfig()).pil(files.read(index))
    return ImageOps.pad(image, (CELL, CELL), color=PAPER)
