"""Sweeps with Optuna and joblib: complete runs, failed runs, and settings that are refused before any run."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from composing import SMALL, composed
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from programs import TRAIN, run_program
from sweep_cases import make_run, process_state

from dino_lightning.cli import errors
from dino_lightning.cli.main import main
from dino_lightning.cli.plugins import import_one
from dino_lightning.cli.program import run_name
from dino_lightning.cli.sweeps import Jobs, check_sweeper, concurrent_jobs, in_own_process
from dino_lightning.config import TrainConfig, register
from dino_lightning.errors import UserError
from dino_lightning.loggers.wandb import sweep_name
from dino_lightning.runtime.files import CONF, FAILED
from dino_lightning.training.resources import cpu_threads
from dino_lightning.training.run import train

ROOT = Path(__file__).parents[2]
SHORT = [*SMALL, "callbacks.pictures.enabled=false", "trainer.enable_progress_bar=false"]
OPTUNA = pytest.mark.skipif(errors.find_spec("optuna") is None, reason='pip install "dino-lightning[optuna]"')
JOBLIB = pytest.mark.skipif(
    errors.find_spec("hydra_plugins.hydra_joblib_launcher") is None, reason='pip install "dino-lightning[joblib]"'
)


def with_hydra(*words: str) -> DictConfig:
    """The configuration of `--multirun WORDS` with Hydra's settings."""
    register()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(words), return_hydra_config=True)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder and exit status of a search in which a trial is refused; two better runs are in the folder already."""
    folder = tmp_path_factory.mktemp("search") / "optuna"
    for name, lr in (("7", 0.02), ("8", 0.03)):
        make_run(folder / name, {"optim.lr": lr}, [100.0] * 3)
    words = ["sweep=optuna", *SHORT, "trainer.max_epochs=3", "hydra.sweeper.n_trials=3", f"output_dir={folder}"]
    words += ["callbacks.pruning.after_jobs=2", "callbacks.pruning.warmup=1ep", "hydra.sweeper.sampler.seed=1"]
    words += ["optim.lr=choice(-1,0.01)"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dino", "train", *words])
        patch.setattr("dino_lightning.cli.program.JOBS", Jobs())
        with pytest.raises(SystemExit) as exited:
            main()
    return folder, cast(int, exited.value.code)


@OPTUNA
@pytest.mark.slow
def test_optuna_continues_after_failed_trials(searched: tuple[Path, int]) -> None:
    folder, status = searched
    assert status == 1
    failed = [name for name in "012" if (folder / name / FAILED).exists()]
    ended = {name: json.loads((folder / name / "summary.json").read_text()) for name in "012" if name not in failed}
    assert failed
    assert ended
    assert all("optim.lr=-1\n" in (folder / name / "overrides.yaml").read_text() for name in failed)
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(summary["knn_top1"] for summary in ended.values())
    assert best["best_params"]["optim.lr"] == 0.01


@OPTUNA
@pytest.mark.slow
def test_bad_trials_end_early_and_are_recorded_as_pruned(searched: tuple[Path, int]) -> None:
    folder, _ = searched
    for name in "012":
        if not (folder / name / FAILED).exists():
            summary = json.loads((folder / name / "summary.json").read_text())
            assert summary["pruned"].startswith("after epoch 2 of 3")
            assert summary["epochs"] == 2


@OPTUNA
@pytest.mark.slow
def test_table_and_plot_of_a_search(searched: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = searched
    assert main(["table", str(folder), "format=markdown", "plot=true"]) == 0
    states = Counter(line.split(" | ")[-1].split()[0].strip(":") for line in capsys.readouterr().out.splitlines()[2:7])
    failed = sum((folder / name / FAILED).exists() for name in "012")
    assert (states["failed"], states["pruned"], states["finished"]) == (failed, 3 - failed, 2)
    assert "method.teacher_temperature" in (folder / "sweep.svg").read_text()


@OPTUNA
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks.knn.enabled=false"], "callbacks.knn.enabled=false"),
        (["hydra/sweeper=optuna"], "hydra.sweeper.direction=minimize"),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
        (["hydra.sweeper.n_jobs=-1"], "hydra.sweeper.n_jobs=-1"),
    ],
)
@pytest.mark.slow_after_first(2)
def test_a_search_without_a_value_to_maximize_is_refused(words: list[str], message: str) -> None:
    check_sweeper(with_hydra("hydra/sweeper=optuna_knn"))
    check_sweeper(with_hydra("callbacks.knn.enabled=false"))  # a grid
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_sweeper(with_hydra("hydra/sweeper=optuna_knn", *words))


@OPTUNA
@JOBLIB
def test_optuna_draws_as_many_trials_as_run_side_by_side() -> None:
    assert with_hydra("sweep=optuna").hydra.sweeper.n_jobs == 1
    words = ("sweep=optuna", "hydra/launcher=joblib_side_by_side", "hydra.launcher.n_jobs=3")
    assert with_hydra(*words).hydra.sweeper.n_jobs == 3
    assert concurrent_jobs(with_hydra(*words).hydra.launcher) == 3
    assert concurrent_jobs(with_hydra().hydra.launcher) == 0


@pytest.mark.parametrize(
    ("option", "extra"),
    [("sweeper/optuna", "optuna"), ("launcher/joblib", "joblib"), ("launcher/submitit_slurm", "submitit")],
)
def test_a_plugin_that_is_not_installed_is_named_with_its_command(
    option: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    message = errors._unknown_option("hydra", option)
    assert message == f'hydra/{option} is not installed: pip install "dino-lightning[{extra}]"'


@OPTUNA
def test_an_unknown_hydra_option_gets_a_suggestion() -> None:
    with_hydra()  # Hydra has read its plugins
    assert "did you mean 'optuna_knn'?" in errors._unknown_option("hydra", "sweeper/optuna_kn")
    assert "did you mean 'tpe'?" in errors._unknown_option("hydra", "sweeper/sampler/tp")


def test_failures_in_other_processes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Failures of a previous attempt are not."""
    for name in ("0", "1", "10", "9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FAILED).write_text("before\n")
    jobs = Jobs()
    jobs.begin(tmp_path)
    assert jobs.failures() == []
    jobs.finish()
    for name in ("10", "9"):
        os.utime(tmp_path / name / FAILED, ns=(1, 1))  # written again, with the same text
    assert jobs.failures() == [f"{tmp_path}/9: before", f"{tmp_path}/10: before"]
    with pytest.raises(SystemExit):
        jobs.finish()
    assert f"2 runs failed:\n  {tmp_path}/9: before" in capsys.readouterr().err


@JOBLIB
def test_a_run_in_its_own_process_knows_its_command_and_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B names the group of its runs by the sweep (`loggers.wandb.sweep_name`)."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(with_hydra("hydra.mode=MULTIRUN", f"output_dir='{tmp_path / 'two words'}'"))
    result = cast(Any, in_own_process(process_state, OmegaConf.create({"killed": False}), cli_overrides=["a=1"]))
    assert result["pid"] != os.getpid()
    assert result["argv"] == ["dino", "train", "a=1"]
    assert (result["mode"], result["folder"]) == ("MULTIRUN", str(tmp_path / "two words"))


@JOBLIB
def test_a_run_whose_process_is_killed_is_a_failed_run() -> None:
    with pytest.raises(UserError, match=r"was killed.*hydra\.launcher\.n_jobs"):
        in_own_process(process_state, OmegaConf.create({"killed": True}), cli_overrides=[])


@pytest.mark.parametrize(("mode", "name"), [("MULTIRUN", "two words"), ("RUN", None)])
def test_the_group_at_wandb_is_the_folder_of_the_sweep(
    mode: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {"hydra": {"mode": RunMode[mode], "sweep": {"dir": "/somewhere/two words"}}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create(sweep))
    assert sweep_name() == name


def test_runs_side_by_side_share_the_cores() -> None:
    config = cast(TrainConfig, OmegaConf.to_object(composed(*SHORT)))
    cores = cpu_threads(config, processes=1)
    assert cpu_threads(config, processes=2) == max(1, cores // 2)


def test_runs_side_by_side_have_one_device_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices=2: joblib starts runs with one device each; set trainer"):
        train(composed(*SHORT, "trainer.devices=2", output_dir=tmp_path / "0"), concurrent_runs=2)


def test_a_new_process_can_unpickle_classes_of_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "own-kind.py").write_text("class Kind:\n    def __init__(self, value):\n        self.value = value\n")
    import_one(str(tmp_path / "own-kind.py"))
    import_one(str(tmp_path / "own-kind.py"))
    kind = sys.modules["dino_lightning.cli.plugins.own_kind"].Kind
    read = "import pickle, sys; print(pickle.load(sys.stdin.buffer).value)"
    command = [sys.executable, "-c", read]
    done = subprocess.run(command, input=pickle.dumps(kind(41)), capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == b"41"


FAILING = """
import os, signal, sys
from dino_lightning.errors import UserError

if "seed=0" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
if "seed=1" in sys.argv:
    raise UserError("seed=1 is refused here.")
"""


@JOBLIB
@pytest.mark.slow
def test_joblib_continues_after_a_killed_run_and_names_failed_runs(tmp_path: Path) -> None:
    """Both runs fail while their processes import a user's file, before the imports that take seconds."""
    (tmp_path / "failing.py").write_text(FAILING)
    folder = tmp_path / "out"
    words = ["--multirun", "imports=failing.py", "hydra/launcher=joblib_side_by_side", "seed=0,1", *SHORT]
    done = run_program(TRAIN, *words, f"output_dir={folder}", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"2 runs failed:\n  {folder}/0: the process of this run was killed" in done.stderr
    assert f"\n  {folder}/1: seed=1 is refused here.\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "- seed=1\n" in (folder / "1" / "overrides.yaml").read_text()


@pytest.mark.slow
@JOBLIB
def test_joblib_runs_side_by_side(tmp_path: Path) -> None:
    """A run trains to its end although the other run of the sweep is refused."""
    folder = tmp_path / "out"
    words = ["--multirun", "hydra/launcher=joblib_side_by_side", "optim.lr=-1,0.01", "trainer.max_epochs=1", *SHORT]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stderr
    assert f"1 run failed:\n  {folder}/0: optim.lr=-1.0: expected at least 0." in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "1" / "summary.json").read_text())["knn_top1"] > 0
    assert "- optim.lr=0.01\n" in (folder / "1" / "overrides.yaml").read_text()


OWN = """
import os, signal
from dataclasses import dataclass
from dino_lightning.config import DINOConfig
from dino_lightning.methods.registry import register_method
from dino_lightning.methods.student_teacher import StudentTeacher
from torch import nn

@dataclass
class OwnConfig(DINOConfig):
    fatal: bool = False

@register_method("own", OwnConfig)
class Own(StudentTeacher):
    def __init__(self, config, parts):
        if config.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(config, parts, heads=(nn.Linear(parts.feature_dim, 4), nn.Linear(parts.feature_dim, 4)))

    def loss(self, batch):
        return self.student(batch).square().mean()
"""


@pytest.mark.slow
@JOBLIB
def test_other_runs_continue_after_a_killed_run_of_a_users_method(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    folder = tmp_path / "out"
    words = ["--multirun", f"imports={tmp_path}/own.py", "hydra/launcher=joblib_side_by_side", "method=own", *SHORT]
    words += ["preset=quick", "preset@_global_=quick/dino", "method.fatal=true,false", "trainer.max_epochs=1"]
    command = [sys.executable, str(ROOT / "train.py"), *words, f"output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stderr
    assert f"1 run failed:\n  {folder}/0: the process of this run was killed" in done.stderr
    assert (folder / "1" / "summary.json").exists()


@pytest.mark.slow
def test_submitit_runs_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason='pip install "dino-lightning[submitit]"')
    folder = tmp_path / "out"
    words = ["--multirun", "hydra/launcher=submitit_local_test", "optim.lr=-1,0.01", "trainer.max_epochs=1", *SHORT]
    command = [sys.executable, str(ROOT / "train.py"), *words, "trainer.devices=1", f"output_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stderr
    assert f"1 run failed:\n  {folder}/0: optim.lr=-1.0: expected at least 0." in done.stderr
    assert (folder / "1" / "summary.json").exists()
