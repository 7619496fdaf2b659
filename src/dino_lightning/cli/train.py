"""The command line: `python train.py` and `dino-train`.

Hydra composes the configuration; here it becomes dataclasses, and every error that a user can cause becomes one
sentence and exit status 2.
"""

import dataclasses
import os
import re
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dino_lightning.cli.completion import asks_for_completion, complete_after
from dino_lightning.cli.errors import explain
from dino_lightning.cli.overrides import in_hydras_grammar
from dino_lightning.cli.plugins import import_one, with_imports
from dino_lightning.cli.quick_start import with_quick_start
from dino_lightning.cli.sweeps import Jobs, check_sweeper, in_own_process, runs_at_once
from dino_lightning.config import SCHEMAS, EmbedConfig, EvaluateConfig, TimmConfig, TrainConfig, register
from dino_lightning.config.conf_dir import CONF, option_names
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import RanksDifferError, UserError, cannot_be_written
from dino_lightning.runtime import signals as outside_training
from dino_lightning.runtime.scheduler import INTERRUPTED, PREEMPTED, first_start

PROGRAMS = {"train": TrainConfig, "evaluate": EvaluateConfig, "embed": EmbedConfig}
"""Program -> the root of its configuration."""

BESIDE_KEYS = {"train": ("scale", "sweep"), "evaluate": (), "embed": ()}
"""Program -> groups that set keys of others and have none of their own."""

REPLAY = "replay"
"""First word of the command that shows a step that was not finite once more."""

JOBS = Jobs()
"""The runs of `--multirun`."""

PRINTING = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}
"""Flags of Hydra's that print and do nothing else."""

ALONE_S = 2.0
"""Seconds after which an error counts as that of this process alone."""

EXPLAINED = (UserError, HydraException, OmegaConfBaseException)
"""Errors that a user causes; all others keep their traceback."""


def train() -> None:
    """Entry point of training."""
    outside_training.listen()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise to us instead of printing and leaving with status 1
    register()
    try:
        sys.argv[1:] = with_imports(sys.argv[1:])
        if sys.argv[1:2] == [REPLAY]:
            from dino_lightning.training.debug.replay import main  # torch and lightning load in seconds

            sys.exit(main([word for word in sys.argv[2:] if not word.startswith("imports=")]))
        if asks_for_completion(sys.argv):
            complete_after(partial(as_hydra_takes_it, fast=False))  # to look for a GPU takes seconds
        sys.argv[1:] = as_hydra_takes_it(sys.argv[1:])
    except UserError as error:
        refuse(error)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    try:
        _train()
    except EXPLAINED as error:
        refuse(error)
    except OSError as error:
        refuse_folder(error)
    except OverflowError as error:
        refuse_number(error)
    except ValueError as error:
        if str(error).startswith("Only one of --run"):  # Hydra's
            refuse(UserError(f"{error}."))
        if "No trials are completed" not in str(error):  # Optuna's, where all runs have failed
            raise
    except SystemExit as left:
        if left.code in (PREEMPTED, INTERRUPTED):
            # All is saved and closed. To take the libraries apart can take Python ten seconds, of the few that a
            # scheduler gives.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code)
        raise
    JOBS.finish()
    outside_training.ignore()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _train(cfg: DictConfig) -> float | None:
    words = list(HydraConfig.get().overrides.task)
    run, several = partial(train_one, given=words), HydraConfig.get().mode == RunMode.MULTIRUN
    if several and (at_once := runs_at_once(HydraConfig.get().launcher)):
        run = partial(in_own_process, train_one, given=words, at_once=at_once)
    try:
        # With several jobs, the numbered folder of this one. The processes of the other devices, which Lightning starts
        # once with the same arguments, go through the same jobs in step.
        given = HydraConfig.get().runtime.output_dir if several else cfg.output_dir
        cfg.output_dir = str(usable_path("output_dir", given).absolute())
        return JOBS.attempt(run, cfg, words=words, sentence=sentence) if several else run(cfg)
    except EXPLAINED as error:
        with suppress(OSError):  # Hydra made the folder; leave it only where something stands in it
            Path(cfg.output_dir).rmdir()
        refuse(error)  # here already: Hydra would print the overrides above the sentence
    except FloatingPointError as error:  # of all ranks at the same step
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"dino-lightning: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        from dino_lightning.runtime.collectives import another_rank_is_lost

        if another_rank_is_lost(error):
            end_without_others(error)
        raise


def train_one(cfg: DictConfig, **options: Any) -> float | None:
    """`run_training`, in whatever process: in one that has just been started nothing is known of resolvers and files of
    one's own."""
    register()
    for name in cfg.imports:
        import_one(name)
    from dino_lightning.training.run import run_training  # torch and lightning load in seconds: not needed for --help

    return run_training(cfg, **options)


class SweepStart(Callback):
    """Told by Hydra that a sweep is about to start."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what no run of it could change, and note what stands in its folder."""
        try:
            check_sweeper(config)
        except UserError as error:
            refuse(error)
        JOBS.begin(Path(config.hydra.sweep.dir))


def sentence(error: Exception) -> str | None:
    """What a failed run has to say, or None for an error that nobody foresaw."""
    return explain(error, conf=CONF) if isinstance(error, (*EXPLAINED, FloatingPointError)) else None


def refuse(error: Exception, *, program: str = "dino-lightning") -> NoReturn:
    """Say what is wrong, once over all processes that have the same error, and leave with status 2."""
    words, number = explain(error, conf=CONF), int(os.environ.get("LOCAL_RANK", "0"))
    if number == 0:
        print(f"{program}: {words}", file=sys.stderr)
    elif not isinstance(error, RanksDifferError):
        # An error that the first process of the machine has, too, makes the launcher end this one meanwhile.
        time.sleep(ALONE_S)
        print(f"{program}: on rank {os.environ.get('RANK', number)}: {words}", file=sys.stderr)
    sys.exit(2)


def end_without_others(error: RuntimeError) -> NoReturn:
    """Say that another rank is lost, in place of the traceback of whatever waited for it, and leave with status 1."""
    cause = " ".join(str(error).split())
    print(f"dino-lightning: rank {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} ends because another rank "
          "has ended or has not answered within collective_timeout_s; if one has failed, its own message says why "
          f"({cause[:300]})", file=sys.stderr)  # fmt: skip
    sys.exit(1)


def refuse_folder(error: OSError, *, program: str = "dino-lightning") -> NoReturn:
    """Say that Hydra could not make the folder of the run, which it does before all else; raise other errors again."""
    if isinstance(error, BrokenPipeError) and PRINTING & set(sys.argv):  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes on its way out
        sys.exit(0)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [file for file in files if Path(file).name not in ("pathlib.py", "_local.py", "os.py")]
    if error.filename is None or Path(hydra.__file__).parent not in Path(ours[-1]).parents:
        raise error
    refuse(cannot_be_written("output_dir", error.filename, error), program=program)


def refuse_number(error: OverflowError, *, program: str = "dino-lightning") -> NoReturn:
    """Say that the number of a key has hundreds of digits, for which OmegaConf has no error; raise others again."""
    if "full_key" not in str(error):
        raise error
    refuse(error, program=program)


def as_hydra_takes_it(words: list[str], *, fast: bool | None = None) -> list[str]:
    """The words of a command line with what they leave unsaid, and in Hydra's grammar; networks of timm among them
    become options. `fast` says whether there is a GPU; None looks where that matters."""
    register_timm_networks(words)
    return with_settings_for_data(with_quick_start(in_hydras_grammar(words), fast=fast))


def register_timm_networks(overrides: list[str]) -> None:
    """Make `backbone=NAME` work for every network of timm: an option for each name that is not a file."""
    # Several for a grid, and `choice(…)` of some for Optuna.
    names = [part for text in overrides if text.startswith("backbone=") for part in re.findall(r"[^,()]+", text[9:])]
    unknown = set(names) - set(option_names(CONF / "backbone"))
    if not unknown:
        return
    import timm

    for name in filter(timm.is_model, sorted(unknown)):
        ConfigStore.instance().store(group="backbone", name=name, node=TimmConfig(name=name))


def with_settings_for_data(overrides: list[str]) -> list[str]:
    """The overrides and, where they name data but no experiment, the experiment for photographs.

    The default experiment, `quick`, is tuned to the drawings of the built-in set. A sweep over experiments names them.
    """
    groups = dict(text.split("=", 1) for text in overrides if "=" in text)
    if groups.get("data", "builtin") == "builtin" or "experiment" in groups or _names_experiments(groups.get("sweep")):
        return overrides
    # Beside its cause: Hydra refuses overrides that do not stand together, such as one behind `--multirun`.
    place = overrides.index(f"data={groups['data']}")
    return [*overrides[:place], "experiment=photos32", *overrides[place:]]


def _names_experiments(sweep: str | None) -> bool:
    if sweep in (None, "null"):
        return False
    path = CONF / "sweep" / f"{sweep}.yaml"
    return not path.exists() or "experiment:" in path.read_text()


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
    """The options of each group that the program `train`, `evaluate` or `embed` knows: files, without the schemas."""
    kinds = {field.name: field.type for field in dataclasses.fields(PROGRAMS[program])}
    kinds |= dict.fromkeys(BESIDE_KEYS[program], object)
    return {
        folder.name: [name for name in option_names(folder) if _fits(folder / f"{name}.yaml", kinds[folder.name])]
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name in kinds
    }


def _fits(path: Path, kind: object) -> bool:
    """Whether an option starts from a schema of this kind; experiments start from none."""
    schema = re.search(r"schema_(\w+)", path.read_text())
    return schema is None or issubclass(SCHEMAS[path.parent.name][schema[1]], kind)  # type: ignore[arg-type]
