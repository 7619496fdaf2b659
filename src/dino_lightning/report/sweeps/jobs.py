"""Reads the runs of a sweep and groups them into rows: one per experiment, over its seeds."""

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

from dino_lightning.config.dotted import flatten
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.report.run_folder import Run, read_run
from dino_lightning.report.runs import format_setting, is_run, missing_folder, run_status
from dino_lightning.report.sweeps.published import GRIDS, PUBLISHED, paper_row
from dino_lightning.runtime.files import OVERRIDES

STATES = ("finished", "pruned", "under way", "failed")
IGNORED_KEYS = {"seed", "output_dir", "experiment", "resume", "cpu_threads"}
"""Settings that may differ between runs that are averaged."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep, in any state."""

    run: Run
    seed: int | None
    overrides: dict[str, str]
    """Key -> value of the sweep's command-line overrides; empty if the run's folder does not record them."""

    @property
    def row(self) -> str:
        """The experiment, with the value of a key if the run is a point of one of the paper's grids."""
        command = shlex.split(str(self.run.summary.get("command", "")))
        return paper_row(self.run.title, self.overrides or _as_pairs(command))

    @property
    def state(self) -> str:
        """One of `STATES`; a pruned run was stopped early because others were better."""
        if self.run.failure is not None:
            return "failed"
        if not self.run.summary:  # written last
            return "under way"
        return "pruned" if self.run.summary.get("pruned") else "finished"

    @property
    def status(self) -> str:
        """Progress of the run, in words."""
        if self.state == "pruned":
            return f"pruned {str(self.run.summary['pruned']).partition(':')[0]}"
        return "finished" if self.state == "finished" else run_status(self.run)

    def value(self, key: str) -> Any:
        """The value of a key in the configuration, or else in the command."""
        value = self.run.setting(key)
        return self.overrides.get(key, "") if value is None or isinstance(value, dict) else value


@dataclass
class Row:
    """Runs that differ only in their seed."""

    experiment: str
    """`Job.row` of its runs."""
    name: str
    jobs: list[Job] = field(default_factory=list)
    missing: list[int | None] = field(default_factory=list)
    """Seeds of the sweep without a run; None if the sweep sets no seed."""
    settings: dict[str, str] = field(default_factory=dict)
    """Key -> value of the settings that distinguish it from other rows of its experiment."""

    @property
    def evaluated_jobs(self) -> list[Job]:
        """The finished runs or, if there are none, those that logged anything."""
        finished = [job for job in self.jobs if job.state == "finished"]
        return finished or [job for job in self.jobs if job.run.curves]

    @property
    def status(self) -> str:
        """Progress of its runs, by seed if it differs."""
        states = [(job.status, job.seed) for job in self.jobs] + [("not started", seed) for seed in self.missing]
        seeds: dict[str, list[str]] = {}
        for status, seed in sorted(states, key=lambda state: (state[1] is None, state[1])):
            seeds.setdefault(status, []).append("?" if seed is None else str(seed))
        if len(seeds) == 1:
            return next(iter(seeds))
        return "; ".join(f"seed {', '.join(of_status)}: {status}" for status, of_status in seeds.items())


def read_jobs(folders: Iterable[Path]) -> list[Job]:
    """The runs in folders of sweeps or runs, in order. Raises `UserError` for other folders."""
    return [_read_job(run_dir) for folder in folders for run_dir in _run_dirs(folder)]


def swept_keys(jobs: list[Job]) -> list[str]:
    """The keys whose overrides differ between runs, in the order of the command, without seeds and folders.

    If the overrides are not recorded, all settings that differ.
    """
    by_job = [job.overrides or {key: str(value) for key, value in _settings(job).items()} for job in jobs]
    keys = dict.fromkeys(key for settings in by_job for key in settings if key not in IGNORED_KEYS)
    return [key for key in keys if len({settings.get(key) for settings in by_job}) > 1]


def read_rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of folders of sweeps or runs, in the paper's order. Raises `UserError` for other folders."""
    folders = list(folders)
    rows = _grouped(read_jobs(folders))
    planned = dict.fromkeys(run for folder in folders for run in _planned_runs(folder / "multirun.yaml"))
    for experiment, seed in planned:
        same = [row for row in rows if row.experiment == experiment]
        if any(seed in (None, job.seed) for row in same for job in row.jobs):
            continue
        if not same:
            same = [Row(experiment, display_name(experiment))]
            rows += same
        same[0].missing.append(seed)
    order = list(PUBLISHED)
    return sorted(rows, key=lambda row: order.index(row.experiment) if row.experiment in PUBLISHED else len(order))


def _run_dirs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, or the numbered runs of a sweep."""
    if not folder.is_dir():
        raise UserError(missing_folder(folder))
    if is_run(folder):
        return [folder]
    numbered = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if (folder / "multirun.yaml").exists() or numbered:
        return [path for path in numbered if is_run(path)]
    subfolders = [str(path) for path in sorted(folder.glob("*/")) if is_run(path) or (path / "multirun.yaml").exists()]
    hint = f"; {did_you_mean(str(folder), subfolders)}" if subfolders else "."
    raise UserError(f"{folder}: expected the folder of a sweep (--multirun) or of a run{hint}")


def _read_job(run_dir: Path) -> Job:
    run = read_run(run_dir, allow_partial=True)
    seed = run.setting("seed")
    return Job(run, seed if isinstance(seed, int) else None, _read_overrides(run_dir / OVERRIDES))


def _read_overrides(path: Path) -> dict[str, str]:
    """The overrides in `overrides.yaml`; empty if it is missing or partially written."""
    try:
        overrides = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return _as_pairs(overrides or [])


def _as_pairs(overrides: Iterable[Any]) -> dict[str, str]:
    """Key -> value of overrides `KEY=VALUE`."""
    pairs = [str(override).lstrip("+").split("=", 1) for override in overrides if "=" in str(override)]
    return {key: value for key, value in pairs}


def _planned_runs(multirun: Path) -> list[tuple[str, int | None]]:
    """Row and seed of each run of a sweep, from Hydra's `multirun.yaml`."""
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
            name = ", ".join([display_name(experiment), *(f"{key}={value}" for key, value in values.items())])
            rows.append(Row(experiment, name, group, settings=values))
    return rows


def _differences(jobs: list[Job]) -> list[dict[str, str]]:
    """The settings that distinguish runs of one experiment: the swept keys or, if they do not suffice, all settings."""
    keys = swept_keys(jobs)
    swept = [{key: format_setting(job.value(key)) for key in keys} for job in jobs]
    if len({tuple(values.values()) for values in swept}) == len(jobs):
        return swept
    settings = [_settings(job) for job in jobs]
    keys = sorted(set().union(*settings))
    differing = [key for key in keys if len({str(of_job.get(key)) for of_job in settings}) > 1]
    return [{key: format_setting(of_job.get(key)) for key in differing} for of_job in settings]


def _settings(job: Job) -> dict[str, Any]:
    """The configuration by dotted keys, without the keys that may differ between averaged runs."""
    return {key: value for key, value in flatten(job.run.config).items() if key not in IGNORED_KEYS}


def display_name(experiment: str) -> str:
    """The paper's name of a row, or else the experiment."""
    return PUBLISHED[experiment].name if experiment in PUBLISHED else experiment
