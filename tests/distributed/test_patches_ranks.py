"""Two ranks train with masked patches like one process with the same masks, even if one rank has no mask."""

from dataclasses import replace
from typing import Any

import patches_worker
import pytest
import ranks_worker
import tiny
import torch
from content_masks import mask_of
from patches_worker import CASES, module_and_batches


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return patches_worker.launch(tmp_path_factory.mktemp("patches"))


def test_some_ranks_have_masks_and_some_have_none() -> None:
    _, batches = module_and_batches(CASES["ddp"])
    counts = [
        [
            sum(int(mask_of(crop, tiny.PATCH).sum()) for view in crops[:2] for crop in view[part])
            for part in (slice(0, 4), slice(4, 8))
        ]
        for crops in batches
    ]
    assert [first > 0 for first, _ in counts] == [True] * ranks_worker.STEPS
    assert [second > 0 for _, second in counts] == [False, True] * (ranks_worker.STEPS // 2)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.slow
def test_two_ranks_train_like_one_process(name: str, ranks: list[dict[str, dict[str, Any]]]) -> None:
    module, whole = module_and_batches(replace(CASES[name], accumulate=1))
    module.batch_size_per_device = ranks_worker.BATCH
    record = tiny.fit(module, whole, max_epochs=ranks_worker.EPOCHS)
    for network in ("student", "teacher"):
        for key, weight in tiny.copy(getattr(module, network)).items():
            for rank in ranks:
                torch.testing.assert_close(rank[name][network][key], weight, rtol=1e-9, atol=1e-12, msg=key)
    torch.testing.assert_close(ranks[0][name]["centers"][-1], record.centers[-1], rtol=1e-9, atol=1e-12)
    assert module.student.backbone.mask_token.abs().max() > 0.01  # type: ignore[union-attr]
