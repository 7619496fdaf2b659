"""Compose configurations in a test as the command line does, but faster.

Hydra reads all its files for each configuration. Here the configuration is cached for each choice of groups, and the
other overrides are applied to a copy, as in Hydra's last step. `tests/config/test_composing.py` compares with Hydra.
"""

import pickle
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.overrides import prepare_training
from dino_lightning.cli.program import run_name
from dino_lightning.config import register
from dino_lightning.runtime.files import CONF

SMALL = [
    "data.train_images=96",
    "data.val_images=48",
    "data.num_workers=0",
    "crops.local_count=2",
    "data.batch_size_per_device=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "cpu_threads=1",
    "callbacks.pictures.images=2",
]
"""Overrides for a run of a few seconds on the built-in images."""


def composed(*overrides: str, output_dir: Path | str = "never-written") -> DictConfig:
    """The configuration of `python train.py OVERRIDES`."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    return composition("config", *prepare_training(list(overrides), fast=False), f"output_dir={output_dir}")


def composed_evaluation(*overrides: str, output_dir: Path | str = "never-written") -> DictConfig:
    """The configuration of `dino eval OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    return composition("evaluate", *overrides, *_defaults(overrides), f"output_dir={output_dir}")


def composed_embedding(*overrides: str, output: Path | str = "never-written.parquet") -> DictConfig:
    """The configuration of `dino embed OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    return composition("embed", f"output={output}", *_defaults(overrides), *overrides)


def _defaults(overrides: tuple[str, ...]) -> list[str]:
    """Settings of evaluations in tests, except for keys in `overrides`."""
    defaults = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "feature_cache=null", "cpu_threads=1"]
    return [each for each in defaults if not any(o.startswith(each.split("=")[0] + "=") for o in overrides)]


def composition(root: str, *arguments: str) -> DictConfig:
    """The configuration of `conf/ROOT.yaml` with the overrides in `arguments`."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
        if any(_is_for_hydra(override) for override in overrides):
            return by_hydra(root, *arguments)
        groups = tuple(each for each, override in zip(arguments, overrides, strict=True) if _is_group(override))
        config: DictConfig = pickle.loads(_of_groups(root, groups))
        ConfigLoaderImpl._apply_overrides_to_config([each for each in overrides if not _is_group(each)], config)
        return config
    except Exception:
        return by_hydra(root, *arguments)  # raises the same error with Hydra's message


def by_hydra(root: str, *arguments: str) -> DictConfig:
    """The same configuration, composed by Hydra."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose(root, overrides=list(arguments))


@cache
def _of_groups(root: str, groups: tuple[str, ...]) -> bytes:
    """Pickled, because unpickling is much faster than `copy`."""
    return pickle.dumps(by_hydra(root, *groups))


def _is_group(override: Override) -> bool:
    return override.package is not None or (CONF / override.key_or_group).is_dir()


def _is_for_hydra(override: Override) -> bool:
    """Whether an override is a sweep or a setting of Hydra, not a key of the configuration."""
    return override.is_sweep_override() or override.is_hydra_override()
