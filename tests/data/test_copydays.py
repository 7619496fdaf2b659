"""The layout of Copydays: blocks, what a query shows, and what is refused in one sentence."""

import shutil
from pathlib import Path

import pytest
from landmark_cases import write_copydays, write_others

from dino_lightning.config import CopydaysData
from dino_lightning.data.benchmarks.copydays import open_copydays
from dino_lightning.errors import UserError


def test_blocks_are_the_folders_on_disk(tmp_path: Path) -> None:
    benchmark = open_copydays(write_copydays(tmp_path))
    sizes = {block: len(paths) for block, paths in benchmark.blocks.items()}
    assert sizes == {"original": 5, "strong": 8, "jpegqual/5": 5, "jpegqual/20": 5, "crops/10": 5}
    assert list(sizes) == ["original", "strong", "jpegqual/5", "jpegqual/20", "crops/10"]
    assert [path.name for path in benchmark.blocks["strong"]][:3] == ["200001.jpg", "200002.jpg", "200101.jpg"]
    assert benchmark.database == benchmark.blocks["original"]


def test_a_query_shows_the_originals_with_its_first_four_characters(tmp_path: Path) -> None:
    config = write_copydays(tmp_path)
    shutil.copy(tmp_path / "original/200300.jpg", tmp_path / "original/200350.jpg")
    benchmark = open_copydays(config)
    assert benchmark.positives(tmp_path / "strong/200302.jpg") == [3, 4]
    assert benchmark.positives(tmp_path / "original/200100.jpg") == [1]
    assert benchmark.positives(tmp_path / "strong/209901.jpg") == []


def test_without_the_other_blocks(tmp_path: Path) -> None:
    config = write_copydays(tmp_path)
    shutil.rmtree(tmp_path / "jpegqual")
    shutil.rmtree(tmp_path / "crops")
    assert list(open_copydays(config).blocks) == ["original", "strong"]


def test_distractors_follow_the_originals(tmp_path: Path) -> None:
    config = write_copydays(tmp_path / "copydays")
    config.distractors_path = str(write_others(tmp_path / "others"))
    benchmark = open_copydays(config)
    assert benchmark.database[:5] == benchmark.blocks["original"]
    assert len(benchmark.database) == 5 + 12
    assert benchmark.distractors == sorted((tmp_path / "others").rglob("*.png"))
    # A distractor with the name of a photograph is none.
    (tmp_path / "others" / "200099.png").write_bytes(benchmark.distractors[0].read_bytes())
    assert open_copydays(config).positives(tmp_path / "copydays/strong/200001.jpg") == [0]


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = write_copydays(tmp_path)

    def refused(changed: CopydaysData = config) -> str:
        with pytest.raises(UserError) as caught:
            open_copydays(changed)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in refused(CopydaysData(path=str(tmp_path / "copiedays")))
    lost = refused(CopydaysData(path=config.path, distractors_path=str(tmp_path / "orginal")))
    assert "data.distractors_path" in lost
    assert "did you mean 'original'?" in lost
    file = tmp_path / "strong/200001.jpg"
    assert "is a file; expected a folder" in refused(CopydaysData(path=config.path, distractors_path=str(file)))
    for copy in (tmp_path / "strong").iterdir():
        copy.rename(copy.with_name("x" + copy.name))
    assert "no image in strong/ has the first 4 characters of an image in original/" in refused()
    shutil.rmtree(tmp_path / "strong")
    assert "has no folder strong; it contains crops, jpegqual, original." in refused()
    (tmp_path / "strong").mkdir()
    assert "strong contains no images; expected files with the extensions .jpg" in refused()
    shutil.rmtree(tmp_path / "original")
    shutil.rmtree(tmp_path / "strong")
    assert "has no folder original and no strong" in refused()
