"""Steps that are not finite in lower precisions and on a GPU: the loss scale, overflows, all policies."""

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from nonfinite_cases import BAD, STEPS, BadGradient, assert_equal, broken, callback, dino, files, fit, rows

from dino_lightning.methods.base import Method
from dino_lightning.training.callbacks import nonfinite
from dino_lightning.training.debug.step_dump import read_step


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_other_precisions_skip_the_step(tmp_path: Path, precision: str, policy: str) -> None:
    torch.manual_seed(5)
    batches = broken(tiny.batches(STEPS, dtype=torch.float32), BAD)
    ours = fit(dino(), batches, callback(tmp_path, policy), folder=tmp_path, precision=precision)
    assert_equal(ours.states[BAD], ours.states[BAD - 1])
    assert all(tensor.isfinite().all() for tensor in ours.states[-1].values())
    assert any(not torch.equal(ours.states[-1][key], value) for key, value in ours.states[BAD].items())


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_loss_does_not_change_the_loss_scale(
    tmp_path: Path, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr("dino_lightning.optim.optimizers.FUSED_DEVICES", ())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(5)
    batches = broken(tiny.batches(STEPS, dtype=torch.float32), BAD)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    ours = fit(dino(), batches, callback(tmp_path, "skip"), folder=tmp_path, precision=None, plugins=plugins)
    assert_equal(ours.states[BAD], ours.states[BAD - 1])
    assert any(not torch.equal(ours.states[-1][key], value) for key, value in ours.states[BAD].items())
    assert scaler.get_scale() == 2.0**10
    assert scaler._growth_tracker is not None
    assert scaler._growth_tracker.item() == STEPS - 1
    assert {float(row["amp/overflows"]) for row in rows(tmp_path) if row["amp/overflows"]} == {0}


def test_overflows_are_only_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-14)
    torch.manual_seed(5)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    keeper = callback(tmp_path, "stop")
    module = dino()
    fit(module, tiny.batches(STEPS, dtype=torch.float32), keeper, folder=tmp_path, precision=None, plugins=plugins)
    scales = [float(row["amp/scale"]) for row in rows(tmp_path) if row["amp/scale"]]
    counts = [float(row["amp/overflows"]) for row in rows(tmp_path) if row["amp/overflows"]]
    assert scales[0] == 2.0**40
    fell = [later < earlier for earlier, later in pairwise(scales)]
    assert counts == [sum(fell[:step]) for step in range(STEPS)]
    assert 0 < counts[-1] < STEPS
    assert (keeper.count, files(tmp_path)) == (0, [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(tmp_path: Path, policy: str, cause: str, precision: str) -> None:
    if (cause, precision) == ("gradient", "16-mixed"):
        pytest.skip("the loss scale handles these")
    torch.manual_seed(5)
    batches = tiny.batches(STEPS, dtype=torch.float32)
    batches = broken(batches, BAD) if cause == "loss" else batches
    hooks = [BadGradient(BAD)] if cause == "gradient" else []
    module: Method = dino()
    options = {"accelerator": "gpu", "precision": precision}
    if policy == "stop":
        with pytest.raises(FloatingPointError, match=f"at step {BAD}"):
            fit(module, batches, callback(tmp_path, policy), *hooks, folder=tmp_path, **options)
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    else:
        ours = fit(module, batches, callback(tmp_path, policy), *hooks, folder=tmp_path, **options)
        assert_equal(ours.states[BAD], ours.states[BAD - 1])
        assert_equal(ours.optimizers[BAD], ours.optimizers[BAD - 1])
        assert all(tensor.isfinite().all() for tensor in ours.states[-1].values())
    saved = read_step(tmp_path / "nonfinite" / files(tmp_path)[0])
    assert all(tensor.isfinite().all() for tensor in saved["state"].values())
    assert (saved["crops"] is None) == (policy == "stop" and cause == "gradient")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_overflows_on_a_gpu(tmp_path: Path) -> None:
    """From a scale at which the first steps overflow."""
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, backoff_factor=2.0**-14)
    plugins = [MixedPrecision("16-mixed", "cuda", scaler=scaler)]
    torch.manual_seed(5)
    batches = tiny.batches(STEPS, dtype=torch.float32)
    fit(
        dino(), batches, callback(tmp_path, "stop"), folder=tmp_path, precision=None, plugins=plugins, accelerator="gpu"
    )
    counts = [float(row["amp/overflows"]) for row in rows(tmp_path) if row["amp/overflows"]]
    assert 0 < counts[-1] < STEPS
    assert float(rows(tmp_path)[0]["amp/scale"]) == 2.0**40


def test_only_batch_norms_have_running_statistics() -> None:
    module = dino(head_batch_norm=True)
    found = {id(tensor) for tensor in nonfinite.running_statistics(module)}
    expected = {name for name, tensor in module.named_buffers() if id(tensor) in found}
    assert expected == {name for name, _ in module.named_buffers() if "running" in name or "num_batches" in name}
    assert expected
