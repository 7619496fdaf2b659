"""The teacher is a moving average of parameters, factor by factor, and of no buffers."""

from typing import Any

import oracles
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.models.heads import DINOHead, Prototypes
from dino_lightning.optim.ema import ema_update, follow


def _network(*, batch_norm: bool = True) -> nn.Module:
    network = DINOHead(6, out_dim=9, hidden_dim=7, bottleneck_dim=4, batch_norm=batch_norm, train_norm=True).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network


def _copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
def test_averages_every_parameter(momentum: float) -> None:
    teacher, student = _network(), _network()
    before, now = (_copies(dict(network.named_parameters())) for network in (teacher, student))
    ema_update(teacher, student, momentum=momentum)
    for name, parameter in teacher.named_parameters():
        expected = [
            momentum * t + (1 - momentum) * s
            for t, s in zip(before[name].flatten().tolist(), now[name].flatten().tolist(), strict=True)
        ]
        torch.testing.assert_close(parameter.flatten().tolist(), expected, rtol=1e-12, atol=1e-14)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, now[name])


def test_a_teacher_equal_to_its_student_stays_equal_in_float32() -> None:
    """momentum * t + (1 - momentum) * t is not t: in float32 the factors do not sum to 1."""
    teacher, student = _network().float(), _network().float()
    teacher.load_state_dict(student.state_dict())
    for momentum in (0.996, 0.9999, 0.99999):
        for _ in range(20):
            ema_update(teacher, student, momentum=momentum)
    assert all(torch.equal(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_small_steps_add_up(dtype: torch.dtype) -> None:
    """As the closed form: the distance shrinks by momentum ** steps."""
    teacher, student = nn.Linear(5, 5, dtype=dtype), nn.Linear(5, 5, dtype=dtype)
    start, goal = (network.weight.detach().double().clone() for network in (teacher, student))
    for _ in range(2000):
        ema_update(teacher, student, momentum=0.9999)
    expected = goal + (start - goal) * 0.9999**2000
    # Each of the steps rounds by up to half a unit in the last place: 2000 of them, mostly against each other.
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(teacher.weight.detach().double(), expected, rtol=0, atol=tolerance)


def test_the_number_of_kernels_does_not_depend_on_the_number_of_tensors() -> None:
    asked: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    teacher, student = _network(), _network()
    with Operations():
        ema_update(teacher, student, momentum=0.9)
    assert len(asked) == 1


def test_never_averages_buffers() -> None:
    """Batch-norm statistics of the teacher come from its own forward passes."""
    teacher, student = _network(), _network()
    student(torch.randn(8, 6).double() * 3 + 5)
    before = _copies(dict(teacher.named_buffers()))
    assert before
    assert any(not torch.equal(before[name], buffer) for name, buffer in student.named_buffers())
    ema_update(teacher, student, momentum=0.5)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name])


def test_the_factors_of_the_prototypes_are_averaged_not_their_product() -> None:
    teacher, student = (Prototypes(4, 9, train_norm=True).double() for _ in range(2))
    with torch.no_grad():
        for layer in (teacher, student):
            layer.weight_g.uniform_(0.5, 2)

    def composed(layer: Prototypes) -> torch.Tensor:
        return oracles.prototypes(layer.weight_g, layer.weight_v).detach()

    average_of_products = (composed(teacher) + composed(student)) / 2
    g, v = ((getattr(teacher, name) + getattr(student, name)).detach() / 2 for name in ("weight_g", "weight_v"))
    product_of_averages = oracles.prototypes(g, v)
    ema_update(teacher, student, momentum=0.5)
    torch.testing.assert_close(composed(teacher), product_of_averages, rtol=1e-12, atol=1e-14)
    assert (product_of_averages - average_of_products).norm() / average_of_products.norm() > 0.1


def test_leaves_no_graph_and_no_gradient() -> None:
    student, teacher = _network(), _network()
    follow(teacher, student)
    ema_update(teacher, student, momentum=0.9)
    assert all(parameter.grad_fn is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_teacher_starts_as_a_copy_of_the_student() -> None:
    student, teacher = _network(), _network()
    student(torch.randn(8, 6).double() + 5)  # batch-norm statistics unlike the initial ones
    assert follow(teacher, student) is teacher
    ours, theirs = teacher.state_dict(), student.state_dict()
    assert any("running_mean" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
    pointers = {tensor.data_ptr() for tensor in theirs.values()}
    assert not pointers & {tensor.data_ptr() for tensor in ours.values()}
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(next(teacher.parameters()), next(student.parameters()))


def test_a_network_cannot_follow_itself() -> None:
    network = _network()
    with pytest.raises(ValueError, match="same object"):
        follow(network, network)


def test_networks_of_different_shapes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="mlp"):
        follow(_network(batch_norm=False), _network(batch_norm=True))
