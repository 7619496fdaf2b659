"""Conditions on single values, and how a value that breaks one is refused."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dino_lightning.distributed import trains_on_cpu
from dino_lightning.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on one value and the words for it."""

    expected: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """A finite number of at least `low`."""
    return Rule(f"at least {low}", lambda value: math.isfinite(value) and value >= low)


POSITIVE = Rule("a positive number", lambda value: math.isfinite(value) and value > 0)
SHARE = Rule("a share from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Rule("a share from 0 up to but not including 1", lambda value: 0 <= value < 1)
NEIGHBOURS = Rule("one or more numbers of at least 1", lambda value: bool(value) and min(value) >= 1)


def check_values(config: Any, rules: Mapping[str, Rule], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse the first value that breaks its rule or is none of its choices; keys that `config` lacks are skipped."""
    for key, rule in rules.items():
        value = lookup(config, key)
        if value is not None and not rule.holds(value):
            raise UserError(f"{key}={shown(value)}: expected {rule.expected}.")
    for key, known in choices.items():
        value = lookup(config, key)
        if value is not None and value not in known:
            raise UserError(f"{key}={value}: {nearest(value, known)}")


def check_devices(trainer: Any, known: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse devices that this machine lacks, and values of `trainer` that are not among the `known` ones of a key."""
    for key, choices in known.items():
        value = str(getattr(trainer, key))
        if value not in choices:
            raise UserError(f"trainer.{key}={value}: {nearest(value, choices)}")
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={trainer.accelerator}: this machine has no GPU that PyTorch can use; "
                        "set trainer.accelerator=cpu.")  # fmt: skip
    if trains_on_cpu(trainer.accelerator) and str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision={trainer.precision} needs a GPU; on a CPU set trainer.precision=32.")


def check_keys(composed: DictConfig, *, prefix: str = "") -> None:
    """Refuse keys that no dataclass has: `+key=value` and files can add them, and nothing would read them."""
    schema = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(schema):
        return
    known = [field.name for field in dataclasses.fields(schema)]
    for name in composed:
        if name not in known:
            raise UserError(f"{prefix}{name} is not a key of the configuration; {nearest(str(name), known)}")
        node = composed._get_node(name)
        if isinstance(node, DictConfig):
            check_keys(node, prefix=f"{prefix}{name}.")


def lookup(config: Any, key: str) -> Any:
    """The value at a dotted key, or None where this configuration has no such key."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).replace(" ", "")
