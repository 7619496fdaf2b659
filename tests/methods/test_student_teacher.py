"""The teacher's update, compared with rules that are written by hand for the recorded weights of the student."""

import functools
from itertools import pairwise
from pathlib import Path
from typing import Any

import oracles
import pytest
import tiny
import tiny_methods
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

EPOCHS, PER_EPOCH = 2, 3
TOTAL = EPOCHS * PER_EPOCH
UPDATES = ["ema", "copy_each_step", "previous_step", "copy_each_epoch"]
Weights = dict[str, Tensor]


def weights(state: Weights, network: str) -> Weights:
    return {name.removeprefix(f"{network}."): w for name, w in state.items() if name.startswith(f"{network}.")}


def by_hand(update: str, start: Weights, students: list[Weights]) -> list[Weights]:
    """The teacher after each step, of the student's weights at the start and after each step."""
    momentum = oracles.cosine_schedule(0.9, 1.0, TOTAL)
    teacher, teachers, before = start, [], start
    for step, student in enumerate(students):
        match update:
            case "ema":
                m = momentum[step]
                teacher = {name: m * teacher[name] + (1 - m) * student[name] for name in student}
            case "copy_each_step":
                teacher = student
            case "previous_step":
                teacher = before
            case "copy_each_epoch":
                teacher = student if step % PER_EPOCH == PER_EPOCH - 1 else teacher
        teachers.append(teacher)
        before = student
    return teachers


def train(
    update: str, *, accumulated: int = 1, kinds: int = PER_EPOCH, **options: Any
) -> tuple[Weights, tiny_methods.States]:
    torch.manual_seed(1)
    module = tiny.dino(batch_size=8 // accumulated, teacher_update=update, teacher_momentum=0.9)
    start = {name: weight.double() for name, weight in tiny.copy(module.student).items()}
    data = tiny.split(tiny.batches(kinds) * (PER_EPOCH // kinds), parts=accumulated)
    limits = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulated, **options}
    return start, tiny_methods.fit(module, data, **limits)


@functools.cache
def trained(update: str, *, accumulated: int) -> tuple[Weights, tiny_methods.States]:
    """`train` with the default options, for tests that only read its results."""
    return train(update, accumulated=accumulated)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("update", UPDATES)
def test_teacher_after_each_step(update: str, accumulated: int) -> None:
    start, seen = trained(update, accumulated=accumulated)
    states = seen.states[accumulated - 1 :: accumulated]
    students, teachers = ([weights(state, network) for state in states] for network in ("student", "teacher"))
    expected = by_hand(update, start, students)
    assert len(expected) == TOTAL
    for step, (ours, wanted) in enumerate(zip(teachers, expected, strict=True)):
        for name, weight in ours.items():
            if update == "ema":
                torch.testing.assert_close(weight, wanted[name], rtol=1e-12, atol=1e-15, msg=f"{name} at step {step}")
            else:
                assert torch.equal(weight, wanted[name]), f"{name} at step {step} is not an exact copy"
    for before, now in pairwise(students):
        assert not torch.equal(before["backbone.pos_embed"], now["backbone.pos_embed"])


@pytest.mark.parametrize("update", UPDATES)
def test_the_loss_uses_the_teacher_of_the_previous_step(update: str) -> None:
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            at = pl_module.teacher.backbone
            at.register_forward_pre_hook(lambda *_: seen.append(at.pos_embed.detach().clone()))

    start, run = train(update, callbacks=[Look()])
    students = [start, *(weights(state, "student") for state in run.states)]
    teachers = [start, *by_hand(update, start, students[1:])]
    assert len(seen) == TOTAL
    for step, ours in enumerate(seen):
        torch.testing.assert_close(ours, teachers[step]["backbone.pos_embed"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("update", UPDATES)
def test_the_teacher_is_constant_between_two_steps(update: str) -> None:
    _, seen = trained(update, accumulated=2)
    for index in range(1, len(seen.states) - 1, 2):
        now, then = (weights(seen.states[i], "teacher") for i in (index, index + 1))
        assert all(torch.equal(now[name], then[name]) for name in now)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.slow_after_first(2)
def test_a_resumed_run_equals_an_uninterrupted_one(update: str, tmp_path: Path) -> None:
    """From the middle of an epoch, and from its end. All batches are equal, because a list has no position."""
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, whole = train(update, kinds=1, callbacks=[checkpoints], enable_checkpointing=True)
    for after in (2, 3):
        _, rest = train(update, kinds=1, ckpt_path=tmp_path / f"step={after}.ckpt")
        assert rest.steps[-1] == TOTAL
        for name, weight in whole.states[-1].items():
            assert torch.equal(weight, rest.states[-1][name]), (after, name)


def test_the_momentum_is_logged() -> None:
    values: dict[str, list[float]] = {}
    for update in UPDATES:
        module = tiny.dino(teacher_update=update, teacher_momentum=0.9)
        rows: list[float] = values.setdefault(update, [])
        module.metric_listeners.append(
            lambda reading, rows=rows: rows.append(reading.values["schedule/teacher_momentum"])
        )
        tiny.fit(module, tiny.batches(PER_EPOCH), max_epochs=EPOCHS, log_every_n_steps=1)
    assert values["copy_each_step"] == values["previous_step"] == [0.0] * TOTAL
    assert values["copy_each_epoch"] == [1.0, 1.0, 0.0] * EPOCHS
    assert values["ema"] == pytest.approx(list(oracles.cosine_schedule(0.9, 1.0, TOTAL)))


def test_a_short_last_window_ends_the_epoch() -> None:
    """Three micro-batches by two are two steps: the copy is at the second."""
    module = tiny.dino(teacher_update="copy_each_epoch", batch_size=4)
    seen = tiny_methods.fit(module, tiny.split(tiny.batches(2), parts=2)[:3], accumulate_grad_batches=2)
    first, last = seen.states[1], seen.states[2]
    name = "backbone.patch_embed.proj.weight"
    assert not torch.equal(first[f"teacher.{name}"], first[f"student.{name}"])
    assert torch.equal(last[f"teacher.{name}"], last[f"student.{name}"])
