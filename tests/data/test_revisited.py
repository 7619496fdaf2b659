"""The layout of revisited Oxford and Paris: what is read of it, and what is refused in one sentence."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from landmark_cases import LANDMARKS, VIEWS, write_revisited, write_truth
from slow_params import first

from dino_lightning.config import RevisitedData
from dino_lightning.data.benchmarks.revisited import load_data_pickle, open_revisited
from dino_lightning.errors import UserError


@pytest.mark.parametrize("protocol", [0, 2, 3, 5])
def test_images_queries_and_ground_truth(protocol: int, tmp_path: Path) -> None:
    config = write_revisited(tmp_path, name="rparis6k", protocol=protocol)
    benchmark = open_revisited(config)
    jpg = tmp_path / "rparis6k" / "jpg"
    assert benchmark.images[:5] == [jpg / f"place{i // 4}_{i % 4}.jpg" for i in range(5)]
    assert len(benchmark.images) == LANDMARKS * VIEWS
    query = benchmark.queries[3]
    assert (query.name, query.path) == ("query3", jpg / "query3.jpg")
    assert query.box == (19.6, 30, 84.2, 94.4)
    assert (query.easy, query.hard, query.junk) == ([12], [13], [14])
    assert benchmark.queries[0].easy == []


@pytest.mark.parametrize(("name", "images"), first([("roxford5k", 4993), ("rparis6k", 6322)]))
def test_the_real_ground_truth(name: str, images: int, shared_data: Path, tmp_path: Path) -> None:
    """The images, which are not available, are empty files."""
    (tmp_path / name / "jpg").mkdir(parents=True)
    file = shutil.copy(shared_data / "retrieval" / name / f"gnd_{name}.pkl", tmp_path / name)
    with open(file, "rb") as opened:
        truth = load_data_pickle(opened)
    for image in (*truth["imlist"], *truth["qimlist"]):
        (tmp_path / name / "jpg" / f"{image}.jpg").touch()
    benchmark = open_revisited(RevisitedData(path=str(tmp_path), name=name))
    assert len(benchmark.images) == images
    assert len(benchmark.queries) == 70
    for query, own in zip(benchmark.queries, truth["gnd"], strict=True):
        assert (query.easy, query.hard, query.junk, list(query.box)) == tuple(
            own[k] for k in ("easy", "hard", "junk", "bbx")
        )


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch evil",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_revisited(tmp_path)
    write_truth(tmp_path / "roxford5k" / "gnd_roxford5k.pkl", {"imlist": Evil()})
    with pytest.raises(
        UserError, match=r"cannot be read \(it refers to \w+\.system, but a ground truth contains no code\)"
    ):
        open_revisited(config)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", [b"cos\nsystem\n(S'touch evil'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."])
def test_no_global_is_loaded(name: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="contains no code"):
        load_data_pickle(io.BytesIO(name))


@pytest.mark.parametrize("broken", [b"", b"\x80\x02}q", b"no pickle at all", b"\x80\x02]K\x01\x85R."])
def test_a_damaged_pickle_is_one_sentence(broken: bytes, tmp_path: Path) -> None:
    config = write_revisited(tmp_path)
    (tmp_path / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(broken)
    with pytest.raises(UserError, match="gnd_roxford5k.pkl cannot be read"):
        open_revisited(config)


def _query(**changes: Any) -> dict[str, Any]:
    own = {"easy": [0], "hard": [], "junk": [1], "bbx": [0, 0, 9, 9]} | changes
    return {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [own]}


@pytest.mark.parametrize(
    ("truth", "expected"),
    [
        ([1, 2], "expected a dict with imlist, qimlist and gnd"),
        ({"imlist": ["a"], "gnd": []}, "expected a dict with imlist, qimlist and gnd"),
        (_query() | {"gnd": []}, "gnd does not have one entry for each of the 1 queries"),
        (_query() | {"gnd": [{"easy": [0]}]}, "gnd of q lacks bbx, easy, hard or junk"),
        (_query(easy=[2]), "easy, hard or junk of q contains an index that is not among the 2"),
        (_query(easy=[-1]), "easy, hard or junk of q contains an index that is not among the 2"),
        (_query(easy=[]), "no query has a matching image"),
    ],
)
def test_another_content_is_one_sentence(truth: Any, expected: str, tmp_path: Path) -> None:
    write_truth(tmp_path / "roxford5k" / "gnd_roxford5k.pkl", truth)
    with pytest.raises(UserError, match=f"is not a ground truth of revisited Oxford or Paris: {expected}"):
        open_revisited(RevisitedData(path=str(tmp_path)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = write_revisited(tmp_path / "data")
    place = tmp_path / "data" / "roxford5k"

    def refused(*, path: str = config.path, name: str = config.name) -> str:
        with pytest.raises(UserError) as caught:
            open_revisited(RevisitedData(path=path, name=name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "data.name=roxford: did you mean 'roxford5k'?" in refused(name="roxford")
    assert f"data.path={tmp_path / 'dota'} does not exist" in refused(path=str(tmp_path / "dota"))
    assert f"use its parent folder {place.parent}." in refused(path=str(place))
    assert "does not contain the ground truth rparis6k/gnd_rparis6k.pkl" in refused(name="rparis6k")
    assert "It contains roxford5k: set data.name=roxford5k." in refused(name="rparis6k")
    for name in ("place1_2", "query4", "place0_0"):
        (place / "jpg" / f"{name}.jpg").unlink()
    assert "3 of 30 images are missing in roxford5k/jpg: place0_0.jpg, place1_2.jpg, query4.jpg." in refused()
    for image in (place / "jpg").iterdir():
        image.unlink()
    assert "30 of 30 images are missing" in refused()
    assert refused().endswith("place1_0.jpg, ….")
    (place / "jpg").rmdir()
    assert "the images are missing; expected roxford5k/jpg/*.jpg" in refused()
