"""`dino eval`: one evaluation of one network, or with `--multirun` many."""

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
