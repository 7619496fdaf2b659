"""Evaluate a network: k-NN, linear, fine-tuning, retrieval, copies, video, attention.

usage: dino eval CHECKPOINT [group=option] [group.key=value]

CHECKPOINT is checkpoint: a run's folder, a weights file, timm:NAME, hf:OWNER/NAME or untrained:NAME.

Examples:
  dino eval outputs/RUN                            k-NN on the built-in images
  dino eval FILE.pth eval=linear data=imagenet data.path=DIR
  dino eval timm:vit_small_patch16_224.dino eval=video data.path=DIR
  dino eval outputs/RUN eval=attention data=pictures data.path=photo.jpg
  dino eval outputs/RUN baseline=true              and the untrained network for comparison
  dino eval A,B --multirun eval=knn,linear_grid    several evaluations
"""

from functools import partial

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dino_lightning.cli.overrides import quote_overrides, with_plain_words
from dino_lightning.cli.program import attempt, run


def main(words: list[str]) -> None:
    """Evaluate as the words say."""
    run(words, task, verb="eval", root="evaluate", prepare=prepare)


def prepare(words: list[str]) -> list[str]:
    """Hydra's overrides."""
    return quote_overrides(with_plain_words(words, "checkpoint", verb="eval"))


def task(cfg: DictConfig) -> float | None:
    """One evaluation as Hydra composed it."""
    from dino_lightning.evaluation.run import run_evaluation  # torch takes seconds to import

    return attempt(partial(run_evaluation, overrides=list(HydraConfig.get().overrides.task)), cfg, verb="eval")
