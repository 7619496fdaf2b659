"""`dino-train data.path=~/photos`: what reads the path, and which experiment fits the machine.

The words that are put in are overrides like any other: Hydra shows them, and `config.yaml` keeps what they mean.
"""

import os
from collections import Counter
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

ENDINGS = {
    ".csv": "listing", ".tsv": "listing", ".txt": "listing", ".zip": "archive", ".tar": "archive", ".parquet": "parquet"
}  # fmt: skip
"""Ending of a file -> option of `data`."""
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
"""Endings that tell a folder of images."""
DECIDED = ("data", "experiment", "scale", "recipe", "sweep")
"""Groups with any of which a command says for itself what it wants."""
SMALL, ON_CPU = "small_data", "photos32"
"""Experiments: a ViT with settings by number and size of the images, and minutes on a CPU."""


def with_quick_start(words: list[str], *, fast: bool | None = None) -> list[str]:
    """The words of a command line and, where they give `data.path` but neither data nor experiment, what is missing.

    `fast` says whether there is a GPU; None looks. Raises `UserError` for what cannot be a path.
    """
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    if "data.path" not in given or any(group in given for group in DECIDED):
        return words
    path = given["data.path"]
    if path[:1] in "\"'":  # Hydra's quotes
        read = OverridesParser.create().parse_override(f"data.path={path}").value()
        path = str(read)
    # A network of the user's own wants crops of its own, which the rule for small data chooses.
    if fast is None:
        fast = "backbone" in given or has_accelerator(given.get("trainer.accelerator", "auto"))
    chosen = [f"data={kind_of(path)}", f"experiment={SMALL if fast else ON_CPU}"]
    if "suggest_machine" not in given:
        chosen.append("suggest_machine=true")
    # Beside its cause: Hydra refuses overrides that do not stand together, such as one behind `--multirun`.
    place = next(index for index, word in enumerate(words) if word.startswith("data.path="))
    return [*words[:place], *chosen, *words[place:]]


def has_accelerator(accelerator: str) -> bool:
    """Whether Lightning's `accelerator` means another device than the CPU on this machine."""
    from dino_lightning.runtime.collectives import (
        trains_on_cpu,  # torch loads in seconds: not needed for other commands
    )

    return not trains_on_cpu(accelerator)


def kind_of(path: str) -> str:
    """The option of `data` that reads the path, from its ending or the first file below it that says so.

    Raises `UserError` where archives lie beside folders with images: one of the two would be left out.
    """
    root = usable_path("data.path", path)
    if not root.is_dir():
        return ENDINGS.get(root.suffix.lower(), "folder")
    for folder, inside, files in os.walk(root):
        inside.sort()
        if "state.json" in files or "dataset_dict.json" in files:
            return "parquet"
        found = Counter(Path(folder, name).suffix.lower() for name in files if not name.startswith("."))
        images = sum(count for ending, count in found.items() if ending not in (*ENDINGS, ".json", ".md", ""))
        for ending in (".parquet", ".tar", ".zip"):
            if found[ending] and found[ending] >= images:  # one of them among photographs is not the data
                beside = next(filter(_has_images, (Path(folder, name) for name in inside)), None)
                if beside is not None:
                    found_here = f"there are {ending} files in '{folder}' and images in '{beside}'"
                    kinds = f"data={ENDINGS[ending]} or data=folder"
                    raise UserError(f"data.path={path}: {found_here}; say which ({kinds}), or give one of them.")
                return ENDINGS[ending]
        if images:
            return "folder"
    return "folder"


def _has_images(folder: Path) -> bool:
    return any(Path(name).suffix.lower() in IMAGES for _, _, files in os.walk(folder) for name in files)
