"""The runs of a sweep, read from its folders, and sorted into rows: one for each experiment, over its seeds."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.report.run_folder import Run, read_run
from dino_lightning.report.sweeps.published import GRIDS, PUBLISHED, paper_row
from dino_lightning.runtime.files import FAILED, OVERRIDES

FILES = ("config.yaml", "metrics.csv", "summary.json", FAILED)
"""What makes a folder that of a run."""

IGNORED_KEYS = {"seed", "output_dir", "experiment", "resume", "cpu_threads"}
"""Settings in which runs that are averaged may differ."""
MAX_NUMBER_CHARS = 8
"""Characters of a number from which it is shown with four digits: Optuna draws them with all there are."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep, in whatever state."""

    run: Run
    seed: int | None
    failure: str | None
    """The sentence of `failed.txt`, where there is one."""
    overrides: dict[str, str]
    """Key -> value of the words that the sweep was started with; empty where the run's folder does not keep them."""

    @property
    def experiment(self) -> str:
        """Name of the experiment; of the folder where no file tells."""
        return str(self.run.setting("experiment") or self.run.summary.get("experiment") or self.run.name)

    @property
    def row(self) -> str:
        """The experiment, with the value of a key where the run is a point of one of the paper's grids."""
        command = shlex.split(str(self.run.summary.get("command", "")))
        return paper_row(self.experiment, self.overrides or _as_pairs(command))

    @property
    def ended(self) -> bool:
        """Whether the run has come to an end; `summary.json` is the last thing it writes."""
        return bool(self.run.summary) and self.failure is None

    @property
    def pruned(self) -> bool:
        """Whether the run has ended early because others were better."""
        return self.ended and bool(self.run.summary.get("pruned"))

    @property
    def finished(self) -> bool:
        """Whether the run has come to its own end."""
        return self.ended and not self.pruned

    @property
    def status(self) -> str:
        """How far it has come, in words."""
        epoch, epochs = max((epoch for _, epoch in self.run.epochs), default=0), self.run.setting("trainer.max_epochs")
        if self.failure is not None:
            return f"failed: {self.failure}"
        if self.pruned:
            return f"pruned {str(self.run.summary['pruned']).partition(':')[0]}"
        if self.finished:
            return "finished"
        return f"epoch {epoch} of {epochs}" if epochs and epoch else "started"

    def last_value(self, *columns: str) -> float | None:
        """The last value of the first of these columns that has any."""
        return next((self.run.curves[name][-1][1] for name in columns if self.run.curves.get(name)), None)

    @property
    def knn(self) -> float | None:
        """k-NN top-1, in percent: the run's, or the latest so far."""
        return self.run.number("knn_top1") if self.ended else self.last_value("knn/top1")

    def value(self, key: str) -> Any:
        """What a key is set to: a number or word of the configuration, else the word of the command."""
        value = self.run.setting(key)
        return self.overrides.get(key, "") if value is None or isinstance(value, dict) else value


@dataclass
class Row:
    """The runs that differ in nothing but their seed."""

    experiment: str
    """`Job.row` of its runs."""
    name: str
    jobs: list[Job] = field(default_factory=list)
    missing: list[int | None] = field(default_factory=list)
    """Seeds of the sweep without a run; None where it names none."""
    settings: dict[str, str] = field(default_factory=dict)
    """Key -> value of what tells it from the other rows of its experiment."""

    @property
    def evaluated_jobs(self) -> list[Job]:
        """Runs that figures are of: the finished ones or, where none is, those that have logged anything."""
        return [job for job in self.jobs if job.finished] or [job for job in self.jobs if job.run.curves]

    @property
    def status(self) -> str:
        """How far its runs have come; by seed where they differ."""
        states = [(job.status, job.seed) for job in self.jobs] + [("not started", seed) for seed in self.missing]
        seeds: dict[str, list[str]] = {}
        for status, seed in sorted(states, key=lambda state: (state[1] is None, state[1])):
            seeds.setdefault(status, []).append("?" if seed is None else str(seed))
        if len(seeds) == 1:
            return next(iter(seeds))
        return "; ".join(f"seed {', '.join(those)}: {status}" for status, those in seeds.items())


def read_jobs(folders: Iterable[Path]) -> list[Job]:
    """The runs in one or several folders of sweeps or runs, in their order.

    Raises `UserError` for a folder that is neither.
    """
    return [_read_job(run_dir) for folder in folders for run_dir in _run_dirs(folder)]


def swept_keys(jobs: list[Job]) -> list[str]:
    """The keys in which the words of runs differ, in the order of the command; seeds and folders are none of them.

    Where the words are not kept, all settings that differ.
    """
    kept = [job.overrides or {key: str(value) for key, value in _settings(job).items()} for job in jobs]
    keys = dict.fromkeys(key for words in kept for key in words if key not in IGNORED_KEYS)
    return [key for key in keys if len({words.get(key) for words in kept}) > 1]


def format_setting(value: Any) -> str:
    """A value as it stands in a name."""
    text = value if isinstance(value, str) else str(value).replace(" ", "")
    return f"{value:.4g}" if isinstance(value, float) and len(text) > MAX_NUMBER_CHARS else text


def read_rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of one or several folders of sweeps or runs, in the paper's order.

    Raises `UserError` for a folder that is neither.
    """
    folders = list(folders)
    planned: dict[tuple[str, int | None], None] = {}
    rows = _grouped(read_jobs(folders))
    for folder in folders:
        planned |= dict.fromkeys(_planned_runs(folder / "multirun.yaml"))
    for experiment, seed in planned:
        those = [row for row in rows if row.experiment == experiment]
        if any(seed in (None, job.seed) for row in those for job in row.jobs):
            continue
        if not those:
            those = [Row(experiment, _display_name(experiment))]
            rows += those
        those[0].missing.append(seed)
    order = list(PUBLISHED)
    return sorted(rows, key=lambda row: order.index(row.experiment) if row.experiment in PUBLISHED else len(order))


def _run_dirs(folder: Path) -> list[Path]:
    """The folder of a run itself, or the numbered ones in that of a sweep."""
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.glob("*/")] if folder.parent.is_dir() else []
        raise UserError(
            f"{folder}: there is no such folder; {did_you_mean(folder.name, beside) if beside else ''}".rstrip()
        )
    if _is_run(folder):
        return [folder]
    numbered = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if (folder / "multirun.yaml").exists() or numbered:
        return [path for path in numbered if _is_run(path)]
    below = [str(path) for path in sorted(folder.glob("*/")) if _is_run(path) or (path / "multirun.yaml").exists()]
    hint = f"; {did_you_mean(str(folder), below)}" if below else "."
    raise UserError(f"{folder}: expected the folder of a sweep (--multirun) or of a run{hint}")


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def _read_job(run_dir: Path) -> Job:
    run = read_run(run_dir, allow_partial=True)
    failed = run_dir / FAILED
    lines = failed.read_text("utf-8", errors="replace").splitlines() if failed.exists() else None
    failure = None if lines is None else (lines or ["without a reason"])[0].strip()
    seed = run.setting("seed")
    return Job(run, seed if isinstance(seed, int) else None, failure, overrides=_read_overrides(run_dir / OVERRIDES))


def _read_overrides(path: Path) -> dict[str, str]:
    """What stands in `overrides.yaml`; empty where there is none, or half of one."""
    try:
        words = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return _as_pairs(words or [])


def _as_pairs(words: Iterable[Any]) -> dict[str, str]:
    """Key -> value of the words `KEY=VALUE`."""
    pairs = [str(word).lstrip("+").split("=", 1) for word in words if "=" in str(word)]
    return {key: value for key, value in pairs}


def _planned_runs(multirun: Path) -> list[tuple[str, int | None]]:
    """Row and seed of each run of a sweep, from what Hydra writes down of it."""
    try:
        hydra = yaml.safe_load(multirun.read_text("utf-8"))["hydra"]
        words = [f"{key}={value}" for key, value in (hydra["sweeper"]["params"] or {}).items()]
        words += hydra["overrides"]["task"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    swept: dict[str, list[str]] = {}
    for word in words:
        if (key := word.split("=")[0]) in ("experiment", "seed", "sweep", "preset", *GRIDS.values()):
            swept[key] = _values(word)
    seeds = [int(seed) for seed in swept.pop("seed", []) if seed.isdigit()]
    points = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    rows = dict.fromkeys(paper_row(point["experiment"], point) for point in points if "experiment" in point)
    return [(row, seed) for row in rows for seed in seeds or [None]]


def _values(word: str) -> list[str]:
    try:
        override = OverridesParser.create().parse_override(word)
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
        return [str(value) for value in values if value not in (None, "")]
    except HydraException:
        return []


def _grouped(jobs: list[Job]) -> list[Row]:
    by_experiment: dict[str, dict[str, list[Job]]] = {}
    for job in jobs:
        same = by_experiment.setdefault(job.row, {})
        same.setdefault(json.dumps(_settings(job), sort_keys=True, default=str), []).append(job)
    rows = []
    for experiment, groups in by_experiment.items():
        for group, values in zip(groups.values(), _differences([group[0] for group in groups.values()]), strict=True):
            name = ", ".join([_display_name(experiment), *(f"{key}={value}" for key, value in values.items())])
            rows.append(Row(experiment, name, group, settings=values))
    return rows


def _differences(jobs: list[Job]) -> list[dict[str, str]]:
    """What tells runs of one experiment apart: what the sweep has set or, where that is not enough, all settings."""
    keys = swept_keys(jobs)
    swept = [{key: format_setting(job.value(key)) for key in keys} for job in jobs]
    if len({tuple(values.values()) for values in swept}) == len(jobs):
        return swept
    settings = [_settings(job) for job in jobs]
    keys = sorted(set().union(*settings))
    differing = [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]
    return [{key: format_setting(one.get(key)) for key in differing} for one in settings]


def _settings(job: Job) -> dict[str, Any]:
    """The configuration by dotted keys, without what may differ from run to run."""
    found: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif f"{prefix}{key}" not in IGNORED_KEYS:
                found[f"{prefix}{key}"] = value

    walk(job.run.config, "")
    return found


def _display_name(experiment: str) -> str:
    return PUBLISHED[experiment].name if experiment in PUBLISHED else experiment
