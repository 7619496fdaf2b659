"""Runs, evaluations and views at W&B: the real wandb client with a local server."""

import json
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from composing import SMALL, composed, composed_evaluation
from programs import run_code
from safetensors import safe_open
from wandb_records import artifacts, configuration, description, history, logged, maxima, offline_records, records_of
from wandb_server import ENTITY, KEY, Run, WandbServer, md5, serving

from dino_lightning.cli.main import main
from dino_lightning.config import WandbLoggerConfig
from dino_lightning.evaluation.run import run_evaluation
from dino_lightning.loggers.wandb import STEP_METRIC, FaultTolerantWandbLogger, wandb_logger, wandb_session
from dino_lightning.report.charts import CHARTS
from dino_lightning.report.gallery import CAPTIONS
from dino_lightning.report.wandb_workspace import SECTIONS, SYSTEM_CHARTS
from dino_lightning.training.run import train

PROJECT = Path(__file__).parents[2]
TRAIN = [*SMALL, "logger=wandb", "logger.end_timeout_s=60", "callbacks.knn.k=[5,20]"]
EVALUATE = [
    "eval=knn",
    "eval.k=[5]",
    "data=builtin",
    "data.train_images=64",
    "data.val_images=32",
    "data.num_workers=0",
    "logger=wandb",
]
ONLY_ON_GPUS = {"speed/mfu", "speed/gpu_memory_gib", "amp/scale"}


@pytest.fixture(scope="module")
def at_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[WandbServer | str], None]]:
    """Points wandb to a server; the teardown ends W&B's process, which remembers the server that it started with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_API_KEY", KEY)
        for kind in ("CACHE", "DATA"):  # by default in the home folder, where other processes use it too
            patch.setenv(f"WANDB_{kind}_DIR", str(tmp_path_factory.mktemp("wandb")))
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)

        def point(server: WandbServer | str) -> None:
            wandb.teardown()
            patch.setenv("WANDB_BASE_URL", server if isinstance(server, str) else server.url)

        yield point
        wandb.teardown()


@pytest.fixture(scope="module")
def online(
    tmp_path_factory: pytest.TempPathFactory, at_server: Callable[[WandbServer | str], None]
) -> Iterator[tuple[WandbServer, Path]]:
    """A run of 12 steps that was interrupted after 6, and its evaluation."""
    folder = tmp_path_factory.mktemp("online")
    torch.manual_seed(0)
    with serving() as server:
        at_server(server)
        words = [*TRAIN, "logger.mode=online", "logger.tags=[a,b]", "logger.project=photos"]
        train(composed(*words, "trainer.max_steps=6", output_dir=folder / "run"))
        train(composed(*words, "resume=true", output_dir=folder / "run"))
        words = [*EVALUATE, "logger.mode=online", f"checkpoint={folder / 'run'}"]
        run_evaluation(composed_evaluation(*words, output_dir=folder / "knn"), overrides=words)
        yield server, folder


def run_of(server: WandbServer, job_type: str) -> Run:
    (run,) = [run for run in server.runs.values() if run.sent["jobType"] == job_type]
    return run


def test_a_resumed_run_continues_its_curves(online: tuple[WandbServer, Path]) -> None:
    server, folder = online
    run = run_of(server, "train")
    assert run.name == (folder / "run" / "wandb_run_id.txt").read_text().strip()
    assert run.starts == 1
    losses = [(row[STEP_METRIC], row["train/loss"]) for row in run.rows if "train/loss" in row]
    with (folder / "run" / "metrics.csv").open() as file:
        names = file.readline().strip().split(",")
        rows = [dict(zip(names, line.strip().split(","), strict=True)) for line in file]
    assert losses == [(int(row["step"]), pytest.approx(float(row["train/loss"]))) for row in rows if row["train/loss"]]
    assert [step for step, _ in losses] == list(range(12))
    assert [row["_step"] for row in run.rows] == list(range(len(run.rows)))


def test_the_description_of_a_run(online: tuple[WandbServer, Path]) -> None:
    server, _ = online
    run = run_of(server, "train")
    assert (run.project, run.sent["displayName"], run.sent["tags"]) == ("photos", "run", ["a", "b"])
    assert {"commit", "command", "torch"} <= run.config["environment"].keys()
    assert run.config["data"]["train_images"] == 96
    best = max(row["knn/top1"] for row in run.rows if "knn/top1" in row)
    assert run.summary["knn/top1"] == {"max": best}
    assert run.summary["summary/knn_top1_untrained"] > 0


def test_pictures_are_logged_at_their_steps(online: tuple[WandbServer, Path]) -> None:
    server, folder = online
    rows = [row for row in run_of(server, "train").rows if "pictures/attention" in row]
    assert [row[STEP_METRIC] for row in rows] == [5, 11]
    assert rows[-1]["pictures/attention"]["captions"] == ["after 12 steps"]
    (name,) = rows[-1]["pictures/attention"]["filenames"]
    sent = server.files[f"{run_of(server, 'train').name}/{name}"]
    assert sent[:8] == (folder / "run" / "pictures" / "attention.png").read_bytes()[:8]


def test_weights_are_uploaded_as_an_artifact(online: tuple[WandbServer, Path]) -> None:
    server, folder = online
    run, exported = run_of(server, "train"), folder / "run" / "teacher.safetensors"
    found = [artifact for artifact in server.artifacts if artifact.sent["artifactTypeName"] == "model"]
    assert [artifact.sent["artifactCollectionName"] for artifact in found] == [f"weights-{run.name}"] * 2
    assert all(artifact.committed for artifact in found)
    assert server.files[f"{found[-1].id}/teacher.safetensors"] == exported.read_bytes()
    assert found[-1].files == {"teacher.safetensors": md5(exported.read_bytes())}
    metadata = json.loads(found[-1].sent["metadata"])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (metadata["knn_top1"], metadata["timm"]) == (summary["knn_top1"], summary["timm"])
    with safe_open(exported, framework="pt") as file:
        assert json.loads(file.metadata()["timm"]) == metadata["timm"]


def test_an_evaluation_refers_to_its_weights(online: tuple[WandbServer, Path]) -> None:
    server, folder = online
    run = run_of(server, "evaluation")
    assert run.project == "photos"  # that of the training run
    (weights, *_) = [one.id for one in reversed(server.artifacts) if one.sent["artifactTypeName"] == "model"]
    assert run.used == [weights]
    assert run.config["training_run"] == run_of(server, "train").name
    line = json.loads((folder / "knn" / "results.jsonl").read_text().splitlines()[0])
    assert run.config["checkpoint_digest"] == line["checkpoint_digest"]
    (table,) = [content for path, content in server.files.items() if path.endswith("results.table.json")]
    rows = {row[1]: row[2] for row in json.loads(table)["data"]}
    assert rows[line["metric"]] == pytest.approx(line["value"])
    assert run.summary[f"knn/{line['metric']}"] == pytest.approx(line["value"])


def test_the_view_has_what_a_run_logs(online: tuple[WandbServer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    server, _ = online
    assert main(["wandb", "photos", "report=true"]) == 0
    view, report = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "photos", "DINO")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    titles = ["Learning", "Schedules", "Signs of collapse", "Speed", "Pictures", "Norms", "System"]
    assert [section["name"] for section in sections] == titles == list(SECTIONS)
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    shown = {name for panel in panels for name in panel.get("metrics", []) + panel.get("mediaKeys", [])}
    run = run_of(server, "train")
    pictures = {f"pictures/{name}" for name in CAPTIONS}
    assert shown == {name for chart in [*CHARTS, *SYSTEM_CHARTS] for name in chart.columns} | pictures
    missing = {name for name in shown if not name.startswith("system/")} - {name for row in run.rows for name in row}
    assert missing == ONLY_ON_GPUS
    assert {panel["xAxis"] for panel in panels if "metrics" in panel} == {STEP_METRIC, "_step"}
    assert f"View: {server.url}/{ENTITY}/photos?nw=" in capsys.readouterr().out
    assert all(title in report["spec"] for title in titles)


# ------------------------------------------------------------------------------------------------------- out of reach


def started(folder: Path, **config: Any) -> FaultTolerantWandbLogger:
    settings = WandbLoggerConfig(**{"mode": "online", "start_timeout_s": 20.0, "end_timeout_s": 20.0, **config})
    logger = wandb_logger(settings, folder=folder, run_id="abc", name="n", group=None, job_type="train")
    with wandb_session():
        logger.start()
        logger.log_metrics({"loss": 1.0}, 0)
        logger.log_summary({"knn_top1": 1.0}, weights=None)
    return logger


def warning_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    return line


@pytest.mark.parametrize(
    ("key", "reason"),
    [("x" * 40, "401"), ("12345", "characters"), (None, "no API key for")],
    ids=["bad", "short", "no"],
)
def test_an_invalid_key(
    at_server: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    reason: str,
) -> None:
    with serving() as server:
        at_server(server)
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        monkeypatch.delenv("WANDB_API_KEY") if key is None else monkeypatch.setenv("WANDB_API_KEY", key)
        started(tmp_path)
        assert not server.runs
    warning = warning_of(capsys)
    assert reason in warning
    assert f"continues offline. Upload it later with `wandb sync {tmp_path}/wandb/offline-run-*-abc`." in warning
    (row,) = history(offline_records(tmp_path))
    assert row["loss"] == 1


@pytest.mark.parametrize("answers", ["refuses", "is silent"])
@pytest.mark.slow_after_first(1)
def test_an_unreachable_server(
    at_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: str
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if answers == "is silent":
            silent.listen(50)
        at_server(f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        started(tmp_path, start_timeout_s=2.0)
        assert time.monotonic() - begin < 40
    assert "continues offline" in warning_of(capsys)
    assert logged(offline_records(tmp_path))["loss"] == [1]


@pytest.mark.slow
def test_a_server_that_stops(at_server: Any, tmp_path: Path) -> None:
    """Closing the run takes a bounded time, and its rows remain on the disk."""
    with serving() as server:
        at_server(server)
        settings = WandbLoggerConfig(mode="online", end_timeout_s=2.0)
        logger = wandb_logger(settings, folder=tmp_path, run_id="abc", name="n", group=None, job_type="train")
        logger.start()
    begin = time.monotonic()
    logger.log_metrics({"loss": 2.0}, 0)
    logger.finish()
    assert time.monotonic() - begin < 40
    (path,) = tmp_path.glob("wandb/run-*/run-abc.wandb")
    assert logged(records_of(path))["loss"] == [2]


ON_A_TERMINAL = """
import os, sys
from pathlib import Path
terminal = os.open(sys.argv[2], os.O_RDWR)
os.dup2(terminal, 0)
os.dup2(terminal, 1)
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
assert sys.stdin.isatty() and sys.stdout.isatty()
from dino_lightning.loggers.wandb import wandb_logger
from dino_lightning.config import WandbLoggerConfig

config = WandbLoggerConfig(mode="online")
logger = wandb_logger(config, folder=Path(sys.argv[1]), run_id="abc", name="n", group=None, job_type="train")
logger.start()
logger.log_metrics({"loss": 1.0}, 0)
logger.finish()
"""


@pytest.mark.slow
def test_a_run_in_a_terminal_asks_no_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = pty.openpty()
    variables = {"NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_code(ON_A_TERMINAL, str(tmp_path), os.ttyname(theirs), cwd=tmp_path, variables=variables)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert "there is no API key for http://127.0.0.1:9" in done.stderr
    assert logged(offline_records(tmp_path))["loss"] == [1]


def test_disabled(tmp_path: Path) -> None:
    assert not started(tmp_path, mode="disabled").disconnected
    assert wandb.run is None
    assert not list(tmp_path.rglob("*.wandb"))


# ------------------------------------------------------------------------------------------------------------ offline


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The run saves its artifact for `wandb sync`; the evaluation warns that it cannot record the weights it used."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    train(composed(*TRAIN, "trainer.max_steps=2", "callbacks.pictures.enabled=false", output_dir=run))
    records = offline_records(run)
    run_id = description(records).run_id
    assert [(one.type, one.name) for one in artifacts(records)] == [("model", f"weights-{run_id}")]
    assert {"knn/top1", "knn/top5", "knn/top1_k5"} <= maxima(records)
    words = [*EVALUATE, f"checkpoint={run / 'teacher.safetensors'}"]
    capsys.readouterr()
    run_evaluation(composed_evaluation(*words, output_dir=tmp_path / "knn"), overrides=words)
    assert "cannot record used artifacts offline" in warning_of(capsys)
    records = offline_records(tmp_path / "knn")
    assert description(records).job_type == "evaluation"
    assert configuration(records)["training_run"] == run_id
    assert "knn/top1_k5" in logged(records)


@pytest.mark.slow
def test_artifacts_can_be_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["logger.artifacts=false", "trainer.max_steps=1", "callbacks.pictures.enabled=false"]
    train(composed(*TRAIN, *words, "callbacks.knn.enabled=false", output_dir=tmp_path))
    assert not artifacts(offline_records(tmp_path))


@pytest.mark.slow
def test_a_sweep_is_a_group_and_only_one_rank_logs(tmp_path: Path) -> None:
    words = [
        *TRAIN,
        "trainer.max_steps=2",
        "callbacks.pictures.enabled=false",
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.precision=32",
    ]
    words += ["--multirun", "seed=0,1", f"output_dir={tmp_path / 'both'}"]
    command = [sys.executable, str(PROJECT / "train.py"), *words]
    subprocess.run(command, check=True, timeout=500, env={**os.environ, "WANDB_SILENT": "true"})
    for job in ("0", "1"):
        run = description(offline_records(tmp_path / "both" / job))
        assert (run.run_group, run.display_name) == ("both", f"both/{job}")
