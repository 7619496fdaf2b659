"""Opening sources: the hold-out and the built-in pictures. Each reader has its own test file."""

from collections import Counter

import numpy as np
from source_cases import check_consistent, numbers, write

from dino_lightning.config import BuiltinData, FolderData
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.base import held_out


class TestHoldOut:
    def test_is_stratified_and_leaves_the_training_images(self, tmp_path):
        sizes = {"a": 20, "b": 10, "c": 2, "d": 1}
        names = [f"{name}/{i}.png" for name, size in sizes.items() for i in range(size)]
        for number, name in enumerate(names):
            write(tmp_path / "data" / name, number)
        sources = open_sources(FolderData(path=str(tmp_path / "data"), holdout=0.2), seed=3)
        assert Counter(sources.val.labels.tolist()) == {0: 4, 1: 2, 2: 1}
        assert sorted(numbers(sources.train) + numbers(sources.val)) == list(range(len(names)))
        assert "20% of the images (7) are held out" in sources.remark
        assert "/data/a/" in sources.val.describe(0)
        check_consistent(sources.train)
        check_consistent(sources.val)

    def test_depends_on_the_seed_only(self):
        labels = np.repeat(np.arange(5), 40)
        first, again, other = (held_out(labels, share=0.1, seed=seed) for seed in (0, 0, 1))
        assert (first == again).all()
        assert (first != other).any()
        assert first.sum() == other.sum() == 20

    def test_unlabeled_images_stay(self):
        labels = np.array([-1] * 50 + [0] * 10)
        assert np.flatnonzero(held_out(labels, share=0.5, seed=0)).min() >= 50

    def test_a_class_never_leaves_the_training_images(self):
        assert held_out(np.array([0, 0, 1, 1, 1]), share=0.99, seed=0).tolist().count(True) == 3


def test_builtin_pictures():
    sources = open_sources(BuiltinData(train_images=24, val_images=13, image_size=16), seed=0)
    assert (len(sources.train), len(sources.val), sources.remark) == (24, 13, None)
    assert sources.train.read(0).shape == (16, 16, 3)
    assert (sources.train.read(0) != sources.val.read(0)).any()
    check_consistent(sources.train)
    check_consistent(sources.val)
