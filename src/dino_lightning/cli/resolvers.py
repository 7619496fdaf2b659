"""TODO."""

import dataclasses
import os
import re
import time
from pathlib import Path

from dino_lightning.config import SCHEMAS, EmbedConfig, EvaluateConfig, TrainConfig
from dino_lightning.config.conf_dir import CONF, option_names
from dino_lightning.runtime.scheduler import first_start

PROGRAMS = {"train": TrainConfig, "evaluate": EvaluateConfig, "embed": EmbedConfig}
"""Program -> the root of its configuration."""


BESIDE_KEYS = {"train": ("preset", "sweep"), "evaluate": (), "embed": ()}
"""Program -> groups that set keys of others and have none of their own."""


def run_name() -> str:
    """A name for the run's folder that all its processes and later starts agree on: the scheduler's, or the time of
    the first process."""
    for variable in ("DINO_LIGHTNING_RUN", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(variable, "none") != "none":
            return os.environ[variable]
    # Processes that Lightning starts for the other devices inherit it.
    os.environ["DINO_LIGHTNING_RUN"] = time.strftime("%Y%m%d-%H%M%S", time.localtime(first_start()))
    return os.environ["DINO_LIGHTNING_RUN"]


def groups(program: str) -> str:
    """The options of each group, for `--help`; a folder in a group stands for its files."""
    shown = {
        group: dict.fromkeys(re.sub(r"/.*", "/…", name) for name in names) for group, names in options(program).items()
    }
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in shown.items())


def options(program: str) -> dict[str, list[str]]:
    """The options of each group that the program `train`, `evaluate` or `embed` has: files and dataclasses."""
    kinds = {field.name: field.type for field in dataclasses.fields(PROGRAMS[program])}
    kinds |= dict.fromkeys(BESIDE_KEYS[program], object)
    options = {
        group: [name for name in option_names(CONF / group) if _fits(CONF / group / f"{name}.yaml", kind)]
        for group, kind in sorted(kinds.items())
    }
    return {group: names for group, names in options.items() if names}


def _fits(path: Path, kind: object) -> bool:
    """Whether an option is of this kind or starts from one; experiments start from none."""
    schemas = SCHEMAS.get(path.parent.name, {})
    base = re.search(r"schema_(\w+)", path.read_text()) if path.exists() else None
    schema = schemas.get(base[1] if base else path.stem)
    return schema is None or issubclass(schema, kind)  # type: ignore[arg-type]
