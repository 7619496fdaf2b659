"""Copydays (Douze et al., CIVR 2009) as it lies on disk: photographs, and copies of them changed in known ways.

    PATH/original/*.jpg       the database
    PATH/strong/*.jpg         queries: print and scan, blur, paint, ...
    PATH/jpegqual/QUALITY/    queries: compressed, where the folder exists
    PATH/crops/PERCENT/       queries: cropped, where the folder exists

The first four characters of a file's name say which photograph it shows.
"""

from dataclasses import dataclass
from pathlib import Path

from dino_lightning.config import CopydaysData
from dino_lightning.data.benchmarks.files import existing_folder, images_in
from dino_lightning.data.sources.folder import subfolders
from dino_lightning.errors import UserError

PREFIX = 4
"""Characters that copies of one photograph share."""


@dataclass(frozen=True)
class Copydays:
    """The benchmark."""

    blocks: dict[str, list[Path]]
    """Images of `original`, `strong`, `jpegqual/3`, ..., in this order; all of them are queries."""
    distractors: list[Path]
    """More images of the database, which show none of the photographs."""

    @property
    def database(self) -> list[Path]:
        """The originals, then the distractors."""
        return [*self.blocks["original"], *self.distractors]

    def positives(self, query: Path) -> list[int]:
        """Positions in the database of the photograph that a query shows."""
        return [i for i, path in enumerate(self.blocks["original"]) if path.name[:PREFIX] == query.name[:PREFIX]]


def open_copydays(config: CopydaysData) -> Copydays:
    """The benchmark at `data.path` with the distractors.

    Raises `UserError` where `original` or `strong` is missing, where a folder has no images, and where no strong query
    shows one of the originals.
    """
    root = existing_folder(config.path, key="data.path")
    here = subfolders(root)
    lost = [name for name in ("original", "strong") if name not in here]
    if lost:
        found = f"it has {', '.join(here[:10])}" if here else "it has no folders"
        raise UserError(f"data.path={config.path} has no folder {' and no '.join(lost)}; {found}.")
    names = ["original", "strong"]
    for group in ("jpegqual", "crops"):
        if group in here:
            names += [f"{group}/{name}" for name in sorted(subfolders(root / group), key=_by_number)]
    blocks = {name: images_in(root / name, key="data.path") for name in names}
    more = config.distractors_path
    distractors = [] if more is None else images_in(more, key="data.distractors_path", below=True)
    benchmark = Copydays(blocks, distractors)
    if not any(benchmark.positives(query) for query in blocks["strong"]):
        raise UserError(
            f"data.path={config.path}: no image of strong/ begins with the {PREFIX} characters of one of "
            "original/; expected names as in Copydays, such as 200001.jpg of 200000.jpg."
        )
    return benchmark


def _by_number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0, name)
