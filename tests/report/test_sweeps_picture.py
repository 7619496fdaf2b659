"""The picture and the table of a sweep: positions of runs, keys that become axes, and the marks of states."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from sweep_cases import make_run

from dino_lightning.cli.main import main
from dino_lightning.errors import UserError
from dino_lightning.report.sweeps.jobs import read_jobs, read_rows, swept_keys
from dino_lightning.report.sweeps.map import color
from dino_lightning.report.sweeps.picture import sweep_svg
from dino_lightning.report.sweeps.points import axis_of, sweep_of

SVG = "{http://www.w3.org/2000/svg}"
STATES = ("finished", "pruned", "under-way", "failed")


def drawn(folder: Path) -> ElementTree.Element:
    return ElementTree.fromstring(sweep_svg(sweep_of(read_jobs([folder]))))


def marks(picture: ElementTree.Element) -> dict[str, tuple[str, float, float]]:
    """Folder -> state and place of its mark in the first panel that has it."""
    found: dict[str, tuple[str, float, float]] = {}
    for group in picture.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is None:
            continue
        folder, state = re.match(r"folder (\d+), ([a-z ]+)", title.text or "").groups()  # type: ignore[union-attr]
        shape = next((one for one in group if one.get("class") in (*STATES, "cell")), None)
        assert shape is not None
        x, y = (float(shape.get(name) or math.nan) for name in ("cx", "cy"))
        found.setdefault(folder, (state, x, y))
    return found


def texts(picture: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


def test_one_key_is_a_curve(tmp_path: Path) -> None:
    """Through the means of what has finished; places are those of a logarithmic axis."""
    for number, (lr, seed, knn) in enumerate([(0.001, 0, 50.0), (0.001, 1, 54.0), (0.01, 0, 60.0), (0.1, 0, 40.0)]):
        make_run(tmp_path / str(number), {"optim.lr": lr, "seed": seed}, [knn])
    picture = drawn(tmp_path)
    places = marks(picture)
    assert [state for state, *_ in places.values()] == ["finished"] * 4
    (_, x0, y0), (_, x1, y1), (_, x2, y2), (_, x3, y3) = places.values()
    assert x0 == x1
    assert x2 - x0 == pytest.approx(x3 - x2, abs=0.2)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(4 / 10, abs=0.01)
    (line,) = picture.iter(f"{SVG}polyline")
    corners = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    assert corners == [(x0, pytest.approx((y0 + y1) / 2, abs=0.1)), (x2, y2), (x3, y3)]
    (best,) = [one for one in picture.iter(f"{SVG}circle") if one.get("class") == "best" and one.get("cx") != "420.0"]
    assert (float(best.get("cx") or 0), float(best.get("cy") or 0)) == (x2, y2)
    assert "optim.lr" in texts(picture)
    assert "untrained" in texts(picture)
    assert "Best: k-NN 60.0 % in folder 2, optim.lr=0.01." in texts(picture)


def test_every_state_has_its_mark(tmp_path: Path) -> None:
    states = ["finished", "pruned", "under way", "failed", "finished"]
    for number, state in enumerate(states):
        make_run(tmp_path / str(number), {"optim.lr": 0.01 * (number + 1)}, [50.0 + 5 * number], state=state)
    make_run(tmp_path / "5", {"optim.lr": 0.06}, [], state="under way")  # nothing to draw yet
    picture = drawn(tmp_path)
    places = marks(picture)
    assert [state for state, *_ in places.values()] == states
    classes = Counter(one.get("class") for one in picture.iter() if one.get("class") in STATES)
    assert classes == {"finished": 3, "pruned": 2, "under-way": 2, "failed": 2}  # those of the legend, too
    assert texts(picture)[0] == "6 runs: 2 finished, 1 pruned, 2 under way, 1 failed."
    assert "in folder 4" in texts(picture)[1]


def test_two_keys_are_a_map(tmp_path: Path) -> None:
    grid = [(lr, k) for lr in (0.002, 0.004) for k in (64, 128, 256)]
    for number, (lr, k) in enumerate(grid):
        state = {2: "failed", 3: "pruned"}.get(number, "finished")
        make_run(tmp_path / str(number), {"optim.lr": lr, "method.out_dim": k}, [40.0 + 4 * number], state=state)
    picture = drawn(tmp_path)
    cells = [one for one in picture.iter(f"{SVG}rect") if one.get("class") == "cell"]
    assert [cell.get("fill") for cell in cells] == [color(value, low=40, high=60)[0] for value in (40, 44, 52, 56, 60)]
    lefts, tops = (Counter(cell.get(name) for cell in cells) for name in ("x", "y"))
    assert sorted(lefts.values()) == [2, 3]
    assert sorted(tops.values()) == [1, 2, 2]
    assert {"40.0", "44.0", "52.0", "56.0", "60.0", "64", "128", "256", "0.002", "0.004"} <= set(texts(picture))
    assert [marks(picture)[number][0] for number in "23"] == ["failed", "pruned"]


def test_two_keys_with_many_values_are_points(tmp_path: Path) -> None:
    for number in range(10):
        words = {"optim.lr": 0.001 * (number + 1), "method.teacher_temperature": 0.03 + 0.001 * (number * 7 % 10)}
        make_run(tmp_path / str(number), words, [40.0 + number])
    places = marks(drawn(tmp_path))
    xs, ys = [x for _, x, _ in places.values()], [y for *_, y in places.values()]
    assert xs == sorted(xs)
    temperatures = [number * 7 % 10 for number in range(10)]
    assert sorted(range(10), key=lambda i: -ys[i]) == sorted(range(10), key=lambda i: temperatures[i])


def test_more_keys_get_a_panel_each(tmp_path: Path) -> None:
    for number in range(5):
        words = {"optim.lr": 0.001 * 3**number, "optim.weight_decay": 0.1 * number, "backbone": f"net{number % 2}"}
        make_run(tmp_path / str(number), words, [40.0 + number])
    picture = drawn(tmp_path)
    assert {"optim.lr", "optim.weight_decay", "backbone", "net0", "net1"} <= set(texts(picture))
    assert len([one for one in picture.iter(f"{SVG}circle") if one.get("class") == "finished"]) == 3 * 5 + 1
    assert not list(picture.iter(f"{SVG}polyline"))


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([3, 1, 2], [0.946, 0.054, 0.5]),
        ([1.0, 10.0, 100.0], [0.054, 0.5, 0.946]),
        (["b", "a", "b", "c"], [1 / 6, 0.5, 1 / 6, 5 / 6]),
        ([True, False], [0.75, 0.25]),
        ([7, 7], [0.5, 0.5]),
        ([1.0, math.inf, 2.0], [1 / 6, 5 / 6, 0.5]),
    ],
)
def test_axes(values: list[Any], places: list[float]) -> None:
    axis = axis_of(values)
    assert [axis.position(value) for value in values] == pytest.approx(places, abs=0.001)
    assert all(0 <= place <= 1 for place, _ in axis.ticks())


def test_keys_are_those_that_the_sweep_sets(tmp_path: Path) -> None:
    """Not what follows from them, such as the whole network of `backbone=…`; seeds are averaged over."""
    for number, (name, seed) in enumerate([("vit", 0), ("vit", 1), ("resnet", 0)]):
        make_run(tmp_path / str(number), {"backbone": name, "seed": seed, "output_dir": f"x{number}"}, [50.0 + number])
    assert swept_keys(read_jobs([tmp_path])) == ["backbone"]
    for path in tmp_path.glob("*/overrides.yaml"):  # of a sweep before these files: all settings that differ
        path.unlink()
    make_run(tmp_path / "3", {"optim.lr": 0.1}, [50.0])
    (tmp_path / "3" / "overrides.yaml").unlink()
    assert set(swept_keys(read_jobs([tmp_path]))) == {"backbone", "optim.lr"}


def test_seeds_alone_are_an_axis_and_nothing_is_none(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / str(number), {"seed": number}, [50.0 + number])
    assert "seed" in texts(drawn(tmp_path))
    with pytest.raises(UserError, match="do not differ in any setting"):
        sweep_of(read_jobs([tmp_path / "0"]))


def test_a_search_has_a_column_for_each_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, state in enumerate(["finished", "pruned", "failed"]):
        words = {"optim.lr": 0.0123456789 / (number + 1), "method.out_dim": 64}
        make_run(tmp_path / str(number), words, [50.0 + number, 60.0], state=state)
    assert main(["table", str(tmp_path), "format=markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| folder | optim.lr | k-NN, % | status |"
    assert lines[2:5] == [
        "| 0 | 0.01235 | 60.0 | finished |",
        "| 1 | 0.006173 | 60.0 | pruned after epoch 2 of 4 |",
        "| 2 | 0.004115 | 60.0 | failed: the loss is nan at step 3: lower optim.lr. |",
    ]
    assert "Best: k-NN 60.0 % of quick, optim.lr=0.01235 (folder 0)" in lines[-1]


def test_a_cell_with_running_and_failed_seeds(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"a": 1, "b": 1, "seed": 0}, [10.0], state="failed")
    make_run(tmp_path / "1", {"a": 1, "b": 1, "seed": 1}, [70.0], state="under way")
    make_run(tmp_path / "2", {"a": 2, "b": 2, "seed": 0}, [50.0])
    assert {"70.0", "50.0"} <= set(texts(drawn(tmp_path)))


def test_a_pruned_run_is_not_averaged_with_finished_ones(tmp_path: Path) -> None:
    make_run(tmp_path / "0", {"seed": 0}, [50.0, 70.0])
    make_run(tmp_path / "1", {"seed": 1}, [10.0], state="pruned")
    (row,) = read_rows([tmp_path])
    assert [job.run.name for job in row.evaluated_jobs] == ["0"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        make_run(tmp_path / "sweep" / str(number), {"optim.lr": 0.1 * (number + 1)}, [50.0])
    folder = str(tmp_path / "sweep")
    assert main(["table", folder, "plot=true"]) == 0
    assert f"Picture: {folder}/sweep.svg" in capsys.readouterr().err
    assert ElementTree.parse(tmp_path / "sweep" / "sweep.svg")
    assert main(["table", folder, f"plot={tmp_path}/else.svg"]) == 0
    assert (tmp_path / "else.svg").read_text() == (tmp_path / "sweep" / "sweep.svg").read_text()
    assert main(["table", folder, f"plot={tmp_path}/else.png"]) == 2
    assert "name it" in capsys.readouterr().err
    assert main(["table", folder, "plot=."]) == 2
    assert "name it sweep.svg" in capsys.readouterr().err
    assert main(["table", f"{folder}/0", "plot=true"]) == 2


def test_brackets_in_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["[a]", "[/b]"]):
        make_run(tmp_path / str(number), {"backbone": name}, [50.0 + number])
    assert main(["table", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[a]" in said
    assert said.count("[/b]") == 2


def test_words_are_escaped(tmp_path: Path) -> None:
    for number, name in enumerate(["<a & b>", "c"]):
        make_run(tmp_path / str(number), {"backbone": name}, [50.0])
    assert "<a & b>" in texts(drawn(tmp_path))
