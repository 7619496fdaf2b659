"""Revisited Oxford and Paris (Radenović et al., CVPR 2018) in their original layout:

    PATH/roxford5k/gnd_roxford5k.pkl    lists of images and queries; box, easy, hard and junk images of each query
    PATH/roxford5k/jpg/*.jpg

The pickle contains only lists, strings and numbers. The unpickler refuses references to code, so that untrusted files
are safe to read.
"""

import pickle
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from dino_lightning.config import RevisitedData
from dino_lightning.data.benchmarks.files import existing_folder
from dino_lightning.errors import UserError, did_you_mean

NAMES = ("roxford5k", "rparis6k")
MAX_EXAMPLES = 5
"""Missing images that a message names."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom (pixels)."""


@dataclass(frozen=True)
class Query:
    """A query, and the positions of its landmark in `Revisited.images`."""

    name: str
    path: Path
    box: Box
    """The landmark in the image."""
    easy: list[int]
    hard: list[int]
    junk: list[int]
    """Ignored: neither correct nor incorrect."""


@dataclass(frozen=True)
class Revisited:
    """One of the two benchmarks."""

    images: list[Path]
    """The database."""
    queries: list[Query]


def open_revisited(config: RevisitedData) -> Revisited:
    """The benchmark `data.name` in `data.path`, after checking that all its images exist.

    Raises `UserError` for an unknown name, a missing or invalid ground truth, and missing images.
    """
    if config.name not in NAMES:
        raise UserError(f"data.name={config.name}: {did_you_mean(config.name, NAMES)}")
    root = existing_folder(config.path, key="data.path")
    truth = _ground_truth(_truth_file(root, config), name=config.name)
    jpg = root / config.name / "jpg"
    if not jpg.is_dir():
        raise UserError(f"data.path={config.path}: the images are missing; expected {config.name}/jpg/*.jpg.")
    images = [jpg / f"{name}.jpg" for name in truth["imlist"]]
    queries = [
        Query(name, jpg / f"{name}.jpg", tuple(entry["bbx"]), *(list(entry[key]) for key in ("easy", "hard", "junk")))
        for name, entry in zip(truth["qimlist"], truth["gnd"], strict=True)
    ]
    _check_files([*images, *(query.path for query in queries)], jpg=jpg, config=config)
    return Revisited(images, queries)


def _truth_file(root: Path, config: RevisitedData) -> Path:
    name = f"gnd_{config.name}.pkl"
    if (root / config.name / name).is_file():
        return root / config.name / name
    if (root / name).is_file():
        raise UserError(
            f"data.path={config.path} is the folder {config.name} itself; use its parent folder {root.parent}."
        )
    others = [other for other in NAMES if (root / other / f"gnd_{other}.pkl").is_file()]
    hint = f" It contains {others[0]}: set data.name={others[0]}." if others else ""
    raise UserError(f"data.path={config.path} does not contain the ground truth {config.name}/{name}.{hint}")


class _DataUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; references to classes and functions are errors."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, but a ground truth contains no code")


def load_data_pickle(file: IO[bytes]) -> Any:
    """The content of a pickle without code. Raises `pickle.UnpicklingError` for one that refers to code."""
    return _DataUnpickler(file, encoding="utf-8").load()


def _ground_truth(path: Path, *, name: str) -> dict[str, Any]:
    """The validated dict in the pickle."""
    try:
        with open(path, "rb") as file:
            truth = load_data_pickle(file)
    # A damaged pickle may raise any error, because its bytes are instructions.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.name={name}: {path} cannot be read ({reason}); download it again from the benchmark's page."
        ) from error
    problem = _problem(truth)
    if problem:
        raise UserError(f"data.name={name}: {path} is not a ground truth of revisited Oxford or Paris: {problem}.")
    return truth


def _problem(truth: Any) -> str | None:
    """What is wrong with a ground truth; None if it is valid."""
    if not isinstance(truth, dict) or not {"imlist", "qimlist", "gnd"} <= set(truth):
        return "expected a dict with imlist, qimlist and gnd"
    images, queries, gnd = truth["imlist"], truth["qimlist"], truth["gnd"]
    if len(gnd) != len(queries):
        return f"gnd does not have one entry for each of the {len(queries)} queries"
    for name, entry in zip(queries, gnd, strict=True):
        if not {"bbx", "easy", "hard", "junk"} <= set(entry):
            return f"gnd of {name} lacks bbx, easy, hard or junk"
        if not all(0 <= position < len(images) for position in chain(entry["easy"], entry["hard"], entry["junk"])):
            return f"easy, hard or junk of {name} contains an index that is not among the {len(images)} images"
    return None if any(entry["easy"] or entry["hard"] for entry in gnd) else "no query has a matching image"


def _check_files(paths: list[Path], *, jpg: Path, config: RevisitedData) -> None:
    missing = sorted({path.name for path in paths} - {entry.name for entry in jpg.iterdir()})
    if missing:
        examples = ", ".join(missing[:MAX_EXAMPLES]) + (", …" if len(missing) > MAX_EXAMPLES else "")
        raise UserError(
            f"data.path={config.path}: {len(missing)} of {len({path.name for path in paths})} images are "
            f"missing in {config.name}/jpg: {examples}."
        )
