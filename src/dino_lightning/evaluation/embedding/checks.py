"""What a configuration of `dino embed` and the arguments of `embed` must satisfy, before anything is read."""

from collections.abc import Sequence
from pathlib import Path

from dino_lightning.config import DevicesConfig, EmbedConfig
from dino_lightning.config.checks.evaluation import TRAINING_KEYS
from dino_lightning.config.constraints import check_devices, check_values
from dino_lightning.config.dotted import get_dotted
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.output import SUFFIXES, files_of
from dino_lightning.evaluation.features.choice import FeatureKind
from dino_lightning.runtime.environment import check_gpus, check_variables
from dino_lightning.runtime.files import check_writable


def check_embedding(config: EmbedConfig, *, overrides: Sequence[str] = ()) -> None:
    """Everything that the configuration alone can tell; `overrides` are the words of the command line."""
    check_values(config)
    FeatureKind(config.features, config.n_last_blocks).check()
    for word in overrides:
        key = word.lstrip("+~").split("=")[0]
        if key.startswith("data.") and key[5:] in (*TRAINING_KEYS, "holdout"):
            instead = "; set batch_size_per_device" if key == "data.batch_size_per_device" else ""
            raise UserError(f"{word}: {key} is for training, dino embed does not use it{instead}.")
    if config.image_resize is not None and config.image_resize < (config.image_size or config.image_resize + 1):
        wrong = "needs image_size" if config.image_size is None else f"is smaller than image_size={config.image_size}"
        raise UserError(f"image_resize={config.image_resize} {wrong}, the center taken from it.")
    if type(config.trainer) is not DevicesConfig:
        raise UserError("trainer: dino embed has no training loop; leave trainer=devices and set its keys.")
    check_devices(config.trainer)


def check_machine(config: EmbedConfig) -> None:
    """What the machine and its environment must offer."""
    check_variables()
    check_gpus(config.trainer.accelerator)


def check_output(output: Path, config: EmbedConfig) -> None:
    """Raise `UserError` for a file of features that is of no known kind, that is there, or that cannot be written."""
    if output.suffix not in SUFFIXES:
        raise UserError(f"output={output}: expected a file that ends in {' or '.join(SUFFIXES)}.")
    images = get_dotted(config, "data.path")
    for file in files_of(output):
        if images is not None and file.absolute() == usable_path("data.path", images).absolute():
            raise UserError(f"output={output} would take the place of data.path={images}; choose another name.")
        if file.is_dir():
            raise UserError(f"output={output}: {file} is a folder; expected the name of a file.")
        if file.exists() and not config.overwrite:
            raise UserError(f"output={output}: {file} is there already; choose another name or set overwrite=true.")
    check_writable("output", output.parent)
