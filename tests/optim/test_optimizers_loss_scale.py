"""Training in fp16 with scaled gradients: hooks, clipping and the optimizer see unscaled gradients."""

from typing import Any

import lightning as L
import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from dino_lightning.config import AdamWConfig, OptimConfig, SGDConfig
from dino_lightning.optim import optimizers as optim

STEPS, CLIP = 6, 0.05
OPTIMIZERS: dict[str, OptimConfig] = {
    "adamw": AdamWConfig(lr=0.032, lr_warmup="0ep", clip_grad=CLIP),
    "sgd": SGDConfig(lr=3.2, lr_warmup="0ep", clip_grad=CLIP),
}


class Watch(L.Callback):
    """Records norms of the student's gradients before and after clipping, and the scale."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.before: list[dict[str, float]] = []
        self.after: list[dict[str, float]] = []
        self.scales: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before.append(norms(pl_module.student))
        self.scales.append(self.scaler.get_scale())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.after.append(norms(pl_module.student))


def norms(student: torch.nn.Module) -> dict[str, float]:
    return {name: p.grad.norm().item() for name, p in student.named_parameters() if p.grad is not None}


def train(config: OptimConfig, **scale: float) -> tuple[tiny.Record, Watch, Any]:
    """Train six steps from the same weights on the same images."""
    torch.manual_seed(3)
    module = tiny.dino(optim=config, teacher_momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", **scale)  # type: ignore[arg-type]
    watch = Watch(scaler)
    options = {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "callbacks": [watch]}
    record = tiny.fit(module, tiny.batches(STEPS, dtype=torch.float32), **options)
    return record, watch, module


@pytest.fixture(params=list(OPTIMIZERS))
def config(request: pytest.FixtureRequest) -> OptimConfig:
    return OPTIMIZERS[request.param]


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "scale", [{}, {"init_scale": 2.0**40, "backoff_factor": 2.0**-14}], ids=["scaled", "overflowing"]
)
@pytest.mark.slow_after_first(2)
def test_fused_trains_as_foreach(config: OptimConfig, scale: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to rounding in float32, which Adam magnifies; Lightning unscales foreach optimizers itself."""
    record, watch, module = train(config, **scale)
    monkeypatch.setattr(optim, "FUSED_DEVICES", ())
    expected, other, _ = train(config, **scale)
    assert watch.scales == other.scales
    for ours, theirs in zip(record.students + record.teachers, expected.students + expected.teachers, strict=True):
        assert_same(ours, theirs)
    assert module.trainer.optimizers[0].param_groups[0]["fused"]


def test_clipping_uses_unscaled_gradients(config: OptimConfig) -> None:
    _, watch, _ = train(config, init_scale=2.0**10)
    assert set(watch.scales) == {2.0**10}, "no gradient overflows"
    raw = [norm for step in watch.before for norm in step.values()]
    assert max(raw) < 100, "a callback, too, sees no scale"
    assert any(norm > 2 * CLIP for norm in raw)
    for before, after in zip(watch.before, watch.after, strict=True):
        assert before.keys() == after.keys()
        for name, norm in before.items():
            assert after[name] == pytest.approx(min(norm, CLIP), rel=1e-3, abs=1e-6), name


def test_weights_do_not_change_after_an_overflow(config: OptimConfig) -> None:
    record, watch, module = train(config, init_scale=2.0**40, backoff_factor=2.0**-14)
    assert watch.scales[0] > watch.scales[-1]
    skipped = sum(later < earlier for earlier, later in zip(watch.scales, watch.scales[1:], strict=False))
    assert 0 < skipped < STEPS - 1
    torch.manual_seed(3)
    start = tiny.copy(tiny.dino(optim=config, teacher_momentum=0.9).student)
    for step in range(skipped):
        assert all(torch.equal(weight, start[name]) for name, weight in record.students[step].items())
    assert any(not torch.equal(weight, start[name]) for name, weight in record.students[skipped].items())
    assert all(torch.isfinite(weight).all() for weight in record.students[-1].values())
    for parameter, state in module.trainer.optimizers[0].state.items():
        assert all(torch.isfinite(value).all() for value in state.values()), parameter.shape
        assert state.get("step", torch.tensor(STEPS - skipped)) == STEPS - skipped


def test_the_step_does_not_wait_for_the_overflow_flag(config: OptimConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", lambda *_, **__: asked.append("found_inf.item()"))
    train(config)
    assert not asked
    monkeypatch.setattr(optim, "FUSED_DEVICES", ())
    train(config)
    assert len(asked) == STEPS, "which is what it does about other optimizers"


def test_without_a_backward_pass_there_is_nothing_to_unscale() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.build_optimizer(AdamWConfig(), [{"params": [weight]}])
    precision = MixedPrecision("16-mixed", "cpu")
    assert optim.unscaling(lambda: None, optimizer=optimizer, precision=precision)() is None
    with pytest.raises(AssertionError, match="scale"):  # the scaler has scaled nothing
        optim.unscaling(lambda: 1.0, optimizer=optimizer, precision=precision)()
