"""The files that the non-finite policy saves, and the micro-batches it keeps for them."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from nonfinite_cases import BAD, STEPS, assert_equal, broken, callback, data, dino, files, fit

from dino_lightning.training.debug.step_dump import read_step


def test_the_file_contains_the_micro_batch_of_the_step(tmp_path: Path) -> None:
    """Of an accumulated step, the one whose loss is not finite; with the weights before the step."""
    torch.manual_seed(4)
    module = dino(batch_size=4, head_batch_norm=True)
    batches = broken(data(parts=2), 2 * BAD)
    ours = fit(module, batches, callback(tmp_path, "skip"), folder=tmp_path, accumulate_grad_batches=2)
    (name,) = files(tmp_path)
    saved = read_step(tmp_path / "nonfinite" / name)
    assert (saved["step"], saved["batch_index"], saved["rank"], saved["world_size"]) == (BAD, 2 * BAD, 0, 1)
    for crop, given in zip(saved["crops"], batches[2 * BAD], strict=True):
        torch.testing.assert_close(crop, given, rtol=0, atol=0, equal_nan=True)
    assert_equal(saved["state"], ours.states[2 * BAD - 1])
    assert saved["ranges"]["crops"]["bad"] == 1
    assert saved["ranges"]["student.backbone.patch_embed"]["bad"] > 0
    assert math.isnan(saved["loss"])
    assert saved["schedules"]["teacher_momentum"] == module.schedules["teacher_momentum"](BAD)


def test_only_the_current_micro_batch_is_saved(tmp_path: Path) -> None:
    """And those known to be not finite, until the step is over: no memory for all of a step."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(len(keeper._micro_batches))

    keeper = callback(tmp_path, "skip")
    fit(
        dino(batch_size=2),
        broken(data(parts=4, count=2), 5),
        keeper,
        Look(),
        folder=tmp_path,
        accumulate_grad_batches=4,
    )
    assert seen == [1, 1, 1, 0, 1, 1, 2, 0]


def test_saving_does_not_change_random_numbers(tmp_path: Path) -> None:
    """The forward pass that is repeated for its ranges draws the same, and takes none from those that follow."""
    draws: list[Any] = []

    class Draw(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            draws.append(torch.rand(1).item())

    for save in (0, 1):
        module = dino(batch_size=4)
        module.student.head.mlp.append(torch.nn.Dropout(0.5))
        batches = broken(data(parts=2), 2 * BAD)
        torch.manual_seed(1)
        keeper = callback(tmp_path / str(save), "skip", max_saved=save)
        fit(module, batches, keeper, Draw(), folder=tmp_path, accumulate_grad_batches=2)
    assert len(set(draws[: 2 * STEPS])) == 2 * STEPS
    assert draws[: 2 * STEPS] == draws[2 * STEPS :]


def test_a_disk_that_is_full_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nonfinite").write_text("a file where the folder would be")
    ours = fit(dino(), broken(data(), BAD), callback(tmp_path, "skip"), folder=tmp_path)
    assert len(ours.states) == STEPS
    assert "could not be saved" in capsys.readouterr().err
