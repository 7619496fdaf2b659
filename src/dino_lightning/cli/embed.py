"""Write the features of many images to a file.

usage: dino embed CHECKPOINT PATH output=FILE [group=option] [key=value]

CHECKPOINT is checkpoint, as for dino eval; PATH is data.path.

Examples:
  dino embed outputs/RUN ~/photos output=photos.parquet
  dino embed timm:vit_small_patch16_224.dino photos.zip data=archive output=photos.npy
  dino embed outputs/RUN ~/photos output=x.npy features=mean_patch    the mean patch token
  dino embed outputs/RUN ~/photos output=x.npy trainer.devices=8      repeat the command to continue
"""

from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.errors import EXPLAINED, explained
from dino_lightning.cli.exit import exit_with_error
from dino_lightning.cli.overrides import MULTIRUN_FLAGS, quote_overrides, with_plain_words
from dino_lightning.cli.program import run
from dino_lightning.config import EmbedConfig
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError
from dino_lightning.runtime.ranks import is_first_process


def main(words: list[str]) -> None:
    """Embed as the words say."""
    if set(MULTIRUN_FLAGS) & set(words):  # before Hydra writes a file for the sweep
        raise UserError("--multirun: dino embed writes one file; run it once for each.")
    run(words, task, verb="embed", root="embed", prepare=prepare)


def prepare(words: list[str]) -> list[str]:
    """Hydra's overrides."""
    return quote_overrides(with_plain_words(words, "checkpoint", "data.path", verb="embed"))


def task(cfg: DictConfig) -> None:
    """Embed as Hydra composed it."""
    try:
        write_features(cfg, overrides=list(HydraConfig.get().overrides.task))
    except EXPLAINED as error:
        exit_with_error(explained(error, verb="embed"), program="dino embed")  # Hydra would print the overrides, too


def write_features(composed: DictConfig, *, overrides: list[str]) -> None:
    """Write the features as configured and print where they are."""
    from dino_lightning.config.constraints import check_keys  # torch takes seconds to import
    from dino_lightning.evaluation.embedding.run import run_embedding

    check_keys(composed)
    config = cast(EmbedConfig, OmegaConf.to_object(composed))
    output = usable_path("output", config.output).absolute()
    embeddings = run_embedding(config, output=output, overrides=overrides, own_threads=True)
    if is_first_process():
        print(f"{len(embeddings)} images, {embeddings.features.shape[1]} features each: {output}")
