"""Checks of a configuration of `dino embed` or of the arguments of `embed`, before anything is read."""

from collections.abc import Sequence
from pathlib import Path

from dino_lightning.config import EmbedConfig
from dino_lightning.config.constraints import check_values, ranges_of
from dino_lightning.config.dotted import get_dotted
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError
from dino_lightning.evaluation.checks import TRAINING_KEYS, check_resize, check_trainer, check_training_keys
from dino_lightning.evaluation.embedding.output import SUFFIXES, files_of
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.runtime.files import check_writable


def feature_spec(features: str, n_last_blocks: int) -> FeatureSpec:
    """The features of `dino embed`, `embed` and `DinoFeatures`. Raises `UserError` for values that cannot be."""
    ranges = ranges_of(EmbedConfig)
    ranges["features"].check("features", features)
    ranges["n_last_blocks"].check("n_last_blocks", n_last_blocks)
    if n_last_blocks > 1 and features == "mean_patch":
        raise UserError(f"n_last_blocks={n_last_blocks} is for features=class; with features=mean_patch set it to 1.")
    return FeatureSpec(n_last_blocks, features=features, prefix="")


def check_embedding(config: EmbedConfig, *, overrides: Sequence[str] = ()) -> None:
    """All checks that need only the configuration and `overrides`, those of the command line."""
    check_values(config)
    feature_spec(config.features, config.n_last_blocks)
    keys = (*TRAINING_KEYS, "holdout")
    check_training_keys(overrides, keys, program="dino embed", batch_key="batch_size_per_device")
    check_resize(config.image_size, config.image_resize, prefix="")
    check_trainer(config.trainer, program="dino embed")


def check_output(output: Path, config: EmbedConfig) -> None:
    """Raise `UserError` for an output file of an unknown type, that exists already, or that cannot be written."""
    if output.suffix not in SUFFIXES:
        raise UserError(f"output={output}: expected a file name that ends in {' or '.join(SUFFIXES)}.")
    images = get_dotted(config, "data.path")
    for file in files_of(output):
        if images is not None and file.absolute() == usable_path("data.path", images).absolute():
            raise UserError(f"output={output} would overwrite data.path={images}; choose another name.")
        if file.is_dir():
            raise UserError(f"output={output}: {file} is a folder; expected a file name.")
        if file.exists() and not config.overwrite:
            raise UserError(f"output={output}: {file} already exists; choose another name or set overwrite=true.")
    check_writable("output", output.parent)
