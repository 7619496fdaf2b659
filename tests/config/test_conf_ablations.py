"""The paper's ablations: every experiment with every preset, the sweeps, and a sweep in which a run fails."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from composing import SMALL, composed
from omegaconf import DictConfig, OmegaConf

from dino_lightning.cli.help import group_options
from dino_lightning.cli.main import main
from dino_lightning.cli.overrides import with_photo_experiment
from dino_lightning.cli.sweeps import Jobs
from dino_lightning.config import TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.report.sweeps.jobs import read_rows
from dino_lightning.report.sweeps.published import GRIDS, PUBLISHED, paper_row
from dino_lightning.runtime.files import CONF
from dino_lightning.training.build import build_method

FILES = {f"ablation/{path.stem}": path for path in (CONF / "experiment" / "ablation").glob("*.yaml")}
PAGE = (CONF.parent / "docs" / "ablations.md").read_text()
SWEEPS = sorted(path for path in (CONF / "sweep").glob("*.yaml") if "experiment:" in path.read_text())
QUICK = ["preset=quick", "trainer.accelerator=cpu"]
PAPER = ["data.path=.", "trainer.precision=32"]


def groups_and_keys(path: Path) -> tuple[list[Any], dict[str, Any]]:
    """The overrides of groups and of keys in a file."""
    values = yaml.safe_load(path.read_text())
    return values.pop("defaults"), values


CHANGES_KEYS_ONLY = sorted(name for name, path in FILES.items() if len(groups_and_keys(path)[0]) == 1)
CHANGES_GROUPS = sorted(FILES.keys() - CHANGES_KEYS_ONLY)


@pytest.fixture(scope="module")
def base() -> Callable[[str], DictConfig]:
    """`ablation/dino` with a preset of the paper or with `quick`, composed once."""
    kept: dict[str, DictConfig] = {}

    def of(preset: str) -> DictConfig:
        if preset not in kept:
            words = QUICK if preset == "quick" else [*PAPER, f"preset={preset}"]
            kept[preset] = composed("experiment=ablation/dino", *words)
        return kept[preset]

    return of


def checked(cfg: DictConfig, name: str) -> TrainConfig:
    config = cast(TrainConfig, OmegaConf.to_object(cfg))
    check_config(config)
    assert config.experiment == name
    if config.crops.global_size == 32:  # it has the same parts as the large one and builds much faster
        with torch.device("meta"):
            build_method(config)
    return config


@pytest.mark.parametrize("name", CHANGES_KEYS_ONLY)
@pytest.mark.slow_after_first(5)
def test_ablations_of_dino_pass_the_checks_and_build(name: str, base: Callable[[str], DictConfig]) -> None:
    """The keys of the file are merged over DINO with its preset, as Hydra does (next test)."""
    [defaults], values = groups_and_keys(FILES[name])
    preset = defaults["override /preset"]
    epochs = {"paper300": 300, "paper100": 100, "quick": 16}
    for chosen in (preset, "quick"):
        config = checked(cast(DictConfig, OmegaConf.merge(base(chosen), values)), name)
        assert config.trainer.max_epochs == epochs[chosen]
    assert set(values) - {"experiment"} or name == "ablation/dino"


@pytest.mark.parametrize("name", ["ablation/no_momentum", "ablation/head_relu"])
def test_hydra_merges_the_keys_of_an_ablation_over_the_preset(name: str, base: Callable[[str], DictConfig]) -> None:
    [defaults], values = groups_and_keys(FILES[name])
    assert composed(f"experiment={name}", *QUICK) == OmegaConf.merge(base("quick"), values)
    large = composed(f"experiment={name}", *PAPER)
    assert large == OmegaConf.merge(base(defaults["override /preset"]), values)


@pytest.mark.parametrize("name", CHANGES_GROUPS)
@pytest.mark.slow_after_first(2)
def test_ablations_with_other_methods_pass_the_checks_and_build(name: str) -> None:
    large, small = (checked(composed(f"experiment={name}", *words), name) for words in (PAPER, QUICK))
    assert (large.trainer.max_epochs, large.trainer.devices, large.trainer.num_nodes) == (300, 8, 2)
    assert type(large.method).__name__[:4].lower() == name.split("/")[1][:4]
    multicrop = name.endswith("multicrop") or name.endswith("swav")
    assert (large.crops.local_count, small.crops.local_count) == ((8, 2) if multicrop else (0, 0))
    assert (small.trainer.max_epochs, small.crops.global_size) == (16, 32)
    assert small.method.head_hidden_dim == 256  # type: ignore[attr-defined]


@pytest.mark.parametrize("preset", ["quick", "photos32"])
def test_small_presets_have_a_file_with_multicrop_next_to_one_without(preset: str) -> None:
    """Without this file, the method's sizes for ImageNet would apply."""
    files = {path.stem for path in (CONF / "preset" / preset).glob("*.yaml")}
    assert {"byol", "byol_multicrop", "moco", "moco_multicrop"} <= files


def test_files_of_a_preset_are_not_options() -> None:
    assert group_options("train")["preset"] == ["paper", "paper100", "paper300", "photos32", "quick"]


def test_every_file_has_the_results_of_the_paper() -> None:
    assert FILES.keys() == {name for name in PUBLISHED if "=" not in name}
    for name, path in FILES.items():
        row, (said,) = PUBLISHED[name], re.findall(r"Published: (.*)\.$", path.read_text(), re.MULTILINE)
        figures = [f"k-NN {row.knn} %"] * (row.knn is not None) + [f"linear {row.linear} %"] * (row.linear is not None)
        assert said == (", ".join(figures) or "curves only, no figures")
        assert f"dino train experiment={name} preset=quick" in path.read_text()
        (line,) = re.findall(rf"^\| `{re.escape(path.stem)}` \| .* \| (.*) \|$", PAGE, re.MULTILINE)
        assert line == (row.figures or "curves only")


def test_the_page_has_the_points_of_each_grid() -> None:
    points = {name: row for name, row in PUBLISHED.items() if "=" in name}
    assert len(points) == 20
    for name, row in points.items():
        assert re.search(rf"^\| {re.escape(name.partition('=')[2])} \| .*{row.figures} \|$", PAGE, re.MULTILINE), name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_name_experiments_that_exist(path: Path) -> None:
    hydra = yaml.safe_load(path.read_text())["hydra"]
    assert hydra["mode"] == "MULTIRUN"  # even without `--multirun`
    params = hydra["sweeper"]["params"]
    swept = params["experiment"].split(", ")
    assert set(swept) <= FILES.keys()
    assert len(set(swept)) == len(swept)
    if key := GRIDS.get(path.stem):
        points = {paper_row(swept[0], {"sweep": path.stem, key: value}) for value in str(params[key]).split(",")}
        assert points == {name for name in PUBLISHED if f" {key}=" in name}
        assert (set(params), params["preset"]) == ({"experiment", "preset", key}, "paper100")
        assert f"| `{path.stem}` | `{key}={params[key]}`" in PAGE
    else:
        assert f"| `{path.stem}` | {', '.join(name.removeprefix('ablation/') for name in swept)} |" in PAGE


def test_every_ablation_is_in_a_sweep() -> None:
    assert [name for name in FILES if not any(name in path.read_text() for path in SWEEPS)] == [
        "ablation/teacher_temperature_warmup"
    ]
    assert set(group_options("train")["sweep"]) == {"optuna", *(path.stem for path in SWEEPS)}


def test_a_point_of_a_grid_composes_as_in_its_sweep() -> None:
    words = ["sweep=teacher_temperature", "experiment=ablation/dino", "method.teacher_temperature=0.02"]
    assert composed(*words, *QUICK).method.teacher_temperature_start == 0.02
    large = composed(*words, "preset=paper100", *PAPER)
    assert (large.trainer.max_epochs, large.method.teacher_temperature_start, large.method.out_dim) == (
        100,
        0.02,
        65536,
    )


def test_paper_row_of_a_point_of_a_grid() -> None:
    point = "ablation/dino method.out_dim=1024"
    assert paper_row("ablation/dino", {"sweep": "prototypes", "method.out_dim": "1024"}) == point
    assert paper_row("ablation/dino", {"preset": "paper100", "method.out_dim": "1024"}) == point
    assert paper_row("ablation/dino", {"preset": "quick", "method.out_dim": "1024"}) == "ablation/dino"
    assert paper_row("ablation/dino", {"sweep": "prototypes", "method.out_dim": "77"}) == "ablation/dino"
    batch = {"sweep": "table7", "data.batch_size_per_device": "16"}
    assert paper_row("ablation/no_multicrop", batch) == "ablation/no_multicrop"


def test_a_sweep_with_the_users_images_keeps_its_experiments() -> None:
    words = ["sweep=table7", "data=parquet", "preset=photos32"]
    assert with_photo_experiment(words) == words
    assert with_photo_experiment(["sweep=optuna", "data=parquet"]) == [
        "sweep=optuna",
        "experiment=photos32",
        "data=parquet",
    ]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder and exit status of a sweep of three runs: the first is refused, the last diverges."""
    folder = tmp_path_factory.mktemp("sweep") / "table15"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "failed.txt").write_text("a previous attempt\n")
    words = ["--multirun", "sweep=table15", "preset=quick", "experiment=ablation/sinkhorn", *SMALL]
    words += ["seed=3", "optim.lr=-1,0.01,1e30", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    words += ["callbacks.pictures.enabled=false", "cpu_threads=1", f"output_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dino", "train", *words])
        patch.setattr("dino_lightning.cli.program.JOBS", Jobs())
        with pytest.raises(SystemExit) as exited:
            main()
    return folder, cast(int, exited.value.code)


@pytest.mark.slow
def test_a_sweep_continues_after_a_failed_run(sweep: tuple[Path, int]) -> None:
    folder, status = sweep
    assert status == 1
    refused = (folder / "0" / "failed.txt").read_text()
    assert refused == "optim.lr=-1.0: expected at least 0.\n"
    assert json.loads((folder / "1" / "summary.json").read_text())["experiment"] == "ablation/sinkhorn"
    assert not (folder / "1" / "failed.txt").exists()
    assert (folder / "2" / "failed.txt").read_text().startswith("the loss is nan at step ")
    assert (folder / "2" / "metrics.csv").exists()


def test_the_table_of_a_sweep_with_failures(sweep: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = sweep
    assert main(["table", str(folder), "format=markdown"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| Sinkhorn")]
    assert [line[0] for line in lines] == [f"| Sinkhorn-Knopp, optim.lr={lr}" for lr in ("-1.0", "0.01", "1e+30")]
    assert [line[-1].removesuffix(" |").split(":")[0] for line in lines] == ["failed", "finished", "failed"]
    summary = json.loads((folder / "1" / "summary.json").read_text())
    assert lines[1][1:4] == ["1", f"{summary['knn_top1']:.1f}", "72.2 / 76.0"]
    assert all(float(cell) > 0 for cell in lines[1][4:7])


def test_all_runs_are_in_the_rows_of_the_table(sweep: tuple[Path, int]) -> None:
    folder, _ = sweep
    rows = read_rows([folder])
    assert [job.seed for row in rows for job in row.jobs] == [3, 3, 3]
    assert not any(row.missing for row in rows)


def fails(error: BaseException) -> Callable[[DictConfig], float]:
    def job(cfg: DictConfig) -> float:
        raise error

    return job


def test_an_unexpected_error_is_saved_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, cfg = Jobs(), OmegaConf.create({"output_dir": str(tmp_path / "7"), "experiment": "e", "other": "${missing}"})
    assert jobs.attempt(fails(RuntimeError("two\nlines")), cfg) is None
    first, *others = (tmp_path / "7" / "failed.txt").read_text().splitlines()
    assert first == "RuntimeError: two lines"
    assert any("in job" in line for line in others)
    assert yaml.safe_load((tmp_path / "7" / "config.yaml").read_text())["experiment"] == "e"
    assert jobs.attempt(lambda cfg: 4.0, cfg) == 4.0
    with pytest.raises(SystemExit) as exited:
        jobs.finish()
    assert exited.value.code == 1
    assert f"1 run failed:\n  {tmp_path / '7'}: RuntimeError: two lines" in capsys.readouterr().err


def test_an_interrupt_ends_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Jobs().attempt(fails(KeyboardInterrupt()), OmegaConf.create({"output_dir": str(tmp_path)}))
    assert not list(tmp_path.iterdir())


def test_a_failure_of_one_rank_ends_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    jobs, cfg = Jobs(), OmegaConf.create({"output_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="alone"):
        jobs.attempt(fails(ValueError("alone")), cfg)
    (tmp_path / "failed.txt").write_text("before it started the others\n")
    assert jobs.attempt(fails(ValueError("as the first")), cfg) is None
    assert (tmp_path / "failed.txt").read_text() == "before it started the others\n"
