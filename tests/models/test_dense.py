"""Linear layers with LayerNorm or GELU before them: the numbers of the plain modules, with less kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.models.kernels.dense import VECTORS, dense, gelu_dense, norm_dense

INPUTS, OUTPUTS = 64, 96
ON_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in VECTORS


class Layers(nn.Module):
    """A linear layer and a norm, with weights of order 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(INPUTS, OUTPUTS), nn.LayerNorm(INPUTS, eps=1e-6)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)


FORMS: dict[str, tuple[Callable[[Layers, Tensor], Tensor], Callable[[Layers, Tensor], Tensor]]] = {
    "dense": (lambda m, x: dense(x, m.linear), lambda m, x: m.linear(x)),
    "norm": (lambda m, x: norm_dense(x, m.norm, m.linear), lambda m, x: m.linear(m.norm(x))),
    "gelu": (lambda m, x: gelu_dense(x, m.linear), lambda m, x: m.linear(F.gelu(x))),
}
"""Ours and the plain form."""


def outputs_and_gradients(form: Callable[[Layers, Tensor], Tensor], layers: Layers, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layers.zero_grad()
    y = form(layers, x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("shape", [(640,), (643,), (5,), (4, 40)])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_values_equal_plain_modules(kind: str, shape: tuple[int, ...], dtype: torch.dtype, relative: float) -> None:
    """Relative to the largest entry: sums over up to 643 rows in another order."""
    layers, x = Layers().to(dtype), torch.randn(*shape, INPUTS, dtype=dtype)
    ours, plain = (outputs_and_gradients(form, layers, x) for form in FORMS[kind])
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        assert value.dtype == dtype
        assert (value - plain[name]).abs().max() <= relative * plain[name].abs().max(), name


@pytest.mark.parametrize("kind", FORMS)
def test_autocast_casts_like_in_plain_modules(kind: str) -> None:
    """The same operators on the same bfloat16 numbers: to the bit, but for weight gradients of other orders of sums."""
    layers, x = Layers(), torch.randn(640, INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = (outputs_and_gradients(form, layers, x) for form in FORMS[kind])
    assert ours["y"].dtype == torch.bfloat16
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype
        assert (value - plain[name]).abs().max() <= 2**-8 * plain[name].abs().max(), name


@pytest.mark.parametrize(("kind", "plain_numbers"), [("norm", 2 * INPUTS), ("gelu", 2 * INPUTS)])
def test_the_input_of_the_layer_is_not_saved_for_backward(kind: str, plain_numbers: int) -> None:
    """Numbers kept per row: the input and, in the plain form, what the linear layer sees."""
    rows, counted = 640, []
    for form in FORMS[kind]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() if len(tensor) == rows else 0
            return tensor

        layers, x = Layers(), torch.randn(rows, INPUTS, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            form(layers, x)
        counted.append(sum(kept.values()) / rows)
    statistics = 2 if kind == "norm" else 0
    assert counted[0] == INPUTS + statistics
    assert counted[1] == plain_numbers + statistics


class Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Note and run it."""
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not ON_ONEDNN, reason="needs an x86 processor with AVX2 and a PyTorch with oneDNN")
@pytest.mark.parametrize(
    ("rows", "dtype", "convolved"),
    [(640, torch.float32, True), (641, torch.float32, False), (4, torch.float32, False), (640, torch.float64, False)],
)
def test_float32_goes_to_onednn(rows: int, dtype: torch.dtype, convolved: bool) -> None:
    """Where the rows make a picture and are worth it; 641 is a prime number."""
    layers, threads = Layers().to(dtype), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Operators() as operators:
            outputs_and_gradients(FORMS["dense"][0], layers, torch.randn(rows, INPUTS, dtype=dtype))
    finally:
        torch.set_num_threads(threads)
    assert ({"convolution", "convolution_backward"} <= operators.names) == convolved
    assert ("mm" in operators.names) != convolved


def test_frozen_weights_and_inputs_without_gradient() -> None:
    layers = Layers().requires_grad_(False)
    assert not dense(torch.randn(8, INPUTS), layers.linear).requires_grad
    x = torch.randn(8, INPUTS, requires_grad=True)
    norm_dense(x, layers.norm, layers.linear).sum().backward()
    assert x.grad is not None
    assert layers.linear.weight.grad is None
    layers.requires_grad_(True)
    norm_dense(torch.randn(8, INPUTS), layers.norm, layers.linear).sum().backward()
    assert layers.norm.weight.grad is not None
