"""Copydays (Douze et al., CIVR 2009) in its original layout: photographs, and copies with known changes.

    PATH/original/*.jpg       the database
    PATH/strong/*.jpg         queries: print and scan, blur, paint, ...
    PATH/jpegqual/QUALITY/    queries: compressed, if the folder exists
    PATH/crops/PERCENT/       queries: cropped, if the folder exists

The first four characters of a file name identify the photograph.
"""

from dataclasses import dataclass
from pathlib import Path

from dino_lightning.config import CopydaysData
from dino_lightning.data.benchmarks.files import existing_folder, list_images
from dino_lightning.data.sources.folder import subfolders
from dino_lightning.errors import UserError

PREFIX_LENGTH = 4
"""Characters of the file name that copies of a photograph share."""


@dataclass(frozen=True)
class Copydays:
    """The benchmark."""

    blocks: dict[str, list[Path]]
    """Images of `original`, `strong`, `jpegqual/3`, ..., in this order; all of them are queries."""
    distractors: list[Path]
    """More images of the database, which are copies of none of the photographs."""

    @property
    def database(self) -> list[Path]:
        """The originals, then the distractors."""
        return [*self.blocks["original"], *self.distractors]

    def positives(self, query: Path) -> list[int]:
        """Positions in the database of the photograph that a query is a copy of."""
        photograph = query.name[:PREFIX_LENGTH]
        return [i for i, path in enumerate(self.blocks["original"]) if path.name[:PREFIX_LENGTH] == photograph]


def open_copydays(config: CopydaysData) -> Copydays:
    """The benchmark in `data.path` with the distractors.

    Raises `UserError` if `original` or `strong` is missing, if a folder contains no images, and if no strong query is a
    copy of one of the originals.
    """
    root = existing_folder(config.path, key="data.path")
    folders = subfolders(root)
    missing = [name for name in ("original", "strong") if name not in folders]
    if missing:
        existing = f"it contains {', '.join(folders[:10])}" if folders else "it contains no folders"
        raise UserError(f"data.path={config.path} has no folder {' and no '.join(missing)}; {existing}.")
    names = ["original", "strong"]
    for group in ("jpegqual", "crops"):
        if group in folders:
            by_number = sorted(subfolders(root / group), key=lambda name: (int(name) if name.isdecimal() else 0, name))
            names += [f"{group}/{name}" for name in by_number]
    blocks = {name: list_images(root / name, key="data.path") for name in names}
    path = config.distractors_path
    distractors = [] if path is None else list_images(path, key="data.distractors_path", recursive=True)
    benchmark = Copydays(blocks, distractors)
    if not any(benchmark.positives(query) for query in blocks["strong"]):
        raise UserError(
            f"data.path={config.path}: no image in strong/ has the first {PREFIX_LENGTH} characters of an image in "
            "original/; expected names like in Copydays, such as 200001.jpg for a copy of 200000.jpg."
        )
    return benchmark
