"""Compose configurations inside a test, as the command line does.

Hydra looks through all its files for each configuration. Here it does so once for the groups that are chosen; values of
keys it then sets in a copy, which is its own last step, too (`tests/config/test_composing.py` compares).
"""

import pickle
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.overrides import prepare_overrides
from dino_lightning.cli.resolvers import run_name
from dino_lightning.cli.train import CONF
from dino_lightning.config import register

SMALL = [
    "data.train_images=96",
    "data.val_images=48",
    "data.num_workers=0",
    "data.batch_size_per_device=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "cpu_threads=1",
    "callbacks.pictures.images=2",
]
"""A run of seconds on the built-in images."""


def composed(*overrides: str, output_dir: Path | str = "never-written") -> DictConfig:
    """The configuration of `python train.py OVERRIDES`."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    return composition("config", *prepare_overrides(list(overrides), fast=False), f"output_dir={output_dir}")


def composed_evaluation(*overrides: str, output_dir: Path | str = "never-written") -> DictConfig:
    """The configuration of `dino eval OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    return composition("evaluate", *overrides, *_here(overrides), f"output_dir={output_dir}")


def composed_embedding(*overrides: str, output: Path | str = "never-written.parquet") -> DictConfig:
    """The configuration of `dino embed OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    return composition("embed", f"output={output}", *_here(overrides), *overrides)


def _here(overrides: tuple[str, ...]) -> list[str]:
    """What an evaluation has besides, wherever the overrides say nothing else."""
    words = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "feature_cache=null", "cpu_threads=1"]
    return [word for word in words if not any(o.startswith(word.split("=")[0] + "=") for o in overrides)]


def composition(root: str, *words: str) -> DictConfig:
    """The configuration of the file `conf/ROOT.yaml` and the words of a command line."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(words))
        if any(_is_for_hydra(override) for override in overrides):
            return by_hydra(root, *words)
        groups = tuple(word for word, override in zip(words, overrides, strict=True) if _is_group(override))
        config: DictConfig = pickle.loads(_of_groups(root, groups))
        ConfigLoaderImpl._apply_overrides_to_config([each for each in overrides if not _is_group(each)], config)
        return config
    except Exception:
        return by_hydra(root, *words)  # which finds the same error, in its own words


def by_hydra(root: str, *words: str) -> DictConfig:
    """The same, all of it by Hydra itself."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(root, overrides=list(words))


@cache
def _of_groups(root: str, groups: tuple[str, ...]) -> bytes:
    """Pickled: that copies in a fraction of the time that `copy` takes."""
    return pickle.dumps(by_hydra(root, *groups))


def _is_group(override: Override) -> bool:
    return override.package is not None or (CONF / override.key_or_group).is_dir()


def _is_for_hydra(override: Override) -> bool:
    """Whether it concerns more than this one configuration: a sweep, or how it is run."""
    return override.is_sweep_override() or override.is_hydra_override()
