"""Two ranks over gloo train as one process with the same total batch, with complete networks (DDP) or shards (FSDP)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import ranks_worker
import scaling_bytes
import tiny
import torch
from ranks_worker import CASES, Case
from torch import Tensor

EXACT = {"rtol": 1e-9, "atol": 1e-12}
"""Float64: only the order of sums differs."""
AS_ONE: dict[str, Any] = {"accumulate": 1, "checkpointed": False, "tiled": False, "compiled": False}
"""Settings that only matter for several processes."""
SLOW = (
    "ddp, checkpointed",
    "ddp, compiled",
    "ddp, unused",
    "fsdp, accumulated, tiled",
    "fsdp, checkpointed",
    "fsdp, sgd",
)
FAST = tuple(name for name in CASES if name not in SLOW)
LAST = ("head.last_layer.weight_g", "head.last_layer.weight_v")


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return ranks_worker.launch(tmp_path_factory.mktemp("ranks"), *FAST)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return ranks_worker.launch(tmp_path_factory.mktemp("slow_ranks"), *SLOW)


@dataclass
class Alone:
    """The same training by one process."""

    record: tiny.Record
    watch: ranks_worker.Watch
    module: Any


@pytest.fixture(scope="module")
def trained_alone() -> dict[str, Alone]:
    """Cache by settings, because several cases train the same network."""
    return {}


@pytest.fixture(params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture
def ranks(request: pytest.FixtureRequest, name: str) -> list[dict[str, Any]]:
    """The results of both ranks in one case."""
    return [rank[name] for rank in request.getfixturevalue("slow_ranks" if name in SLOW else "all_ranks")]


@pytest.fixture
def alone(case: Case, trained_alone: dict[str, Alone]) -> Alone:
    key = str(replace(case, **AS_ONE, strategy=""))
    if key not in trained_alone:
        trained_alone[key] = train_alone(case)
    return trained_alone[key]


def train_alone(case: Case) -> Alone:
    # On CPUs, a batch norm uses the images of its rank, which are those of one of two micro-batches.
    parts = ranks_worker.RANKS if case.batch_norm else 1
    module, whole = ranks_worker.module_and_batches(replace(case, **AS_ONE))
    module.batch_size_per_device = ranks_worker.BATCH // parts
    watch = ranks_worker.Watch()
    options = {"max_epochs": ranks_worker.EPOCHS, "accumulate_grad_batches": parts}
    record = tiny.fit(module, tiny.split(whole, parts=parts), callbacks=[watch], **options)
    return Alone(record, watch, module)


def by_step(values: list[Any]) -> list[Any]:
    """Select the values after each optimizer step from those after each micro-batch."""
    window = len(values) // (ranks_worker.STEPS * ranks_worker.EPOCHS)
    return values[window - 1 :: window]


def step_means(losses: list[float]) -> Tensor:
    return torch.tensor(losses).double().unflatten(0, (ranks_worker.STEPS * ranks_worker.EPOCHS, -1)).mean(dim=1)


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors except the statistics of batch norms, which differ between processes."""
    return {name: tensor for name, tensor in state.items() if "running" not in name and "num_batches" not in name}


def test_losses(ranks: list[dict[str, Any]], alone: Alone) -> None:
    mean = (step_means(ranks[0]["losses"]) + step_means(ranks[1]["losses"])) / 2
    torch.testing.assert_close(mean, step_means(alone.record.losses), rtol=1e-6, atol=0)
    assert ranks[0]["losses"] != ranks[1]["losses"], "the ranks have different images"


def test_learning_rate_scales_with_the_total_batch(ranks: list[dict[str, Any]], alone: Alone) -> None:
    assert by_step(ranks[0]["rates"]) == by_step(alone.record.rates)


def test_center(ranks: list[dict[str, Any]], alone: Alone) -> None:
    for ours, others, expected in zip(
        *(by_step(rank["centers"]) for rank in ranks), by_step(alone.record.centers), strict=True
    ):
        torch.testing.assert_close(ours, expected, **EXACT)
        assert torch.equal(ours, others), "both ranks compute the same center; DDP does not copy it"


def test_gradients(ranks: list[dict[str, Any]], alone: Alone) -> None:
    for rank in ranks:
        for ours, expected in zip(rank["gradients"], alone.watch.gradients, strict=True):
            assert ours.keys() == expected.keys()
            for name, gradient in ours.items():
                torch.testing.assert_close(gradient, expected[name], **EXACT, msg=name)


def test_some_gradients_are_clipped(alone: Alone) -> None:
    norms = [gradient.norm() for step in alone.watch.gradients for gradient in step.values()]
    assert {bool(norm > ranks_worker.CLIP) for norm in norms} == {True, False}


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_final_weights(network: str, ranks: list[dict[str, Any]], alone: Alone) -> None:
    expected = parameters(tiny.copy(getattr(alone.module, network)))
    for rank in ranks:
        ours = parameters(rank[network])
        assert ours.keys() == expected.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, expected[name], **EXACT, msg=name)
    assert all(torch.equal(ranks[0][network][name], ranks[1][network][name]) for name in expected)


def test_prototypes_are_frozen_in_some_steps_only(alone: Alone) -> None:
    """The comparisons above cover both states."""
    states, frozen = alone.record.students, 6
    steps = by_step(states)
    for name in LAST:
        assert torch.equal(steps[0][name], steps[frozen - 1][name])
        assert not torch.equal(steps[frozen - 1][name], steps[frozen][name])


def test_settings_of_ddp(name: str, case: Case, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        if case.strategy == "fsdp":
            assert not rank["settings"]
            continue
        settings = rank["settings"]
        assert settings["gradient_as_bucket_view"]
        assert settings["static_graph"] is (name not in ("ddp, accumulated", "ddp, unused"))
        buffers = settings.get("forward_sync_buffers", settings.get("broadcast_buffers"))
        assert buffers is case.batch_norm
        assert set(rank["storages"]) == {1}, "all gradients are views of one bucket"


def test_fsdp_shards_weights_gradients_and_moments(case: Case, ranks: list[dict[str, Any]]) -> None:
    assert {*ranks[0]["sharded"], *ranks[1]["sharded"]} == {case.strategy == "fsdp"}
    first, second = (rank["sizes"] for rank in ranks)
    assert any(name.startswith("gradient of student.") for name in first)
    assert any("exp_avg" in name or "momentum_buffer" in name for name in first)
    for name, (shape, here) in first.items():
        there, whole = second[name][1], math.prod(shape)
        if case.strategy == "fsdp":
            # The first rank has one row more if their number is odd; a single row is halved.
            left = whole // shape[0] if shape[0] % 2 and shape[0] > 1 else 0
            assert (here, there) == ((whole + left) // 2, (whole - left) // 2), name
        else:
            assert here == there == whole
    for name in first:
        if name.startswith("student."):
            assert first[name] == first[name.replace("student", "teacher")]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_bytes_sent_are_those_of_the_scaling_estimate(name: str, ranks: list[dict[str, Any]], alone: Alone) -> None:
    options: Any = {"gpus": ranks_worker.RANKS, "element": 8}
    small = sum(scaling_bytes.small_bytes(tiny.K, **options).values())
    if name == "ddp":
        expected = {"all_reduce": small, "gradients": scaling_bytes.ddp_bytes(alone.module.student, **options)}
    else:
        paper = scaling_bytes.fsdp_bytes(alone.module, **options)
        gathered = paper["teacher"] + paper["forward"] + paper["backward"]
        expected = {"all_gather": gathered, "reduce_scatter": paper["gradients"], "all_reduce": small + paper["norms"]}
    for rank in ranks:
        for sent in rank["sent"][1 : ranks_worker.STEPS - 1]:  # Lightning communicates around epochs, too
            # Later versions of PyTorch have shorter names.
            names = {key: key.removesuffix("_tensor").removesuffix("_into") for key in sent}
            assert {names[key]: count for key, count in sent.items()} == expected


def test_optimizer_kernels(name: str, ranks: list[dict[str, Any]]) -> None:
    expected: dict[str, bool] = {"fused": True, "foreach": False}
    expected = {"fsdp, sgd": {"fused": False, "foreach": True}, "fsdp, lars": {}}.get(name, expected)
    assert all(group == expected for rank in ranks for group in rank["options"])


@pytest.mark.slow
def test_compiled_blocks_are_compiled_in_the_first_step(slow_ranks: list[dict[str, dict[str, Any]]]) -> None:
    """Blocks and last blocks of student and teacher, under DDP."""
    for rank in slow_ranks:
        assert set(rank["ddp, compiled"]["graphs"]) == {4}
