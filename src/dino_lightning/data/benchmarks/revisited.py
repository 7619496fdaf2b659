"""Revisited Oxford and Paris (Radenović et al., CVPR 2018), as they lie on disk:

    PATH/roxford5k/gnd_roxford5k.pkl    lists of images and queries; box, easy, hard and junk images of each query
    PATH/roxford5k/jpg/*.jpg

The pickle holds lists, texts and numbers only. It is read by an unpickler that cannot name code, so a file from
anywhere is as harmless as text.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from dino_lightning.config import RevisitedData
from dino_lightning.data.benchmarks.files import existing_folder
from dino_lightning.errors import UserError, did_you_mean

NAMES = ("roxford5k", "rparis6k")
MOST_NAMED = 5
"""Missing images that a message names."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom (pixels)."""


@dataclass(frozen=True)
class Query:
    """A query, and what the database holds of it: positions in `Revisited.images`."""

    name: str
    path: Path
    box: Box
    """The landmark in the image."""
    easy: list[int]
    hard: list[int]
    junk: list[int]
    """Neither right nor wrong."""


@dataclass(frozen=True)
class Revisited:
    """One of the two benchmarks."""

    images: list[Path]
    """The database."""
    queries: list[Query]


def open_revisited(config: RevisitedData) -> Revisited:
    """The benchmark `data.name` below `data.path`, every image of it seen to be there.

    Raises `UserError` for an unknown name, a missing or strange ground truth, and missing images.
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
        Query(name, jpg / f"{name}.jpg", tuple(own["bbx"]), *(list(own[key]) for key in ("easy", "hard", "junk")))
        for name, own in zip(truth["qimlist"], truth["gnd"], strict=True)
    ]
    _check_files([*images, *(query.path for query in queries)], jpg=jpg, config=config)
    return Revisited(images, queries)


def _truth_file(root: Path, config: RevisitedData) -> Path:
    name = f"gnd_{config.name}.pkl"
    if (root / config.name / name).is_file():
        return root / config.name / name
    if (root / name).is_file():
        raise UserError(
            f"data.path={config.path} is the folder {config.name} itself; give the one above, {root.parent}."
        )
    others = [other for other in NAMES if (root / other / f"gnd_{other}.pkl").is_file()]
    hint = f" There is {others[0]}: set data.name={others[0]}." if others else ""
    raise UserError(f"data.path={config.path} has no {config.name}/{name}, the ground truth.{hint}")


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; a pickle that names a class or function is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and a ground truth needs no code")


def load_plain(file: IO[bytes]) -> Any:
    """What a pickle of plain values holds. Raises `pickle.UnpicklingError` at one that wants to run code."""
    return _PlainUnpickler(file, encoding="utf-8").load()


def _ground_truth(path: Path, *, name: str) -> dict[str, Any]:
    """The pickle's dict, in the form that the benchmark promises."""
    try:
        with open(path, "rb") as file:
            truth = load_plain(file)
    # A damaged pickle may raise anything: its bytes are instructions to a small machine.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.name={name}: {path} cannot be read ({reason}); fetch it again from the benchmark's page."
        ) from error
    problem = _problem(truth)
    if problem:
        raise UserError(f"data.name={name}: {path} is no ground truth of revisited Oxford or Paris: {problem}.")
    return truth


def _problem(truth: Any) -> str | None:
    """What is wrong with a ground truth, in words."""
    if not isinstance(truth, dict) or not {"imlist", "qimlist", "gnd"} <= set(truth):
        return "expected a dict of imlist, qimlist and gnd"
    images, queries, gnd = truth["imlist"], truth["qimlist"], truth["gnd"]
    if not all(
        isinstance(names, list) and names and all(isinstance(n, str) for n in names) for names in (images, queries)
    ):
        return "imlist and qimlist are not lists of names"
    if not isinstance(gnd, list) or len(gnd) != len(queries):
        return f"gnd does not have one entry for each of the {len(queries)} queries"
    problems = (_query_problem(name, own, images=len(images)) for name, own in zip(queries, gnd, strict=True))
    if problem := next(filter(None, problems), None):
        return problem
    return None if any(own["easy"] or own["hard"] for own in gnd) else "no query has an image to find"


def _query_problem(name: str, own: Any, *, images: int) -> str | None:
    if not isinstance(own, Mapping) or not {"bbx", "easy", "hard", "junk"} <= set(own):
        return f"gnd of {name} lacks bbx, easy, hard or junk"
    if not all(isinstance(own[key], Sequence) for key in ("bbx", "easy", "hard", "junk")):
        return f"gnd of {name} holds something else than lists"
    box = own["bbx"]
    if len(box) != 4 or not all(isinstance(v, int | float) for v in box) or not (box[0] < box[2] and box[1] < box[3]):
        return f"bbx of {name} is no box of left, top, right and bottom"
    positions = list(chain(own["easy"], own["hard"], own["junk"]))
    if not all(isinstance(position, int) and 0 <= position < images for position in positions):
        return f"easy, hard or junk of {name} names an image that is none of the {images}"
    if len(set(positions)) != len(positions):
        return f"easy, hard and junk of {name} name an image twice"
    return None


def _check_files(paths: list[Path], *, jpg: Path, config: RevisitedData) -> None:
    there = {entry.name for entry in jpg.iterdir()}
    missing = sorted({path.name for path in paths} - there)
    if missing:
        shown = ", ".join(missing[:MOST_NAMED]) + (", …" if len(missing) > MOST_NAMED else "")
        raise UserError(
            f"data.path={config.path}: {len(missing)} of {len({path.name for path in paths})} images are "
            f"missing in {config.name}/jpg: {shown}."
        )
