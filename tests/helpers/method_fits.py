"""Compares a training of a method over two epochs with its slow reference."""

from typing import Any

import oracles
import oracles_methods
import tiny
import tiny_methods
import torch
from torch import Tensor

from dino_lightning.config import AdamWConfig

EPOCHS, PER_EPOCH = 2, 3
TOTAL = EPOCHS * PER_EPOCH
OPTIM = AdamWConfig(lr=0.064, lr_end=1e-4, lr_warmup="2it", weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.05)
EXACT = {"rtol": 1e-7, "atol": 1e-9}
"""Tolerance for other orders of summation in float64 over 6 steps; Adam divides small gradients by small numbers."""


def check_fit(name: str, *, accumulated: int, views: int, reference: dict[str, Any], **changed: Any) -> tuple[Any, Any]:
    """Train both, compare all losses and weights, and return the module and the reference."""
    module = tiny_methods.build(name, optim=OPTIM, batch_size=8 // accumulated, **changed)
    epoch = [crops[:views] for crops in tiny.batches(PER_EPOCH)]
    micro = tiny.split(epoch, parts=accumulated)
    slow = start(name, module, **reference)
    steps = [micro[i : i + accumulated] for i in range(0, len(micro), accumulated)]
    slow.run(steps * EPOCHS)
    record = tiny_methods.fit(module, micro, max_epochs=EPOCHS, accumulate_grad_batches=accumulated)
    losses = torch.tensor(record.losses, dtype=torch.float64).unflatten(0, (TOTAL, accumulated)).mean(dim=1)
    torch.testing.assert_close(losses, torch.tensor(slow.losses, dtype=torch.float64), rtol=1e-8, atol=0)
    compare(record.states[-1], slow.state)
    assert losses.max() - losses.min() > 0.01, "the loss does not change"
    check_changes_only_at_steps(record, accumulated)
    return module, slow


def start(name: str, module: Any, **reference: Any) -> oracles_methods.Training:
    kind = {"byol": oracles_methods.BYOL, "swav": oracles_methods.SwAV}.get(name, oracles_methods.MoCo)
    return kind(
        {key: value.double() if value.is_floating_point() else value for key, value in tiny.copy(module).items()},
        lr=oracles.cosine_schedule(0.064 * 8 / 256, 1e-4, TOTAL, 2),
        weight_decay=oracles.cosine_schedule(0.04, 0.4, TOTAL),
        clip=0.05,
        **reference,
    )


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    names = [name for name in ours if not name.startswith("queue")]
    assert set(names) == {name for name in tiny_methods.real(expected) if not name.startswith("queue")}
    for name in names:
        torch.testing.assert_close(ours[name], expected[name], **EXACT, msg=f"{name} differs")


def check_changes_only_at_steps(record: tiny_methods.States, accumulated: int) -> None:
    """Check that the state changes only with the last accumulated micro-batch. The first learning rate is 0."""
    for index, (before, now) in enumerate(zip(record.states[:-1], record.states[1:], strict=True), start=1):
        changed = [name for name in now if not torch.equal(before[name], now[name])]
        stepped = record.steps[index] != record.steps[index - 1]
        assert stepped == ((index + 1) % accumulated == 0)
        assert not changed or stepped, changed
        kinds = {name.split(".")[0] for name in changed}
        assert (
            not stepped or record.steps[index] == 1 or kinds >= {"student", "teacher"} & {n.split(".")[0] for n in now}
        )


def rows_in_order(queue: Any) -> Tensor:
    """The rows of a queue, from the oldest to the newest."""
    return queue.features.roll(-int(queue.position), dims=0)
