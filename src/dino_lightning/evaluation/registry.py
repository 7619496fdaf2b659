"""The evaluations by name, those of this package and yours alike.

    @register_evaluation("knn", KNNEval)
    def evaluate(config: KNNEval, task: Task) -> Iterator[Result]: ...

`dino eval imports=my_evaluation.py eval=NAME` runs an evaluation of a file of yours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from dino_lightning.config import SCHEMAS, DataConfig, EvaluationConfig, ImagesConfig
from dino_lightning.config.registry import register_schema
from dino_lightning.evaluation.context import Result, Task

Evaluate = TypeVar("Evaluate", bound=Callable[[Any, Task], Iterator[Result]])

MODULES = {
    "knn": "classification.knn",
    "linear": "classification.linear",
    "linear_grid": "classification.linear_grid",
    "logistic": "classification.logistic",
    "finetune": "classification.finetune",
    "neighbors": "classification.neighbors",
    "retrieval": "retrieval.retrieval",
    "copy_detection": "retrieval.copy_detection",
    "video": "video.video",
    "attention": "attention.attention",
}
"""Where the evaluations of this package register; imported when they are needed."""


@dataclass(frozen=True)
class Evaluation:
    """A registered evaluation."""

    name: str
    evaluate: Callable[[Any, Task], Iterator[Result]]
    data: tuple[type[ImagesConfig], ...]
    """The kinds of data that it accepts."""
    check: Callable[[Any, Any], None]
    """`check(config.eval, config.data)` raises `UserError` for settings that cannot work; called before any work."""


EVALUATIONS: dict[type[EvaluationConfig], Evaluation] = {}


def register_evaluation(
    name: str,
    config: type[EvaluationConfig],
    *,
    data: tuple[type[ImagesConfig], ...] = (DataConfig,),
    check: Callable[[Any, Any], None] = lambda eval_config, data_config: None,
) -> Callable[[Evaluate], Evaluate]:
    """Make `eval=NAME` run the decorated function; the fields of the dataclass `config` are the keys of `eval`.

    The function yields results and saves pictures with `task.save_picture`; the caller writes the results to disk.
    """

    def register(evaluate: Evaluate) -> Evaluate:
        register_schema("eval", name, config)
        EVALUATIONS[config] = Evaluation(name, evaluate, data, check)
        return evaluate

    return register


def find_evaluation(config: EvaluationConfig) -> Evaluation:
    """The evaluation that `config` belongs to."""
    if type(config) not in EVALUATIONS:
        name = next(name for name, schema in SCHEMAS["eval"].items() if schema is type(config))
        import_module(f"dino_lightning.evaluation.{MODULES[name]}")
    return EVALUATIONS[type(config)]
