"""One of two ranks has a step that is not finite: both react identically, in the same step."""

from pathlib import Path
from typing import Any

import nonfinite_worker
import pytest
import tiny
import torch
from nonfinite_cases import BAD, STEPS, assert_equal, reference_states
from nonfinite_worker import CASES, CULPRIT, FAST, RANKS, SLOW, Case, launch, module_and_batches
from torch import Tensor

from dino_lightning.training.debug.step_dump import read_step

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("fast")
    return folder, launch(folder, *FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("slow")
    return folder, launch(folder, *SLOW)


NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture
def seen(name: str, request: pytest.FixtureRequest) -> tuple[Path, Ranks]:
    folder, ranks = request.getfixturevalue("slow" if name in SLOW else "fast")
    return folder / name, [rank[name] for rank in ranks]


@pytest.mark.parametrize("name", NAMES)
def test_both_ranks_agree(name: str, seen: tuple[Path, Ranks]) -> None:
    _, (first, second) = seen
    case = CASES[name]
    assert (first["count"], second["count"]) == (1, 1)
    assert first["error"] == second["error"]
    assert bool(first["error"]) == (case.policy == "stop")
    assert first["steps"] == second["steps"] == (BAD if case.policy == "stop" else STEPS)
    # Including the statistics of batch norms, which DDP copies from rank 0 before each forward pass.
    trained = [key for key in first["end"] if not case.batch_norm or "running" not in key]
    assert_equal({key: first["end"][key] for key in trained}, {key: second["end"][key] for key in trained})
    assert all(tensor.isfinite().all() for rank in (first, second) for tensor in rank["end"].values())


@pytest.mark.parametrize("name", NAMES)
def test_the_step_changes_nothing(name: str, seen: tuple[Path, Ranks]) -> None:
    _, ranks = seen
    if CASES[name].policy != "skip":
        ends = {"stop": ranks[0]["states"][BAD - 1], "rollback": ranks[0]["states"][0]}
        after = {"stop": ranks[0]["end"], "rollback": ranks[0]["states"][min(BAD, len(ranks[0]["states"]) - 1)]}
        assert_equal(after[CASES[name].policy], ends[CASES[name].policy])
        return
    for rank in ranks:
        assert_equal(rank["states"][BAD], rank["states"][BAD - 1])
        assert rank["sums"][BAD] == rank["sums"][BAD - 1]
        assert rank["sums"][-1] != rank["sums"][BAD]


@pytest.mark.parametrize("name", [name for name in NAMES if "batch norms" not in str(name)])
def test_the_other_steps_equal_those_of_one_process(name: str, seen: tuple[Path, Ranks]) -> None:
    """Compared with total batches without that step; a rollback to the checkpoint after step 0 also undoes step 1."""
    case, (_, ranks) = CASES[name], seen
    whole = Case(case.strategy, case.policy)
    module, batches = module_and_batches(whole)
    module.batch_size_per_device = nonfinite_worker.BATCH
    skipped = {"stop": set(range(BAD, STEPS)), "skip": {BAD}, "rollback": set(range(1, BAD + 1))}[case.policy]
    expected = reference_states(module, batches, skipped=skipped)[-1]
    for name_, tensor in ranks[0]["end"].items():
        torch.testing.assert_close(tensor, expected[name_], rtol=1e-6, atol=1e-9, msg=name_)


@pytest.mark.parametrize("name", NAMES)
def test_the_rank_with_the_bad_loss_saves_its_images(name: str, seen: tuple[Path, Ranks]) -> None:
    case, (folder, ranks) = CASES[name], seen
    culprits = [CULPRIT] if case.cause == "loss" else list(range(RANKS))
    files = sorted((folder / "nonfinite").glob("*"))
    assert [file.name for file in files] == [f"step{BAD:06d}-rank{rank}.pt" for rank in culprits]
    saved = read_step(files[-1])
    assert (saved["rank"], saved["world_size"], saved["step"]) == (CULPRIT, RANKS, BAD)
    parts = tiny.split(module_and_batches(case)[1], parts=RANKS * case.accumulate)
    own: list[Tensor] = parts[BAD * RANKS * case.accumulate + CULPRIT]
    assert bool(saved["crops"][0][0, 0, 0, 0].isnan()) == (case.cause == "loss")
    for crop, given in zip(saved["crops"], own, strict=True):
        assert torch.equal(crop.flatten()[1:], given.flatten()[1:])
    assert saved["ranges"]["loss"]["count"] == 1
    before: dict[str, Tensor] = ranks[CULPRIT]["states"][BAD - 1]
    if not case.batch_norm:
        assert_equal(saved["state"], before)
