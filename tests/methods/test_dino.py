"""A real fit against an independent training loop: every loss, the center, and every weight."""

from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch

from dino_lightning.config import AdamWConfig, ComputeConfig
from dino_lightning.methods.dino import DINO

EPOCHS, PER_EPOCH = 2, 3
TOTAL = EPOCHS * PER_EPOCH
OPTIM = AdamWConfig(lr=0.064, lr_end=1e-4, lr_warmup="2it", weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.05)
METHOD: dict[str, Any] = {
    "freeze_last_layer": "1ep",
    "teacher_temperature_start": 0.04,
    "teacher_temperature": 0.07,
    "teacher_temperature_warmup": "2ep",
    "teacher_momentum": 0.9,
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
"""Orders of summation in float64, over 6 steps."""


def _oracle(module: DINO, *, norm_last_layer: bool) -> oracles.DINOTraining:
    return oracles.DINOTraining(
        student={name: weight.double() for name, weight in tiny.copy(module.student).items()},
        patch=tiny.PATCH,
        heads=tiny.HEADS,
        lr=oracles.cosine_schedule(0.064 * 8 / 256, 1e-4, TOTAL, 2),
        weight_decay=oracles.cosine_schedule(0.04, 0.4, TOTAL),
        momentum=oracles.cosine_schedule(0.9, 1.0, TOTAL),
        temperature=oracles.temperature_schedule(0.04, 0.07, warmup_epochs=2, epochs=EPOCHS, per_epoch=PER_EPOCH),
        frozen_steps=PER_EPOCH,
        clip=0.05,
        trained=lambda name: not (norm_last_layer and name.endswith("weight_g")),
    )


def _same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], **EXACT, msg=f"{name} differs")


@pytest.mark.parametrize(("accumulated", "norm_last_layer"), [(1, True), (1, False), (4, True)])
def test_a_fit_equals_algorithm_1(accumulated: int, norm_last_layer: bool) -> None:
    """Schedules, clip, frozen last layer, AdamW, teacher and center; in one batch a step or in four micro-batches."""
    module = tiny.dino(optim=OPTIM, batch_size=8 // accumulated, norm_last_layer=norm_last_layer, **METHOD)
    epoch = tiny.batches(PER_EPOCH)
    oracle = _oracle(module, norm_last_layer=norm_last_layer).run(epoch * EPOCHS)
    micro = tiny.split(epoch, parts=accumulated)
    record = tiny.fit(module, micro, max_epochs=EPOCHS, accumulate_grad_batches=accumulated)
    losses = np.array(record.losses).reshape(TOTAL, accumulated).mean(1)
    np.testing.assert_allclose(losses, oracle.losses, rtol=1e-10)
    torch.testing.assert_close(module.center.center[0], oracle.center_K, **EXACT)
    _same(tiny.copy(module.student), oracle.student)
    _same(tiny.copy(module.teacher), oracle.teacher)
    # What this would not show if it never happened:
    assert oracle.clipped > 20
    assert np.ptp(losses) > 0.1
    assert oracle.center_K.abs().max() > 0.05
    assert {adam.steps for adam in oracle.adam.values()} == {TOTAL, TOTAL - PER_EPOCH}


@pytest.mark.parametrize("fused", [True, False])
def test_the_backbone_runs_once_per_resolution(fused: bool) -> None:
    module, seen = tiny.dino(compute=ComputeConfig(fused=fused)).double(), []
    module.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (crops,) = tiny.batches(1)
    together = module.student(crops)
    assert len(seen) == (1 if fused else 2), "all resolutions in one pass, or one each"
    sizes = [tuple(batch.shape) for batch in (seen[0] if fused else seen)]
    views = [(8, 3, side, side) for side in (32, 32, 16, 16)]
    assert sizes == (views if fused else [(16, 3, 32, 32), (16, 3, 16, 16)])
    apart = torch.cat([module.student.head(module.student.backbone(crop)) for crop in crops])
    torch.testing.assert_close(together, apart, **EXACT)


def test_views_keep_their_order_where_sizes_alternate() -> None:
    module = tiny.dino().double()
    (crops,) = tiny.batches(1)
    alternating = [crops[i] for i in (0, 2, 1, 3)]
    apart = torch.cat([module.student.head(module.student.backbone(crop)) for crop in alternating])
    torch.testing.assert_close(module.student(alternating), apart, **EXACT)


def test_the_head_runs_in_float32() -> None:
    """Under mixed precision the features are concatenated in float32, as in the original."""
    module = tiny.dino()
    module.student.backbone.bfloat16()
    features = module.student.features([crop.bfloat16() for crop in tiny.batches(1)[0]])
    assert features.dtype == torch.float32


def test_a_short_last_window_of_accumulation_is_a_step_too() -> None:
    """Six micro-batches by four: two steps an epoch, for the schedules, the teacher and the center alike."""
    module = tiny.dino(optim=OPTIM, batch_size=2, teacher_momentum=0.9)
    micro = tiny.split(tiny.batches(2), parts=4)[:6]
    record = tiny.fit(module, micro, max_epochs=2, accumulate_grad_batches=4)
    assert record.steps == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    assert (module.clock.steps_per_epoch, module.clock.total_steps) == (2, 4)
    rates = oracles.cosine_schedule(0.064 * 8 / 256, 1e-4, 4, 2)
    assert record.rates[3::6] + record.rates[5::6] == pytest.approx([rates[0], rates[2], rates[1], rates[3]])
    moved = [not torch.equal(a, b) for a, b in zip(record.centers[:-1], record.centers[1:], strict=True)]
    assert [i + 1 for i, flag in enumerate(moved) if flag] == [3, 5, 9, 11]
    assert not record.centers[2].any()


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    module, (crops,) = tiny.dino(), tiny.batches(1)
    crops[0][0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0.*optim\.lr"):
        tiny.fit(module, [crops])


def test_max_steps_bounds_the_schedules() -> None:
    """`max_steps` shorter than the epochs: the cosine spans the steps that are taken."""
    module = tiny.dino(optim=OPTIM)
    record = tiny.fit(module, tiny.batches(3), max_epochs=5, max_steps=4)
    assert record.rates == pytest.approx(list(oracles.cosine_schedule(0.064 * 8 / 256, 1e-4, 4, 2)))
