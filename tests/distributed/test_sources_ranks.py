"""Every kind of source with two ranks × two loader processes: each image once per epoch, in its own order and crops.

`sources_worker` contains the program of a rank. Built-in pictures are identified by their crops.
"""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import sources_worker
from sources_worker import BATCH, IMAGES, RANKS, WORKERS

SOURCES = [
    "folder",
    "folder, flat",
    "folder, disk cache",
    "folder, ram cache",
    "list",
    "table",
    "zip",
    "tar",
    "imagenet22k",
    "gldv2",
    "parquet",
    "save_to_disk",
    "huggingface",
    "huggingface, streaming",
    "webdataset",
    "torchvision",
    "builtin",
]
Seen = list[dict[str, Any]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return sources_worker.launch(tmp_path_factory.mktemp("sources"))


def numbers(seen: Seen, *, epoch: int, what: str = "epochs") -> list[list[int]]:
    """The images of each rank in order."""
    return [[int(row[0]) for batch in rank[what][epoch] for row in batch] for rank in seen]


def crops(seen: Seen, *, epoch: int, what: str = "epochs") -> list[tuple[float, ...]]:
    """The values that identify the crops of each image on all ranks, without its index."""
    return [tuple(row[1:]) for rank in seen for batch in rank[what][epoch] for row in batch]


def test_every_source_is_covered(ranks: Seen) -> None:
    assert list(ranks[0]) == list(ranks[1])
    assert sorted(ranks[0]) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_every_image_once_per_epoch(name: str, ranks: Seen) -> None:
    seen = [rank[name] for rank in ranks]
    for epoch in (0, 1):
        assert [len(rank["epochs"][epoch]) for rank in seen] == [IMAGES // BATCH // RANKS] * RANKS
        if name != "builtin":
            assert Counter(chain.from_iterable(numbers(seen, epoch=epoch))) == Counter(range(IMAGES))


@pytest.mark.parametrize("name", SOURCES)
def test_the_order_depends_on_epoch_and_seed_only(name: str, ranks: Seen) -> None:
    seen = [rank[name] for rank in ranks]
    assert [rank["again"][0] for rank in seen] == [rank["epochs"][0] for rank in seen]
    if name != "builtin":
        first = numbers(seen, epoch=0)
        assert first != numbers(seen, epoch=1)
        assert first != numbers(seen, epoch=0, what="other seed")


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_every_rank_resumes_at_its_position(name: str, ranks: Seen) -> None:
    for rank in ranks:
        assert rank[name]["resumed"][0] == rank[name]["epochs"][0]


@pytest.mark.parametrize("name", SOURCES)
def test_no_two_images_get_the_same_crops(name: str, ranks: Seen) -> None:
    """Equal seeds in two ranks or loader processes would give equal crops at equal positions."""
    seen = [rank[name] for rank in ranks]
    assert WORKERS == RANKS == 2
    of_all = crops(seen, epoch=0) + crops(seen, epoch=1) + crops(seen, epoch=0, what="other seed")
    assert len(set(of_all)) == len(of_all) == 3 * IMAGES
