"""Every image once, whatever the number of ranks, and no trace in the random states."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

from dino_lightning.evaluation.features import extract as features_module
from dino_lightning.evaluation.features.extract import extract_features, gather_by_index, subset_indices

CPU = torch.device("cpu")
WORLD = 3


class Numbered(Dataset):
    """Image i is filled with i and has label i mod 7."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((3, 2, 2), float(i)), i % 7


def _forward(images_B3HW: Tensor) -> Tensor:
    """Features (i, i^2, 1) of image i: exact in float32 for the numbers used here."""
    value = images_B3HW.mean(dim=(1, 2, 3))
    return torch.stack([value, value**2, torch.ones_like(value)], dim=1)


def _expected(indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [[float(i), float(i * i), 1.0] for i in indices]
    return torch.tensor(rows).reshape(-1, 3), torch.tensor([i % 7 for i in indices]), torch.tensor(indices)


CASES: dict[str, tuple[int, list[int] | None]] = {
    "unequal shards": (50, None),
    "a subset": (50, [49, 3, 20, 8]),
    "fewer images than ranks": (2, None),
    "one image": (1, None),
}


def _run_rank(rank: int, folder: str) -> None:
    features_module.GATHER_ROWS = 5
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for name, (n, indices) in CASES.items():
        shard = extract_features(_forward, Numbered(n), indices=indices, batch_size=4, num_workers=0, device=CPU)
        results[name] = (shard, gather_by_index(*shard))
    results["subset"] = subset_indices(1000, limit=10, seed=3)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    on_ranks(_run_rank, str(folder), ranks=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_see_each_image_once(ranks: list[dict], name: str) -> None:
    n, indices = CASES[name]
    chosen = list(range(n)) if indices is None else indices
    seen = [result[name][0][2].tolist() for result in ranks]
    assert seen == [chosen[0::3], chosen[1::3], chosen[2::3]]
    for result in ranks:
        (features_ND, labels_N, indices_N), gathered = result[name]
        for got, want in zip((features_ND, labels_N), _expected(indices_N.tolist())[:2], strict=True):
            assert torch.equal(got, want)
        for got, want in zip(gathered, _expected(sorted(chosen)), strict=True):
            assert torch.equal(got, want)


def test_ranks_draw_the_same_subset(ranks: list[dict]) -> None:
    assert ranks[0]["subset"] == ranks[1]["subset"] == subset_indices(1000, limit=10, seed=3)


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (7, 0), (7, 2), (50, 0), (64, 0)])
def test_one_process(batch_size: int, num_workers: int) -> None:
    sizes: list[int] = []
    got = extract_features(
        _forward, Numbered(50), batch_size=batch_size, num_workers=num_workers, device=CPU, on_batch=sizes.append
    )
    for value, want in zip(got, _expected(list(range(50))), strict=True):
        assert torch.equal(value, want)
        assert value.dtype == want.dtype
    assert sum(sizes) == 50
    assert all(size == batch_size for size in sizes[:-1])


def test_half_precision_features_come_back_as_float32() -> None:
    features_ND, _, _ = extract_features(
        lambda images: _forward(images).bfloat16(), Numbered(5), batch_size=2, num_workers=0, device=CPU
    )
    assert features_ND.dtype == torch.float32


def test_no_images_at_all() -> None:
    features_ND, labels_N, indices_N = gather_by_index(
        *extract_features(_forward, Numbered(5), indices=[], batch_size=2, num_workers=2, device=CPU)
    )
    assert features_ND.shape == (0, 0)
    assert len(labels_N) == len(indices_N) == 0


def test_repeated_images_are_noticed() -> None:
    shard = extract_features(_forward, Numbered(5), indices=[1, 1], batch_size=2, num_workers=0, device=CPU)
    with pytest.raises(AssertionError, match="twice"):
        gather_by_index(*shard)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_states_and_modes_do_not_change(num_workers: int) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)).train()
    backbone[1].eval()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # pyright: ignore
    features_ND, _, _ = extract_features(backbone, Numbered(10), batch_size=4, num_workers=num_workers, device=CPU)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # pyright: ignore
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert [module.training for module in backbone] == [True, False, True]
    assert not features_ND.requires_grad


def test_features_may_enter_a_later_training() -> None:
    """A tensor made under `torch.inference_mode` may not: here a backbone caches one."""
    cache: list[Tensor] = []

    def forward(images_B3HW: Tensor) -> Tensor:
        cache.append(images_B3HW.flatten(1) * 2)
        return cache[-1]

    extract_features(forward, Numbered(2), batch_size=2, num_workers=0, device=CPU)
    weight = torch.ones(12, requires_grad=True)
    (cache[0] * weight).sum().backward()
    assert weight.grad is not None


def test_subset_is_even_sorted_and_seeded() -> None:
    assert subset_indices(5, limit=None, seed=0) == subset_indices(5, limit=5, seed=0) == [0, 1, 2, 3, 4]
    assert subset_indices(5, limit=9, seed=0) == [0, 1, 2, 3, 4]
    drawn = subset_indices(1000, limit=100, seed=1)
    assert drawn == sorted(set(drawn)) == subset_indices(1000, limit=100, seed=1)
    assert len(drawn) == 100
    assert drawn != subset_indices(1000, limit=100, seed=2)
    # 200 draws of 3 of 10: each number 60 times on average, with a standard deviation of 6.5.
    counts = np.bincount([i for seed in range(200) for i in subset_indices(10, limit=3, seed=seed)], minlength=10)
    assert counts.min() > 30
    assert counts.max() < 90


def test_subset_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    subset_indices(1000, limit=10, seed=0)
    assert torch.equal(before, torch.get_rng_state())
