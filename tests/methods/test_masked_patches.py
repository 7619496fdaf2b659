"""The loss on masked patches: compared with slow loops, and in a real fit."""

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import tiny
import torch
from content_masks import mask_by_content
from device_waits import EnterBetweenBatches, waits
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from oracles_masked_patches import SlowTraining
from slow_params import first
from torch import Tensor

from dino_lightning.config import AdamWConfig, ComputeConfig
from dino_lightning.losses.chunked import chunked_row_entropy
from dino_lightning.losses.cross_view import SoftmaxParams
from dino_lightning.methods.masked_patches import row_entropy
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.masking import Masks, draw_masks

EXACT: Any = {"rtol": 1e-10, "atol": 1e-12}
GRID = (4, 4)

# ----------------------------------------------------------------------------------------------------------- loss


def slow_entropy(student_PK: Tensor, teacher_PK: Tensor, sharpness: SoftmaxParams, weights_P: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s_K, t_K, weight in zip(student_PK, teacher_PK, weights_P, strict=True):
        p_K = [torch.exp(x) for x in (t_K - sharpness.center[0]) / sharpness.teacher_temperature]
        q_K = [torch.exp(x) for x in s_K / sharpness.student_temperature]
        for p, q in zip(p_K, q_K, strict=True):
            total = total - weight * p / sum(p_K) * torch.log(q / sum(q_K))
    return total


def row_factors(P: int) -> tuple[FactoredLogits, FactoredLogits, SoftmaxParams, Tensor]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    student = FactoredLogits(drawn(P, 3).requires_grad_(), drawn(5, 3).requires_grad_())
    teacher = FactoredLogits(drawn(P, 3) * 0.1, drawn(5, 3))
    return student, teacher, SoftmaxParams(0.5, 0.2, drawn(1, 5) * 0.1), torch.rand(P, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("P", [1, 2, 7, 12])
def test_loss_and_gradients(P: int, rows: int) -> None:
    student, teacher, sharpness, weights_P = row_factors(P)
    slow = slow_entropy(student.logits(), teacher.logits(), sharpness, weights_P)
    plain = row_entropy(student.logits(), teacher.logits(), sharpness, weights_P)
    pieces = chunked_row_entropy(student, teacher, sharpness, weights_P, rows=rows)
    leaves = student.embeddings, student.prototypes
    expected = torch.autograd.grad(slow, leaves)
    for ours in (plain, pieces):
        torch.testing.assert_close(ours, slow, **EXACT)
        for gradient, other in zip(torch.autograd.grad(2 * ours, leaves), expected, strict=True):
            torch.testing.assert_close(gradient, 2 * other, **EXACT)


def test_chunks_have_at_most_the_allowed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from dino_lightning.losses import chunked as prototype_loss

    held: list[int] = []

    def noting(x: Tensor, weight: Tensor) -> Tensor:
        held.append(len(x))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(prototype_loss, "product", noting)
    student, teacher, sharpness, weights_P = row_factors(21)
    chunked_row_entropy(student, teacher, sharpness, weights_P, rows=6)
    assert max(held) == 6
    assert sum(held) == 2 * 22  # the rows of both networks, and one row of padding


def test_without_a_masked_patch_there_is_no_loss() -> None:
    student, teacher, sharpness, weights_P = row_factors(0)
    for loss in (
        row_entropy(student.logits(), teacher.logits(), sharpness, weights_P),
        chunked_row_entropy(student, teacher, sharpness, weights_P, rows=8),
    ):
        assert loss.item() == 0
        assert loss.dtype == torch.float64


def test_half_precision() -> None:
    """Products in bfloat16: three digits."""
    student, teacher, sharpness, weights_P = row_factors(40)
    points, prototypes = (x.detach().float().requires_grad_() for x in (student.embeddings, student.prototypes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = (
            FactoredLogits(points, prototypes),
            FactoredLogits(teacher.embeddings.float(), teacher.prototypes.float()),
        )
        center = SoftmaxParams(0.5, 0.2, sharpness.center.float())
        ours = chunked_row_entropy(*half, center, weights_P.float(), rows=16)
    exact = row_entropy(student.logits(), teacher.logits(), sharpness, weights_P)
    torch.testing.assert_close(ours.double(), exact, rtol=0.02, atol=0)
    ours.backward()
    exact.backward()
    assert (points.grad - student.embeddings.grad).norm() < 0.03 * student.embeddings.grad.norm()  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------- the fit

EPOCHS, PER_EPOCH, WEIGHT = 2, 2, 0.7
TOTAL = EPOCHS * PER_EPOCH
OPTIM = AdamWConfig(lr=0.064, lr_end=1e-4, lr_warmup="2it", weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.05)
METHOD: dict[str, Any] = {"teacher_momentum": 0.9, "patch_loss_weight": WEIGHT, "freeze_last_layer": "1ep"}


def slow_training(module: Any, hidden: list[Tensor]) -> SlowTraining:
    oracle = SlowTraining(
        student={name: weight.double() for name, weight in tiny.copy(module.student).items()},
        patch=tiny.PATCH,
        heads=tiny.HEADS,
        lr=oracles.cosine_schedule(0.064 * 8 / 256, 1e-4, TOTAL, 2),
        weight_decay=oracles.cosine_schedule(0.04, 0.4, TOTAL),
        momentum=oracles.cosine_schedule(0.9, 1.0, TOTAL),
        temperature=np.full(TOTAL, 0.04),
        frozen_steps=PER_EPOCH,
        clip=0.05,
        trained=lambda name: not name.endswith("weight_g"),
    )
    oracle.hidden, oracle.patch_losses, oracle.weight = hidden, [], WEIGHT
    oracle.patch_center = torch.zeros_like(oracle.center_K)
    return oracle


class PatchLosses(Callback):
    """The patch losses of the logging steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.metric_listeners.append(lambda reading: self.values.append(reading.values["train/patch_loss"]))


@pytest.mark.parametrize("fused", first([True, False]))
def test_a_fit_equals_the_slow_training(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are those of seed, step, micro-batch and rank; loss, centers and all weights follow."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    module = tiny.dino(optim=OPTIM, compute=ComputeConfig(fused=fused), **METHOD)
    drawn = [
        draw_masks(np.random.default_rng([11, step, step % PER_EPOCH, 0]), 16, GRID, probability=0.5, share=[0.1, 0.5])
        for step in range(TOTAL)
    ]
    epoch = tiny.batches(PER_EPOCH)
    oracle = slow_training(module, [torch.from_numpy(hidden) for hidden in drawn])
    oracle.run(epoch * EPOCHS)
    record = tiny.fit(module, epoch, max_epochs=EPOCHS, callbacks=[noted := PatchLosses()], log_every_n_steps=1)
    np.testing.assert_allclose(record.losses, oracle.losses, rtol=1e-10)
    np.testing.assert_allclose(noted.values, oracle.patch_losses, rtol=1e-10)
    torch.testing.assert_close(module.center.center[0], oracle.center_K, **EXACT)
    torch.testing.assert_close(module.patches.center.center[0], oracle.patch_center, **EXACT)  # type: ignore[union-attr]
    for ours, expected in ((module.student, oracle.student), (module.teacher, oracle.teacher)):
        state = tiny.copy(ours)
        assert state.keys() == expected.keys()
        for name, weight in state.items():
            torch.testing.assert_close(weight, expected[name], **EXACT, msg=name)
    assert oracle.student["backbone.mask_token"].abs().max() > 0.01
    assert oracle.patch_center.abs().max() > 0.05


def by_content(**options: Any) -> Any:
    torch.manual_seed(5)
    return mask_by_content(tiny.dino(optim=OPTIM, **{**METHOD, **options}), patch=tiny.PATCH)


def test_micro_batches_equal_one_batch() -> None:
    """Some have one image, which may have no mask."""
    batches = tiny.batches(4)
    whole = by_content()
    record = tiny.fit(whole, batches)
    parts = by_content(batch_size=1)
    micro = tiny.fit(parts, tiny.split(batches, parts=8), accumulate_grad_batches=8)
    np.testing.assert_allclose(np.array(micro.losses).reshape(4, 8).mean(1), record.losses, rtol=1e-6)
    for name, weight in tiny.copy(parts).items():
        torch.testing.assert_close(weight, whole.state_dict()[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("centering", ["center", "sinkhorn", "softmax", "none"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow_after_first(4)
def test_without_masks_the_method_equals_dino(fused: bool, centering: str) -> None:
    """`mask_p=0`: the same losses and weights, the initial mask token and second center."""
    options = {"centering": centering, "compute": ComputeConfig(fused=fused)}
    torch.manual_seed(5)
    module = tiny.dino(optim=OPTIM, **{**METHOD, **options, "mask_p": 0.0})
    module.student.backbone.mask_token.data.zero_()  # type: ignore[union-attr]
    torch.manual_seed(5)
    plain = tiny.dino(optim=OPTIM, **{**METHOD, **options, "patch_loss_weight": 0.0})
    weights = {name: weight for name, weight in module.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    batches = tiny.batches(3)
    ours, expected = tiny.fit(module, batches), tiny.fit(plain, batches)
    np.testing.assert_allclose(ours.losses, expected.losses, rtol=1e-9)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], weight, rtol=1e-9, atol=1e-11, msg=name)
    assert not module.student.backbone.mask_token.any()  # type: ignore[union-attr]
    if centering == "center":
        assert not module.patches.center.center.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options", [{"centering": "sinkhorn"}, {"predictor": True}, {"head_batch_norm": True}, {"centering": "none"}]
)
def test_masks_work_with_the_other_options_of_dino(options: dict[str, Any]) -> None:
    """In chunks and all at once."""
    batches, losses = tiny.batches(3), []
    for fused in (True, False):
        module = by_content(compute=ComputeConfig(fused=fused, loss_rows=7), **options)
        losses.append(tiny.fit(module, batches).losses)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)


def test_a_resumed_run_draws_the_same_masks(tmp_path: Path) -> None:
    """After a micro-batch in the middle of an epoch; and no two micro-batches have the same masks."""
    batches, drawn = tiny.split(tiny.batches(3), parts=2), []

    def noting(module: Any) -> Any:
        draw = module.patches.draw
        module.patches.draw = lambda *given: drawn.append(draw(*given)) or drawn[-1]
        return module

    def fit(**options: Any) -> list[Masks]:
        drawn.clear()
        torch.manual_seed(5)
        module = noting(tiny.dino(optim=OPTIM, batch_size=4, **METHOD))
        tiny.fit(module, batches, max_epochs=2, accumulate_grad_batches=2, **options)
        return [*drawn]

    whole = fit()
    save = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(enable_checkpointing=True, callbacks=[save])
    resumed = fit(ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert [each.hidden.tolist() for each in resumed] == [each.hidden.tolist() for each in whole[8:]]
    assert len({str(each.hidden.tolist()) for each in whole}) == 12


def test_no_step_waits_for_the_device() -> None:
    """Except for the recorder of the tests; NumPy's arrays become tensors on the host."""
    module = tiny.dino(batch_size=8, **METHOD)
    watch = EnterBetweenBatches(waits(), first=2, last=6)
    tiny.fit(module, tiny.batches(8, dtype=torch.float32), precision="32-true", callbacks=[watch])
    assert watch.result, "the recorder waits"
    known = [entry for entry in watch.result if "/tests/helpers/tiny.py" in entry]
    known += [entry for entry in watch.result if entry.startswith("lift_fresh") and "/masking.py" in entry]
    assert sorted(watch.result) == sorted(known)
