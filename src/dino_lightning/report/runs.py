"""Finds the runs that a command names, and makes their labels and the list of differing settings."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dino_lightning.config.dotted import flatten, format_value
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.report.run_folder import Run, to_finite
from dino_lightning.runtime.files import FAILED

RUN_FILES = ("config.yaml", "metrics.csv", "summary.json", FAILED)
"""A folder with one of these files is the folder of a run."""
LOCATION_KEYS = ("output_dir", "resume")
"""Settings with the location of a run, which do not distinguish runs."""
MAX_SETTING_CHARS = 24
"""Longer settings do not appear in the label of a run."""
MAX_NUMBER_CHARS = 8
"""Longer numbers, such as those drawn by Optuna, are rounded to four digits in a label or on an axis."""


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """The folders of the named runs, each once, in the given order.

    A pattern is the folder of a run, a folder that directly contains runs, such as a sweep's, or a glob of these.
    Raises `UserError` if it matches no run.
    """
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        runs = [run for match in matches for run in _runs_in(match)]
        if not runs:
            raise UserError(_not_found(pattern, path, matches))
        for run in runs:
            folders.setdefault(run.resolve(), run)
    return list(folders.values())


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder; an evaluation's folder, which contains only results, is not a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    return [path for path in sorted(folder.glob("*/"), key=_by_number) if is_run(path)]


def _by_number(path: Path) -> tuple[bool, int, str]:
    return (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path.name)


def _not_found(pattern: str, path: Path, matches: Sequence[Path]) -> str:
    if matches:
        return f"{pattern}: expected the folder of a run or of a sweep, but it contains no run."
    return f"{pattern}: no folder matches." if glob.has_magic(pattern) else missing_folder(path)


def missing_folder(path: Path) -> str:
    """A message for a folder that does not exist, with a similar name next to it."""
    siblings = [sibling.name for sibling in path.parent.glob("*/")] if path.parent.is_dir() else []
    return f"{path}: this folder does not exist{f'; {did_you_mean(path.name, siblings)}' if siblings else '.'}"


def run_status(run: Run) -> str:
    """Progress of a run, whether it was pruned and whether it collapsed, in words."""
    pruned, collapse = run.summary.get("pruned"), run.summary.get("collapse")
    epoch, epochs = max((epoch for _, epoch in run.epochs), default=0), run.setting("trainer.max_epochs")
    if run.failure is not None:
        return f"failed: {run.failure}"
    if run.summary:
        status = f"pruned {pruned}" if pruned else "finished"
        return f"{status}; collapse: {collapse}" if collapse else status
    return f"epoch {epoch} of {epochs}" if epochs and epoch else "started"


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that contains all of them."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Key -> its value in each run, as text, of the settings that differ; empty if a run does not have the key.

    The commit of the code is one of them, if all runs have ended and recorded it.
    """
    settings = [flatten(run.config) for run in runs]
    commits = [str(run.summary.get("commit") or "")[:11] for run in runs]
    if all(commits):
        settings = [{**of_run, "commit": commit} for of_run, commit in zip(settings, commits, strict=True)]
    keys = dict.fromkeys(key for of_run in settings for key in of_run if key not in LOCATION_KEYS)
    values = {key: [format_value(of_run[key]) if key in of_run else "" for of_run in settings] for key in keys}
    return {key: of_key for key, of_key in values.items() if len(set(of_key)) > 1}


def relative_folders(runs: Sequence[Run]) -> list[str]:
    """Each run's folder, relative to the innermost folder that contains all of them."""
    folders = [run.folder.resolve() for run in runs]
    common = common_folder(folders)
    return [str(folder.relative_to(common)) for folder in folders]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its folder and, if they are few and short, the settings that differ."""
    folders, differences = relative_folders(runs), differing_settings(runs)
    names = [key.rpartition(".")[2] for key in differences]
    settings = {
        name if names.count(name) == 1 else key: [format_setting(value) for value in values]
        for (key, values), name in zip(differences.items(), names, strict=True)
    }
    are_short = all(len(f"{key}={value}") <= MAX_SETTING_CHARS for key, values in settings.items() for value in values)
    if not (are_short and 0 < len(settings) <= 2):
        return folders
    suffixes = [
        ", ".join(f"{key}={value}" for key, value in zip(settings, values, strict=True) if value)
        for values in zip(*settings.values(), strict=True)
    ]
    return [f"{folder} ({suffix})" if suffix else folder for folder, suffix in zip(folders, suffixes, strict=True)]


def format_setting(value: Any) -> str:
    """A value, or its text, in a label or on an axis."""
    text, number = format_value(value), None if isinstance(value, int) else to_finite(value)
    return text if number is None or len(text) <= MAX_NUMBER_CHARS else f"{number:.4g}"
