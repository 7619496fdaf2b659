"""The projection head: its names, its initial values, and what it computes."""

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dino_lightning.models.heads import DINOHead, Prototypes


def _prototypes(*, train_norm: bool = True) -> Prototypes:
    layer = Prototypes(6, 11, train_norm=train_norm).double()
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2)
    return layer


def test_prototypes_are_normalised_row_by_row() -> None:
    layer, x = _prototypes(), torch.randn(4, 6, dtype=torch.float64)
    expected = x @ oracles.prototypes(layer.weight_g, layer.weight_v).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_prototypes_equal_torch_weight_norm() -> None:
    """Values and all three gradients of `parametrizations.weight_norm`, which has other names for the two factors."""
    ours, x, direction = _prototypes(), torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 11).double()
    theirs = weight_norm(nn.Linear(6, 11, bias=False).double())
    factors = theirs.parametrizations.weight
    with torch.no_grad():
        factors.original0.copy_(ours.weight_g)
        factors.original1.copy_(ours.weight_v)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-13, atol=1e-13)
    ours_grad = torch.autograd.grad((ours(x) * direction).sum(), [x, ours.weight_g, ours.weight_v])
    theirs_grad = torch.autograd.grad((theirs(x) * direction).sum(), [x, factors.original0, factors.original1])
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradient_of_the_prototypes_is_the_derivative() -> None:
    layer, x = _prototypes(), torch.randn(3, 6).double()

    def forward(g: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_g": g, "weight_v": v}, (x,))

    assert torch.autograd.gradcheck(forward, (layer.weight_g, layer.weight_v))


def test_names_are_those_of_published_checkpoints() -> None:
    head = DINOHead(10, out_dim=12, hidden_dim=8, bottleneck_dim=5)
    shapes = {name: tuple(weight.shape) for name, weight in head.state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (8, 10),
        "mlp.0.bias": (8,),
        "mlp.2.weight": (8, 8),
        "mlp.2.bias": (8,),
        "mlp.4.weight": (5, 8),
        "mlp.4.bias": (5,),
        "last_layer.weight_g": (12, 1),
        "last_layer.weight_v": (12, 5),
    }


def test_one_layer_is_a_bare_linear() -> None:
    head = DINOHead(10, out_dim=12, layers=1, hidden_dim=8, bottleneck_dim=5)
    assert [name for name in head.state_dict() if "mlp" in name] == ["mlp.weight", "mlp.bias"]
    assert head.mlp.weight.shape == (5, 10)
    assert head(torch.randn(2, 10)).shape == (2, 12)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_batch_norm_is_between_linear_and_gelu(layers: int) -> None:
    head = DINOHead(10, out_dim=12, layers=layers, hidden_dim=8, bottleneck_dim=5, batch_norm=True)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert [type(module) for module in head.mlp] == hidden * (layers - 1) + [nn.Linear]
    plain = DINOHead(10, out_dim=12, layers=layers, hidden_dim=8, bottleneck_dim=5)
    assert [type(module) for module in plain.mlp] == [nn.Linear, nn.GELU] * (layers - 1) + [nn.Linear]


def test_forward_equals_the_oracle() -> None:
    head = DINOHead(10, out_dim=12, hidden_dim=8, bottleneck_dim=5).double()
    _spread(head)
    x = torch.randn(6, 10, dtype=torch.float64)
    torch.testing.assert_close(head(x), oracles.head(head.state_dict(), x), rtol=1e-12, atol=1e-12)


def test_logits_are_cosines_times_the_norm() -> None:
    """The L2 norm before the last layer: the scale of its input does not matter, and |logit| is at most the norm."""
    head = DINOHead(10, out_dim=200, hidden_dim=8, bottleneck_dim=3).double()
    _spread(head)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    bottleneck: list[Tensor] = []
    head.last_layer.register_forward_pre_hook(lambda _, inputs: bottleneck.append(inputs[0]))
    logits = head(torch.randn(500, 10, dtype=torch.float64) * 100)
    torch.testing.assert_close(bottleneck[0].norm(dim=1), torch.ones(500, dtype=torch.float64))
    bound = head.last_layer.weight_g.detach().T
    assert (logits.abs() <= bound * (1 + 1e-12)).all()
    assert (logits.abs() / bound).max() > 0.95


def test_initial_values() -> None:
    """MLP: normal of std .02 cut at 2, zero bias. Prototypes: nn.Linear's own, uniform of std 1 / sqrt(3 * 256)."""
    head = DINOHead(384, out_dim=2048, hidden_dim=1024, bottleneck_dim=256)
    linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert linear.weight.abs().max() > 0.06  # a normal, not a uniform of the same std (at most .035)
        assert not linear.bias.any()
    v = head.last_layer.weight_v
    assert v.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.01)
    assert v.abs().max().item() == pytest.approx(1 / 16, rel=1e-3)
    assert torch.equal(head.last_layer.weight_g, torch.ones(2048, 1))


@pytest.mark.parametrize("train_norm", [False, True])
def test_the_norm_is_trained_only_on_request(train_norm: bool) -> None:
    head = DINOHead(10, out_dim=12, hidden_dim=8, bottleneck_dim=5, train_norm=train_norm)
    head(torch.randn(3, 10)).sum().backward()
    assert head.last_layer.weight_g.requires_grad is train_norm
    assert (head.last_layer.weight_g.grad is not None) is train_norm
    assert head.last_layer.weight_v.grad is not None


def _spread(module: nn.Module) -> None:
    """Weights of order 1, so that a wrong term would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 2)
