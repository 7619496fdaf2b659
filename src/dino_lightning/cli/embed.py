"""`dino embed`, `python -m dino_lightning.cli.embed`: features of many images, in a file.

    dino embed checkpoint=outputs/RUN data.path=~/photos output=photos.parquet
    dino embed checkpoint=timm:NAME data=archive data.path=photos.zip output=photos.npy

Exit status: 0, or 2 where a setting, a file or the combination is wrong, in one sentence.
"""

import os
import sys
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.completion import asks_for_completion, complete_after
from dino_lightning.cli.errors import EXPLAINED, exit_with_error, refuse_number
from dino_lightning.cli.overrides import quote_overrides
from dino_lightning.cli.resolvers import groups
from dino_lightning.cli.train import CONF
from dino_lightning.config import EmbedConfig, register
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

PROGRAM = "dino embed"


def main() -> None:
    """Entry point."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise to us instead of printing and leaving with status 1
    register()
    if asks_for_completion(sys.argv):
        complete_after(quote_overrides)
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    try:
        if {"-m", "--multirun"} & set(sys.argv[1:]):  # here already: Hydra would write a file of its own
            raise UserError("--multirun: dino embed writes one file; run it once for each.")
        _embed()
    except EXPLAINED as error:
        exit_with_error(error, program=PROGRAM)
    except OverflowError as error:
        refuse_number(error, program=PROGRAM)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="embed")
def _embed(cfg: DictConfig) -> None:
    try:
        embed_as(cfg, overrides=list(HydraConfig.get().overrides.task))
    except EXPLAINED as error:
        exit_with_error(error, program=PROGRAM)  # here already: Hydra would print the overrides above the sentence


def embed_as(composed: DictConfig, *, overrides: list[str]) -> None:
    """Write the features as configured and say where they are."""
    from dino_lightning.config.constraints import check_keys  # torch loads in seconds: not needed for --help
    from dino_lightning.evaluation.embedding.run import run_embedding

    check_keys(composed)
    config = cast(EmbedConfig, OmegaConf.to_object(composed))
    output = usable_path("output", config.output).absolute()
    found = run_embedding(config, output=output, overrides=overrides, own_threads=True)
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
        print(f"{len(found)} images, {found.features.shape[1]} features each: {output}")


if __name__ == "__main__":
    main()
