"""Which runs a command means: folders of runs or of sweeps, and patterns of such; and how to call them."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.report.run_folder import Run, to_finite
from dino_lightning.runtime.files import FAILED

RUN_FILES = ("config.yaml", "metrics.csv", "summary.json", FAILED)
"""What makes a folder that of a run."""
LOCATION_KEYS = ("output_dir", "resume")
"""Settings that say where a run is, not what it is."""
MAX_SETTING_CHARS = 24
"""Characters of a setting in the name of a run."""
MAX_NUMBER_CHARS = 8


def find_runs(words: Iterable[str]) -> list[Path]:
    """The folders of runs that are named, each once, in the order of the words.

    A word is the folder of a run, or one with runs directly in it, such as a sweep's, or a pattern of both. Raises
    `UserError` where one is neither.
    """
    found: dict[Path, Path] = {}
    for word in words:
        path = Path(word).expanduser()
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        runs = [run for match in matches for run in _runs_in(match)]
        if not runs:
            raise UserError(_not_found(word, path, matches))
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a run has written anything there; an evaluation's folder, which has results alone, is none."""
    return any((folder / name).exists() for name in RUN_FILES)


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    return [path for path in sorted(folder.glob("*/"), key=_by_number) if is_run(path)]


def _by_number(path: Path) -> tuple[bool, int, str]:
    return (not path.name.isdigit(), int(path.name) if path.name.isdigit() else 0, path.name)


def _not_found(word: str, path: Path, matches: Sequence[Path]) -> str:
    if matches:
        return f"{word}: expected the folder of a run or of a sweep, and there is no run in it."
    if glob.has_magic(word):
        return f"{word}: no folder has such a name."
    beside = [other.name for other in path.parent.glob("*/")] if path.parent.is_dir() else []
    return f"{word}: there is no such folder; {did_you_mean(path.name, beside) if beside else 'name that of a run'}"


def run_status(run: Run) -> str:
    """How far a run has come, whether it was pruned, and whether it has collapsed, in words."""
    failed, pruned, collapse = run.folder / FAILED, run.summary.get("pruned"), run.summary.get("collapse")
    epoch, epochs = max((epoch for _, epoch in run.epochs), default=0), run.setting("trainer.max_epochs")
    if failed.exists():
        lines = failed.read_text("utf-8", errors="replace").splitlines() or ["without a reason"]
        return f"failed: {lines[0].strip()}"
    if run.summary:
        ended = f"pruned {pruned}" if pruned else "finished"
        return f"{ended}; collapse: {collapse}" if collapse else ended
    return f"epoch {epoch} of {epochs}" if epochs and epoch else "started"


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that all of them lie in."""
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def flat_settings(run: Run) -> dict[str, Any]:
    """The configuration by dotted keys, without what says only where the run is."""
    found: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk({key: value for key, value in run.config.items() if key not in LOCATION_KEYS}, "")
    return found


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Key -> its value in each run, as text, of the keys that are not the same in all; empty where a run lacks one.

    The commit of the code counts as one.
    """
    known = [{**flat_settings(run), "commit": str(run.summary.get("commit") or "")[:11]} for run in runs]
    # A run that has not ended has not said its commit: that is no difference.
    if any(not each["commit"] for each in known):
        known = [{key: value for key, value in each.items() if key != "commit"} for each in known]
    keys = dict.fromkeys(key for each in known for key in each)
    told = {key: [plain(each[key]) if key in each else "" for each in known] for key in keys}
    return {key: values for key, values in told.items() if len(set(values)) > 1}


def plain(value: Any) -> str:
    """A setting as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def relative_folders(runs: Sequence[Run]) -> list[str]:
    """Each run's folder, from the innermost one that all lie in."""
    folders = [run.folder.resolve() for run in runs]
    above = common_folder(folders)
    return [str(folder.relative_to(above)) for folder in folders]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder, and the settings that differ where these are few and short."""
    names, found = relative_folders(runs), differing_settings(runs)
    ends = [key.rpartition(".")[2] for key in found]
    told = {
        end if ends.count(end) == 1 else key: [_brief(value) for value in values]
        for (key, values), end in zip(found.items(), ends, strict=True)
    }
    short = all(len(f"{key}={value}") <= MAX_SETTING_CHARS for key, values in told.items() for value in values)
    if not (short and 0 < len(told) <= 2):
        return names
    said = [
        ", ".join(f"{key}={value}" for key, value in zip(told, row, strict=True) if value)
        for row in zip(*told.values(), strict=True)
    ]
    return [f"{name} ({words})" if words else name for name, words in zip(names, said, strict=True)]


def _brief(value: str) -> str:
    """Four digits of a number with more characters than a hand would type."""
    number = to_finite(value)
    return f"{number:.4g}" if number is not None and len(value) > MAX_NUMBER_CHARS else value
