"""Compose configurations inside a test, as the command line does."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli import CONF, register_timm_networks, run_name, with_settings_for_data, with_shards_in_one_piece
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
    register_timm_networks(list(overrides))
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = with_shards_in_one_piece(with_settings_for_data(list(overrides)))
        return compose("config", overrides=[*words, f"output_dir={output_dir}"])


def composed_evaluation(*overrides: str, output_dir: Path | str = "never-written") -> DictConfig:
    """The configuration of `dino-eval OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    here = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "feature_cache=null", "cpu_threads=1"]
    here = [word for word in here if not any(o.startswith(word.split("=")[0] + "=") for o in overrides)]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("evaluate", overrides=[*overrides, *here, f"output_dir={output_dir}"], return_hydra_config=False)


def composed_embedding(*overrides: str, output: Path | str = "never-written.parquet") -> DictConfig:
    """The configuration of `dino-embed OVERRIDES`, on one CPU and without the user's feature cache."""
    register()
    here = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "feature_cache=null", "cpu_threads=1"]
    here = [word for word in here if not any(o.startswith(word.split("=")[0] + "=") for o in overrides)]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("embed", overrides=[f"output={output}", *here, *overrides])
