"""`compute.compile`: a few graphs in the first step, none later, and the same results."""

import pytest
import torch
from slow_params import first
from torch import Tensor
from torch._dynamo.utils import counters

from dino_lightning.config import ComputeConfig, TimmConfig, ViTConfig
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.models.packed_block import compiled_pass
from dino_lightning.models.vit import OriginalViT


def network(step: ComputeConfig, *, rate: float = 0.0, depth: int = 3) -> MultiCropNetwork:
    torch.manual_seed(0)
    vit = OriginalViT(
        ViTConfig(width=32, depth=depth, heads=2, patch_size=8), image_size=32, drop_path_rate=rate
    ).train()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return MultiCropNetwork(vit, torch.nn.Linear(32, 8), compute=step)


def crops(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, side, side, generator=generator) for side in (32, 32, 16, 16, 16)]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def steps(student: MultiCropNetwork, teacher: MultiCropNetwork, count: int) -> tuple[list[Tensor], list[int]]:
    """Features of each step, and how many graphs there were after it."""
    features, made = [], []
    for step in range(count):
        with torch.no_grad():
            target = teacher.features(crops(step)[:2])
        ours = student.features(crops(step))
        student.zero_grad()
        (ours[: len(target)] * target).sum().backward()
        features.append(ours.detach())
        made.append(graphs())
    return features, made


@pytest.mark.parametrize(
    ("rate", "expected", "checkpointed"),
    first([(0.1, 5, True), (0.0, 4, False), (0.0, 4, True), (0.1, 5, False)]),
)
@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_step(rate: float, expected: int, checkpointed: bool) -> None:
    """One graph each for blocks and last block of student and teacher; with stochastic depth, the student's first
    block has its own graph, because it drops nothing.

    Graphs are counted without generating code, which would take long.
    """
    torch.compiler.reset()
    counters.clear()
    how = ComputeConfig(gradient_checkpointing=checkpointed)
    student, teacher = network(how, rate=rate), network(how)
    for each in (student, teacher):
        for block in each.backbone.blocks:  # type: ignore[union-attr]
            block.pass_function = compiled_pass("aot_eager")  # type: ignore[union-attr]
    _, made = steps(student, teacher, 3)
    assert made == [expected] * 3


@pytest.mark.slow
def test_compiled_networks_equal_uncompiled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, twelve blocks: other orders of sums."""
    torch.compiler.reset()
    compiled, plain = (
        [network(ComputeConfig(compile=compile), depth=12) for _ in range(2)] for compile in (True, False)
    )
    ours, made = steps(*compiled, 3)
    expected, _ = steps(*plain, 3)
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    for (name, one), other in zip(compiled[0].named_parameters(), plain[0].parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None
            assert (one.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max(), name
    assert made[0] == made[-1] > 0


@pytest.mark.slow
def test_convolutional_networks_compile_once_for_each_resolution() -> None:
    torch.compiler.reset()
    counters.clear()
    nets = [
        MultiCropNetwork(
            build_backbone(TimmConfig(name="test_resnet"), image_size=32, drop_path=False),
            torch.nn.Linear(8, 8),
            compute=ComputeConfig(compile=True),
        )
        for _ in range(2)
    ]
    _, made = steps(*nets, 3)
    assert made == [3, 3, 3]
