"""Every file under conf/ composes, passes the checks and builds; every key is documented and used."""

import dataclasses
import inspect
from itertools import zip_longest
from pathlib import Path
from typing import cast

import lightning as L
import pytest
import torch
from composing import composed
from omegaconf import OmegaConf
from programs import TRAIN, run_program
from slow_params import first

from dino_lightning.cli import docs as reference
from dino_lightning.cli.help import group_options
from dino_lightning.cli.overrides import with_joined_shards
from dino_lightning.config import SCHEMAS, TrainConfig, TrainerConfig, ViTConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.config.docs import all_keys
from dino_lightning.runtime.files import CONF
from dino_lightning.training.build import build_method, build_trainer

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = [
    f"{group}={name}"
    for group, names in group_options("train").items()
    for name in names
    if group in SCHEMAS and name != "timm"  # it needs the name of a network: tested below
]


def config_of(*overrides: str) -> TrainConfig:
    return cast(TrainConfig, OmegaConf.to_object(composed(*overrides)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.slow_after_first(4)
def test_experiments_pass_the_checks_and_build(experiment: str) -> None:
    config = config_of(
        f"experiment={experiment}", "trainer.precision=32", *(["data.path=."] if experiment != "quick" else [])
    )
    check_config(config)
    assert config.experiment == experiment
    with torch.device("meta"):
        method = build_method(config)
    assert method.student.head.last_layer.weight_v.shape[0] == config.method.out_dim  # type: ignore[attr-defined]


PLACES = {
    "data=huggingface": ["data.name=."],
    "data=torchvision": ["data.name=svhn"],
    "data=webdataset": ["data.shards=x.tar", "data.images=1000"],
    **{f"data={name}": [] for name in ("builtin", "cifar10", "cifar100", "stl10")},
}
"""The settings with which an option finds its images, if not `data.path`."""


def combinations() -> list[list[str]]:
    """Every option in one combination of options from several groups, to compose fewer configurations."""
    by_group: dict[str, list[str]] = {}
    for option in OPTIONS:
        by_group.setdefault(option.split("=")[0], []).append(option)
    large = [by_group.pop("data"), by_group.pop("backbone")]
    rows = [*zip_longest(*large), *zip_longest(*by_group.values())]
    return [[option for option in row if option] for row in rows]


@pytest.mark.parametrize("options", combinations(), ids=" ".join)
@pytest.mark.slow_after_first(10)
def test_options_pass_the_checks(options: list[str]) -> None:
    path = [word for option in options if "data=" in option for word in PLACES.get(option, ["data.path=."])]
    sizes = ["crops.global_size=224", "crops.local_size=96"]
    sizes += ["crops.eval_size=224", "crops.eval_resize=256"]
    check_config(config_of(*options, "trainer.precision=32", *path, *sizes))


@pytest.mark.parametrize(
    "backbone",
    first(
        ["vit_small", "resnet50", "xcit_small", "convnext_tiny", "resnet18", "vit_tiny", "vit_base", "vit_large"],
        fast=3,
    ),
)
@pytest.mark.slow_after_first(2)
def test_backbones_build_by_name(backbone: str) -> None:
    config = config_of(f"backbone={backbone}", "crops.global_size=224")
    with torch.device("meta"):
        method = build_method(config)
        features = method.teacher.features([torch.empty(2, 3, 224, 224)] * 2 + [torch.empty(2, 3, 96, 96)])
    assert features.shape == (6, method.teacher.backbone.num_features)


@pytest.mark.parametrize(
    "words",
    [["data.shards=/a b/x-{00..02}.tar"], ["data.shards='/a b/x-{00..02}.tar'"], ['data.shards="/a b/x-{00..02}.tar"']],
)
def test_braces_in_shards_need_no_inner_quotes(words: list[str]) -> None:
    cfg = composed("data=webdataset", *words, "data.images=5", "seed=3")
    assert (cfg.data.shards, cfg.data.images, cfg.seed) == ("/a b/x-{00..02}.tar", 5, 3)


def test_shards_can_be_values_of_a_sweep() -> None:
    assert with_joined_shards(["-m", "data.shards=a.tar,b.tar"]) == ["-m", "data.shards=a.tar,b.tar"]


def test_shards_that_the_shell_has_expanded_are_joined() -> None:
    cfg = composed("data=webdataset", "data.shards=x-0.tar", "data.shards=x-1.tar", "data.images=5")
    assert cfg.data.shards == "x-0.tar::x-1.tar"


def test_batch_norms_are_not_synchronized_on_a_cpu(tmp_path: Path) -> None:
    """PyTorch's synchronized batch norm raises an error on a CPU if there are two processes."""
    config = config_of("method.head_batch_norm=true", "trainer.accelerator=cpu", "trainer.devices=2")
    config.output_dir = str(tmp_path)
    assert config.trainer.sync_batchnorm
    assert build_trainer(config, hyperparameters={}).strategy._layer_sync is None  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_users_images_get_the_settings_for_photographs() -> None:
    bare = composed("data=parquet", "data.path=.")
    assert bare == composed("experiment=photos32", "data=parquet", "data.path=.")
    assert bare.experiment == "photos32"
    for builtin in ((), ("data=builtin",), ("backbone=vit_tiny",)):
        assert composed(*builtin).experiment == "quick"
    assert composed("data=folder", "data.path=.", "experiment=quick").experiment == "quick"
    for backbone in ("vit_tiny", "resnet50", "resnet18"):
        assert config_of("data=folder", "data.path=.", f"backbone={backbone}").experiment == "photos32"


@pytest.mark.parametrize("place", [0, 3])
def test_hydra_flags_have_any_place_among_the_arguments(place: int, tmp_path: Path) -> None:
    words = ["data=folder", "data.path=.", f"output_dir={tmp_path}"]
    words[place:place] = ["--cfg", "job"]
    done = run_program(TRAIN, *words, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr
    assert "\nexperiment: photos32\n" in done.stdout


def test_help_lists_every_option_and_no_schema() -> None:
    shown = run_program(TRAIN, "--help", cwd=CONF.parent).stdout
    entries = shown.split("\n\n")[3].removeprefix("Groups (group=option):\n").replace("\n" + " " * 25, " ")
    listed = {group: names.split(", ") for group, names in (line.split(maxsplit=1) for line in entries.splitlines())}
    for option in [*OPTIONS, "backbone=timm", *(f"experiment={name}" for name in EXPERIMENTS)]:
        group, name = option.split("=")
        assert name in listed[group]
    assert "schema_" not in shown


def test_patch_size_is_a_separate_key() -> None:
    backbone = config_of("backbone=vit_small", "backbone.patch_size=8").backbone
    assert isinstance(backbone, ViTConfig)
    assert (backbone.width, backbone.patch_size) == (384, 8)


def test_vits16_100ep_has_the_defaults_of_the_original_script() -> None:
    """The defaults of the original's argument parser, copied by hand."""
    config = OmegaConf.to_container(composed("experiment=vits16_100ep", "data.path=."), resolve=True)
    assert isinstance(config, dict)
    expected = {
        "backbone": {"width": 384, "depth": 12, "heads": 6, "patch_size": 16, "drop_path_rate": 0.1},
        "method": {
            "out_dim": 65536,
            "norm_last_layer": True,
            "teacher_momentum": 0.996,
            "teacher_momentum_end": 1.0,
            "head_batch_norm": False,
            "head_layers": 3,
            "head_hidden_dim": 2048,
            "head_bottleneck_dim": 256,
            "teacher_temperature_start": 0.04,
            "teacher_temperature": 0.04,
            "teacher_temperature_warmup": "0ep",
            "student_temperature": 0.1,
            "center_momentum": 0.9,
            "freeze_last_layer": "1ep",
        },
        "optim": {
            "lr": 0.0005,
            "lr_end": 1e-6,
            "lr_warmup": "10ep",
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "clip_grad": 3.0,
            "betas": [0.9, 0.999],
        },
        "crops": {
            "global_size": 224,
            "local_size": 96,
            "local_count": 8,
            "global_scale": [0.4, 1.0],
            "local_scale": [0.05, 0.4],
            "flip_p": 0.5,
            "jitter_p": 0.8,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.2,
            "hue": 0.1,
            "grayscale_p": 0.2,
            "blur_p": [1.0, 0.1, 0.5],
            "blur_radius": [0.1, 2.0],
            "solarize_p": [0.0, 0.2, 0.0],
            "solarize_threshold": 128,
        },
        "data": {"batch_size_per_device": 64, "num_workers": 10},
        "trainer": {"max_epochs": 100, "precision": "16-mixed", "devices": 8, "sync_batchnorm": True},
        "seed": 0,
    }
    for group, values in expected.items():
        found = config[group]
        if isinstance(values, dict):
            found = {key: found[key] for key in values}
        assert found == values, group


def test_trainer_has_every_argument_of_lightning() -> None:
    ours = {field.name for field in dataclasses.fields(TrainerConfig)}
    theirs = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    elsewhere = {"logger", "callbacks", "default_root_dir", "gradient_clip_val", "gradient_clip_algorithm"}
    assert ours == theirs - elsewhere


def test_every_key_is_documented() -> None:
    for key in all_keys():
        assert len(key.doc) > 4, key.name


def test_configuration_page_is_up_to_date() -> None:
    assert reference.TARGET.read_text() == reference.render(), "run dino docs"


def test_every_key_is_read_somewhere() -> None:
    """A silently ignored option is a bug: each field's name appears in code outside the schemas."""
    source = Path(reference.__file__).parents[1]
    code = "\n".join(path.read_text() for path in source.rglob("*.py") if path.parent.name != "config")
    passed_on = {field.name for field in dataclasses.fields(TrainerConfig)}  # by `asdict`, to lightning.Trainer
    unread = [
        key.name
        for key in all_keys()
        if key.name.rpartition(".")[2] not in passed_on and f".{key.name.rpartition('.')[2]}" not in code
    ]
    assert not unread
