"""Parquet files and `save_to_disk` folders, written by pyarrow and `datasets`."""

import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_cases import check_consistent, decoded, numbers, picture, png

from dino_lightning.config import ParquetData
from dino_lightning.data.sources import open_sources
from dino_lightning.errors import UserError

SHARED = Path(os.environ.get("DINO_TEST_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(
    first: int, count: int, *, labels: list | None = None, form: str = "struct", classes: list[str] | None = None
) -> pa.Table:
    """Rows of pictures `first`, `first + 1`, …; the labels alternate between 0 and 1."""
    encoded = [png(number) for number in range(first, first + count)]
    images = encoded if form == "bytes" else [{"bytes": one, "path": "x.png"} for one in encoded]
    rows = pa.table(
        {"image": images, "label": [i % 2 for i in range(count)] if labels is None else labels, "extra": ["e"] * count}
    )
    return rows if classes is None else rows.replace_schema_metadata({"classes": json.dumps(classes)})


def write_table(path: Path, *args, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(*args, **options), path, row_group_size=3)


def hub_dataset(first: int, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"image": [picture(n) for n in range(first, first + count)], "label": [i % 2 for i in range(count)]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
    )


class TestParquet:
    @pytest.mark.parametrize("form", ["struct", "bytes"])
    def test_splits_and_class_names_from_the_schema(self, tmp_path, form):
        write_table(tmp_path / "d" / "train.parquet", 0, 8, form=form, classes=["cat", "dog"])
        write_table(tmp_path / "d" / "val.parquet", 8, 4, form=form, classes=["cat", "dog"])
        sources = open_sources(ParquetData(path=str(tmp_path / "d")), seed=0)
        assert numbers(sources.train) == list(range(8))
        assert numbers(sources.val) == list(range(8, 12))
        assert sources.train.classes == sources.val.classes == ["cat", "dog"]
        assert sources.train.labels.tolist() == [0, 1] * 4
        assert sources.train.describe(7) == "train.parquet row 7"
        assert sources.remark is None
        check_consistent(sources.train)

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            (
                ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "data/validation-00000-of-00001.parquet",
            ),
            (["train/0000.parquet", "train/0001.parquet"], "test/0000.parquet"),
            (["default/train/0.parquet", "default/train/1.parquet"], "default/validation/0.parquet"),
            (["[odd] *name/train-a.parquet", "[odd] *name/train-b.parquet"], "[odd] *name/test.parquet"),
        ],
    )
    def test_names_of_the_hub(self, tmp_path, train, val):
        for first, name in zip((0, 5, 10), [*train, val], strict=True):
            write_table(tmp_path / "d" / name, first, 5)
        sources = open_sources(ParquetData(path=str(tmp_path / "d")), seed=0)
        assert (numbers(sources.train), numbers(sources.val)) == (list(range(10)), list(range(10, 15)))
        assert sources.train.describe(6) == f"{train[1]} row 1"
        assert sources.train.classes == ["0", "1"]

    def test_validation_is_preferred_to_test(self, tmp_path):
        for first, name in enumerate(["train", "test", "validation"]):
            write_table(tmp_path / "d" / f"{name}.parquet", 2 * first, 2)
        assert numbers(open_sources(ParquetData(path=str(tmp_path / "d")), seed=0).val) == [4, 5]

    @pytest.mark.parametrize("path", ["d", "d/part.parquet"])
    def test_images_of_one_file_are_held_out(self, tmp_path, path):
        write_table(tmp_path / "d" / "part.parquet", 0, 10)
        sources = open_sources(ParquetData(path=str(tmp_path / path), holdout=0.2), seed=0)
        assert sorted(numbers(sources.train) + numbers(sources.val)) == list(range(10))
        assert sources.val.labels.tolist() == [0, 1]
        assert sources.val.describe(0).startswith("part.parquet row ")

    def test_no_label_column(self, tmp_path):
        write_table(tmp_path / "d" / "train.parquet", 0, 3)
        sources = open_sources(ParquetData(path=str(tmp_path / "d"), label_column=None), seed=0)
        assert (sources.train.labels, sources.train.classes, sources.val) == (None, None, None)
        check_consistent(sources.train)

    def test_rows_without_a_label(self, tmp_path):
        write_table(tmp_path / "d" / "train.parquet", 0, 6, labels=[0, None, 1, -1, 0, 1])
        write_table(tmp_path / "d" / "test.parquet", 6, 2, labels=[-1, -1])
        sources = open_sources(ParquetData(path=str(tmp_path / "d"), holdout=0.5), seed=0)
        assert sorted(sources.train.labels.tolist()) == [-1, -1, 0, 1]
        assert sources.val.labels.tolist() == [0, 1]
        assert "the validation split has no labels" in sources.remark

    def test_row_without_an_image_opens_and_raises_when_read(self, tmp_path):
        rows = pa.table({"image": pa.array([None, {"bytes": png(0), "path": None}]), "label": [0, 1]})
        pq.write_table(rows, tmp_path / "train.parquet")
        source = open_sources(ParquetData(path=str(tmp_path / "train.parquet"), holdout=0), seed=0).train
        with pytest.raises(ValueError, match="no image"):
            source.read(0)
        assert source.read(1) == png(0)

    def test_save_to_disk(self, tmp_path):
        splits = datasets.DatasetDict({"train": hub_dataset(0, 6), "test": hub_dataset(6, 2)})
        splits.save_to_disk(tmp_path / "d")
        sources = open_sources(ParquetData(path=str(tmp_path / "d")), seed=0)
        assert (numbers(sources.train), numbers(sources.val)) == (list(range(6)), [6, 7])
        assert sources.train.classes == ["cat", "dog"]
        assert sources.train.describe(2) == "d train row 2"
        check_consistent(sources.train)

    def test_save_to_disk_of_a_selection(self, tmp_path):
        hub_dataset(0, 8).select([5, 0, 3, 2]).save_to_disk(tmp_path / "d")
        source = open_sources(ParquetData(path=str(tmp_path / "d"), holdout=0), seed=0).train
        assert numbers(source) == [5, 0, 3, 2]
        assert source.labels.tolist() == [1, 0, 1, 0]

    @pytest.mark.parametrize("change", ["rows", "time", "column"])
    def test_fingerprint(self, tmp_path, change):
        def fingerprint(**options) -> str:
            config = ParquetData(path=str(tmp_path), holdout=0, label_column=None, **options)
            return open_sources(config, seed=0).train.fingerprint()

        path = tmp_path / "train.parquet"
        rows = table(0, 4, form="bytes")
        pq.write_table(rows.append_column("other", rows.column("image")), path)
        before = fingerprint()
        assert fingerprint() == before
        if change == "rows":
            times = os.stat(path).st_mtime_ns
            pq.write_table(table(10, 5, form="bytes"), path)
            os.utime(path, ns=(times, times))
        elif change == "time":
            os.utime(path, (1, 1))
        assert fingerprint(**({"image_column": "other"} if change == "column" else {})) != before

    def test_fingerprint_of_save_to_disk(self, tmp_path):
        for name, count in (("a", 4), ("b", 3)):
            hub_dataset(0, 4).select(range(count)).save_to_disk(tmp_path / name)
        first, again, other = (
            open_sources(ParquetData(path=str(tmp_path / name), holdout=0), seed=0).train for name in "aab"
        )
        assert first.fingerprint() == again.fingerprint() != other.fingerprint()

    def test_class_names_of_the_hub_survive_parquet(self, tmp_path):
        hub_dataset(0, 4).to_parquet(tmp_path / "train.parquet")
        assert open_sources(ParquetData(path=str(tmp_path)), seed=0).train.classes == ["cat", "dog"]

    def test_a_rewritten_file_is_read_again(self, tmp_path):
        path = tmp_path / "d" / "train.parquet"
        for first in (0, 20):
            write_table(path, first, 4)
            os.utime(path, (first, first))
            assert numbers(open_sources(ParquetData(path=str(path), holdout=0), seed=0).train) == list(
                range(first, first + 4)
            )

    def test_without_a_cache_images_stay_in_memory(self, tmp_path, monkeypatch):
        hub_dataset(0, 4).to_parquet(tmp_path / "train.parquet")
        (tmp_path / "file").touch()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
        sources = open_sources(ParquetData(path=str(tmp_path), holdout=0), seed=0)
        assert numbers(sources.train) == [0, 1, 2, 3]
        assert "kept in memory" in sources.remark

    def test_no_progress_bars(self, tmp_path, capfd):
        write_table(tmp_path / "d" / "train.parquet", 0, 4)
        open_sources(ParquetData(path=str(tmp_path / "d")), seed=0)
        assert capfd.readouterr() == ("", "")
        assert not datasets.are_progress_bars_disabled()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"image_column": "imag"}, r"data\.image_column=imag is not a column .* did you mean 'image'"),
            ({"label_column": "labels"}, r"data\.label_column=labels is not .* did you mean 'label'"),
            ({"image_column": "label"}, r"data\.image_column=label .* int64 values; expected encoded images"),
            ({"label_column": "extra"}, r"data\.label_column=extra .* string values; expected integers"),
            ({"path": "nowhere"}, r"data\.path=nowhere does not exist"),
        ],
    )
    def test_wrong_settings_are_named(self, tmp_path, options, words):
        write_table(tmp_path / "train.parquet", 0, 2)
        with pytest.raises(UserError, match=words):
            open_sources(ParquetData(**{"path": str(tmp_path), **options}), seed=0)

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            (
                "train.parquet",
                {"labels": [0, 2], "classes": ["cat", "dog"]},
                "contains the label 2, but there are 2 class names",
            ),
            ("train.parquet", {"labels": [0, 10**6]}, "class numbers from 0"),
            ("val.parquet", {}, "no train"),
            ("train.txt", {}, "neither"),
        ],
    )
    def test_wrong_files_are_named(self, tmp_path, name, options, words):
        write_table(tmp_path / "d" / name, 0, 2, **options)
        with pytest.raises(UserError, match=words):
            open_sources(ParquetData(path=str(tmp_path / "d")), seed=0)

    def test_broken_file_is_named(self, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
        with pytest.raises(UserError, match=r"train\.parquet' is not a readable parquet file"):
            open_sources(ParquetData(path=str(tmp_path)), seed=0)

    def test_cifar10(self):
        if not (SHARED / "cifar10" / "train.parquet").exists():
            pytest.skip(f"no CIFAR-10 in {SHARED}")
        sources = open_sources(ParquetData(path=str(SHARED / "cifar10")), seed=0)
        assert (len(sources.train), len(sources.val)) == (50_000, 10_000)
        assert sources.train.classes[:3] == ["airplane", "automobile", "bird"]
        assert Counter(sources.val.labels.tolist()) == dict.fromkeys(range(10), 1000)
        content = pq.read_table(SHARED / "cifar10" / "train.parquet").slice(33_333, 1).to_pylist()[0]
        assert sources.train.read(33_333) == content["image"]["bytes"]
        shown = Image.open(io.BytesIO(content["image"]["bytes"])).convert("RGB")
        assert decoded(sources.train, 33_333).tobytes() == shown.tobytes()
        assert sources.train.labels[33_333] == content["label"]
        # 15 MB of images: a copy for a loader worker holds the labels and the way to the memory-mapped file.
        assert len(pickle.dumps(sources.train)) < 1_000_000
