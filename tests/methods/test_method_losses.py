"""Loss and gradient of each method against its paper's equations, in float64."""

from typing import Any

import oracles_methods as oracles
import pytest
import tiny
import tiny_methods
import torch
from torch import Tensor

from dino_lightning.losses.contrastive import info_nce
from dino_lightning.losses.cross_view import cross_view_distance, view_entropy
from dino_lightning.losses.koleo import koleo

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(*shape: int) -> Tensor:
    return oracles.unit(double(*shape)).detach().requires_grad_()


def same_with_gradient(ours: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(ours, expected, **EXACT)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# --------------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize("V", [2, 4])
def test_distance_of_unit_vectors(V: int) -> None:
    predicted, targets = double(V, 5, 6), double(2, 5, 6).detach()
    same_with_gradient(2 * cross_view_distance(predicted, targets), oracles.byol_loss(predicted, targets), predicted)
    assert torch.autograd.gradcheck(lambda x: cross_view_distance(x, targets), predicted)


def test_distance_does_not_depend_on_lengths() -> None:
    predicted, targets = double(2, 5, 6), double(2, 5, 6)
    scaled = cross_view_distance(3 * predicted, 0.1 * targets)
    torch.testing.assert_close(scaled, cross_view_distance(predicted, targets), **EXACT)
    torch.testing.assert_close(cross_view_distance(targets.flip(0), targets), scaled.new_zeros(()), **EXACT)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_with_a_queue(temperature: float) -> None:
    query, keys, queue = unit(4, 6), unit(4, 6).detach(), unit(9, 6).detach()
    ours = info_nce(query, keys, temperature=temperature, negatives_ND=queue)
    same_with_gradient(ours, oracles.info_nce(query, keys, [queue] * 4, temperature=temperature), query)
    assert torch.autograd.gradcheck(lambda x: info_nce(x, keys, temperature=temperature, negatives_ND=queue), query)


@pytest.mark.parametrize("first", [0, 3])
def test_info_nce_within_the_batch_of_all_ranks(first: int) -> None:
    """The queries of one rank against the keys of two: each with the others', those of the other rank included."""
    query, keys = unit(3, 6), unit(6, 6).detach()
    own = slice(first, first + 3)
    expected = oracles.info_nce(query, keys[own], oracles.in_batch(keys)[own], temperature=0.2)
    same_with_gradient(info_nce(query, keys, temperature=0.2, first=first), expected, query)
    assert torch.autograd.gradcheck(lambda x: info_nce(x, keys, temperature=0.2, first=first), query)


def test_entropy_of_given_distributions() -> None:
    logits, targets = double(4, 3, 7), double(2, 3, 7).softmax(dim=-1).detach()
    expected = oracles.pairs_entropy(logits, targets, temperature=0.3)
    same_with_gradient(view_entropy(logits, targets, temperature=0.3), expected, logits)
    assert torch.autograd.gradcheck(lambda x: view_entropy(x, targets, temperature=0.3), logits)


def test_koleo() -> None:
    """Up to the small numbers that keep it finite where two features are equal."""
    features = double(7, 4)
    ours, expected = koleo(features), oracles.koleo(features)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    ((gradient,), (wanted,)) = (torch.autograd.grad(loss, features) for loss in (ours, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradcheck(koleo, features)
    equal = features.detach()[:1].repeat(3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(koleo(equal), equal)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["distance", "info_nce", "in batch"])
def test_mixed_precision_does_not_round_similarities(name: str) -> None:
    """Under autocast a product would be rounded to 8 bits, which a temperature multiplies."""
    one, two, queue = (oracles.unit(torch.randn(16, 32)) for _ in range(3))
    losses: dict[str, Any] = {
        "distance": lambda: cross_view_distance(one.unflatten(0, (2, 8)), two.unflatten(0, (2, 8))),
        "info_nce": lambda: info_nce(one, two, temperature=0.01, negatives_ND=queue),
        "in batch": lambda: info_nce(one, two, temperature=0.01),
    }
    expected = losses[name]()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses[name](), expected)


# ----------------------------------------------------------------------------------------------------------- methods


def parameters(module: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def oracle(name: str, module: Any, **options: Any) -> oracles.Training:
    kinds = {"byol": oracles.BYOL, "moco2": oracles.MoCo, "moco3": oracles.MoCo, "swav": oracles.SwAV}
    options |= {"moco2": {"version": 2}, "moco3": {"version": 3}}.get(name, {})
    nothing: Any = None
    state = {key: value.double() for key, value in tiny.copy(module).items()}
    return kinds[name](state, lr=nothing, weight_decay=nothing, clip=0.0, **options)


def check(name: str, *, views: int = 2, changed: dict[str, Any] | None = None, **options: Any) -> float:
    """Compare loss and gradients with the oracle's; return the loss."""
    module = tiny_methods.build(name, **(changed or {})).double()
    crops = tiny.batches(1)[0][:views]
    own = parameters(module)
    slow = oracle(name, module, **options)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in own.items()}
    ours, expected = module.loss(crops), slow.loss({**slow.state, **leaves}, crops)
    torch.testing.assert_close(ours, expected, **EXACT)
    gradients = torch.autograd.grad(ours, list(own.values()))
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    for key, gradient, other in zip(own, gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-11, msg=f"gradient of {key}")
    assert {key.split(".")[0] for key in own} <= {"student", "predictor"}
    return ours.item()


@pytest.mark.parametrize("views", [2, 4])
def test_byol(views: int) -> None:
    assert 0 < check("byol", views=views) < 8


@pytest.mark.parametrize("changed", [{"predictor": False}, {"head_batch_norm": False}, {"head_layers": 3}], ids=str)
def test_parts_of_byol(changed: dict[str, Any]) -> None:
    check("byol", changed=changed)


def test_moco_2() -> None:
    check("moco2")


def test_moco_3() -> None:
    check("moco3")


def test_swav() -> None:
    check("swav", views=4)
    check("swav", changed={"head_batch_norm": False})


def test_moco_2_takes_the_query_from_the_first_crop_and_the_key_from_the_second() -> None:
    module, (crops,) = tiny_methods.build("moco2").double(), tiny.batches(1)
    seen: dict[str, list[Tensor]] = {}
    for name in ("student", "teacher"):
        backbone = getattr(module, name).backbone
        backbone.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    module.loss(crops[:2])
    assert [torch.equal(crop, expected) for crop, expected in zip(seen["student"], crops[:1], strict=True)] == [True]
    assert [torch.equal(crop, expected) for crop, expected in zip(seen["teacher"], crops[1:2], strict=True)] == [True]


def test_moco_uses_all_local_crops_as_queries() -> None:
    """Every crop but the key's own is a query; the mean over them, both ways."""
    module, (crops,) = tiny_methods.build("moco3", predictor=False, head_batch_norm=False).double(), tiny.batches(1)
    with torch.no_grad():
        embedded_VBE = oracles.unit(module.student(crops).unflatten(0, (4, -1)))
        keys_TBE = oracles.unit(module.teacher(crops[:2]).unflatten(0, (2, -1)))
    terms = [
        oracles.info_nce(embedded_VBE[v], keys_TBE[t], oracles.in_batch(keys_TBE[t]), temperature=0.2)
        for t in range(2)
        for v in range(4)
        if v != t
    ]
    torch.testing.assert_close(module.loss(crops), 0.4 * 2 * torch.stack(terms).mean(), **EXACT)


def test_a_frozen_patch_projection_has_no_gradient() -> None:
    module = tiny_methods.build("moco3", freeze_patch_embedding=True).double()
    module.loss(tiny.batches(1)[0][:2]).backward()
    without = {name for name, p in module.student.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}


@pytest.mark.parametrize("name", ["byol", "moco2", "moco3"])
def test_the_teacher_takes_no_gradient(name: str) -> None:
    module = tiny_methods.build(name).double()
    module.loss(tiny.batches(1)[0][:2]).backward()
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


@pytest.mark.parametrize("name", ["moco2", "moco3", "swav", "byol"])
def test_mixed_precision_is_close_to_float32(name: str) -> None:
    module, crops = tiny_methods.build(name), [crop.float() for crop in tiny.batches(1)[0][:2]]
    with torch.no_grad():
        full = module.loss(crops)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module.loss(crops)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=0.03, atol=0)
