"""`tests/helpers/composing.py` makes the same configurations and errors as Hydra."""

import pytest
from composing import SMALL, by_hydra, composition
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dino_lightning.config import register


def comparable(config: DictConfig) -> tuple[object, ...]:
    """The values before interpolation, the classes, and the flags of the nodes."""
    nodes = [node for node in config._content.values() if isinstance(node, DictConfig)]  # type: ignore[union-attr]
    flags = [(OmegaConf.is_struct(node), OmegaConf.is_readonly(node), OmegaConf.get_type(node)) for node in nodes]
    return OmegaConf.to_container(config), OmegaConf.get_type(config), OmegaConf.is_struct(config), flags


@pytest.mark.parametrize(
    "words",
    [
        ("config", *SMALL, "output_dir=somewhere"),
        ("config", "backbone=vit_small", "method=moco", "method.version=2", "optim.lr=0.25", "data.image_size=${seed}"),
        ("config", "optim.lr=0.1", "optim=sgd", "experiment=ablation/sinkhorn", "preset=quick", "crops.ratio=[0.5,2]"),
        ("config", "+own={a:1,b:2}", "++backbone.own=null", "~own.a"),
        ("evaluate", "eval=linear", "checkpoint=x y", "eval.lr='0.1'", "data=folder", 'data.path="a b"'),
        ("embed", "checkpoint=x", "data.path=.", "output=x.parquet"),
    ],
)
@pytest.mark.slow_after_first(2)
def test_composition_equals_hydra(words: tuple[str, ...]) -> None:
    register()
    expected = by_hydra(*words)
    for _ in range(2):  # the second time from the cache
        config = composition(*words)
        assert comparable(config) == comparable(expected)
        OmegaConf.set_struct(config, False)
        config.merge_with({"backbone": {"width": 8}, "own": 7, "output_dir": "another"})  # does not change the cache


@pytest.mark.parametrize("word", ["backbone=vit_smal", "optim.lrr=1", "optim.lr=fast", "seed=1,2", "own@here=1", "a b"])
@pytest.mark.slow_after_first(3)
def test_errors_equal_those_of_hydra(word: str) -> None:
    register()
    with pytest.raises(HydraException) as ours:
        composition("config", "optim=sgd", word)
    with pytest.raises(HydraException) as theirs:
        by_hydra("config", "optim=sgd", word)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


def test_overrides_do_not_change_the_schemas_in_the_store_of_hydra() -> None:
    """`register` makes Hydra copy each schema that it loads instead of the whole store."""
    register()
    node = ConfigStore.instance().repo["optim"]["schema_sgd.yaml"].node
    before = node.lr
    config = by_hydra("config", "optim=sgd", "optim.lr=77", "output_dir=x")
    assert (config.optim.lr, node.lr) == (77, before)
    assert by_hydra("config", "optim=sgd", "output_dir=x").optim.lr != 77
