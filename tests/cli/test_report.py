"""`dino report`: the runs that its arguments select, and the content of the page of several runs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from report_cases import CONFIG, SUMMARY, Page, draw, rows, write_metrics
from safetensors.torch import save_file

from dino_lightning.checkpoints.load import weights_digest
from dino_lightning.cli.main import main
from dino_lightning.cli.report import write
from dino_lightning.errors import UserError
from dino_lightning.report.comparison import MAX_RUNS
from dino_lightning.report.curves import MAX_PAGE_POINTS, MAX_POINTS, MIN_POINTS, max_points, plot_runs
from dino_lightning.report.evaluations import find_results
from dino_lightning.report.gallery import MAX_SHEETS, choose_epochs
from dino_lightning.report.run_folder import read_run
from dino_lightning.report.runs import differing_settings, find_runs, run_labels, run_status

Rows = list[dict[str, Any]]


def made(folder: Path, *, config: dict[str, Any] | None = None, summary: dict[str, Any] | None = None) -> Path:
    """A finished run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **(config or {})}))
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **(summary or {})}))
    write_metrics(folder, rows())
    return folder


def result(checkpoint: object, metric: str = "top1_k20", value: float = 71.5, **others: Any) -> dict[str, Any]:
    """A line of `results.jsonl`."""
    line = {
        "eval": "knn",
        "metric": metric,
        "value": value,
        "unit": "%",
        "trained": True,
        "time": "2026-01-01T00:00:00",
    }
    line |= {"checkpoint": str(checkpoint), "checkpoint_digest": "0", "config": {"data": {"path": "/data/flowers"}}}
    return line | others


def write_results(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Two runs; `b` learns faster and is not finished."""
    made(tmp_path / "a", config={"optim": {"lr": 0.002}})
    b = made(tmp_path / "b", config={"optim": {"lr": 0.004}, "trainer": {"max_epochs": 9}})
    (b / "summary.json").unlink()
    draw(tmp_path / "a", "attention_epoch0002", "attention_epoch0004", "attention")
    draw(b, "attention_epoch0002", "attention_epoch0003")
    return tmp_path


def test_arguments_are_runs_sweeps_or_patterns(tmp_path: Path):
    for number in (0, 2, 10):
        made(tmp_path / "sweep" / str(number))
    made(tmp_path / "alone")
    write_results(tmp_path / "eval-1")
    sweep = [tmp_path / "sweep" / name for name in ("0", "2", "10")]
    assert find_runs([str(tmp_path / "sweep")]) == sweep
    assert find_runs([str(tmp_path / "sweep" / "2"), str(tmp_path / "s*")]) == [sweep[1], sweep[0], sweep[2]]
    assert find_runs([str(tmp_path / "alone"), str(tmp_path / "sweep" / ".." / "alone")]) == [tmp_path / "alone"]
    assert find_runs([str(tmp_path)]) == [tmp_path / "alone"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["alon"], "alon: this folder does not exist; did you mean 'alone'?"),
        (["z*"], "z*: no folder matches."),
        (["eval-1"], "eval-1: expected the folder of a run or of a sweep, but it contains no run."),
        (["alone", "output=x.pdf"], "output=x.pdf: the page is an HTML file; name it x.html"),
        (["alone", "output=."], "output=.: the page is an HTML file; name it report.html"),
        (["alone", "output=no/x.html"], "output=no/x.html: there is no folder no; name a file in a folder"),
        (["alone", "results=alone"], "results=alone: expected a results.jsonl written by dino eval"),
        (["alone", "results=eval-1"], "its results are not of these runs but of /runs/other"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], sentence: str
):
    made(tmp_path / "alone")
    write_results(tmp_path / "eval-1", result("/runs/other"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_too_many_runs_are_refused_before_they_are_read(tmp_path: Path):
    for number in range(MAX_RUNS + 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text("half")
    with pytest.raises(UserError, match=f"these are {MAX_RUNS + 1} runs and a page takes {MAX_RUNS}"):
        write([str(tmp_path)])


def test_a_folder_name_may_contain_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = made(tmp_path / "run [x] [/y]")
    assert main(["report", str(folder)]) == 0
    assert f"Report: {folder}/report.html\n" in capsys.readouterr().out


def test_one_run_has_its_page_inside_and_several_share_one_next_to_them(pair: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(pair / "a")]) == 0
    assert "dino-lightning run" in Page(pair / "a" / "report.html").text
    assert main(["report", str(pair / "a"), str(pair / "b")]) == 0
    assert capsys.readouterr().out.split() == ["Report:", f"{pair}/a/report.html", "Report:", f"{pair}/report.html"]
    assert "2 dino-lightning runs" in Page(pair / "report.html").text
    assert main(["report", str(pair), f"output={pair}/b/both.html"]) == 0
    assert (pair / "b" / "both.html").read_text() == (pair / "report.html").read_text()


@pytest.mark.parametrize(
    ("summary", "failure", "expected"),
    [
        ({}, None, "finished"),
        ({"collapse": "uniform at step 9"}, None, "finished; collapse: uniform at step 9"),
        ({"pruned": "at epoch 3"}, None, "pruned at epoch 3"),
        ({}, "It broke.\nTraceback", "failed: It broke."),
    ],
)
def test_the_state_of_a_run(tmp_path: Path, summary: dict[str, Any], failure: str | None, expected: str):
    folder = made(tmp_path / "a", summary=summary)
    if failure:
        (folder / "failed.txt").write_text(failure)
    assert run_status(read_run(folder)) == expected


def test_only_settings_count_as_differences(tmp_path: Path):
    nested = {"optim": {"lr": 1e-3, "betas": [0.9, 0.999]}, "callbacks": {}}
    one = made(tmp_path / "1", config={**nested, "seed": 0, "output_dir": "x", "resume": None})
    two = made(tmp_path / "2", config={**nested, "optim": {"lr": 1e-3}, "seed": 1, "output_dir": "y", "resume": True})
    runs = [read_run(one), read_run(two)]
    assert differing_settings(runs) == {"optim.betas": ["[0.9,0.999]", ""], "seed": ["0", "1"]}
    three = made(tmp_path / "3", config={**nested, "seed": 0}, summary={"commit": "f" * 40})
    assert differing_settings([runs[0], read_run(three)]) == {"commit": ["3f2a9c1e8b7", "f" * 11]}


def test_names_contain_the_differences_if_they_are_short(tmp_path: Path):
    runs = [read_run(made(tmp_path / "s" / str(n), config={"optim": {"lr": 0.1 * n}})) for n in (1, 2)]
    assert run_labels(runs) == ["1 (lr=0.1)", "2 (lr=0.2)"]
    drawn = [read_run(made(tmp_path / "o" / str(n), config={"optim": {"lr": n / 3}})) for n in (1, 2)]
    assert run_labels(drawn) == ["1 (lr=0.3333)", "2 (lr=0.6667)"]
    other = read_run(made(tmp_path / "t" / "1", config={"optim": {"lr": 0.3}, "why": "for a reason of many words"}))
    assert run_labels([*runs, other]) == ["s/1", "s/2", "t/1"]


def test_each_chart_shows_both_runs(pair: Path):
    page = Page(write([str(pair / "a"), str(pair / "b")]))
    by_title = dict(zip(titles(page), page.data["charts"], strict=True))
    expected = [[row["step"], row["knn/top1"]] for row in rows() if "knn/top1" in row]
    assert [one["points"] for one in by_title["k-NN accuracy: top-1"]["series"]] == [expected, expected]
    assert {one["color"] for one in by_title["Learning rate"]["series"]} == {0, 1}
    assert (
        len(by_title)
        == len(page.data["charts"])
        == len({column for row in rows() for column in row} - {"step", "epoch", "knn/top5_k10"})
    )
    # Reference lines of only one run are left out.
    assert "untrained, top-1" not in page.references()
    assert "1/√D: evenly spread" not in page.references()
    assert "ln 256: all prototypes alike" in page.references()


def titles(page: Page) -> list[str]:
    return [part.partition("</h4>")[0] for part in page.source.partition('id="curves"')[2].split("<h4>")[1:]]


def test_the_page_lists_state_settings_and_results_of_both_runs(pair: Path):
    page = Page(write([str(pair / "a"), str(pair / "b")]))
    for words in (
        "finished",
        "epoch 4 of 9",
        "trainer.max_epochs",
        "optim.lr",
        "0.004",
        "a (lr=0.002) has the best k-NN accuracy, 76.7 %",
        "6.7 points more than the worst run",
    ):
        assert words in page.text, words
    assert "backbone.width" not in page.text
    assert [float(str(data["value"])) for data in page.all("data")] == [SUMMARY["knn_top1"], 50 + 399 / 20]


def test_a_slider_covers_the_epochs_of_all_runs(pair: Path):
    page = Page(write([str(pair / "a"), str(pair / "b")]))
    (slider,) = [box for box in page.all("input") if "data-stops" in box]
    assert slider["data-stops"] == "2 3 4 "
    frames = [(span["data-epoch"], "now" in str(span["class"])) for span in page.all("span") if "data-epoch" in span]
    assert frames == [("2", False), ("4", False), ("", True), ("2", False), ("3", True)]


def test_many_runs_show_fewer_pictures_each():
    every = [(epoch, Path()) for epoch in (*range(1, 100), None)]
    assert choose_epochs([every] * 3, most=MAX_SHEETS // 3)[0] == 1
    assert choose_epochs([every, every[:50]], most=1) == [None]
    assert choose_epochs([every[4:7]], most=12) == [5, 6, 7]


def test_many_runs_have_fewer_points_per_curve(tmp_path: Path):
    folder = tmp_path / "0"
    folder.mkdir()
    write_metrics(folder, [{"step": step, **{f"x{n}": step % 7 for n in range(10)}} for step in range(3000)])
    run = read_run(folder)
    for n, most in ((1, MAX_POINTS), (20, MAX_PAGE_POINTS // 200), (200, MIN_POINTS)):
        assert max_points([run] * n) == most
    charts = plot_runs([run] * 20, [""] * 20)
    assert 0.9 * 1000 < max(len(series.curve) for drawn in charts for series in drawn.series) <= 1000
    (means,) = {tuple(drawn.series[0].means or []) for drawn in plot_runs([run], [""])}
    # Each point is the mean of three steps of a sawtooth curve, at the middle step.
    assert means[:2] == ((1, 1.0), (4, pytest.approx((3 + 4 + 5) / 3)))


def test_evaluations_belong_to_their_run(pair: Path):
    write_results(
        pair / "eval-1",
        result(pair / "a"),
        result(pair / "a", value=50.0, trained=False),
        result(pair / "a", "top1_k10", 1.0),
        result(pair / "elsewhere" / "a", value=2.0),
        result(f"{pair.name}/a/teacher.safetensors", "top1_k10", 70.25, time="2026-02-01"),
    )
    (pair / "eval-1" / "results.jsonl").open("a").write('{"eval": "knn", "half')
    write_results(pair / "b" / "linear", result(pair / "b" / "checkpoints" / "last.ckpt", "top1", 80.0, eval="linear"))
    a, b = find_results([read_run(pair / "a"), read_run(pair / "b")])
    assert [(one.metric, one.value, one.trained) for one in a] == [
        ("top1_k20", 71.5, True),
        ("top1_k20", 50.0, False),
        ("top1_k10", 70.25, True),
    ]
    assert [(one.eval, one.value) for one in b] == [("linear", 80.0)]
    page = Page(write([str(pair / "a")]))
    assert [float(str(data["value"])) for data in page.all("data")][:4] == [
        SUMMARY[key] for key in ("knn_top1_pixels", "knn_top1_untrained", "knn_top1")
    ] + [71.5]
    assert "flowers" in page.text


def test_results_of_a_moved_folder_are_matched_by_the_weights(pair: Path, tmp_path_factory: pytest.TempPathFactory):
    weights = {"w": torch.arange(6.0).reshape(2, 3)}
    save_file(weights, pair / "a" / "teacher.safetensors")
    (pair / "b" / "teacher.safetensors").write_bytes(b"half")
    far = tmp_path_factory.mktemp("far")
    write_results(far / "eval", result("/cluster/runs/x", checkpoint_digest=weights_digest(weights)))
    a, b = find_results([read_run(pair / "a"), read_run(pair / "b")], [far])
    assert ([one.value for one in a], b) == ([71.5], [])


def test_results_of_runs_with_the_same_name_are_matched_by_the_weights(tmp_path: Path):
    """Results of `dino eval checkpoint=0`, which can be in the folder of either sweep."""
    for number, sweep in enumerate("ab"):
        weights = {"w": torch.full((2,), float(number))}
        save_file(weights, made(tmp_path / sweep / "0") / "teacher.safetensors")
        write_results(
            tmp_path / sweep / "eval", result("0", value=50.0 + number, checkpoint_digest=weights_digest(weights))
        )
    a, b = find_results([read_run(tmp_path / sweep / "0") for sweep in "ab"])
    assert ([one.value for one in a], [one.value for one in b]) == ([50.0], [51.0])


def test_the_page_of_forty_runs_is_small(tmp_path: Path):
    for number in range(MAX_RUNS):
        folder = made(tmp_path / f"{number:02}", config={"seed": number})
        draw(folder, *(f"attention_epoch{epoch:04d}" for epoch in range(1, 20)))
    started = time.monotonic()
    page = write([str(tmp_path)])
    assert page.stat().st_size < 4e6
    assert time.monotonic() - started < 30
    assert Page(page).text.count("seed=") >= MAX_RUNS
