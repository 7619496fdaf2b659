"""Weight decay groups, clipping per tensor, the frozen last layer, and the optimizers."""

import math
from collections import Counter
from typing import Any

import oracles
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.config import AdamWConfig, LARSConfig, OptimConfig, SGDConfig, ViTConfig
from dino_lightning.methods.base import MultiCropNetwork
from dino_lightning.models.heads import DINOHead
from dino_lightning.models.vit import OriginalViT
from dino_lightning.optim import optimizers as optim
from dino_lightning.optim.lars import LARS
from dino_lightning.optim.optimizers import (
    build_optimizer,
    clip_each_gradient,
    drop_last_layer_gradients,
    parameter_groups,
    scale_each,
)

EXACT = {"rtol": 1e-12, "atol": 1e-14}


def _network(*, train_norm: bool = True) -> MultiCropNetwork:
    config = ViTConfig(width=16, depth=1, heads=2, patch_size=8)
    vit = OriginalViT(config, image_size=16, drop_path_rate=0.0)
    return MultiCropNetwork(
        vit, DINOHead(16, out_dim=9, hidden_dim=7, bottleneck_dim=4, train_norm=train_norm)
    ).double()


def _with_gradients(network: nn.Module, *, scale: float = 1.0) -> nn.Module:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * scale
    return network


def _names(network: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in chosen}


def test_only_biases_and_vectors_are_exempt_from_weight_decay() -> None:
    network = _network()
    decayed, exempt = parameter_groups(network)
    assert _names(network, decayed) == {
        "backbone.cls_token",
        "backbone.pos_embed",
        "backbone.patch_embed.proj.weight",
        "backbone.blocks.0.attn.qkv.weight",
        "backbone.blocks.0.attn.proj.weight",
        "backbone.blocks.0.mlp.fc1.weight",
        "backbone.blocks.0.mlp.fc2.weight",
        "head.mlp.0.weight",
        "head.mlp.2.weight",
        "head.mlp.4.weight",
        "head.last_layer.weight_g",
        "head.last_layer.weight_v",
    }
    others = {name for name, _ in network.named_parameters()} - _names(network, decayed)
    assert _names(network, exempt) == others
    assert all(name.endswith("bias") or "norm" in name for name in others)
    assert exempt["weight_decay"] == 0
    assert "weight_decay" not in decayed


def test_a_two_dimensional_bias_is_exempt_too() -> None:
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.register_parameter("bias", nn.Parameter(torch.ones(2, 2)))
    assert [len(group["params"]) for group in parameter_groups(module)] == [0, 1]


def test_parameters_that_are_not_trained_are_in_no_group() -> None:
    network = _network(train_norm=False)
    names = set().union(*(_names(network, group) for group in parameter_groups(network)))
    assert {name for name, _ in network.named_parameters()} - names == {"head.last_layer.weight_g"}


def test_clips_tensor_by_tensor() -> None:
    network = _with_gradients(_network())
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    raw = [parameter.grad.clone() for parameter in parameters]
    expected = oracles.clip_each(raw, max_norm=3.0)
    clip_each_gradient(network.parameters(), max_norm=3.0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **EXACT)
    clipped = [not torch.equal(a, b.grad) for a, b in zip(raw, parameters, strict=True)]
    assert any(clipped)
    assert not all(clipped)
    for parameter, gradient in zip(parameters, raw, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, 3.0)  # one norm over all tensors, so it scales all of them
    ratios = [math.sqrt((p.grad**2).sum() / (e**2).sum()) for p, e in zip(parameters, expected, strict=True)]
    assert max(ratios) < 0.8


def test_clipping_with_one_kernel_equals_clipping_with_many() -> None:
    shapes = [(3,), (200, 100), (4, 5), (1,), (1 << 14,), (7, 2, 2), (300, 60)]
    tensors = [torch.randn(shape) for shape in shapes] + [
        torch.randn(6, 4).t()
    ]  # the last one has another memory layout
    factors = torch.rand(len(tensors))
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    for fuse_small in (False, True):
        scaled = [tensor.clone() for tensor in tensors]
        scale_each(scaled, factors, fuse_small=fuse_small)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(scaled, expected, strict=True))


def test_clipping_divides_by_the_norm_plus_a_millionth() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([3e-6, 4e-6], dtype=torch.float64)
    clip_each_gradient([parameter], max_norm=1e-6)
    torch.testing.assert_close(parameter.grad.norm().item(), 1e-6 * 5e-6 / 6e-6, rtol=1e-9, atol=0)


def test_clipping_skips_missing_gradients() -> None:
    network = _network()
    clip_each_gradient(network.parameters(), max_norm=1.0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_frozen_last_layer_has_no_adam_state_and_starts_at_step_one() -> None:
    network = _network()
    groups = parameter_groups(network)
    groups[0]["weight_decay"] = 0.4
    adamw = build_optimizer(AdamWConfig(), groups)
    for group in adamw.param_groups:
        group["lr"] = 1e-2
    last = list(network.head.last_layer.parameters())
    start = [parameter.detach().clone() for parameter in last]
    for frozen in (True, True, True, False):
        _with_gradients(network)
        if frozen:
            drop_last_layer_gradients(network)
        adamw.step()
        if frozen:
            assert all(parameter not in adamw.state for parameter in last)
            assert all(torch.equal(a, b) for a, b in zip(last, start, strict=True))  # no weight decay either
    assert all(adamw.state[parameter]["step"] == 1 for parameter in last)
    assert adamw.state[network.head.mlp[0].weight]["step"] == 4
    for parameter, before in zip(last, start, strict=True):
        expected = oracles.AdamW().step(before, parameter.grad, lr=1e-2, weight_decay=0.4)
        torch.testing.assert_close(parameter.detach(), expected, **EXACT)


def test_lars_equals_a_loop() -> None:
    shapes = [(4, 3), (3, 1), (5,), (2, 3, 2, 2)]
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)))  # of norm 0: its trust ratio is 1
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    exempt = [parameter for parameter in parameters if parameter.ndim == 1]
    lars = LARS([{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.1}], lr=0.0)
    rows = [_rows(parameter.detach()) for parameter in parameters]
    speed = [[[0.0 for _ in row] for row in weight] for weight in rows]
    for step in range(5):
        options = {"lr": 0.1 * (step + 1), "weight_decay": 0.1, "momentum": 0.9, "trust_coefficient": 0.001}
        for group in lars.param_groups:
            group["lr"] = options["lr"]
        _with_gradients(nn.ParameterList(parameters))
        for i, parameter in enumerate(parameters):
            gradient, matrix = _rows(parameter.grad), parameter.ndim > 1
            rows[i], speed[i] = oracles.lars_step(rows[i], gradient, speed[i], matrix=matrix, **options)
        lars.step()
        for parameter, expected in zip(parameters, rows, strict=True):
            torch.testing.assert_close(_rows(parameter.detach()), expected, **EXACT)


def _rows(tensor: torch.Tensor) -> list[list[float]]:
    return tensor.flatten(1).tolist() if tensor.ndim > 1 else [tensor.tolist()]


def test_lars_evaluates_its_closure_and_skips_parameters_without_a_gradient() -> None:
    trained, other = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    lars = LARS([{"params": [trained, other]}], lr=1.0)

    def closure() -> torch.Tensor:
        loss = (trained**2).sum()
        loss.backward()
        return loss

    assert lars.step(closure).item() == 4.0
    assert not torch.equal(trained, torch.ones(2, 2))
    assert torch.equal(other, torch.ones(2, 2))
    assert other not in lars.state


@pytest.mark.parametrize(
    ("config", "kind", "defaults"),
    [
        (AdamWConfig(betas=[0.8, 0.95]), torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-8}),
        (SGDConfig(momentum=0.8), torch.optim.SGD, {"momentum": 0.8, "nesterov": False, "dampening": 0}),
        (LARSConfig(momentum=0.8, trust_coefficient=0.02), LARS, {"momentum": 0.8, "trust_coefficient": 0.02}),
    ],
)
def test_the_configured_optimizer(config: OptimConfig, kind: type, defaults: dict) -> None:
    optimizer = build_optimizer(config, parameter_groups(_network()))
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {name: group[name] for name in defaults} == defaults
    assert optimizer.param_groups[1]["weight_decay"] == 0


# ------------------------------------------------------------------------------------------------------------ kernels


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


CONFIGS: dict[str, OptimConfig] = {"adamw": AdamWConfig(), "sgd": SGDConfig(), "lars": LARSConfig()}


def _parameters(count: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(3, 2, dtype=dtype)) for _ in range(count)]


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    _with_gradients(nn.ParameterList(parameters))
    clip_each_gradient(parameters, max_norm=1.0)
    optimizer.step()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_a_constant_number_of_operations_and_reads_no_values(name: str) -> None:
    seen = []
    for count in (2, 40):
        parameters = _parameters(count)
        optimizer = build_optimizer(CONFIGS[name], [{"params": parameters}])
        _step(optimizer, parameters)  # creates the state
        with Operations() as operations:
            _with_gradients(nn.ParameterList(parameters))
            before = operations.seen.total()
            clip_each_gradient(parameters, max_norm=1.0)
            optimizer.step()
        assert "_local_scalar_dense" not in operations.seen
        seen.append(operations.seen.total() - before)
    assert seen[0] == seen[1] < 40


@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)]
)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_devices_and_types_with_fused_optimizers(name: str, dtype: torch.dtype, fused: bool) -> None:
    parameters = _parameters(2, dtype)
    optimizer = build_optimizer(CONFIGS[name], [{"params": parameters}])
    _step(optimizer, parameters)
    (group,) = optimizer.param_groups
    assert (group["fused"], group["foreach"]) == (fused, not fused)


def test_other_devices_use_foreach() -> None:
    (group,) = build_optimizer(AdamWConfig(), [{"params": [nn.Parameter(torch.empty(2, device="meta"))]}]).param_groups
    assert (group["fused"], group["foreach"]) == (False, True)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "foreach"])
def test_adamw_equals_the_equation(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "FUSED_DEVICES", devices)
    parameters = _parameters(3, torch.float64)
    groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = build_optimizer(AdamWConfig(betas=[0.8, 0.95]), groups)
    expected, moments = [p.detach().clone() for p in parameters], [oracles.AdamW(0.8, 0.95) for _ in parameters]
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (step + 1)
        _with_gradients(nn.ParameterList(parameters))
        for i, (parameter, adam) in enumerate(zip(parameters, moments, strict=True)):
            decay = 0.3 if i < 2 else 0.0
            expected[i] = adam.step(expected[i], parameter.grad, lr=0.1 * (step + 1), weight_decay=decay)
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, **EXACT)


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "foreach"])
def test_sgd_equals_the_equation_also_for_unfrozen_parameters(
    devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "FUSED_DEVICES", devices)
    parameters = _parameters(3, torch.float64)
    optimizer = build_optimizer(SGDConfig(momentum=0.7), [{"params": parameters, "weight_decay": 0.2}])
    optimizer.param_groups[0]["lr"] = 0.1
    expected = [parameter.detach().clone() for parameter in parameters]
    speed = [torch.zeros_like(weight) for weight in expected]
    for step in range(5):
        _with_gradients(nn.ParameterList(parameters))
        parameters[0].grad = None if step < 2 else parameters[0].grad
        for i, parameter in enumerate(parameters):
            if parameter.grad is not None:
                speed[i] = 0.7 * speed[i] + parameter.grad + 0.2 * expected[i]
                expected[i] = expected[i] - 0.1 * speed[i]
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, **EXACT)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("written_with", [("cpu",), ()], ids=["fused", "foreach"])
def test_resuming_from_a_checkpoint_of_other_kernels(
    name: str, written_with: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = () if written_with else ("cpu",)
    weights, gradients = _parameters(3, torch.float64), [_parameters(3, torch.float64) for _ in range(4)]

    def run(devices: list[tuple[str, ...]]) -> list[nn.Parameter]:
        parameters = [nn.Parameter(weight.detach().clone()) for weight in weights]
        state = None
        for kernels, some in zip(devices, (gradients[:2], gradients[2:]), strict=True):
            monkeypatch.setattr(optim, "FUSED_DEVICES", kernels)
            optimizer = build_optimizer(CONFIGS[name], [{"params": parameters}])
            if state is not None:
                optimizer.load_state_dict(state)
            if name != "lars":
                assert optimizer.param_groups[0]["fused"] is bool(kernels)
            for of_all in some:
                for parameter, gradient in zip(parameters, of_all, strict=True):
                    parameter.grad = gradient.detach().clone()
                optimizer.param_groups[0]["lr"] = 0.1
                optimizer.step()
            state = optimizer.state_dict()
        return parameters

    for ours, expected in zip(run([written_with, here]), run([here, here]), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_lars_ignores_matrices_that_do_not_change() -> None:
    still = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    still.grad = torch.zeros_like(still)
    LARS([{"params": [still], "weight_decay": 0.0}], lr=1.0).step()
    assert torch.equal(still, torch.ones(2, 2, dtype=torch.float64))  # not 0 / 0
