"""BYOL: a fit against an independent loop, what its predictor is for, and what it saves."""

import oracles
import pytest
import tiny
import tiny_methods
from method_fits import TOTAL, check_fit

from dino_lightning.config import BYOLConfig


@pytest.mark.parametrize(("accumulated", "views"), [(1, 2), (2, 2), (1, 4)])
@pytest.mark.slow_after_first(1)
def test_a_fit_equals_the_algorithm_of_the_paper(accumulated: int, views: int) -> None:
    momentum = oracles.cosine_schedule(0.9, 1.0, TOTAL)
    check_fit("byol", accumulated=accumulated, views=views, reference={"momentum": momentum})


def test_only_the_student_has_a_predictor() -> None:
    module = tiny_methods.build("byol")
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"student", "teacher", "predictor"}
    assert module.teacher.state_dict().keys() == module.student.state_dict().keys()
    assert tiny_methods.build("byol", predictor=False).predictor is None


def test_projector_and_predictor_of_the_paper() -> None:
    """Linear, batch norm, ReLU, linear: 4096 wide, 256 out."""
    config = BYOLConfig()
    assert (config.head_layers, config.head_hidden_dim, config.out_dim, config.head_batch_norm) == (2, 4096, 256, True)
    module = tiny_methods.build("byol", head_hidden_dim=16, out_dim=8)
    for part, width in ((module.student.head, tiny.BACKBONE.width), (module.predictor, 8)):
        assert [type(layer).__name__ for layer in part] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert [tuple(layer.weight.shape) for layer in part if hasattr(layer, "in_features")] == [(16, width), (8, 16)]


def test_the_student_is_evaluated_and_the_teacher_may_be() -> None:
    module = tiny_methods.build("byol")
    assert module.evaluated is module.student
    assert module.evaluated_key == "student"
    module = tiny_methods.build("byol", evaluate="teacher")
    assert module.evaluated is module.teacher
    assert module.evaluated_key == "teacher"


def test_logged_figures() -> None:
    module, rows = tiny_methods.build("byol"), []
    module.metric_listeners.append(lambda reading: rows.append(reading.values))
    tiny_methods.fit(module, [crops[:2] for crops in tiny.batches(2)], log_every_n_steps=1)
    assert len(rows) == 2
    assert {"schedule/teacher_momentum", "schedule/lr", "collapse/feature_std"} <= rows[0].keys()
