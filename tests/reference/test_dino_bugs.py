"""Bugs seen in other ports of DINO to Lightning, each with a test that says it."""

import math
import statistics
from pathlib import Path

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from dino_lightning.config import (
    AdamWConfig,
    BuiltinData,
    CropsConfig,
    DINOConfig,
    KNNConfig,
    SGDConfig,
    TrainConfig,
    ViTConfig,
)
from dino_lightning.data.module import MultiCropDataModule
from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_entropy
from dino_lightning.training.build import build_method
from dino_lightning.training.callbacks.knn import KNNCallback

LAST = ("head.last_layer.weight_g", "head.last_layer.weight_v")


def _cosine(base: float, final: float, step: int, total: int) -> float:
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / total))


# -------------------------------------------------------------------------------------------------------- the center


def test_center_is_in_the_checkpoint(tmp_path: Path) -> None:
    module = tiny.dino()
    kept = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    tiny.fit(module, tiny.batches(3), enable_checkpointing=True, callbacks=[kept])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["center.center"].abs().max() > 0.01
    assert torch.equal(saved["center.center"], module.center.center)
    fresh = tiny.dino().double()
    fresh.load_state_dict(saved, strict=True)
    assert torch.equal(fresh.center.center, module.center.center)


def test_the_loss_uses_the_previous_center() -> None:
    module, (crops,) = tiny.dino(), tiny.batches(1)
    with torch.no_grad():
        module.double()
        teacher = module.teacher(crops[:2]).unflatten(0, (2, -1))
        student = module.student(crops).unflatten(0, (4, -1))
    losses = [
        cross_view_entropy(
            student, teacher, SoftmaxParams(student_temperature=0.1, teacher_temperature=0.04, center=center)
        ).item()
        for center in (torch.zeros(1, tiny.K).double(), teacher.flatten(0, 1).mean(0, keepdim=True) * 0.1)
    ]
    record = tiny.fit(module, [crops])
    assert record.losses == pytest.approx(losses[:1], rel=1e-12)
    assert abs(losses[0] - losses[1]) > 1e-4
    assert record.centers[0].any()


def test_evaluation_does_not_update_the_center() -> None:
    module = tiny.dino()
    (crops,) = tiny.batches(1)
    tiny.fit(module, [crops])
    before = module.center.center.clone()
    for mode in (module.eval, module.train):
        mode()
        module.teacher(crops[:2])
        module.student(crops)
        module.teacher.backbone(crops[0])
    assert torch.equal(module.center.center, before)


def _data() -> MultiCropDataModule:
    images = BuiltinData(train_images=48, val_images=12, batch_size_per_device=16, num_workers=0, pin_memory=False)
    crops = CropsConfig(global_size=32, local_size=16, local_count=2, eval_resize=32, eval_size=32)
    return MultiCropDataModule(images, crops, seed=0)


def test_knn_evaluation_changes_nothing() -> None:
    """Weights, center, random states, train mode: a run with k-NN each epoch is bit for bit the run without."""
    runs = []
    for callbacks in ([], [KNNCallback(KNNConfig(k=[5], headline_k=5, batch_size_per_device=16))]):
        L.seed_everything(1, verbose=False)
        module = tiny.dino(batch_size=16)
        tiny.fit(module, _data(), max_epochs=2, precision=32, callbacks=callbacks)
        runs.append(tiny.copy(module))
        assert all(part.training for part in module.modules())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_knn_evaluates_the_teacher_and_not_the_student() -> None:
    asked: list[str] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            asked.clear()  # the forward passes of training do not count

    module = tiny.dino(batch_size=16)
    for name in ("student", "teacher"):
        network = getattr(module, name)
        network.backbone.register_forward_hook(lambda m, *_, name=name: None if m.training else asked.append(name))
    tiny.fit(module, _data(), callbacks=[Watch(), KNNCallback(KNNConfig(k=[5], headline_k=5))], precision=32)
    assert set(asked) == {"teacher"}


# ------------------------------------------------------------------------------------------------------- the teacher


def test_teacher_starts_as_the_student_and_shares_nothing() -> None:
    module = build_method(_config())
    student, teacher = module.student.state_dict(), module.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not {w.data_ptr() for w in student.values()} & {w.data_ptr() for w in teacher.values()}
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_teacher_is_not_in_the_optimizer() -> None:
    module = tiny.dino()
    tiny.fit(module, tiny.batches(1))
    (optimizer,) = module.trainer.optimizers
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in module.student.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("accumulated", [1, 4])
def test_teacher_is_updated_once_per_optimizer_step_with_its_momentum(accumulated: int) -> None:
    """Not once an epoch, not once a micro-batch, and not with the momentum of the step before or after."""
    module = tiny.dino(batch_size=8 // accumulated, teacher_momentum=0.5)
    name, before = "head.mlp.0.weight", tiny.copy(module.teacher)["head.mlp.0.weight"].double()
    record = tiny.fit(
        module, tiny.split(tiny.batches(3), parts=accumulated), max_epochs=2, accumulate_grad_batches=accumulated
    )
    for i, (student, teacher) in enumerate(zip(record.students, record.teachers, strict=True)):
        if (i + 1) % accumulated:
            assert torch.equal(teacher[name], before)
            continue
        momentum = ((teacher[name] - student[name]) / (before - student[name])).median().item()
        assert momentum == pytest.approx(_cosine(0.5, 1.0, i // accumulated, 6), rel=1e-9)
        before = teacher[name]


def test_batch_norm_statistics_of_the_teacher_are_its_own() -> None:
    """The teacher runs in train mode; its buffers are not copied or averaged from the student."""
    module = tiny.dino(head_batch_norm=True)
    modes: set[bool] = set()
    module.teacher.register_forward_pre_hook(lambda m, _: modes.add(m.training))
    norm = module.teacher.head.mlp[1]
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tiny.fit(module, tiny.batches(1))
    assert module.teacher.training
    torch.testing.assert_close(norm.running_mean, 0.1 * inputs[0].mean(0), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(norm.running_mean, module.student.head.mlp[1].running_mean, rtol=1e-2)


# ----------------------------------------------------------------------------------------------- schedules and resume


def test_schedules_continue_over_epochs_and_a_resume(tmp_path: Path) -> None:
    """Four epochs at once, and two of them by new objects from the checkpoint of the second: the same to the bit."""
    optim = AdamWConfig(lr=0.032, lr_warmup="1ep")
    options = {"freeze_last_layer": "1ep", "teacher_temperature": 0.07, "teacher_temperature_warmup": "3ep"}
    data = tiny.batches(3)
    kept = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = tiny.dino(optim=optim, **options)
    full = tiny.fit(whole, data, max_epochs=4, enable_checkpointing=True, callbacks=[kept])
    assert len(set(full.rates)) == 11  # base twice, where warm-up and cosine meet
    resumed = tiny.dino(optim=optim, **options).double()  # Lightning loads the weights before it widens the module
    rest = tiny.fit(resumed, data, max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert (rest.rates, rest.decays, rest.losses) == (full.rates[6:], full.decays[6:], full.losses[6:])
    ours, expected = tiny.copy(resumed), tiny.copy(whole)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_weight_decay_is_scheduled_on_the_first_group_only() -> None:
    record = tiny.fit(tiny.dino(), tiny.batches(3), max_epochs=2)
    assert [second for _, second in record.decays] == [0.0] * 6
    assert [first for first, _ in record.decays] == pytest.approx([_cosine(0.04, 0.4, i, 6) for i in range(6)])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_last_layer_is_frozen_in_the_first_epoch_and_free_in_the_second(accumulated: int) -> None:
    """Gradients dropped before backward would come back with it; a rate of 0 would still gather Adam's moments."""
    module = tiny.dino(freeze_last_layer="1ep", norm_last_layer=False, batch_size=8 // accumulated)
    start = tiny.copy(module.student)
    record = tiny.fit(
        module, tiny.split(tiny.batches(3), parts=accumulated), max_epochs=2, accumulate_grad_batches=accumulated
    )
    for name in LAST:
        frozen, free = record.students[3 * accumulated - 1][name], record.students[-1][name]
        assert torch.equal(frozen, start[name].double())
        assert not torch.equal(free, frozen)
    assert not torch.equal(
        record.students[3 * accumulated - 1]["head.mlp.4.weight"], start["head.mlp.4.weight"].double()
    )
    (optimizer,) = module.trainer.optimizers
    assert {optimizer.state[parameter]["step"].item() for parameter in module.student.head.last_layer.parameters()} == {
        3
    }


# ----------------------------------------------------------------------------------------------------- drop path, clip


def _config(**changes: object) -> TrainConfig:
    return TrainConfig(
        backbone=ViTConfig(width=32, depth=3, heads=2, patch_size=8, **changes),
        method=DINOConfig(out_dim=16, head_hidden_dim=8, head_bottleneck_dim=4),
        crops=CropsConfig(global_size=32, local_size=16),
        data=BuiltinData(),
        optim=AdamWConfig(),
    )


def test_drop_path_reaches_the_student_and_not_the_teacher() -> None:
    module, images = build_method(_config(drop_path_rate=0.5)).train(), torch.randn(16, 3, 32, 32)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in module.student.backbone.blocks]
    assert rates == pytest.approx([0.0, 0.25, 0.5])
    assert not torch.equal(module.student([images]), module.student([images]))
    assert torch.equal(module.teacher([images]), module.teacher([images]))


def _step_norms(*, clip: float, **trainer: object) -> list[float]:
    """Norm of each tensor's first step of plain SGD at a rate of 1, which is that of its gradient as clipped."""
    torch.manual_seed(0)  # the same weights and images on each call
    optim = SGDConfig(lr=32.0, lr_warmup="0ep", weight_decay=0.0, weight_decay_end=0.0, clip_grad=clip, momentum=0.0)
    module, data = tiny.dino(optim=optim), tiny.batches(1, dtype=torch.float32)
    start = tiny.copy(module.student)
    (after,) = tiny.fit(module, data, **trainer).students
    return [(after[name] - start[name]).norm().item() for name in start if not name.endswith("weight_g")]


def test_clip_is_per_tensor_and_not_of_the_global_norm() -> None:
    free = _step_norms(clip=0.0)
    clip = statistics.median(norm for norm in free if norm > 0)  # some are longer and some shorter
    clipped = _step_norms(clip=clip)
    assert clipped == pytest.approx([norm * min(1.0, clip / (norm + 1e-6)) for norm in free], rel=1e-8, abs=1e-12)
    assert any(norm > 1.01 * clip for norm in free)
    assert any(0 < norm < 0.99 * clip for norm in free)


def test_clip_works_on_unscaled_gradients() -> None:
    """With a loss scale of 1024 a clip of scaled gradients would make steps a thousand times shorter."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    scaled, plain = _step_norms(clip=0.05, precision=None, plugins=[plugin]), _step_norms(clip=0.05)
    assert scaler.get_scale() == 1024.0  # no step was skipped
    assert sum(norm == pytest.approx(0.05, rel=1e-3) for norm in plain) > 5
    for a, b in zip(scaled, plain, strict=True):
        assert a == pytest.approx(b, rel=0.05, abs=1e-3)  # float16 has three digits
