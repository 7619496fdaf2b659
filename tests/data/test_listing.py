"""Lists of image files: text, CSV and TSV."""

import os
import pickle

import pyarrow as pa
import pytest
from source_cases import check_consistent, numbers, write

from dino_lightning.config import ListingData
from dino_lightning.data.sources import mapped_arrays, open_sources
from dino_lightning.data.sources.listing import column_bytes
from dino_lightning.errors import UserError


@pytest.fixture
def images(tmp_path):
    """Pictures 0 to 5 as `images/N.png`."""
    for number in range(6):
        write(tmp_path / "images" / f"{number}.png", number)
    return tmp_path / "images"


def opened(file, text, **options):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_sources(ListingData(path=str(file), holdout=0, **options), seed=0)


class TestText:
    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_blank_lines_comments_and_repeated_lines(self, images, newline):
        lines = ["\ufeff3.png", "", "# 4.png", "  1.png ", str(images / "5.png"), "3.png"]
        sources = opened(images / "list.txt", newline.join(lines))
        assert numbers(sources.train) == [3, 1, 5, 3]
        assert (sources.train.labels, sources.train.classes, sources.val) == (None, None, None)
        assert sources.remark == "no labels"

    def test_paths_may_be_relative_to_another_folder(self, images, tmp_path):
        (tmp_path / "lists").mkdir()
        sources = opened(tmp_path / "lists" / "list", "0.png\n2.png", root=str(images))
        assert numbers(sources.train) == [0, 2]
        assert sources.train.describe(1) == str(images / "2.png")
        check_consistent(sources.train)

    def test_names_need_not_be_text(self, images):
        os.rename(images / "4.png", os.fsencode(images) + b"/\xff.png")
        assert numbers(opened(images / "list.txt", b"\xff.png\n0.png").train) == [4, 0]

    def test_a_single_missing_file_is_reported_when_it_is_read(self, images):
        source = opened(images / "list.txt", "0.png\ngone.png\n1.png").train
        with pytest.raises(FileNotFoundError):
            source.read(1)


class TestTable:
    @pytest.mark.parametrize(("name", "by"), [("list.csv", ","), ("list.TSV", "\t")])
    def test_class_names_are_sorted(self, images, name, by):
        rows = [["caption", "path", "kind"], ['"a, b\nc"', "4.png", "dog"], ["", "0.png", "cat"], ["", "1.png", ""]]
        sources = opened(images / name, "\n".join(map(by.join, rows)), label_column="kind")
        assert numbers(sources.train) == [4, 0, 1]
        assert sources.train.classes == ["cat", "dog"]
        assert sources.train.labels.tolist() == [1, 0, -1]
        check_consistent(sources.train)

    def test_numbers_are_classes_in_their_own_order(self, images):
        text = "file,y\n0.png,10\n1.png,9\n2.png,-1\n3.png,\n"
        sources = opened(images / "l.csv", text, path_column="file", label_column="y")
        assert sources.train.classes == ["9", "10"]
        assert sources.train.labels.tolist() == [1, 0, -1, -1]

    def test_one_name_makes_all_labels_names(self, images):
        sources = opened(images / "l.csv", "path,y\n0.png,10\n1.png,9\n2.png,-1\n3.png,x\n", label_column="y")
        assert sources.train.classes == ["-1", "10", "9", "x"]
        assert sources.train.labels.tolist() == [1, 2, 0, 3]

    def test_without_labels(self, images):
        sources = opened(images / "list.csv", "path,y\n0.png,1\n")
        assert sources.train.labels is None
        assert sources.remark == "no labels"

    def test_an_empty_label_column(self, images):
        sources = opened(images / "list.csv", "path,y\n0.png,\n1.png,-1\n", label_column="y")
        assert sources.train.labels is None
        assert sources.remark == "no labels: data.label_column=y is empty"

    def test_labeled_images_are_held_out(self, images):
        (images / "list.csv").write_text("path,y\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(6)))
        sources = open_sources(ListingData(path=str(images / "list.csv"), label_column="y", holdout=0.3), seed=0)
        assert sorted(numbers(sources.train) + numbers(sources.val)) == list(range(6))
        assert sorted(sources.val.labels.tolist()) == [0, 1]


def test_large_lists_pickle_by_name(images, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "LARGE", 100)
    text = "path,y\n" + "".join(f"{n % 6}.png,{n % 6}\n" for n in range(3000))
    source = opened(images / "list.csv", text, label_column="y", cache_dir=str(images / "cache")).train
    state = pickle.dumps(source)
    assert len(state) < 2000
    copy = pickle.loads(state)
    assert [copy.describe(i) for i in range(3000)] == [str(images / f"{n % 6}.png") for n in range(3000)]
    assert copy.labels.tolist() == [n % 6 for n in range(3000)]


def test_the_bytes_of_a_part_of_a_column():
    column = pa.chunked_array([pa.array(["left", "out", "é", ""], pa.large_string()).slice(2)])
    arrays = column_bytes(column)
    assert (arrays["blob"].tobytes(), arrays["offsets"].tolist()) == ("é".encode(), [0, 2, 2])


def test_the_fingerprint_depends_on_list_and_files(images):
    texts = ("0.png\n1.png", "0.png\n1.png", "1.png\n0.png", "0.png\n2.png")
    seen = [opened(images / "list.txt", text).train.fingerprint() for text in texts]
    os.utime(images / "2.png", ns=(5, 5))
    seen.append(opened(images / "list.txt", texts[-1]).train.fingerprint())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("l.csv", "path,label\n0.png,1", {"path_column": "pth"}, ["data.path_column=pth", "did you mean 'path'"]),
        ("l.csv", "path,label\n0.png,1", {"label_column": "lable"}, ["did you mean 'label'", "null for no labels"]),
        ("l.csv", "path,label\n0.png,1\n,2", {}, ["row 2 has no path"]),
        ("l.csv", "path,label\n0.png,1\n1.png", {}, ["data.path", "cannot be read as a table", "Expected 2 columns"]),
        ("l.csv", "", {}, ["data.path_column=path is not a column"]),
        ("l.csv", "path,label\n", {"label_column": "label"}, ["lists no image"]),
        ("l.txt", "# nothing\n\n", {}, ["lists no image"]),
        ("l.txt", "0.png", {"label_column": "y"}, ["data.label_column=y needs a table"]),
        ("l.txt", "0.png", {"path_column": "y"}, ["data.path_column=y needs a table"]),
        (
            "l.txt",
            "#\n\nimages/0.png\nx.png",
            {},
            ["line 3", "'images/0.png'", "none of the 2 tested files", "data.root"],
        ),
        ("l.csv", "path\nimages/0.png", {}, ["row 1", "'images/0.png'", "data.root"]),
        ("l.csv", "path\n0.png", {"root": "/nowhere"}, ["data.root=/nowhere does not exist"]),
    ],
)
def test_wrong_lists_are_explained(images, name, text, options, words):
    with pytest.raises(UserError) as caught:
        opened(images / name, text, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_misspelt_list_and_a_folder(images):
    (images / "train.txt").write_text("0.png")
    with pytest.raises(UserError, match=r"did you mean 'train\.txt'"):
        open_sources(ListingData(path=str(images / "trian.txt")), seed=0)
    with pytest.raises(UserError, match="is a folder; .* data=folder"):
        open_sources(ListingData(path=str(images)), seed=0)
