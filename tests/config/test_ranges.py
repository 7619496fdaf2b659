"""Allowed values that the fields of the configuration declare."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from dino_lightning.config import MethodConfig
from dino_lightning.config.constraints import check_values, ranges_of
from dino_lightning.config.docs import all_keys, path_keys
from dino_lightning.config.ranges import AtLeast, Duration, OneOf, Pair, Positive, Range, Share
from dino_lightning.errors import UserError

KEYS = all_keys()
SCHEMAS = sorted({key.schema for key in KEYS}, key=lambda schema: schema.__name__)
WRONG: list[Any] = ["a\0b", []]
UNLIMITED = {
    "trainer.max_epochs",  # checked together with `max_steps`
    "trainer.max_steps",
    "trainer.min_epochs",
    "trainer.min_steps",
    "trainer.check_val_every_n_epoch",  # Lightning checks these
    "trainer.num_sanity_val_steps",
    "trainer.reload_dataloaders_every_n_epochs",
    "callbacks.knn.headline_k",  # one of `k`
    "data.nan_value",
    "data.year",  # a folder of DAVIS
}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_range_is_enforced(schema: type) -> None:
    ranges = ranges_of(schema)
    for name, allowed in ranges.items():
        config = schema()
        if getattr(config, name) not in (None, "???"):
            allowed.check(name, getattr(config, name))
        for other in ranges:
            setattr(config, other, None)
        check_values(config)
        setattr(config, name, next(value for value in WRONG if refuses(allowed, value)))
        with pytest.raises(UserError, match=rf"^{name}="):
            check_values(config)


def refuses(allowed: Range, value: Any) -> bool:
    try:
        allowed.check("key", value)
    except UserError:
        return True
    return False


def test_every_number_has_a_range() -> None:
    numbers = {key.name for key in KEYS if "int" in key.kind or "float" in key.kind}
    assert {key.name for key in KEYS if key.allowed} >= numbers - UNLIMITED


def test_path_keys_are_marked() -> None:
    data = {f"data.{name}" for name in ("path", "root", "csv", "cache_dir", "split", "resolution")}
    data |= {"data.whitening_path", "data.distractors_path"}
    assert path_keys() == {"output_dir", "output", "feature_cache", "eval.classifier", *data}


@dataclass
class OwnMethod(MethodConfig):
    weight: Annotated[float, Share] = 0.5
    kind: Annotated[str, OneOf("first", "second")] = "first"
    warmup: Annotated[str | None, Duration] = None
    scales: Annotated[list[float], Pair(2)] = field(default_factory=lambda: [0.5, 1])


@dataclass
class Outer:
    method: OwnMethod = field(default_factory=OwnMethod)
    count: Annotated[int, AtLeast(1)] = 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight", 1.5, "method.weight=1.5: expected a number from 0 to 1."),
        ("kind", "frist", "method.kind=frist: did you mean 'first'\\?"),
        ("warmup", "3", "method.warmup=3 is not a duration: .*"),
        ("scales", [1, 0.5], r"method.scales=\[1,0.5\]: expected two numbers above 0 and up to 2, the smaller first."),
        ("scales", [[1], 2], r"method.scales=\[\[1\],2\]: expected two numbers .*"),
    ],
)
def test_ranges_of_a_users_method(key: str, value: Any, message: str) -> None:
    config = Outer()
    check_values(config)
    setattr(config.method, key, value)
    with pytest.raises(UserError, match=f"^{message}$"):
        check_values(config)


def test_an_unknown_marker_is_refused() -> None:
    @dataclass
    class Wrong:
        rate: Annotated[float, "0 to 1"] = 0.5

    with pytest.raises(TypeError, match=r"Wrong.rate: '0 to 1' is not a Range"):
        check_values(Wrong())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1, 10**400])
def test_positive_refuses_other_numbers(value: float) -> None:
    with pytest.raises(UserError, match="expected a positive number"):
        Positive.check("key", value)
