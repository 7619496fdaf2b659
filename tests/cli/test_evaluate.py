"""`dino eval`: all options compose, wrong settings are refused in one sentence, and evaluations write results."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from composing import SMALL, composed, composed_evaluation
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from programs import run_program

from dino_lightning.cli.errors import EXPLAINED, message_for
from dino_lightning.cli.help import group_options
from dino_lightning.cli.plugins import with_imports
from dino_lightning.config import SCHEMAS, EvaluateConfig
from dino_lightning.config.constraints import check_keys
from dino_lightning.errors import UserError
from dino_lightning.evaluation import registry
from dino_lightning.evaluation.checks import check_evaluation
from dino_lightning.evaluation.registry import find_evaluation
from dino_lightning.evaluation.run import run_evaluation
from dino_lightning.evaluation.wandb import TrainingRun, training_run
from dino_lightning.training.run import train

EVALUATIONS = group_options("eval")["eval"]
ON_IMAGES = ["data.train_images=120", "data.val_images=48", "data.num_workers=0"]
"""A few built-in images."""

WRONG = [
    ("eval=linear_fast checkpoint=x", ", linear_grid, "),
    ("scale=1 checkpoint=x", "scale is not a key of the configuration; choose one of baseline, "),
    ("eval=vidio", "eval=vidio is not an option of eval; did you mean 'video'?"),
    ("eval=knn", "checkpoint has no value"),
    ("eval=knn checkpoint=x eval.kk=3", "did you mean 'eval.k'?"),
    ("eval=knn checkpoint=x eval.epochs=3", "eval.epochs belongs to eval=linear or linear_grid or finetune"),
    ("eval=knn checkpoint=x eval.k=[0]", "eval.k=[0]: expected one or more numbers of at least 1"),
    ("eval=knn checkpoint=x eval.image_resize=10", "eval.image_resize=10 needs eval.image_size"),
    ("eval=knn checkpoint=x eval.image_resize=10 eval.image_size=20", "is smaller than eval.image_size=20"),
    ("eval=knn checkpoint=x data=davis data.path=.", "eval=knn does not work with data=davis; choose data=builtin or"),
    ("eval=video checkpoint=x data=builtin", "eval=video does not work with data=builtin; choose data=davis."),
    ("eval=video checkpoint=x", "data.path has no value"),
    ("eval=retrieval checkpoint=x data.path=. data.name=oxford5k", "data.name=oxford5k: did you mean 'roxford5k'?"),
    ("eval=copy_detection checkpoint=x data.path=. eval.whitening=pca", "eval.whitening=pca:"),
    ("checkpoint=x data.batch_size_per_device=3", "data.batch_size_per_device is for training"),
    ("checkpoint=x data.cache=ram", "data.cache is for training"),
    ("checkpoint=x trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU"),
    ("checkpoint=x trainer.strategy=fsdp", "trainer.strategy=fsdp:"),
    ("checkpoint=x trainer.max_epochs=3", "trainer.max_epochs belongs to trainer=default"),
    ("checkpoint=x trainer=default", "trainer=default does not belong to this program"),
    ("checkpoint=x seed=-1", "seed=-1: expected an integer"),
    ("checkpoint=x checkpoint_key=techer", "checkpoint_key=techer: did you mean 'teacher'?"),
    ("checkpoint=x +foo=1", "foo is not a key"),
    ("checkpoint=/nowhere-at-all.pth", "checkpoint=/nowhere-at-all.pth"),
    ("checkpoint=timm:resnet5O", "did you mean 'resnet50'?"),
    ("checkpoint=untrained:vit_smal", "did you mean 'vit_small'?"),
    ("checkpoint=untrained:vit_tiny eval.image_size=30", "eval.image_size=30 is not a multiple of the patch size 16"),
    ("checkpoint=untrained:vit_micro data.channels=1", "data.channels=1: the network untrained"),
]


def sentence_for(overrides: str, *, output_dir: Path) -> str:
    """The message that the command prints."""
    words = overrides.split()
    try:
        cfg = composed_evaluation(*words, output_dir=output_dir)
        run_evaluation(cfg, overrides=words)
    except EXPLAINED as error:
        return message_for(error, verb="eval")
    return ""


@pytest.mark.parametrize(("overrides", "expected"), WRONG, ids=[overrides for overrides, _ in WRONG])
@pytest.mark.slow_after_first(14)
def test_wrong_settings_are_refused_in_one_sentence(overrides: str, expected: str, tmp_path: Path) -> None:
    sentence = sentence_for(overrides, output_dir=tmp_path)
    assert expected in sentence
    assert "\n" not in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", EVALUATIONS)
@pytest.mark.slow_after_first(7)
def test_options_compose_and_pass_the_checks(option: str) -> None:
    cfg = composed_evaluation(f"eval={option}", "checkpoint=x")
    if OmegaConf.is_missing(cfg.data, "path"):
        cfg.data.path = "."
    check_keys(cfg)
    config = cast(EvaluateConfig, OmegaConf.to_object(cfg))
    check_evaluation(config)
    assert isinstance(config.data, find_evaluation(config.eval).data)


@pytest.mark.parametrize(
    "key", ["batch_size_per_device", "prefetch_batches", "cache", "cache_resize", "shuffle_buffer"]
)
def test_keys_that_only_training_reads_are_refused(key: str) -> None:
    config = cast(EvaluateConfig, OmegaConf.to_object(composed_evaluation("checkpoint=x")))
    check_evaluation(config, overrides=[f"data.{key}x=1"])
    with pytest.raises(UserError, match=f"data.{key} is for training"):
        check_evaluation(config, overrides=[f"data.{key}=1"])


def test_a_path_with_a_tilde_is_a_run_and_a_timm_name_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: {path: photos}\nlogger: {project: flowers}\n")
    (tmp_path / "run" / "wandb_run_id.txt").write_text("abc")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "run")
    config = cast(EvaluateConfig, OmegaConf.to_object(composed_evaluation("checkpoint=x")))
    with pytest.raises(UserError, match=r"checkpoint=~/run was trained on data\.path=photos"):
        check_evaluation(replace(config, checkpoint="~/run"))
    check_evaluation(replace(config, checkpoint="timm:resnet18"))
    assert training_run("~/run") == TrainingRun("abc", "flowers", None)
    assert training_run("timm:resnet18") is None


def test_every_evaluation_has_an_option() -> None:
    assert set(SCHEMAS["eval"]) <= set(EVALUATIONS)


def test_exit_status_is_2_and_nothing_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ["checkpoint=x", "eval=video", "data=builtin", f"output_dir={output}"]
    done = run_program("dino_lightning", "eval", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dino eval: eval=video does not work with data=builtin")
    assert not output.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few built-in images."""
    output = tmp_path_factory.mktemp("trained")
    train(composed(*SMALL, "callbacks.pictures.enabled=false", output_dir=output))
    return output


QUICK: dict[str, list[str]] = {
    "knn": ["eval.k=[5]"],
    "linear": ["eval.epochs=1", "eval.n_last_blocks=1"],
    "linear_grid": ["eval.epochs=1", "eval.n_last_blocks=[1]", "eval.lrs=[0.1,1.0]"],
    "logistic": ["eval.shares=[0.5]", "eval.splits=1", "eval.c=[1.0]"],
    "finetune": ["eval.epochs=1", "eval.warmup_epochs=0", "eval.batch_size_per_device=24"],
    "neighbors": ["eval.random_queries=3", "eval.neighbors=4"],
    "attention": ["eval.pictures=2"],
}


@pytest.mark.slow
def test_a_sweep_continues_after_a_failed_evaluation(tmp_path: Path) -> None:
    words = ["--multirun", "checkpoint=botth,untrained:vit_micro", "data.train_images=24", "data.val_images=12"]
    words += ["trainer.accelerator=cpu", "feature_cache=null", "data.num_workers=0", "output_dir=both", "eval.k=[5]"]
    done = run_program("dino_lightning", "eval", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "dino eval: 1 run failed:\n" in done.stderr
    reason = (tmp_path / "both" / "0" / "failed.txt").read_text()
    # Not the folder of the sweep itself, whose name is similar.
    assert reason == f"checkpoint=botth: this file does not exist; {tmp_path} contains no checkpoint.\n"
    assert (tmp_path / "both" / "1" / "results.jsonl").exists()
    assert not (tmp_path / "both" / "1" / "failed.txt").exists()


def test_other_ranks_continue_after_a_failure_of_the_first_rank(tmp_path: Path) -> None:
    """Lightning starts the process of another rank for a later evaluation, with the same arguments."""
    reason = tmp_path / "both" / "0" / "failed.txt"
    reason.parent.mkdir(parents=True)
    reason.write_text("eval.k=[0]: …\n", "utf-8")
    words = ["--multirun", "checkpoint=untrained:vit_micro", "eval.k=[0]", "output_dir=both"]
    done = run_program("dino_lightning", "eval", *words, cwd=tmp_path, variables={"LOCAL_RANK": "1"})
    assert done.returncode == 1, done.stderr
    assert reason.read_text("utf-8") == "eval.k=[0]: …\n"


@pytest.mark.parametrize("option", list(QUICK))
@pytest.mark.slow_after_first(1)
def test_evaluations_write_results_of_the_trained_and_the_untrained_network(
    option: str, trained: Path, tmp_path: Path
) -> None:
    words = [f"eval={option}", f"checkpoint={trained}", "baseline=true", *ON_IMAGES, *QUICK[option]]
    value = run_evaluation(composed_evaluation(*words, output_dir=tmp_path), overrides=words)
    lines: list[dict[str, Any]] = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["eval"] for line in lines} == {option}
    assert {line["trained"] for line in lines} == {True, False}
    assert value in [line["value"] for line in lines if line["trained"]]
    by_network = [{line["metric"] for line in lines if line["trained"] is trained} for trained in (True, False)]
    assert by_network[0] == by_network[1] != set()
    for line in lines:
        assert line["config"]["data"]["train_images"] == 120
        assert line["checkpoint"] == str(trained)
        assert line["seconds"] >= 0
        assert {"commit", "torch", "timm"} <= set(line["environment"])
    assert len({line["checkpoint_digest"] for line in lines}) == 2


def test_knn_equals_the_value_of_the_training_run(trained: Path, tmp_path: Path) -> None:
    data = [word for word in SMALL if word.startswith("data.") and "batch_size" not in word]
    words = [f"checkpoint={trained}", *data]
    value = run_evaluation(composed_evaluation(*words, "eval.k=[20]", output_dir=tmp_path), overrides=words)
    assert value == json.loads((trained / "summary.json").read_text())["knn_top1"]


OWN_EVALUATION = '''
from collections.abc import Iterator
from dataclasses import dataclass

from dino_lightning.config import ClassificationEval
from dino_lightning.evaluation.classification.splits import open_labeled, split_features
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.registry import register_evaluation


@dataclass
class MeanNormEval(ClassificationEval):
    """Mean norm of the features."""

    scale: float = 1.0
    """Factor of the norm."""


@register_evaluation("mean_norm", MeanNormEval)
def evaluate(config: MeanNormEval, task: Task) -> Iterator[Result]:
    features_ND, _ = split_features(task, config, open_labeled(task), "val")
    yield Result("norm", config.scale * float(features_ND.norm(dim=1).mean()), unit="", main=True)
'''


@pytest.fixture
def own_evaluation(tmp_path: Path) -> Iterator[str]:
    """The override that imports a file with an evaluation, which is unregistered after the test."""
    file = tmp_path / "mean_norm.py"
    file.write_text(OWN_EVALUATION)
    yield from with_imports([f"imports={file}"])
    del registry.EVALUATIONS[SCHEMAS["eval"].pop("mean_norm")]
    for name in ("mean_norm", "schema_mean_norm"):
        del ConfigStore.instance().repo["eval"][f"{name}.yaml"]
    del sys.modules["dino_lightning.cli.plugins.mean_norm"]


def test_an_evaluation_in_a_users_file_runs(own_evaluation: str, tmp_path: Path) -> None:
    words = [own_evaluation, "eval=mean_norm", "checkpoint=untrained:vit_micro", "feature_cache=null", *ON_IMAGES]
    values = [
        run_evaluation(composed_evaluation(*words, f"eval.scale={scale}", output_dir=tmp_path), overrides=words)
        for scale in (1, 2)
    ]
    assert values[1] == pytest.approx(2 * cast(float, values[0]))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["eval"] for line in lines] == ["mean_norm"] * 2
    sentence = sentence_for(" ".join([*words, "eval.scaled=2"]), output_dir=tmp_path / "wrong")
    assert "did you mean 'eval.scale'?" in sentence


def test_every_evaluation_names_its_module() -> None:
    assert set(registry.MODULES) == set(SCHEMAS["eval"])
