"""Conditions on single values, and how a value that breaks one is refused."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dino_lightning.config.dotted import format_value, get_dotted
from dino_lightning.config.paths import PATHS, usable_path
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.runtime.devices import trains_on_cpu

LARGEST = 2**53


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
NEIGHBORS = Rule("one or more numbers of at least 1", lambda value: bool(value) and min(value) >= 1)


def check_values(config: Any, rules: Mapping[str, Rule], choices: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse the first path that none can be, value that breaks its rule, or is none of its choices.

    Keys that `config` lacks are skipped.
    """
    _check_sizes(config)
    check_paths(config)
    for key, rule in rules.items():
        value = get_dotted(config, key)
        if value is not None and not rule.holds(value):
            raise UserError(f"{key}={format_value(value)}: expected {rule.expected}.")
    for key, known in choices.items():
        value = get_dotted(config, key)
        if value is not None and value not in known:
            raise UserError(f"{key}={value}: {did_you_mean(value, known)}")


def check_paths(config: Any) -> None:
    """Refuse the first path that no file can have."""
    for key in PATHS:
        value = get_dotted(config, key)
        if value is not None:
            usable_path(key, value)


def _check_sizes(config: Any, prefix: str = "") -> None:
    """Refuse lists in lists, which OmegaConf takes for numbers, and whole numbers that no float has exactly.

    No rule below and no library expects them.
    """
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_sizes(value, f"{key}.")
        if (
            isinstance(value, list)
            and "list[" in str(field.type)
            and any(isinstance(one, list | dict) for one in value)
        ):
            raise UserError(f"{key}={format_value(value)}: expected a list of single values, without lists in it.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > LARGEST:
                raise UserError(f"{key}={format_value(value)}: expected no whole number beyond {LARGEST}.")


def check_devices(trainer: Any, known: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse devices that this machine lacks, and values of `trainer` that are not among the `known` ones of a key."""
    for key, choices in known.items():
        value = str(getattr(trainer, key))
        if value not in choices:
            raise UserError(f"trainer.{key}={value}: {did_you_mean(value, choices)}")
    _check_accelerator(trainer.accelerator)
    _check_count(trainer.devices, on_cpu=trains_on_cpu(trainer.accelerator), accelerator=trainer.accelerator)
    if trains_on_cpu(trainer.accelerator) and str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision={trainer.precision} needs a GPU; on a CPU set trainer.precision=32.")


def _check_accelerator(name: str) -> None:
    here = {
        "gpu": torch.cuda.is_available() or torch.backends.mps.is_available(),  # as Lightning understands it
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
        "tpu": find_spec("torch_xla") is not None,
        "hpu": find_spec("habana_frameworks") is not None,
    }
    if here.get(name, True):
        return
    kind = "GPU" if name in ("gpu", "cuda") else f"device of the kind '{name}'"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f", with CUDA_VISIBLE_DEVICES={visible}" if kind == "GPU" and visible is not None else ""
    raise UserError(
        f"trainer.accelerator={name}: this machine has no {kind} that PyTorch can use{hidden}; set "
        "trainer.accelerator=cpu."
    )


def _check_count(devices: Any, *, on_cpu: bool, accelerator: str) -> None:
    """`devices` as Lightning reads it: a number, a list of indices, either as text, -1 for all, or `auto`."""
    text = format_value(devices).strip("[]")
    parts = [part for part in text.split(",") if part]
    several = isinstance(devices, list) or "," in text
    numbers = [int(part) for part in parts if re.fullmatch(r"-?\d+", part)]
    if text == "auto":
        return
    if on_cpu:
        if several or len(numbers) != 1 or numbers[0] < 1:
            raise UserError(
                f"trainer.devices={format_value(devices)}: expected auto or a number of processes of at least 1 "
                "on a CPU."
            )
        return
    if len(numbers) != len(parts) or not parts or (not several and numbers[0] < 1 and numbers[0] != -1):
        raise UserError(
            f"trainer.devices={format_value(devices)}: expected auto, a number of GPUs of at least 1, or a list "
            "of their indices such as [0,1]."
        )
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if several and (max(numbers) >= count or min(numbers) < 0 or len(set(numbers)) < len(numbers)):
        raise UserError(
            f"trainer.devices={format_value(devices)}: this machine shows {count} GPU(s) to PyTorch; expected "
            f"different indices from 0 to {count - 1}."
        )
    if not several and numbers[0] > count:
        raise UserError(
            f"trainer.devices={format_value(devices)}: this machine shows {count} GPU(s) to PyTorch; set "
            f"trainer.devices to at most {count}."
        )


def check_keys(composed: DictConfig, *, prefix: str = "") -> None:
    """Refuse keys that no dataclass has: `+key=value` and files can add them, and nothing would read them."""
    schema = OmegaConf.get_type(composed)
    if not dataclasses.is_dataclass(schema):
        return
    known = [field.name for field in dataclasses.fields(schema)]
    for name in composed:
        if name not in known:
            choice = did_you_mean(f"{prefix}{name}", [f"{prefix}{one}" for one in known])
            raise UserError(f"{prefix}{name} is not a key of the configuration; {choice}")
        node = composed._get_node(name)
        if isinstance(node, DictConfig):
            check_keys(node, prefix=f"{prefix}{name}.")
