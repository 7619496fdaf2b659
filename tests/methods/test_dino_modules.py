"""The parts of DINO that its configuration chooses: loss and gradient of each against the equations, in float64."""

from collections.abc import Callable
from typing import Any

import oracles
import oracles_methods
import pytest
import tiny
import torch
from oracles import Weights
from oracles_methods import part
from torch import Tensor

from dino_lightning.config import ComputeConfig, DINOConfig
from dino_lightning.methods.dino_modules import dino_predictor
from dino_lightning.models.heads import DINOHead

TAU_S, TAU_T = 0.1, 0.07
EXACT = {"rtol": 1e-8, "atol": 1e-11}
PARTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "sinkhorn": {"centering": "sinkhorn"},
    "sinkhorn, one iteration": {"centering": "sinkhorn", "sinkhorn_iterations": 1},
    "softmax": {"centering": "softmax"},
    "no center": {"centering": "none"},
    "mse": {"loss": "mse"},
    "mse, no center": {"loss": "mse", "centering": "none"},
    "predictor": {"predictor": True},
    "predictor, batch norm": {"predictor": True, "head_batch_norm": True},
    "predictor, relu": {"predictor": True, "head_activation": "relu"},
    "no L2": {"head_l2_bottleneck": False},
    "relu": {"head_activation": "relu"},
    "batch norm": {"head_batch_norm": True},
    "1 layer": {"head_layers": 1},
    "2 layers": {"head_layers": 2},
    "4 layers": {"head_layers": 4},
    "trained norms": {"norm_last_layer": False},
    "koleo": {"koleo_weight": 0.1},
}


def head_logits(weights: Weights, x_BD: Tensor, config: Any, *, predictor: Weights | None = None) -> Tensor:
    """Of all crops together, as batch norms see them."""
    activation: Callable[[Tensor], Tensor] = {"gelu": oracles.gelu, "relu": torch.relu}[config.head_activation]
    layers = part(weights, "mlp")
    if config.head_layers == 1:  # a bare linear layer
        layers = {f"0.{name}": value for name, value in layers.items()}
    x = oracles_methods.mlp(layers, x_BD, activation=activation)
    x = oracles_methods.mlp(predictor, x, activation=activation) if predictor else x
    x = oracles_methods.unit(x) if config.head_l2_bottleneck else x
    return x @ oracles.prototypes(weights["last_layer.weight_g"], weights["last_layer.weight_v"]).T


def expected_loss(state: Weights, crops: list[Tensor], config: Any, center_K: Tensor) -> Tensor:
    B, student, teacher = len(crops[0]), part(state, "student"), part(state, "teacher")
    features_SD = torch.cat([oracles_methods.crop_features(student, crop) for crop in crops])
    logits_SK = head_logits(part(student, "head"), features_SD, config, predictor=part(state, "predictor"))
    logits_VBK = logits_SK.unflatten(0, (-1, B))
    seen_SD = torch.cat([oracles_methods.crop_features(teacher, crop) for crop in crops[:2]])
    teacher_SK = head_logits(part(teacher, "head"), seen_SD, config).detach()
    center_K = torch.zeros_like(center_K) if config.centering == "none" else center_K
    if config.loss == "mse":
        loss = oracles_methods.byol_loss(logits_VBK, (teacher_SK - center_K).unflatten(0, (2, B))) / 2
    elif config.centering == "sinkhorn":
        target_SK = oracles_methods.sinkhorn(teacher_SK, epsilon=TAU_T, iterations=config.sinkhorn_iterations)
        loss = oracles_methods.pairs_entropy(logits_VBK, target_SK.unflatten(0, (2, B)), temperature=TAU_S)
    elif config.centering == "softmax":
        target_SK = oracles_methods.softmax_over_batch(teacher_SK, temperature=TAU_T)
        loss = oracles_methods.pairs_entropy(logits_VBK, target_SK.unflatten(0, (2, B)), temperature=TAU_S)
    else:
        views = teacher_SK.unflatten(0, (2, B))
        loss = oracles.dino_loss(logits_VBK, views, tau_s=TAU_S, tau_t=TAU_T, center_K=center_K)
    if config.koleo_weight:
        loss = loss + config.koleo_weight * sum(oracles_methods.koleo(features_SD[i * B : (i + 1) * B]) for i in (0, 1))
    return loss


def at_work(step: ComputeConfig | None = None, **method: Any) -> Any:
    """A DINO as in the middle of a run, without a trainer."""
    module = tiny.dino(compute=step, **method).double()
    module.schedules = {"teacher_temperature": lambda step: TAU_T}
    if module.config.centering == "center":
        module.center.center += 0.2 * torch.randn_like(module.center.center)
    return module


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", list(PARTS))
@pytest.mark.slow_after_first(24)
def test_loss_and_gradient(name: str, fused: bool) -> None:
    module, (crops,) = at_work(ComputeConfig(fused=fused), **PARTS[name]), tiny.batches(1)
    own = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
    leaves = {key: value.detach().clone().requires_grad_() for key, value in own.items()}
    state = {**tiny.copy(module), **leaves}
    ours = module.loss(crops)
    expected = expected_loss(state, crops, module.config, state.get("center.center", torch.zeros(1, tiny.K))[0])
    loose = {"rtol": 1e-6, "atol": 1e-8} if module.config.koleo_weight else EXACT  # for its small numbers
    torch.testing.assert_close(ours, expected, **loose)
    gradients = torch.autograd.grad(ours, list(own.values()))
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    for key, gradient, other in zip(own, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, **loose, msg=f"gradient of {key}")


def test_the_options_change_the_loss() -> None:
    """No two of them are the same loss of the same network."""
    losses = {}
    for name, changed in PARTS.items():
        torch.manual_seed(5)
        module = at_work(**changed)
        losses[name] = module.loss(tiny.batches(1)[0]).item()
    same_loss_other_gradient = {"trained norms"}
    distinct = {round(loss, 9) for name, loss in losses.items() if name not in same_loss_other_gradient}
    # One iteration of Sinkhorn-Knopp is the softmax over the batch.
    assert len(distinct) == len(losses) - len(same_loss_other_gradient) - 1
    assert losses["softmax"] == pytest.approx(losses["sinkhorn, one iteration"], rel=1e-12)


@pytest.mark.parametrize(("batch_norm", "activation"), [(True, "relu"), (False, "gelu")])
def test_the_predictor_has_two_layers_at_the_bottleneck(batch_norm: bool, activation: str) -> None:
    module = tiny.dino(predictor=True, head_batch_norm=batch_norm, head_activation=activation)
    predictor = dino_predictor(module.config)
    assert predictor is not None
    names = [type(layer).__name__ for layer in predictor]  # type: ignore[arg-type,union-attr]
    assert names == ["Linear", *["BatchNorm1d"] * batch_norm, {"relu": "ReLU", "gelu": "GELU"}[activation], "Linear"]
    assert (predictor[0].in_features, predictor[-1].out_features) == (8, 8)  # type: ignore[index]
    assert dino_predictor(tiny.dino().config) is None


def test_without_l2_a_larger_bottleneck_gives_larger_logits() -> None:
    head, x = DINOHead(6, out_dim=5, hidden_dim=8, bottleneck_dim=4, normalize=False), torch.randn(3, 6)
    before = head(x)
    with torch.no_grad():
        for parameter in (head.mlp[-1].weight, head.mlp[-1].bias):  # type: ignore[index]
            parameter.mul_(3)
    torch.testing.assert_close(head(x), 3 * before)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax", "none"])
def test_only_the_running_center_is_saved(centering: str) -> None:
    """What others subtract is of one batch."""
    module = tiny.dino(centering=centering)
    tiny.fit(module, tiny.batches(2))
    kept = {name for name in module.state_dict() if name.startswith("center.")}
    assert kept == ({"center.center"} if centering == "none" else set())
    assert bool(module.center.center.any()) == (centering != "none")


def test_the_predictor_is_trained_and_clipped() -> None:
    module = tiny.dino(predictor=True)
    before = tiny.copy(module.predictor)
    tiny.fit(module, tiny.batches(3))
    after = tiny.copy(module.predictor)
    assert all(not torch.equal(before[name].double(), after[name]) for name in before)
    assert module.teacher.state_dict().keys() == module.student.state_dict().keys()


def test_a_fresh_predictor_keeps_images_apart() -> None:
    """Biases of PyTorch's start would put all points of a fresh, small bottleneck into one place."""
    config = DINOConfig(out_dim=8, head_hidden_dim=256, head_bottleneck_dim=64, predictor=True)
    torch.manual_seed(0)
    predictor = dino_predictor(config)
    assert predictor is not None
    small_BD = 1e-3 * torch.randn(16, 64)
    points_BD = torch.nn.functional.normalize(predictor(small_BD), dim=-1)
    assert points_BD.std(dim=0).mean() > 0.5 / 64**0.5
