"""Each schedule equals a table computed with NumPy and the published values."""

import numpy as np
import oracles
import pytest

from dino_lightning.config.duration import Duration
from dino_lightning.errors import UserError
from dino_lightning.optim.schedules import Cosine, LinearWarmup

ROUNDING = 1e-12
"""The same formula in another order of operations, in float64."""


def _table(schedule: Cosine | LinearWarmup, total: int) -> np.ndarray:
    return np.array([schedule(step) for step in range(total)])


@pytest.mark.parametrize("warmup", [0, 1, 2, 3, 17, 40])
@pytest.mark.parametrize(("base", "final"), [(1e-3, 1e-6), (0.04, 0.4), (0.996, 1.0), (0.1, 0.1)])
def test_cosine_equals_the_table(base: float, final: float, warmup: int) -> None:
    total = 40
    ours, expected = (
        _table(Cosine(base, final, total, warmup), total),
        oracles.cosine_schedule(base, final, total, warmup),
    )
    assert len(expected) == total
    np.testing.assert_allclose(ours, expected, rtol=ROUNDING, atol=0)


def test_published_values() -> None:
    """Epoch means of the original's log: lr 1e-3 to 1e-6 after 10 epochs, weight decay .04 to .4."""
    total = 100 * 2502
    lr, decay = Cosine(1e-3, 1e-6, total, 10 * 2502), Cosine(0.04, 0.4, total)

    def mean(schedule: Cosine, epoch: int) -> float:
        return float(np.mean([schedule(step) for step in range(epoch * 2502, (epoch + 1) * 2502)]))

    assert mean(lr, 0) == pytest.approx(4.99820136696111e-05, rel=ROUNDING)
    assert mean(lr, 49) == pytest.approx(0.0005958076746498755, rel=ROUNDING)
    assert mean(decay, 0) == pytest.approx(0.04002958960483863, rel=ROUNDING)
    assert mean(decay, 49) == pytest.approx(0.2171716692678112, rel=ROUNDING)


def test_end_points_of_the_learning_rate() -> None:
    lr = Cosine(1e-3, 1e-6, 100, 10)
    assert lr(0) == 0.0
    assert lr(9) == lr(10) == 1e-3
    assert lr(8) < 1e-3
    assert lr(11) < 1e-3
    assert lr(99) > 1e-6
    assert lr(100) == 1e-6


def test_momentum_never_reaches_one() -> None:
    momentum = Cosine(0.996, 1.0, 250_200)
    assert momentum(0) == 0.996
    assert 0.99999 < momentum(250_199) < 1.0


def test_warm_up_of_zero_and_one_steps() -> None:
    assert Cosine(1e-3, 1e-6, 10, 0)(0) == 1e-3
    one = Cosine(1e-3, 1e-6, 10, 1)
    assert (one(0), one(1)) == (0.0, 1e-3)


def test_warm_up_over_the_whole_run() -> None:
    schedule = Cosine(1e-3, 1e-6, 10, 10)
    assert (schedule(0), schedule(9)) == (0.0, 1e-3)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 3, 5])
def test_temperature_changes_once_an_epoch(warmup_epochs: int) -> None:
    duration = Duration.parse(f"{warmup_epochs}ep", key="t")
    ours = LinearWarmup.over(duration, start=0.04, final=0.07, steps_per_epoch=6, total_steps=30)
    expected = oracles.temperature_schedule(0.04, 0.07, warmup_epochs=warmup_epochs, epochs=5, per_epoch=6)
    np.testing.assert_allclose(_table(ours, 30), expected, rtol=ROUNDING)
    assert (np.ptp(_table(ours, 30).reshape(5, 6), axis=1) == 0).all()


@pytest.mark.parametrize(("text", "steps"), [("7it", 7), ("25%", 8), ("1.5ep", 9)])
def test_temperature_changes_every_step_in_other_units(text: str, steps: int) -> None:
    ours = LinearWarmup.over(Duration.parse(text, key="t"), start=0.04, final=0.07, steps_per_epoch=6, total_steps=30)
    expected = np.concatenate([np.linspace(0.04, 0.07, steps), np.full(30 - steps, 0.07)])
    np.testing.assert_allclose(_table(ours, 30), expected, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10ep", 1000),
        ("0ep", 0),
        ("0.5ep", 50),
        ("500it", 500),
        ("10%", 200),
        ("2.5%", 50),
        ("100%", 2000),
        (" 3 ep ", 300),
    ],
)
def test_durations_in_steps(text: str, steps: int) -> None:
    assert Duration.parse(text, key="k").steps(steps_per_epoch=100, total_steps=2000) == steps


@pytest.mark.parametrize("text", ["10", "ten epochs", "10 epochs", "-1ep", "1e3it", "", "ep", "101%", "2.5it", "10EP"])
def test_errors_name_the_key_and_the_value(text: str) -> None:
    with pytest.raises(UserError, match="optim.lr_warmup") as caught:
        Duration.parse(text, key="optim.lr_warmup")
    assert f"={text}" in str(caught.value)


def test_percentages_scale_with_the_run_and_epochs_with_the_batch() -> None:
    """A change of batch size changes the steps of an epoch, and with them every schedule."""
    ten_epochs, ten_percent = Duration.parse("10ep", key="k"), Duration.parse("10%", key="k")
    for per_epoch in (50, 100):
        assert ten_epochs.steps(steps_per_epoch=per_epoch, total_steps=100 * per_epoch) == 10 * per_epoch
        assert ten_percent.steps(steps_per_epoch=per_epoch, total_steps=40 * per_epoch) == 4 * per_epoch
