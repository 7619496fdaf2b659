"""Trainings with a non-finite step, and a plain loop that leaves this step out, for comparison."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from dino_lightning.config import NonfiniteConfig
from dino_lightning.methods.clock import StepClock
from dino_lightning.optim.ema import ema_update
from dino_lightning.optim.optimizers import build_optimizer, clip_each_gradient, parameter_groups
from dino_lightning.runtime.sharding import is_sharded, local
from dino_lightning.training.callbacks.nonfinite import NonfiniteSteps

STEPS, BAD = 5, 2
"""Number of steps, and index of the non-finite one."""


def callback(folder: Path, policy: str, **config: Any) -> NonfiniteSteps:
    """The callback without a configuration of the method, so its files cannot be replayed."""
    paths: dict[str, Any] = {"folder": folder / "nonfinite", "checkpoints": folder / "checkpoints"}
    settings: dict[str, Any] = {"configuration": {}, "seed": 0, "precision": "64-true"}
    return NonfiniteSteps(NonfiniteConfig(policy=policy, **config), **paths, **settings)


def broken(data: tiny.Batches, *at: int) -> tiny.Batches:
    """A copy of the batches, with a NaN pixel in those at the indices `at`."""
    data = [[crop.clone() for crop in crops] for crops in data]
    for index in at:
        data[index][0][0, 0, 0, 0] = float("nan")
    return data


class BadGradient(L.Callback):
    """Makes one gradient infinite in the micro-batches `at`; the loss stays finite."""

    def __init__(self, *at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        weight = next(p for p in pl_module.student.parameters() if p.requires_grad)
        if batch_idx in self.at and not is_sharded(weight):
            handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """For sharded parameters, which have no hooks, make this rank's slice of a gradient infinite."""
        if trainer.fit_loop.batch_idx in self.at:
            slices = [local(p.grad) for p in pl_module.student.parameters() if is_sharded(p) and p.grad is not None]
            for part in [part for part in slices if part.numel()][:1]:
                part.fill_(float("inf"))


class StateRecorder(L.Callback):
    """Records the state of module and optimizer after each micro-batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.optimizers: list[dict[str, Tensor]] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)
        self.states.append(tiny.copy(pl_module))
        self.optimizers.append(optimizer_state(trainer.optimizers[0]))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index} {name}": value.clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def fit(module: Any, data: Any, *callbacks: L.Callback, folder: Path, **trainer: Any) -> StateRecorder:
    recorder = StateRecorder()
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 1, "log_every_n_steps": 1, "devices": 1}
    options |= {"accelerator": "cpu", "enable_checkpointing": False, "logger": CSVLogger(folder, name="", version="")}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, **trainer}
    loader = DataLoader(data, batch_size=None)
    L.Trainer(**options, callbacks=[*callbacks, recorder]).fit(module, loader)
    return recorder


def reference_states(
    module: Any, data: tiny.Batches, *, skipped: set[int], accumulated: int = 1
) -> list[dict[str, Tensor]]:
    """The state after each step of a plain training loop of DINO, without the `skipped` steps."""
    module.double()
    steps = len(data) // accumulated
    batch_size = module.batch_size_per_device * accumulated
    module.clock = StepClock(steps_per_epoch=steps, total_steps=steps, total_batch_size=batch_size)
    module.schedules = module.make_schedules()
    optimizer = build_optimizer(module.optim, parameter_groups(module))
    states = []
    for step in range(steps):
        module.clock.step = step
        if step not in skipped:
            optimizer.zero_grad()
            for crops in data[step * accumulated : (step + 1) * accumulated]:
                (module.loss(crops) / accumulated).backward()
            clip_each_gradient(module.parameters(), max_norm=module.optim.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = module.value("lr")
            optimizer.param_groups[0]["weight_decay"] = module.value("weight_decay")
            optimizer.step()
            ema_update(module.teacher, module.student, momentum=module.value("teacher_momentum"))
            module.center.update()
        states.append(tiny.copy(module))
    return states


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], message: str = "") -> None:
    """Check that two states are bit-identical."""
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), f"{name} {message}"


def dino(**options: Any) -> Any:
    torch.manual_seed(4)
    return tiny.dino(**{"teacher_momentum": 0.9, **options})


def data(*, parts: int = 1, count: int = STEPS) -> tiny.Batches:
    torch.manual_seed(5)
    return tiny.split(tiny.batches(count), parts=parts)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "nonfinite").glob("*"))
