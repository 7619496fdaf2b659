"""Files of runs of other methods contain the network that the run evaluated; such runs can resume."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_methods
import torch
from composing import SMALL, composed, composed_evaluation
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from slow_params import first
from torch import Tensor

from dino_lightning.checkpoints import load_network
from dino_lightning.checkpoints.load import weights_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.run import run_evaluation
from dino_lightning.training.run import train

FEW = [
    "trainer.max_steps=3",
    "callbacks.knn.enabled=false",
    "callbacks.pictures.enabled=false",
    "optim.lr=0.5",
    "optim.lr_warmup=0ep",
]
"""Long enough that student and teacher differ."""
RUNS: dict[str, tuple[list[str], str]] = {
    "swav": (["method=swav", "method.queue_length=20", "method.freeze_prototypes=1it"], "student"),
    "supervised": (["method=supervised"], "student"),
    "byol": (["method=byol"], "student"),
    "moco, its teacher": (["method=moco", "method.evaluate=teacher"], "teacher"),
    "dino, its student": (["method.evaluate=student", "trainer.max_epochs=3"], "student"),
}
"""Overrides, and the network that is evaluated."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the runs, each created by the first test that needs it."""
    return {name: tmp_path_factory.mktemp("runs") / name.replace(", ", "_").replace(" ", "_") for name in RUNS}


@pytest.fixture(params=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(name: str, runs: dict[str, Path]) -> Path:
    if not runs[name].exists():
        train(composed(*SMALL, *FEW, *RUNS[name][0], output_dir=runs[name]))
    return runs[name]


def backbone(run: Path, key: str) -> dict[str, Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {n.removeprefix(f"{key}.backbone."): w for n, w in state.items() if n.startswith(f"{key}.backbone.")}


@pytest.mark.slow_after_first(2)
def test_the_exported_file_has_the_name_of_its_network(run: Path, name: str) -> None:
    key = RUNS[name][1]
    assert [path.name for path in run.glob("*.safetensors")] == [f"{key}.safetensors"]
    exported, expected = load_file(run / f"{key}.safetensors"), backbone(run, key)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.slow_after_first(2)
def test_every_file_of_a_run_loads_the_evaluated_network(run: Path, name: str) -> None:
    key = RUNS[name][1]
    expected = weights_digest(backbone(run, key))
    for file in ("", f"{key}.safetensors", "checkpoints/last.ckpt"):
        assert load_network(str(run / file)).digest == expected
        assert load_network(str(run / file), key=key).digest == expected


@pytest.mark.slow_after_first(2)
def test_the_checkpoint_also_contains_the_other_network(run: Path, name: str) -> None:
    other = {"student": "teacher", "teacher": "student"}[RUNS[name][1]]
    if name in ("swav", "supervised"):
        with pytest.raises(UserError, match=r"checkpoint_key=teacher: .* does not contain a teacher"):
            load_network(str(run), key=other)
    else:
        assert (
            load_network(str(run), key=other).digest
            == weights_digest(backbone(run, other))
            != load_network(str(run)).digest
        )
    with pytest.raises(UserError, match=f"checkpoint_key={other}: .* contains only the {RUNS[name][1]}"):
        load_network(str(run / f"{RUNS[name][1]}.safetensors"), key=other)


@pytest.mark.parametrize("file", ["", "checkpoints/last.ckpt"])
def test_dino_eval(file: str, runs: dict[str, Path], tmp_path: Path) -> None:
    if not runs["swav"].exists():
        train(composed(*SMALL, *FEW, *RUNS["swav"][0], output_dir=runs["swav"]))
    words = ["eval=knn", f"checkpoint={runs['swav'] / file}", *SMALL[:3], "data=builtin", "eval.k=[10,20]"]
    run_evaluation(composed_evaluation(*words, output_dir=tmp_path), overrides=words)
    assert "top1" in (tmp_path / "results.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------- resuming

RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "byol": ("byol", {}),
    "moco 2": ("moco2", {}),
    "moco 3": ("moco3", {}),
    "swav, queue": ("swav", {"queue_length": 12, "freeze_prototypes": "1it"}),
    "supervised": ("supervised", {}),
}


@pytest.mark.parametrize(
    ("case", "after"),
    first(
        [*((case, 2) for case in RESUMED), ("swav, queue", 3), *((c, 3) for c in RESUMED if c != "swav, queue")], fast=6
    ),
)
@pytest.mark.slow_after_first(3)
def test_a_resumed_run_equals_an_uninterrupted_one(case: str, after: int, tmp_path: Path) -> None:
    """Resumed in the middle of an epoch (2) or at its end (3), with queues, prototypes and batch norm statistics."""
    name, changed = RESUMED[case]

    def fit(**options: Any) -> tuple[dict[str, Tensor], list[int]]:
        torch.manual_seed(1)
        module = tiny_methods.build(name, **changed)
        data: Any = tiny.batches(1)
        data = (tiny_methods.labeled(data) if name == "supervised" else data) * 3  # loaders without a state
        seen = tiny_methods.fit(module, data, max_epochs=2, **options)
        return tiny.copy(module), seen.steps

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit(callbacks=[keep], enable_checkpointing=True)
    rest, steps = fit(ckpt_path=tmp_path / f"step={after}.ckpt")
    assert steps == list(range(after + 1, 7))
    assert rest.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, rest[key]), key
