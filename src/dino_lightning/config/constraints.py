"""Checks of single values, keys and devices."""

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from dino_lightning.config.dotted import format_value
from dino_lightning.config.ranges import Range
from dino_lightning.config.trainer import DevicesConfig, TrainerConfig
from dino_lightning.errors import UserError, did_you_mean


def check_values(config: Any, *, prefix: str = "") -> None:
    """Refuse the first value outside the range that its field declares (`config.ranges`)."""
    for key, value, allowed in declared_ranges(config, prefix=prefix):
        if value is not None:
            allowed.check(key, value)


def declared_ranges(config: Any, *, prefix: str = "") -> Iterator[tuple[str, Any, Range]]:
    """Dotted key, value and range of each field of a dataclass that declares a range, also in nested dataclasses."""
    ranges = ranges_of(type(config))
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from declared_ranges(value, prefix=f"{key}.")
        elif field.name in ranges:
            yield key, value, ranges[field.name]


@cache
def ranges_of(schema: type) -> dict[str, Range]:
    """Field name -> range. Raises TypeError for an `Annotated` marker that is not a `Range`."""
    ranges = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        for marker in getattr(hint, "__metadata__", ()):
            if not isinstance(marker, Range):
                raise TypeError(f"{schema.__name__}.{name}: {marker!r} is not a Range of dino_lightning.config.ranges")
            ranges[name] = marker
    return ranges


def check_devices(trainer: DevicesConfig | TrainerConfig) -> None:
    """Refuse devices that this machine does not have, and half precision on a CPU."""
    from dino_lightning.runtime.devices import trains_on_cpu  # torch takes seconds to import

    _check_accelerator(trainer.accelerator)
    _check_count(trainer.devices, on_cpu=trains_on_cpu(trainer.accelerator), accelerator=trainer.accelerator)
    if trains_on_cpu(trainer.accelerator) and str(trainer.precision).startswith("16"):
        raise UserError(f"trainer.precision={trainer.precision} needs a GPU; on a CPU set trainer.precision=32.")


def _check_accelerator(name: str) -> None:
    import torch

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
    kind = "GPU" if name in ("gpu", "cuda") else f"device of type '{name}'"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f", with CUDA_VISIBLE_DEVICES={visible}" if kind == "GPU" and visible is not None else ""
    raise UserError(
        f"trainer.accelerator={name}: this machine has no {kind} that PyTorch can use{hidden}; set "
        "trainer.accelerator=cpu."
    )


def _check_count(devices: Any, *, on_cpu: bool, accelerator: str) -> None:
    """`devices` as Lightning reads it: a number, a list of indices, either as text, -1 for all, or `auto`."""
    import torch

    text = format_value(devices).replace(" ", "").strip("[]")
    if text == "auto":
        return
    parts = [part for part in text.split(",") if part]
    is_list = isinstance(devices, list) or "," in text
    numbers = [int(part) for part in parts if re.fullmatch(r"-?\d+", part)]
    count = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    problem = ""
    if on_cpu:
        if is_list or len(numbers) != 1 or numbers[0] < 1:
            problem = "expected auto or a number of processes of at least 1 on a CPU"
    elif len(numbers) != len(parts) or not parts or (not is_list and numbers[0] < 1 and numbers[0] != -1):
        problem = "expected auto, a number of GPUs of at least 1, or a list of their indices such as [0,1]"
    elif is_list and count and (not {*numbers} <= {*range(count)} or len(set(numbers)) < len(numbers)):
        problem = f"PyTorch sees {count} GPU(s) on this machine; expected different indices from 0 to {count - 1}"
    elif not is_list and count and numbers[0] > count:
        problem = f"PyTorch sees {count} GPU(s) on this machine; set trainer.devices to at most {count}"
    if problem:
        raise UserError(f"trainer.devices={format_value(devices)}: {problem}.")


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know."""
    import timm  # takes seconds

    if not timm.is_model(name):
        raise UserError(
            f"backbone.name={name} is not a network of timm {timm.__version__}; "
            f"{did_you_mean(name, timm.list_models())}"
        )


def check_keys(composed: DictConfig, *, prefix: str = "") -> None:
    """Refuse keys that no dataclass has: `+key=value` and files can add them, but nothing would read them."""
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
