"""Wrong values of the configuration: each gets one sentence before a model is built."""

from pathlib import Path
from typing import Any, cast

import pytest
from composing import SMALL, composed, composed_evaluation
from omegaconf import OmegaConf
from PIL import Image
from programs import TRAIN, run_code, run_program

from dino_lightning.checkpoints.load import load_network
from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.cli.plugins import import_one
from dino_lightning.config import TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.config.constraints import check_keys
from dino_lightning.data.sources.folder import existing_path
from dino_lightning.errors import UserError
from dino_lightning.evaluation.checks import check_evaluation
from dino_lightning.training.build import build_data
from dino_lightning.training.preflight import check_data, check_environment
from dino_lightning.training.resume import check_output_dir

WRONG = [
    ("backbone=vit_smal", "backbone=vit_smal is not an option of backbone; did you mean 'vit_small'?"),
    ("step=reference", ", compute, "),
    ("suggest=true", "choose one of auto.data, auto.machine, "),
    ("suggest_machine=true", "did you mean 'auto.machine'?"),
    ("scale=quick", ", preset, "),
    ("callbacks.nonfinite.most=3", "did you mean 'callbacks.nonfinite.max_steps'?"),
    ("backbone=foo", ", xcit_small. Every network of timm works by its name, too"),
    ("experiment=quik", "did you mean 'quick'?"),
    ("experiment=ablation/sinkhrn", "did you mean 'ablation/sinkhorn'?"),
    ("sweep=tabel7", "sweep=tabel7 is not an option of sweep; did you mean 'table7'?"),
    (
        "backbone.pach_size=8",
        "backbone.pach_size is not a key of the configuration; did you mean 'backbone.patch_size'?",
    ),
    ("trainer.max_epoch=3", "did you mean 'trainer.max_epochs'?"),
    ("optim.momentum=0.9", "optim.momentum belongs to optim=sgd or lars"),
    ("optim.lr=fast", "optim.lr: value 'fast'"),
    ("trainer.max_epochs=2.5", "trainer.max_epochs: value '2.5'"),
    ("+foo=1", "foo is not a key"),
    ("+crops.zoom=1", "crops.zoom is not a key"),
    ("data=folder", "data.path has no value"),
    ("data=folder data.path=/nowhere-at-all", "data.path=/nowhere-at-all does not exist"),
    ("backbone=timm", "backbone.name has no value"),
    ("backbone=timm backbone.name=resnet5O", "did you mean 'resnet50'?"),
    ("method.out_dim=0", "method.out_dim=0: expected at least 2"),
    (
        "method.sinkhorn_iterations=5",
        "method.sinkhorn_iterations=5 has no effect with method.centering=center; set method.centering=sinkhorn",
    ),
    ("method.centering=none method.center_momentum=0.5", "has no effect with method.centering=none"),
    ("method.mask_p=1", "method.mask_p=1.0 has no effect with method.patch_loss_weight=0.0"),
    ("method.mask_share=[0.2,0.3]", "has no effect with method.patch_loss_weight=0.0; set method.patch_loss_weight=1"),
    ("method=swav method.queue_start=20%", "has no effect with method.queue_length=0; set method.queue_length=3840"),
    ("method.teacher_temperature=0", "method.teacher_temperature=0.0: expected a positive number"),
    ("method.teacher_momentum=1.5", "method.teacher_momentum=1.5: expected a number from 0 to 1"),
    ("method.freeze_last_layer=3", "method.freeze_last_layer=3 is not a duration"),
    ("optim.lr_warmup=99ep", "optim.lr_warmup=99ep is longer than the run of trainer.max_epochs"),
    ("optim.lr_warmup=999999it", "optim.lr_warmup=999999it is longer than the run of"),
    ("method.teacher_temperature_warmup=101%", "longer than the run: at most '100%'"),
    ("crops.local_size=20", "crops.local_size=20 is not a multiple of backbone.patch_size=8; the nearest is 16"),
    ("crops.global_size=36", "crops.global_size=36 is not a multiple"),
    ("crops.eval_resize=16", "crops.eval_resize=16 is smaller than crops.eval_size=32"),
    (
        "crops.global_scale=[0.9,0.1]",
        "crops.global_scale=[0.9,0.1]: expected two shares",
    ),
    ("crops.blur_p=[0.5]", "crops.blur_p=[0.5]: expected three probabilities"),
    ("crops.hue=0.7", "crops.hue=0.7: expected a number from 0 to 0.5"),
    ("crops.std=[0,1,1]", "crops.std=[0.0,1.0,1.0]: expected a number for each channel"),
    ("crops.std=[inf,1,1]", "crops.std=[inf,1.0,1.0]: expected a number for each channel"),
    ("crops.mean=[nan,0,0]", "crops.mean=[nan,0.0,0.0]: expected a number for each channel"),
    ("crops.ratio=[0.5,inf]", "crops.ratio=[0.5,inf]: expected two numbers above 0 and up to 1000"),
    ("crops.blur_radius=[0.1,1e9]", "crops.blur_radius=[0.1,1000000000.0]: expected two numbers above 0"),
    ("crops.brightness=1e300", "crops.brightness=1e+300: expected a number from 0 to 1000"),
    ("data.value_range=[-inf,1]", "data.value_range=[-inf,1.0]: expected two numbers"),
    ("crops.eval_resize=1 crops.eval_size=1", "crops.eval_resize=1: expected at least 2"),
    ("backbone=vit_tiny backbone.heads=5 crops.local_size=32", "backbone.heads=5 does not divide backbone.width=192"),
    ("data.batch_size_per_device=100000", "is larger than the"),
    ("data.num_workers=-1", "data.num_workers=-1: expected at least 0"),
    ("trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU"),
    ("trainer.precision=fp8", "trainer.precision=fp8:"),
    ("trainer.precision=bf16-true", "trainer.precision=bf16-true would round"),
    ("trainer.strategy=ddpp", "trainer.strategy=ddpp: did you mean 'ddp'?"),
    ("trainer.strategy=fsdp trainer.precision=64", "trainer.strategy=fsdp does not work with trainer.precision=64"),
    ("compute=compild", "did you mean 'compiled'?"),
    ("compute.loss_rows=0", "compute.loss_rows=0: expected at least 1"),
    ("compute.attention=flash", "compute.attention=flash:"),
    ("compute.attention=varlen", "compute.attention=varlen needs a GPU"),
    ("compute.attention=varlen compute.fused=false", "compute.attention=varlen needs compute.fused=true"),
    (
        "compute.attention=varlen backbone=convnext_tiny",
        "compute.attention=varlen needs backbone=vit_small or another ViT",
    ),
    ("compute.matmul_precision=fast", "compute.matmul_precision=fast:"),
    ("backbone.drop_path=batch", "backbone.drop_path=batch:"),
    ("backbone.registers=-1", "backbone.registers=-1: expected at least 0"),
    ("method.patch_loss_weight=1 backbone=convnext_tiny", "only the built-in ViTs support; set backbone=vit_small"),
    (
        "method.mask_share=[0.5,0.1]",
        "method.mask_share=[0.5,0.1]: expected two shares",
    ),
    ("backbone.drop_path=subset compute.fused=false", "backbone.drop_path=subset needs compute.fused=true"),
    ("backbone.drop_path=subset compute.compile=true", "backbone.drop_path=subset needs compute.compile=false"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0: expected at least 1"),
    ("trainer.max_epochs=-1", "trainer.max_epochs=-1 needs a length in trainer.max_steps"),
    ("callbacks.knn.headline_k=7", "callbacks.knn.headline_k=7 is not one of"),
    ("callbacks.knn.k=[]", "callbacks.knn.k=[]: expected one or more"),
    ("callbacks.knn.k=[1,[2]]", "callbacks.knn.k=[1,[2]]: expected one or more numbers"),
    ("crops.ratio=[1,null]", "crops.ratio[1]: a value is null where a float is expected"),
    ("callbacks.knn.bank=0", "callbacks.knn.bank=0: expected at least 1"),
    ("callbacks.knn.every_n_epochs=0", "callbacks.knn.every_n_epochs=0: expected at least 1"),
    ("callbacks.knn.temperature=0", "callbacks.knn.temperature=0.0: expected a positive number"),
    ("logger=wandb logger.mode=on", "logger.mode=on:"),
    ("data=cifar10 data.name=cifar11", "data.name=cifar11: did you mean 'cifar10'?"),
    ("method=mocco", "did you mean 'moco'?"),
    ("method=moco method.version=4", "method.version=4: choose one of 2, 3"),
    ("method=moco experiment=photos32 data=builtin method.freeze_patch_embedding=true", "this network has no patches"),
    ("method=byol compute.loss_rows=64", "compute.loss_rows=64 applies only to method=dino"),
    ("method=byol method.evaluate=techer", "did you mean 'teacher'?"),
    ("method=swav method.sinkhorn_epsilon=0", "method.sinkhorn_epsilon=0.0: expected a positive number"),
    ("method=swav method.queue_length=64 method.queue_start=99ep", "method.queue_start=99ep is longer than the run"),
    ("method.teacher_update=copy_each_stp", "did you mean 'copy_each_step'?"),
    ("method.centering=sinkhron", "did you mean 'sinkhorn'?"),
    ("method=byol method.centering=none", "method.centering"),
    ("seed=-1", "seed=-1: expected an integer"),
    ("resume=true", "resume=true: output_dir="),
]


def sentence_for(*overrides: str, output_dir: Path) -> str:
    """The error message of the command line; the configuration is composed and checked, but nothing is built."""
    given = [word.partition("=")[0] for word in overrides]
    here = {} if "data" in given else {"data.train_images": 200, "data.val_images": 20}  # few images to draw
    here |= {"trainer.accelerator": "cpu"}
    try:
        words = [*overrides, *(f"{key}={value}" for key, value in here.items() if key not in given)]
        cfg = composed(*words, output_dir=output_dir)
        check_keys(cfg)
        config = cast(TrainConfig, OmegaConf.to_object(cfg))
        check_config(config)
        check_output_dir(config)
        check_environment(config)
        check_data(config, build_data(config), world_size=1)
    except EXPLAINED as error:
        return message_for(error)
    return ""


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[overrides for overrides, _ in WRONG])
def test_one_sentence(overrides: str, expected: str, tmp_path: Path) -> None:
    sentence = sentence_for(*overrides.split(), output_dir=tmp_path)
    assert expected in sentence
    assert "\n" not in sentence


def test_right_settings_get_no_error(tmp_path: Path) -> None:
    assert sentence_for(output_dir=tmp_path) == ""


def test_unlabeled_images_and_knn(tmp_path: Path) -> None:
    for index in range(80):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / f"{index}.png")
    data = ["data=folder", f"data.path={tmp_path}", "data.batch_size_per_device=8", "optim.lr_warmup=1ep"]
    assert "callbacks.knn.enabled=true: k-NN evaluation needs labeled" in sentence_for(*data, output_dir=tmp_path)
    assert sentence_for(*data, "callbacks.knn.enabled=false", output_dir=tmp_path) == ""


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 300, "is longer than file names can be"),
        ("~no-such-user/x", "'~' has no home folder"),
        ("a\0b", "contains a character that no path can have"),
    ],
    ids=["long", "home", "zero"],
)
def test_impossible_paths(path: str, reason: str, tmp_path: Path) -> None:
    photos = composed("data=folder", f"data.path={tmp_path}", "trainer.accelerator=cpu")
    knn = composed_evaluation("checkpoint=untrained:vit_micro")
    for cfg, keys in ((photos, ("output_dir", "data.path", "data.cache_dir")), (knn, ("output_dir", "feature_cache"))):
        check: Any = check_config if cfg is photos else check_evaluation
        for key in keys:
            changed = cfg.copy()
            OmegaConf.update(changed, key, path)
            with pytest.raises(UserError) as refused:
                check(OmegaConf.to_object(changed))
            assert str(refused.value).startswith(f"{key}={path[:200]}".replace("\0", "\\0"))
            assert reason in str(refused.value)
            assert len(str(refused.value)) < 300
    with pytest.raises(UserError, match=reason):
        existing_path(path)
    with pytest.raises(UserError, match=reason):
        import_one(path)
    with pytest.raises(UserError, match=reason):
        load_network(path, seed=0)


def test_a_long_name_of_a_network(tmp_path: Path) -> None:
    assert "is not an option of backbone" in sentence_for(f"backbone={'x' * 300}", output_dir=tmp_path)


def test_a_number_of_hundreds_of_digits(tmp_path: Path) -> None:
    """OmegaConf raises a Python error for it, not one of its own errors."""
    program = (
        "from dino_lightning.cli.main import main\n"
        "LR = '1' + '0' * 400\n"
        "holdout = 'data.holdout=' + LR\n"
        "for words in (['train', 'optim.lr=' + LR], ['eval', holdout], ['data', '.', holdout]):\n"
        "    print(main(words))\n"
    )
    done = run_code(program, cwd=tmp_path)
    assert done.stdout.split() == ["2"] * 3, done.stderr
    message = "the value is too large for a number; it is: "
    keys = [line.split(message)[0] for line in done.stderr.splitlines()]
    assert keys == ["dino train: optim.lr: ", "dino eval: data.holdout: ", "dino data: data.holdout: "]


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert "already contains a run. Set resume=true" in sentence_for(output_dir=tmp_path)


def test_a_gpu_on_a_machine_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "has no GPU" in sentence_for("trainer.accelerator=gpu", output_dir=tmp_path)


def test_exit_status_is_2_and_nothing_is_written(tmp_path: Path) -> None:
    """Nor in a folder named `~`, which Hydra would create in the working folder."""
    (tmp_path / "home").mkdir()
    words = [*SMALL, "crops.local_size=20", "output_dir='~/run'"]
    done = run_program(TRAIN, *words, cwd=tmp_path, variables={"HOME": str(tmp_path / "home")})
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "dino train: crops.local_size=20 is not a multiple of backbone.patch_size=8; the nearest is 16."
    )
    assert done.stdout == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


def test_errors_are_value_errors() -> None:
    assert issubclass(UserError, ValueError)
