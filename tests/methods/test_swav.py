"""SwAV: fits against an independent loop, with its queue, frozen prototypes and small batches."""

import pytest
import tiny
import tiny_methods
import torch
from method_fits import EXACT, PER_EPOCH, check_fit, rows_in_order

from dino_lightning.config import SwAVConfig


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_fit_equals_the_algorithm_of_the_paper(accumulated: int) -> None:
    check_fit("swav", accumulated=accumulated, views=4, reference={})


@pytest.mark.parametrize(("accumulated", "start"), [(1, 0), (2, 0), (1, 2)])
def test_a_fit_with_a_queue(accumulated: int, start: int) -> None:
    """Which joins the assignment from the step on when it is full."""
    reference = {"queue_length": 12, "queue_start": start}
    changed = {"queue_length": 12, "queue_start": f"{start}it"}
    module, slow = check_fit("swav", accumulated=accumulated, views=2, reference=reference, **changed)
    for queue, expected in zip(module.queues, slow.queues, strict=True):
        assert expected.full
        torch.testing.assert_close(rows_in_order(queue), torch.stack(expected.rows), **EXACT)
    assert not torch.equal(module.queues[0].features, module.queues[1].features), "one for each global crop"


def test_frozen_prototypes() -> None:
    check_fit("swav", accumulated=1, views=2, reference={"frozen_steps": PER_EPOCH}, freeze_prototypes="1ep")
    module = tiny_methods.build("swav", freeze_prototypes="1ep")
    before = module.prototypes.weight.detach().double()
    tiny_methods.fit(module, tiny.batches(2))
    torch.testing.assert_close(module.prototypes.weight.detach(), before, rtol=1e-6, atol=0)


def test_prototypes_have_length_1_from_the_start_and_after_each_step() -> None:
    module = tiny_methods.build("swav")
    lengths = [module.prototypes.weight.detach().norm(dim=1)]
    seen = tiny_methods.fit(module, tiny.batches(3))
    lengths += [state["predictor.weight"].norm(dim=1) for state in seen.states]
    for found in lengths:
        torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-6, atol=0)
    assert not torch.equal(seen.states[0]["predictor.weight"], seen.states[1]["predictor.weight"])


def test_targets_are_balanced_over_the_batch() -> None:
    module, (crops,) = tiny_methods.build("swav", sinkhorn_iterations=1000).double(), tiny.batches(1)
    with torch.no_grad():
        z_BE = torch.nn.functional.normalize(module.student(crops[:1]), dim=-1)
        target_BK = module._assignment(z_BE, module.prototypes(z_BE), 0)
    torch.testing.assert_close(target_BK.sum(dim=1), torch.ones(8).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(target_BK.sum(dim=0), torch.ones(8).double(), rtol=1e-3, atol=0)


def test_settings_of_the_paper() -> None:
    config = SwAVConfig()
    assert (config.out_dim, config.head_hidden_dim, config.head_bottleneck_dim) == (3000, 2048, 128)
    assert (config.temperature, config.sinkhorn_epsilon, config.sinkhorn_iterations) == (0.1, 0.05, 3)
    assert (config.freeze_prototypes, config.head_batch_norm, config.head_layers) == ("1ep", True, 2)


def test_no_teacher() -> None:
    module = tiny_methods.build("swav")
    assert module.evaluated is module.student
    assert not hasattr(module, "teacher")
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "predictor"}
