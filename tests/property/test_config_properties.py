"""Any value of a key results in a configuration that passes all checks, or in an error of one line with the key."""

import dataclasses
import pickle
from functools import cache
from typing import Any

import pytest
from composing import composed, composed_embedding, composed_evaluation
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from profiles import check, examples

from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.cli.export import check as check_export
from dino_lightning.config import SCHEMAS, EvaluateConfig, TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.config.constraints import check_keys
from dino_lightning.config.docs import Key, all_keys
from dino_lightning.evaluation.checks import check_evaluation
from dino_lightning.evaluation.embedding.checks import check_embedding
from dino_lightning.runtime.files import CONF

TRAINING = [
    (),
    ("backbone=resnet50", "optim=sgd", "method=supervised", "logger=wandb", "data=folder", "data.path=here"),
    ("method=byol", "optim=lars", "logger=tensorboard", "data=listing", "data.path=here"),
    ("method=moco", "data=archive", "data.path=here"),
    ("method=swav", "data=parquet", "data.path=here"),
    ("data=gldv2", "data.path=here"),
    ("data=huggingface", "data.name=here"),
    ("data=webdataset", "data.shards=here", "data.images=1000"),
    ("data=cifar10",),
]
EVALUATION = [
    *((f"eval={name}",) for name in ("knn", "linear", "linear_grid", "logistic", "finetune", "attention", "neighbors")),
    ("eval=retrieval", "data=revisited", "data.path=here"),
    ("eval=copy_detection", "data=copydays", "data.path=here"),
    ("eval=video", "data=davis", "data.path=here"),
    ("eval=attention", "data=voc", "data.path=here"),
    ("eval=attention", "data=pictures", "data.path=here"),
]
"""Together, these configurations have every key of every schema."""


CHECKS = {"train": check_config, "evaluate": check_evaluation, "embed": check_embedding, "export": check_export}
BASES = {"train": TRAINING, "evaluate": EVALUATION, "embed": [("data=builtin",)], "export": [()]}


@cache
def base(overrides: tuple[str, ...], *, program: str) -> DictConfig:
    if program == "train":
        return composed(*overrides, "trainer.accelerator=cpu")
    if program == "export":
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("export", overrides=["checkpoint=untrained:vit_micro", "format=onnx", "output=x.onnx"])
    composed_other = composed_evaluation if program == "evaluate" else composed_embedding
    return composed_other(*overrides, "checkpoint=untrained:vit_micro")


@cache
def pickled(overrides: tuple[str, ...], *, program: str) -> bytes:
    """Pickled, because unpickling is much faster than `copy`."""
    return pickle.dumps(base(overrides, program=program))


@cache
def home(name: str, schema: type) -> tuple[tuple[str, ...], str]:
    """The first configuration with this key, and its program."""
    for program, bases in BASES.items():
        for overrides in bases:
            if _has(base(overrides, program=program), name, schema):
                return overrides, program
    raise AssertionError(f"no configuration here has {name} of {schema.__name__}")


def _has(config: DictConfig, name: str, schema: type) -> bool:
    node: Any = config
    *above, last = name.split(".")
    for part in above:
        if part not in node:
            return False
        node = node._get_node(part)
    return issubclass(OmegaConf.get_type(node) or object, schema) and last in node._content


def quoted(text: str) -> str:
    """A string quoted for Hydra."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


INTEGERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([10**6, 2**31, 2**63, -(2**63), 10**30, 10**400, 65536, 4294967296])
).map(str)
FLOATS = st.one_of(
    st.floats(0, 1).map(repr),
    st.floats().map(repr),
    st.sampled_from(["nan", "inf", "-inf", "1e400", "1e-320", "-0.0", "1e38", "-1e-9", "1e200"]),
)
WORDS = st.sampled_from(
    [
        "''",
        "x",
        "null",
        "true",
        "false",
        "???",
        "auto",
        "none",
        "10ep",
        "-5%",
        "1e9ep",
        "nanep",
        "infit",
        "0it",
        "inf%",
        "${seed}",
        "${nope}",
        "${oc.env:NO_SUCH_VARIABLE}",
        "${oc.env:",
        "{}",
        "{a:1}",
        "{a:[1,{b:2}]}",
        "[]",
        "[[]]",
        "[null]",
        "[x]",
        "[1,[2]]",
        "a=b",
        "a,b",
        "glob(*)",
        "range(1,3)",
        "int(3)",
        "00:00:00:01",
        "1e3",
        "0x10",
        "1_000",
        "\\",
        "'",
        '"',
        "/",
        "~",
        "resnet18",
        "vit",
        "teacher",
        "center",
        "cpu",
        "16-mixed",
        "ddp",
        "/nowhere/at/all",
    ]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(quoted)
SCALARS = {"int": INTEGERS, "float": FLOATS, "str": st.one_of(WORDS, TEXTS), "bool": st.sampled_from(["true", "false"])}
ANYTHING = st.one_of(INTEGERS, FLOATS, WORDS, TEXTS)


def values(kind: str) -> st.SearchStrategy[str]:
    """Values for a key of this type as text: mostly of the type, valid or absurd, sometimes of another type."""
    kind = kind.removesuffix(" or null")
    if kind.startswith("list["):
        inner = st.one_of(SCALARS[kind[5:-1]], SCALARS["float"])
        own = st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]")
    else:
        own = SCALARS.get(kind, ANYTHING)
    return st.one_of(own, own, ANYTHING)


def is_word(key: Key, word: str) -> bool:
    """Whether Hydra parses it as a single value; otherwise Hydra reports an error, or it is a sweep."""
    try:
        (override,) = OverridesParser.create().parse_overrides([f"{key.name}={word}"])
    except HydraException:
        return False
    return not override.is_sweep_override() and word != "???"  # no value: what is computed from it may be named


def outcome(key: Key, word: str) -> str:
    """The error message of the checks before images and devices are used, or None."""
    overrides, program = home(key.name, key.schema)
    config = pickle.loads(pickled(overrides, program=program))
    try:
        (override,) = OverridesParser.create().parse_overrides([f"{key.name}={word}"])
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
        check_keys(config)
        typed: Any = OmegaConf.to_object(config)
        CHECKS[program](typed)
    except OverflowError as error:
        if "full_key" not in str(error):  # as `refuse_number`
            raise
        return message_for(error)
    except EXPLAINED as error:
        return message_for(error)
    assert dataclasses.is_dataclass(typed)
    return ""


KEYS = all_keys()


@examples(few=2, many=100)
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] if index % 24 else [], id=f"{key.schema.__name__}-{key.name}")
        for index, key in enumerate(KEYS)
    ],
)
def test_any_value_passes_or_is_refused_in_one_sentence(key: Key, examples: Any) -> None:
    def holds(word: str) -> None:
        sentence = outcome(key, word)
        assert "\n" not in sentence
        assert sentence == sentence.strip()
        if sentence and is_word(key, word):
            assert key.name.split(".")[-1] in sentence, sentence

    check(holds, given(values(key.kind)), examples)


def test_every_schema_is_tested() -> None:
    schemas = {TrainConfig, EvaluateConfig, *(schema for group in SCHEMAS.values() for schema in group.values())}
    assert {key.schema for key in KEYS} >= {schema for schema in schemas if any(k.schema is schema for k in KEYS)}
    assert len(KEYS) > 300
    assert {home(key.name, key.schema)[1] for key in KEYS} == set(CHECKS)


def test_valid_values_pass_and_invalid_values_are_refused() -> None:
    """The property above would also hold for checks that accept everything or nothing."""
    rate = next(key for key in KEYS if key.name == "optim.lr")
    assert outcome(rate, "0.1") == ""
    assert "optim.lr=nan: expected at least 0" in outcome(rate, "nan")
    assert "optim.lr: value 'x'" in outcome(rate, "x")
    assert "optim.lr: the value is too large for a number" in outcome(rate, "1" + "0" * 400)
