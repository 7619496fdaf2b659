"""Google Landmarks v2: its two kinds of table, with a few images in its hashed folders."""

import pickle

import numpy as np
import pytest
from source_cases import check_consistent, numbers, write

from dino_lightning.config import LandmarksData
from dino_lightning.data.sources import mapped_arrays, open_sources
from dino_lightning.data.sources.base import held_out
from dino_lightning.errors import UserError

IDS = ["0000000000000001", "fedcba9876543210", "0123456789abcdef", "8000000000000000", "00000000000000ff"]
LANDMARKS = [203, 7, 203, 20, 7]
TRAIN = "id,url,landmark_id\n" + "".join(f'{i},"http://x/{i},1.jpg",{n}\n' for i, n in zip(IDS, LANDMARKS, strict=True))
CLEAN = f"landmark_id,images\n7,{IDS[1]} {IDS[4]}\n203,{IDS[0]} {IDS[2]}\n"


def fill(root, *, below="", known=IDS):
    for number, name in enumerate(IDS):
        if name in known:
            file = root / below / name[0] / name[1] / name[2] / f"{name}.jpg"
            # PNG bytes, so that the pixels identify the image.
            write(file.with_suffix(".png"), number).rename(file)
    (root / "train.csv").write_text(TRAIN)
    (root / "train_clean.csv").write_text(CLEAN)
    return root


def opened(root, **options):
    return open_sources(LandmarksData(path=str(root), **options), seed=0)


@pytest.mark.parametrize("below", ["", "train"])
def test_one_image_a_row(tmp_path, below):
    sources = opened(fill(tmp_path, below=below), holdout=0)
    assert numbers(sources.train) == [0, 1, 2, 3, 4]
    assert sources.train.classes == ["7", "20", "203"]
    assert sources.train.labels.tolist() == [2, 0, 2, 1, 0]
    assert sources.train.describe(2) == str(tmp_path / below / "0/1/2/0123456789abcdef.jpg")
    check_consistent(sources.train)


def test_one_landmark_a_row(tmp_path):
    sources = opened(fill(tmp_path), csv="train_clean.csv", holdout=0)
    assert numbers(sources.train) == [1, 4, 0, 2]
    assert sources.train.classes == ["7", "203"]
    assert sources.train.labels.tolist() == [0, 0, 1, 1]


def test_one_image_of_each_landmark_with_two_is_held_out(tmp_path):
    sources = opened(fill(tmp_path))
    assert sorted(sources.val.labels.tolist()) == [0, 2]
    assert sorted(numbers(sources.train) + numbers(sources.val)) == [0, 1, 2, 3, 4]


def test_a_missing_image_is_reported_when_it_is_read(tmp_path):
    source = opened(fill(tmp_path, known=IDS[3:]), holdout=0).train
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_large_tables_pickle_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_arrays, "LARGE", 100)
    fill(tmp_path)
    drawn = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    names = [IDS[0], *(f"{name:016x}" for name in drawn)]
    (tmp_path / "train.csv").write_text("id,url,landmark_id\n" + "".join(f"{name},,5\n" for name in names))
    source = opened(tmp_path, holdout=0, cache_dir=str(tmp_path / "cache")).train
    state = pickle.dumps(source)
    assert len(state) < 2000
    copy = pickle.loads(state)
    assert [copy.describe(i)[-20:-4] for i in range(len(copy))] == names


@pytest.mark.parametrize(
    ("options", "table", "words"),
    [
        ({"csv": "trian.csv"}, TRAIN, ["data.csv=trian.csv", "did you mean 'train.csv'"]),
        ({}, "id,url\n1,2\n", ["has the columns id, url", "landmark_id"]),
        ({}, "id,url,landmark_id\n", ["lists no images"]),
        ({}, f"id,url,landmark_id\n{IDS[0]},x,1\n0123,x,1\n", ["lists '0123'", "16 digits"]),
        ({}, f"id,url,landmark_id\n{IDS[0]},x,1\n{IDS[1].upper()},x,1\n", ["lists 'FEDCBA9876543210'"]),
        ({}, f"id,url,landmark_id\n{IDS[0]},x,Rome\n", ["cannot be read as a table", "Rome"]),
        ({}, "id,url,landmark_id\n1111111111111111,x,1\n", ["such as '1/1/1/1111111111111111.jpg' or 'train/1/1/1"]),
    ],
)
def test_wrong_tables_are_explained(tmp_path, options, table, words):
    (fill(tmp_path) / "train.csv").write_text(table)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, **options)
    for word in words:
        assert word in str(caught.value)


def test_the_hold_out_is_the_same_as_class_by_class_and_fast():
    labels = np.random.default_rng(0).integers(-1, 300, 4000)
    generator, expected = np.random.default_rng(5), np.zeros(4000, dtype=bool)
    for label in range(300):
        members = np.flatnonzero(labels == label)
        count = min(max(round(0.1 * len(members)), 1), len(members) - 1)
        expected[generator.permutation(members)[:count]] = True
    assert (held_out(labels, share=0.1, seed=5) == expected).all()
    # Class by class, this would compare 10^10 numbers.
    many = held_out(np.arange(200_000) // 2, share=0.1, seed=0)
    assert (many.reshape(-1, 2).sum(axis=1) == 1).all()
