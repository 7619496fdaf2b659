"""Data sets that `datasets.load_dataset` reads, from local folders: as tables and as streams."""

import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import png, write
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dino_lightning.config import HuggingFaceData
from dino_lightning.data.shard_order import read_stream
from dino_lightning.data.sources import ImageSource, ImageStream, Splits, open_sources
from dino_lightning.errors import UserError

SIZES = (6, 5, 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_part(file: Path, first: int, count: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + count)
    names = datasets.ClassLabel(names=["cat", "dog"])
    rows: Any = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 2 for n in numbers]}
    rows["extra"] = ["e"] * count
    features = {"image": datasets.Image(), "label": names, "extra": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """`train` of pictures 0 to 13 in three files, and `test` of 20 to 22."""
    root = tmp_path_factory.mktemp("original")
    for part, size in enumerate(SIZES):
        write_part(root / f"train-{part}.parquet", sum(SIZES[:part]), size)
    write_part(root / "test.parquet", 20, 3)
    return root


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of `original` that a test can change."""
    return shutil.copytree(original, tmp_path / "d")


def opened(folder: Path | str, **options: Any) -> Splits:
    return open_sources(HuggingFaceData(name=str(folder), **options), seed=0)


def stream(folder: Path, **options: Any) -> ImageStream:
    source = opened(folder, **{"streaming": True, "images": 14, **options}).train
    assert isinstance(source, ImageStream)
    return source


def contents(source: Any) -> list:
    return [source.read(i) for i in range(len(source))]


class TestTables:
    def test_splits_and_class_names(self, folder):
        sources = opened(folder, val_split="test")
        assert isinstance(sources.train, ImageSource)
        assert contents(sources.train) == [png(n) for n in range(14)]
        assert contents(sources.val) == [png(n) for n in range(20, 23)]
        assert sources.train.classes == sources.val.classes == ["cat", "dog"]
        assert sources.train.labels.tolist() == [0, 1] * 7
        assert sources.train.describe(3) == f"{folder} train row 3"
        assert sources.remark is None

    def test_images_are_held_out_without_a_validation_split(self, folder):
        sources = opened(folder, holdout=0.3)
        assert sorted(contents(sources.train) + contents(sources.val)) == sorted(png(n) for n in range(14))

    def test_no_labels(self, folder):
        sources = opened(folder, label_column=None, val_split="test")
        assert (sources.train.labels, sources.val) == (None, None)

    def test_a_slice_of_a_split(self, folder):
        assert contents(opened(folder, train_split="train[2:5]", holdout=0.0).train) == [png(n) for n in (2, 3, 4)]

    def test_image_files(self, tmp_path):
        for number, name in enumerate(["cat/a.png", "cat/b.png", "dog/c.png"]):
            write(tmp_path / "f" / "train" / name, number)
        sources = opened(tmp_path / "f", holdout=0.0)
        assert contents(sources.train) == [
            (tmp_path / "f" / "train" / n).read_bytes() for n in ("cat/a.png", "cat/b.png", "dog/c.png")
        ]
        assert sources.train.classes == ["cat", "dog"]


class TestStreams:
    def test_every_shard(self, folder):
        sources = opened(folder, streaming=True, images=20)
        source = sources.train
        assert isinstance(source, ImageStream)
        assert (source.shards, source.images, source.classes, sources.val) == (3, 20, ["cat", "dog"], None)
        assert sources.remark == "read as a stream: no k-NN evaluation"
        for shard, size in enumerate(SIZES):
            samples = list(source.read_shard(shard))
            first = sum(SIZES[:shard])
            assert [sample.content for sample in samples] == [png(n) for n in range(first, first + size)]
            assert [sample.label for sample in samples] == [n % 2 for n in range(first, first + size)]
            assert samples[2].name == f"{folder} train shard {shard} row 2"

    def test_reading_starts_at_a_row(self, folder):
        source = stream(folder)
        whole = list(source.read_shard(0))
        for start in range(8):
            assert list(source.read_shard(0, start=start)) == whole[start:]

    def test_more_rows_than_are_taken_at_once(self, tmp_path):
        write_part(tmp_path / "d" / "train.parquet", 0, 50)
        source = stream(tmp_path / "d")
        for start in (0, 15, 16, 40):
            assert [one.content for one in source.read_shard(0, start=start)] == [png(n) for n in range(start, 50)]

    def test_a_copy_reads_the_same(self, folder):
        source = stream(folder)
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.read_shard(1)) == list(source.read_shard(1))

    def test_without_labels(self, folder):
        source = stream(folder, label_column=None)
        assert source.classes is None
        assert [sample.label for sample in source.read_shard(2)] == [-1] * 3

    def test_rows_without_image_or_label(self, tmp_path):
        images = pa.array([None, {"bytes": png(1), "path": None}, {"bytes": None, "path": str(tmp_path / "no.png")}])
        rows = pa.table({"image": images, "label": pa.array([1, None, 0], pa.int64())})
        (tmp_path / "d").mkdir()
        pq.write_table(rows, tmp_path / "d" / "train.parquet")
        first, second, third = stream(tmp_path / "d").read_shard(0)
        assert [one.content for one in (first, second, third)] == [None, png(1), None]
        assert [one.label for one in (first, second, third)] == [1, -1, 0]
        assert "No such file" in third.name

    def test_plain_bytes(self, tmp_path):
        (tmp_path / "d").mkdir()
        pq.write_table(pa.table({"image": [png(0), png(1)], "label": [0, 1]}), tmp_path / "d" / "train.parquet")
        assert [sample.content for sample in stream(tmp_path / "d").read_shard(0)] == [png(0), png(1)]

    @pytest.mark.parametrize("packed", [False, True])
    def test_image_files_and_those_in_a_zip(self, tmp_path, packed):
        files = [write(tmp_path / "f" / "train" / name, n) for n, name in enumerate(["cat/a.png", "dog/b.png"])]
        wanted = {file.read_bytes() for file in files}
        if packed:
            (tmp_path / "z").mkdir()
            shutil.make_archive(str(tmp_path / "z" / "train"), "zip", tmp_path / "f" / "train")
        source = stream(tmp_path / ("z" if packed else "f"), label_column=None)
        assert {sample.content for shard in range(source.shards) for sample in source.read_shard(shard)} == wanted

    def test_a_damaged_file_ends_its_shard(self, folder):
        source = stream(folder)
        content = bytearray((folder / "train-1.parquet").read_bytes())
        content[4:600] = bytes(596)
        (folder / "train-1.parquet").write_bytes(content)
        *_, last = source.read_shard(1)
        assert last.content is None
        assert "shard 1 (unreadable after 0 rows" in last.name
        assert len(list(source.read_shard(0))) == 6

    def test_the_data_set_knows_the_images_of_an_epoch(self, folder):
        opened(folder)  # `datasets` has counted then
        assert stream(folder, images=None).images == 14
        assert stream(folder, images=5).images == 5


class Rows(IterableDataset):
    """The samples that a loader process reads when our code distributes the shards."""

    def __init__(self, source: ImageStream, *, readers: int, first: int = 0):
        self.source, self.readers, self.first = source, readers, first

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None
        options = {"seed": 1, "reader": self.first + worker.id, "readers": self.readers, "shuffle_buffer": 3}
        for sample, key, _ in islice(read_stream(self.source, **options), 16):
            yield key, sample.content


class OneShard(IterableDataset):
    """All of shard 1, in every loader process."""

    def __init__(self, source: ImageStream):
        self.source = source

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None
        return ((worker.id, sample.content) for sample in self.source.read_shard(1))


class TestLoaderProcesses:
    def test_each_reads_a_whole_shard(self, folder):
        """If `datasets` distributed the shards, the second loader process would read nothing of one shard."""
        seen = list(DataLoader(OneShard(stream(folder)), batch_size=None, num_workers=2))
        for worker in (0, 1):
            assert [content for number, content in seen if number == worker] == [png(n) for n in range(6, 11)]

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_ranks_of_two_loader_processes(self, folder, ranks):
        source = stream(folder)
        seen = [
            (tuple(key), content)
            for rank in range(ranks)
            for key, content in DataLoader(
                Rows(source, readers=2 * ranks, first=2 * rank), batch_size=None, num_workers=2
            )
        ]
        places = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
        first_pass = sorted(pair for pair in seen if pair[0][0] == 0)
        assert first_pass == [((0, *place), png(number)) for number, place in enumerate(places)]


class TestWrongSettings:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"image_column": "imag"}, r"data\.image_column=imag is not a column .* did you mean 'image'"),
            ({"label_column": "labels"}, r"data\.label_column=labels is not .* did you mean 'label'"),
            ({"image_column": "label"}, r"data\.image_column=label .* expected encoded images"),
            ({"label_column": "extra"}, r"data\.label_column=extra .* expected integers"),
            ({"train_split": "tran"}, r"data\.train_split=tran is not a split of .* did you mean 'train'"),
            ({"subset": "defualt"}, r"data\.subset=defualt is not a subset of .* did you mean 'default'"),
            (
                {"folder": "nobody/nothing"},
                r"data\.name=nobody/nothing is not a folder .*not found on the Hugging Face Hub",
            ),
            ({"folder": "/no/such/folder"}, r"data\.name=/no/such/folder is not a folder"),
        ],
    )
    def test_are_named(self, folder, options, words, streaming):
        with pytest.raises(UserError, match=words) as caught:
            opened(**{"folder": folder, "images": 5, "streaming": streaming, **options})
        assert "\n" not in str(caught.value)

    def test_validation_split(self, folder):
        with pytest.raises(UserError, match=r"data\.val_split=tests is not a split of .* did you mean 'test'"):
            opened(folder, val_split="tests")

    def test_number_of_images(self, folder):
        with pytest.raises(UserError, match=r"does not state its number of images; set data\.images"):
            opened(folder, streaming=True, images=None)

    def test_a_file_that_is_no_table(self, tmp_path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "train.parquet").write_bytes(b"PAR1 but not really")
        for streaming in (False, True):
            with pytest.raises(UserError, match=r"data\.name=.* cannot be read \("):
                opened(tmp_path / "d", streaming=streaming)
