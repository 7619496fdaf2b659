"""The scaling estimate: counts compared with real modules, formulas with small cases computed by hand."""

from pathlib import Path

import pytest
import scaling
import torch
from scaling_bytes import all_reduce, ddp_bytes, fsdp_bytes, numbers, on_paper, slice_numbers, small_bytes, state_bytes
from scaling_bytes import trained as trained_of
from scaling_seconds import Hardware, Step, ddp_seconds, fsdp_seconds, step_on
from slow_params import first
from torch import nn

from dino_lightning.models.backbones import build_backbone


class Small(nn.Module):
    """34 trained weights (10 x 3 and 4) and 10 frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(10, 3)), nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(10, 1), requires_grad=False)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Small(), Small().requires_grad_(False)


@pytest.mark.parametrize("name", first(["vit_small", "vit_base"]))
def test_counts_are_those_of_real_networks(name: str) -> None:
    backbone, paper = on_paper(name)
    real = build_backbone(backbone, image_size=224, drop_path=True)
    D, K, H, Z = backbone.width, 65536, 2048, 256
    assert numbers(paper.student.backbone.parameters()) == sum(weight.numel() for weight in real.parameters())
    head = (D * H + H) + (H * H + H) + (H * Z + Z) + K * Z
    assert numbers(paper.student.head.parameters()) == head + K  # and the norms of the prototypes
    assert numbers(trained_of(paper.student)) == sum(weight.numel() for weight in real.parameters()) + head
    assert not trained_of(paper.teacher)
    assert {weight.device.type for weight in paper.parameters()} == {"meta"}


def test_network_sizes_of_the_paper() -> None:
    """ViT-S has 21 million weights, ViT-B 85 (table 1)."""
    millions = [numbers(on_paper(name)[1].student.backbone.parameters()) // 10**6 for name in ("vit_small", "vit_base")]
    assert millions == [21, 85]


def test_ring() -> None:
    assert all_reduce(100, gpus=1) == 0
    assert all_reduce(100, gpus=2) == 100  # each GPU sends half of it to be added, and half of the sum
    assert all_reduce(100, gpus=4) == 150


def test_ddp() -> None:
    assert ddp_bytes(Small(), gpus=4) == 34 * 4 * 1.5


@pytest.mark.parametrize(
    ("shape", "gpus", "size"),
    [
        ((10, 3), 4, 9),  # slices of 3, 3, 3 and 1 rows
        ((8, 3), 4, 6),
        ((4,), 4, 1),
        ((4,), 8, 1),  # one number for half of the ranks, padding for the others
        ((1, 5, 8), 4, 10),  # split along the last dimension
        ((1, 5, 6), 4, 30),  # not divisible: each rank has the complete row
    ],
)
def test_slices(shape: tuple[int, ...], gpus: int, size: int) -> None:
    assert slice_numbers(nn.Parameter(torch.ones(shape)), gpus=gpus) == size


def test_fsdp() -> None:
    sent = fsdp_bytes(Pair(), gpus=4)  # type: ignore[arg-type]
    all_weights = 3 * 4 * (9 + 1 + 3)  # three other ranks, four bytes; slices of weight, bias and frozen weight
    assert sent == {
        "teacher": all_weights,
        "forward": all_weights,
        "backward": all_weights,
        "gradients": 3 * 4 * 10,
        "norms": 2 * 4 * 1.5,
    }


def test_center_and_loss() -> None:
    assert small_bytes(7, gpus=2, element=8) == {"center": 64, "loss": 32}


def test_state() -> None:
    assert state_bytes(Pair()) == 4 * (44 + 44 + 3 * 34)  # type: ignore[arg-type]
    assert state_bytes(Pair(), slices=4) == 4 * (13 + 13 + 3 * 10)  # type: ignore[arg-type]


def hardware(**changes: float) -> Hardware:
    return Hardware(**{"matrix": 1e12, "memory": 1e12, "nvlink": 1e9, "node": 1e8, "attained": 0.5, **changes})


def test_the_slower_link_decides() -> None:
    assert hardware().seconds(1e9, gpus=8) == 2  # one node, so no network adapter
    assert hardware().seconds(1e9, gpus=16) == 20
    assert hardware(node=1e10).seconds(1e9, gpus=16) == 2


def test_step() -> None:
    backbone, method = on_paper("vit_small")
    step = step_on(hardware(), backbone, method, images=10)
    assert step.backward == pytest.approx(2 * step.forward)
    assert step.teacher + step.forward + step.backward == pytest.approx(10 * 113.83e9 / 1e12, rel=1e-4)
    # A global crop costs the teacher as much as the student, which also processes eight local crops.
    assert 0.5 * step.forward < step.teacher < step.forward
    assert step.update == 13 * 4 * numbers(trained_of(method.student)) / 1e12


def test_communication_overlaps_the_backward_pass() -> None:
    _, method = on_paper("vit_small")
    for gpus in (8, 16):
        way, _ = ddp_seconds(hardware(), Step(0, 0, 0, 0), method, gpus=gpus)
        buckets = 7  # 176 MB in buckets of 25 MiB
        for backward, exposed in ((0.0, way), (way, way / buckets), (way / 2, way / 2), (100 * way, way / buckets)):
            _, estimate = ddp_seconds(hardware(), Step(0, 0, backward, 0), method, gpus=gpus)
            assert estimate == pytest.approx(exposed)


def test_fsdp_overlaps_each_pass() -> None:
    backbone, method = on_paper("vit_small")
    way, everything = fsdp_seconds(hardware(), Step(0, 0, 0, 0), backbone, method, gpus=8)
    first = way / (backbone.depth + 2)
    assert everything == pytest.approx(way + first)
    _, estimate = fsdp_seconds(hardware(), Step(way, way, way, 0), backbone, method, gpus=8)
    assert estimate == pytest.approx(first)
    _, estimate = fsdp_seconds(hardware(), Step(0, way, way, 0), backbone, method, gpus=8)
    assert estimate == pytest.approx(first + way / 4, rel=1e-2)  # one of four transfers: the teacher's


@pytest.mark.slow
def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py", "--loader", "40"])
    scaling.main()
    text = capsys.readouterr().out
    assert "cores / GPU at 40 images / s" in text
    assert text.count("vit_large") == 1 + 3 + 3 + 3 + 1


def test_the_page_has_these_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py", "--markdown"])
    scaling.main()
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 5
    for table in tables:
        assert table in page
