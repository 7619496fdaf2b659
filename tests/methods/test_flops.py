"""Operations of a step: the formula against what PyTorch counts in real networks."""

import time
from typing import cast

import pytest
import torch
from composing import SMALL as SHORT
from composing import composed
from flops import feature_width, head_flops, matrix_rate, model_flops, step_flops
from omegaconf import OmegaConf
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning.config import CropsConfig, DINOConfig, TimmConfig, TrainConfig, ViTConfig
from dino_lightning.methods import flops
from dino_lightning.methods.base import Method
from dino_lightning.methods.flops import backbone_flops
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.training.build import build_method

SMALL = ViTConfig(width=32, depth=2, heads=2, patch_size=8)


def network(config: ViTConfig, *, image_size: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        num_classes=0,
    )


def count(module: nn.Module, x: torch.Tensor, *, backward: bool = False) -> int:
    """Operations that PyTorch counts, with the attention written out so that it sees its products."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward), counter:
        y = module(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("image_size", [32, 48])
def test_forward_of_a_vit(image_size: int):
    counted = count(network(SMALL, image_size=image_size), torch.randn(3, 3, image_size, image_size))
    assert 3 * sum(backbone_flops(SMALL, image_size=image_size).values()) == counted


def test_the_backward_pass_of_a_vit_is_twice_its_forward_pass():
    parts = backbone_flops(SMALL, image_size=32)
    counted = count(network(SMALL, image_size=32), torch.randn(1, 3, 32, 32), backward=True)
    # PyTorch does not compute the gradient of the images, a third of the patch embedding; the convention counts it.
    assert counted == 3 * sum(parts.values()) - parts["patch_embedding"]


def test_parts_of_a_block():
    block = network(SMALL, image_size=32).blocks[0]
    parts, tokens = backbone_flops(SMALL, image_size=32), torch.randn(1, 17, SMALL.width)
    assert count(block.mlp, tokens) * SMALL.depth == parts["mlp"]
    assert count(block.attn, tokens) * SMALL.depth == parts["attention_linear"] + parts["attention"]


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_head(layers: int):
    method = DINOConfig(out_dim=48, head_layers=layers, head_hidden_dim=20, head_bottleneck_dim=12)
    widths = [32, *[20] * (layers - 1), 12]
    mlp = nn.Sequential(*[nn.Linear(widths[i], widths[i + 1]) for i in range(layers)])
    x = torch.randn(1, 32)
    assert head_flops(method, features=32) == {
        "head_mlp": count(mlp, x),
        "prototypes": count(nn.Linear(12, 48, bias=False), mlp(x)),
    }


def test_passes_of_a_step():
    crops, method = CropsConfig(global_size=32, local_size=16, local_count=5), DINOConfig(out_dim=48)
    large, small = (sum(backbone_flops(SMALL, image_size=size).values()) for size in (32, 16))
    head = sum(head_flops(method, features=32).values())
    student, teacher = 2 * (large + head) + 5 * (small + head), 2 * (large + head)
    assert model_flops(SMALL, crops=crops, method=method) == 3 * student + teacher


def method_of(*words: str) -> tuple[Method, TrainConfig]:
    config = cast(
        TrainConfig,
        OmegaConf.to_object(
            composed(*SHORT, "compute=reference", "backbone.drop_path_rate=0", *words, "crops.local_count=4")
        ),
    )
    return build_method(config, num_classes=7).eval(), config


@pytest.mark.parametrize(
    ("words", "student", "teacher"),
    [
        (["method=dino"], [0, 1, 2, 3, 4, 5], [0, 1]),
        (["method=dino", "method.predictor=true"], [0, 1, 2, 3, 4, 5], [0, 1]),
        (["method=byol"], [0, 1, 2, 3, 4, 5], [0, 1]),
        (["method=moco"], [0, 2, 3, 4, 5], [1]),
        (["method=moco", "method.version=3"], [0, 1, 2, 3, 4, 5], [0, 1]),
        (["method=swav"], [0, 1, 2, 3, 4, 5], []),
        (["method=supervised"], [0, 1, 2, 3, 4, 5], []),
        (["backbone=vovnet_micro", "backbone.drop_path_rate=0"], [0, 1, 2, 3, 4, 5], [0, 1]),
    ],
    ids=lambda words: "-".join(map(str, words)),
)
@pytest.mark.slow_after_first(4)
def test_step_of_each_method(words: list[str], student: list[int], teacher: list[int]):
    """The forward passes of the real networks, counted by PyTorch, three times for the student."""
    method, config = method_of(*words)
    sizes = [config.crops.global_size] * 2 + [config.crops.local_size] * config.crops.local_count
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        for size in (sizes[view] for view in student):
            points = method.student.head(method.student.backbone(torch.randn(1, 3, size, size)))
            if method.predictor is not None:  # DINO's is before the prototypes
                inside = hasattr(method.student.head, "last_layer")
                method.predictor(torch.randn(1, config.method.head_bottleneck_dim) if inside else points)  # type: ignore[attr-defined]
        of_student = counter.get_total_flops()
        for size in (sizes[view] for view in teacher):
            assert isinstance(method, StudentTeacher)
            method.teacher.head(method.teacher.backbone(torch.randn(1, 3, size, size)))
    expected = 3 * of_student + (counter.get_total_flops() - of_student)
    assert flops.step_flops(method, backbone=config.backbone, crops=config.crops) == pytest.approx(expected, rel=1e-6)


def test_vit_small_of_the_paper():
    assert model_flops(ViTConfig(), crops=CropsConfig(), method=DINOConfig()) == pytest.approx(114e9, rel=0.005)


@pytest.mark.slow
def test_resnet50():
    config = TimmConfig(name="resnet50")
    flops = [backbone_flops(config, image_size=size)["network"] for size in (224, 96)]
    assert flops[0] == pytest.approx(2 * 4.09e9, rel=0.01)  # as published: 4.09 billion multiply-adds
    assert flops[1] / flops[0] == pytest.approx((96 / 224) ** 2, rel=0.01)
    assert feature_width(config) == 2048
    parts = step_flops(config, crops=CropsConfig(), method=DINOConfig())
    assert parts["network"] == 8 * flops[0] + 24 * flops[1]


@pytest.mark.parametrize("precision", ["32", "tf32", "bf16"])
def test_matrix_rate_restores_the_precision(precision: str):
    torch.set_float32_matmul_precision("medium")
    try:
        assert matrix_rate("cpu", precision=precision, size=64, turns=1) > 0
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_matrix_rate():
    a, best = torch.randn(256, 256), float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    # Far apart, as a busy machine or another library may be, and still in the same unit.
    assert 1e-3 < matrix_rate("cpu", precision="32", size=256) * best / (2 * 256**3) < 1e3
