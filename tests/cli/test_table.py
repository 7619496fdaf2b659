"""`dino table`: means over seeds, runs in every state, Markdown, and the plot of the curves."""

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from dino_lightning.cli.main import main
from dino_lightning.report.svg import ticks
from dino_lightning.report.sweeps.jobs import read_rows
from dino_lightning.report.sweeps.marks import COLORS, INK
from dino_lightning.report.sweeps.table import markdown_table, notes, row_cells, terminal_table

SVG = "{http://www.w3.org/2000/svg}"


def make(
    folder: Path,
    experiment: str,
    *,
    seed: int = 0,
    knn: float | None = None,
    steps: int = 4,
    entropy: float = 2.0,
    failure: str | None = None,
    **settings: Any,
) -> Path:
    """Write a run: finished if `knn` is not None, otherwise after two of its four epochs."""
    folder.mkdir(parents=True)
    config = {"experiment": f"ablation/{experiment}", "seed": seed, "output_dir": str(folder)}
    config |= {"method": {"out_dim": 16, **settings}, "trainer": {"max_epochs": 4}, "backbone": {"width": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["collapse/teacher_entropy,collapse/teacher_student_kl,epoch,knn/top1,step,train/loss,train/loss_epoch"]
    rows += [f"{entropy + step / 10},{0.3 / (step + 1)},{step // 2},,{step},{5 - step}," for step in range(steps)]
    rows.append(f",,{(steps - 1) // 2},33.5,{steps - 1},,4.5")
    (folder / "metrics.csv").write_text("\n".join(rows[: steps + 2 if steps else 1]) + "\n")
    if knn is not None:
        summary = {"knn_top1": knn, "knn_top1_untrained": 40 + seed, "seed": seed, "epochs": 4}
        (folder / "summary.json").write_text(json.dumps(summary))
    if failure:
        (folder / "failed.txt").write_text(f"{failure}\n\nTraceback (most recent call last):\n")
    return folder


def plan(folder: Path, experiments: str, *words: str) -> None:
    """The file that Hydra writes for a sweep."""
    hydra = {"sweeper": {"params": {"experiment": experiments}}, "overrides": {"task": ["sweep=x", *words]}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))


def table(*folders: Path) -> dict[str, list[str]]:
    return {row.name: row_cells(row)[1:] for row in read_rows(folders)}


def test_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    figures = [70.1, 72.5, 71.2]
    for seed, knn in enumerate(figures):
        make(tmp_path / str(seed), "dino", seed=seed, knn=knn, entropy=2.0 + seed)
    n, knn, paper, loss, entropy, kl, status = table(tmp_path)["DINO"]
    assert (n, paper, status) == ("3", "72.8 / 76.1", "finished")
    assert knn == f"{mean(figures):.1f} ± {stdev(figures):.1f}"
    assert (loss, entropy, kl) == ("4.50", "3.30", "0.07")
    assert notes(read_rows([tmp_path])) == [
        "untrained network: k-NN 41.0 ± 1.0 % (n = 3)",
        "uniform output: entropy ln 16 = 2.77",
    ]


def test_rows_are_in_the_order_of_the_paper(tmp_path: Path) -> None:
    for index, name in enumerate(["swav", "own", "byol", "no_momentum", "dino"]):
        make(tmp_path / str(index), name, knn=50.0)
    assert list(table(tmp_path)) == ["DINO", "no momentum (teacher: the student)", "BYOL", "SwAV", "ablation/own"]


def test_runs_in_every_state_have_a_row(tmp_path: Path) -> None:
    make(tmp_path / "0", "dino", knn=60.0)
    make(tmp_path / "1", "dino", seed=1)
    make(tmp_path / "2", "no_momentum")
    make(tmp_path / "3", "sinkhorn", failure="the loss is nan at step 3: lower optim.lr.")
    make(tmp_path / "4", "mse", steps=0)
    (tmp_path / "5").mkdir()
    plan(
        tmp_path,
        "ablation/dino, ablation/no_momentum, ablation/sinkhorn, ablation/mse, ablation/predictor",
        "seed=0,1",
    )
    found = table(tmp_path)
    assert found["DINO"][:2] == ["1", "60.0"]
    assert found["DINO"][-1] == "seed 0: finished; seed 1: epoch 2 of 4"
    assert found["no momentum (teacher: the student)"][:2] == ["1", "33.5"]
    assert found["no momentum (teacher: the student)"][-1] == "seed 0: epoch 2 of 4; seed 1: not started"
    sentence = "failed: the loss is nan at step 3: lower optim.lr."
    assert found["Sinkhorn-Knopp"][-1] == f"seed 0: {sentence}; seed 1: not started"
    assert found["MSE"] == ["0", "", "52.6 / 62.4", "", "", "", "seed 0: started; seed 1: not started"]
    assert found["with predictor"] == ["0", "", "71.8 / 75.6", "", "", "", "not started"]


def test_experiments_on_the_command_line_replace_those_of_the_sweep(tmp_path: Path) -> None:
    plan(tmp_path, "ablation/dino, ablation/mse", "experiment=ablation/byol")
    assert list(table(tmp_path)) == ["BYOL"]


@pytest.mark.parametrize("cut", ["config.yaml", "metrics.csv", "summary.json", "multirun.yaml"])
def test_half_written_files_are_read_up_to_their_end(tmp_path: Path, cut: str) -> None:
    plan(tmp_path, "ablation/dino")
    make(tmp_path / "0", "dino", knn=60.0)
    path = tmp_path / cut if cut == "multirun.yaml" else tmp_path / "0" / cut
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        rows = read_rows([tmp_path])
        assert rows
        assert terminal_table(rows).row_count == len(rows)
        assert all(row.status for row in rows)


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(tmp_path: Path) -> None:
    for index, (seed, center) in enumerate([(0, 0.9), (1, 0.9), (0, 0.5)]):
        make(tmp_path / str(index), "dino", seed=seed, knn=50.0 + index, center_momentum=center)
    found = table(tmp_path)
    assert {name: row[0] for name, row in found.items()} == {
        "DINO, method.center_momentum=0.9": "2",
        "DINO, method.center_momentum=0.5": "1",
    }


def test_several_folders_and_single_runs(tmp_path: Path) -> None:
    make(tmp_path / "a" / "0", "dino", knn=50.0)
    make(tmp_path / "b" / "0", "dino", seed=1, knn=52.0)
    single = make(tmp_path / "c", "byol", knn=40.0)
    found = table(tmp_path / "a", tmp_path / "b", single)
    assert (found["DINO"][0], found["BYOL"][1]) == ("2", "40.0")


def test_markdown_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "0", "dino", knn=60.0)
    make(tmp_path / "1", "mse", failure="a | b [c]")
    assert main(["table", str(tmp_path), "format=markdown"]) == 0
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == 9
    assert rows[0] == "| DINO | 1 | 60.0 | 72.8 / 76.1 | 4.50 | 2.30 | 0.07 | finished |"
    assert rows[1].endswith("| failed: a \\| b [c] |")
    assert rows[-1] == "Untrained network: k-NN 40.0 % (n = 1). Uniform output: entropy ln 16 = 2.77."


def test_the_terminal_shows_brackets_in_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "0", "mse", failure="[bold]x[/]")
    assert main(["table", str(tmp_path)]) == 0
    assert "[bold]x[/]" in re.sub(r"\s+", "", capsys.readouterr().out)


@pytest.mark.parametrize(("columns", "name"), [(80, "Sinkhorn-Knopp"), (72, "Sinkhorn-")])
def test_names_wrap_before_numbers(
    columns: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for seed, knn in enumerate([79.0, 80.5]):
        make(tmp_path / str(seed), "sinkhorn", seed=seed, knn=knn)
        make(tmp_path / f"1{seed}", "no_momentum", seed=seed, knn=knn)  # a name that is too long for one line
    assert main(["table", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Sinkhorn" in line)
    assert re.search(rf"{name} +2 +79\.8 ± 1\.1 +72\.2 / 76\.0 .* finished", line)


def test_small_values_keep_a_digit(tmp_path: Path) -> None:
    make(tmp_path / "0", "no_momentum", knn=8.3, entropy=-0.2996)
    assert table(tmp_path)["no momentum (teacher: the student)"][4] == "4e-04"


def test_errors_name_the_nearest_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "table7-1" / "0", "dino")
    plan(tmp_path / "table7-1", "ablation/dino")
    plan(tmp_path / "empty", "")
    for folder, said in (
        (tmp_path / "table7-2", "this folder does not exist; did you mean 'table7-1'?"),
        (tmp_path / "no" / "where", "this folder does not exist"),
        (tmp_path, "expected the folder of a sweep (--multirun) or of a run; "),
        (tmp_path / "empty", "no run has started yet."),
    ):
        assert main(["table", str(folder)]) == 2
        assert said in capsys.readouterr().err
    for name, said in (("c.png", "name it c.svg"), ("no/c.svg", "No such file or directory")):
        assert main(["table", str(tmp_path / "table7-1"), f"curves={tmp_path / name}"]) == 2
        assert said in capsys.readouterr().err.replace(f"{tmp_path}/", "")


def test_curves_have_a_color_for_each_row_and_a_line_for_each_seed(tmp_path: Path) -> None:
    """In each panel, and at the heights of the values."""
    for index, (name, seed) in enumerate([("dino", 0), ("dino", 1), ("no_centering", 0), ("byol", 0)]):
        make(tmp_path / str(index), name, seed=seed, entropy=1.0 + index)
    (tmp_path / "3" / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.0\n")
    target = tmp_path / "curves.svg"
    assert main(["table", str(tmp_path), f"curves={target}"]) == 0
    root = ElementTree.fromstring(target.read_text())
    lines = root.findall(f"{SVG}polyline")
    assert [line.get("stroke") for line in lines] == [COLORS[0], COLORS[0], COLORS[1]] * 2
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"DINO", "no centering", "ln 16", "step", "entropy of the teacher (nats)"} <= set(texts)
    assert "BYOL" not in texts
    points = [[tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()] for line in lines]
    assert all(len(line) == 4 for line in points)
    heights = [[y for _, y in line] for line in points[:3]]
    slope = (heights[0][0] - heights[1][0]) / 1.0  # entropies 1.0 and 2.0 at step 0
    assert heights[0][0] - heights[2][0] == pytest.approx(2 * slope, abs=0.2)
    assert heights[0][0] - heights[0][3] == pytest.approx(0.3 * slope, abs=0.2)
    (level,) = [float(text.get("y") or 0) - 4 for text in root.findall(f"{SVG}text") if text.text == "ln 16"]
    assert heights[0][0] - level == pytest.approx((math.log(16) - 1.0) * slope, abs=0.3)


def test_curves_without_values_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "0", "dino", steps=0)
    assert main(["table", str(tmp_path), f"curves={tmp_path}/c.svg"]) == 2
    assert "none of these runs has logged collapse/teacher_entropy" in capsys.readouterr().err
    assert not (tmp_path / "c.svg").exists()


def test_names_are_escaped_in_the_plot(tmp_path: Path) -> None:
    make(tmp_path / "0", "<a & b>", knn=1.0)
    assert main(["table", str(tmp_path), f"curves={tmp_path}/c.svg"]) == 0
    assert "ablation/<a & b>" in [text.text for text in ElementTree.parse(tmp_path / "c.svg").iter(f"{SVG}text")]


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("color", [*COLORS, INK])
def test_colors_have_enough_contrast_on_white_and_on_dark_pages(color: str) -> None:
    """WCAG 2: 3 to 1 for graphics, about 4 to 1 for the text."""
    needed = 4.0 if color == INK else 3.0
    assert 1.05 / (luminance(color) + 0.05) >= needed
    assert (luminance(color) + 0.05) / (luminance("#0d1117") + 0.05) >= needed


@pytest.mark.parametrize("top", [0.0003, 0.07, 1.0, 2.77, 5.545, 9.99, 100.0, 743.0, 120_000.0])
def test_ticks_are_few_and_round(top: float) -> None:
    found = ticks(0, top, count=7)
    assert found[0] == 0
    assert 0.7 * top < found[-1] <= top
    assert 4 <= len(found) <= 8
    assert all(len(f"{tick:.9e}".split("e")[0].rstrip("0.")) <= 4 for tick in found)


def test_an_empty_sweep_has_an_empty_table() -> None:
    assert markdown_table([]).count("\n") == 1
