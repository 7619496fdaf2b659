"""`dino replay`: a real run diverges because of its learning rate, and its step is replayed."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import SMALL, composed

from dino_lightning.cli.main import main as dino
from dino_lightning.cli.replay import main
from dino_lightning.errors import UserError
from dino_lightning.training.debug.step_dump import read_step, write_step
from dino_lightning.training.run import train

TINY = [*SMALL, "callbacks.knn.enabled=false", "callbacks.pictures.enabled=false", "method.out_dim=32"]
EXPLODING = ["optim.lr=1e30", "optim.lr_warmup=0ep"]


def explode(folder: Path, *overrides: str) -> Path:
    """The saved step of a run whose weights overflow float32 in the first step."""
    with pytest.raises(FloatingPointError, match="dino replay"):
        train(composed(*TINY, *EXPLODING, *overrides, output_dir=folder))
    (file,) = (folder / "nonfinite").iterdir()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explode(tmp_path_factory.mktemp("run"))


def changed(file: Path, to: Path, **content: Any) -> Path:
    """The same file with other content."""
    write_step(to, {**read_step(file), **content})
    return to


def healthy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scale weights to at most 1."""
    return {
        name: tensor / tensor.abs().max().clamp(min=1) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def test_the_step_is_reproduced(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on a CPU in float32 computes exactly what the replay computes."""
    assert main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "the loss is nan at step 1, rank 0 of 1" in printed
    assert "It begins in teacher.backbone.blocks.0, the first module whose output is not finite." in printed
    (row,) = (line for line in printed.splitlines() if " teacher.backbone.patch_embed.proj " in line)
    cells = [cell.strip() for cell in row.split("│")[2:-1]]
    assert cells[0] == cells[2] != ""


def test_layer_by_layer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "layers=true"]) == 0
    assert "It begins in teacher.backbone.blocks.0." in capsys.readouterr().out


def test_a_finite_replay_blames_the_precision(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = read_step(file)
    fresh = changed(file, tmp_path / "a.pt", state=healthy(saved["state"]), precision="16-mixed")
    assert main([str(fresh)]) == 3
    printed = capsys.readouterr().out
    assert "In the replay all values are finite" in printed
    assert "the cause is the precision (16-mixed)." in printed
    shared = changed(fresh, tmp_path / "b.pt", world_size=2, what="a gradient is not finite at step 1")
    assert main([str(shared)]) == 3
    assert ", or the images of another rank" in capsys.readouterr().out


def test_a_gradient_is_named(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bottleneck is normalized, so a layer 1e35 times too large before one equally too small changes no output."""
    state = healthy(read_step(file)["state"])
    weights = [name for name in state if name.startswith("student.head.mlp") and name.endswith("weight")]
    state[weights[-2]] = state[weights[-2]] * 1e35
    state[weights[-1]] = state[weights[-1]] * 1e-42
    for name in weights:
        state[name.replace("weight", "bias")] = torch.zeros_like(state[name.replace("weight", "bias")])
    assert main([str(changed(file, tmp_path / "a.pt", state=state))]) == 0
    printed = capsys.readouterr().out
    assert f"it begins in the backward pass, at the gradient of {weights[-1]}." in printed


def test_bad_images_and_bad_weights_are_named(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = read_step(file)
    crops, state = [crop.clone() for crop in saved["crops"]], healthy(saved["state"])
    crops[0][1, 0, 2, 3] = float("inf")
    assert main([str(changed(file, tmp_path / "a.pt", crops=crops, state=state))]) == 0
    assert "The images themselves" in capsys.readouterr().out
    state["student.backbone.norm.weight"] = torch.full_like(state["student.backbone.norm.weight"], float("nan"))
    assert main([str(changed(file, tmp_path / "b.pt", state=state))]) == 0
    assert "student.backbone.norm.weight is the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["method=swav", "method.queue_length=0"], id="swav", marks=pytest.mark.slow),
        pytest.param(["method=supervised"], id="supervised", marks=pytest.mark.slow),
        pytest.param(["method.patch_loss_weight=1", "method.mask_p=1"], id="patches"),
    ],
)
def test_other_methods(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in TINY if "out_dim" not in word] if "supervised" in overrides[0] else TINY
    with pytest.raises(FloatingPointError, match="dino replay"):
        train(composed(*words, *EXPLODING, *overrides, output_dir=tmp_path))
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert main([str(file)]) == 0
    assert "It begins in " in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- files of others


class Code:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def damaged(file: Path, folder: Path, kind: str) -> Path:
    """A file that no run has saved."""
    path, saved = folder / "bad.pt", read_step(file)
    match kind:
        case "none":
            return folder / "absent.pt"
        case "noise":
            path.write_bytes(bytes(range(256)) * 8)
        case "cut":
            path.write_bytes(file.read_bytes()[:-4000])
        case "empty":
            path.write_bytes(b"")
        case "pickle":
            path.write_bytes(pickle.dumps(Code()))
        case "code":
            torch.save({**saved, "what": Code()}, path)
        case "checkpoint":
            torch.save({"state_dict": saved["state"]}, path)
        case "list":
            torch.save([1, 2], path)
        case "channels":
            changed(file, path, crops=[crop[:, :1] for crop in saved["crops"]])
        case "no images":
            changed(file, path, crops=None)
        case "weights":
            changed(file, path, state={"a": torch.zeros(2)})
        case "shapes":
            changed(file, path, state={name: tensor.reshape(-1) for name, tensor in saved["state"].items()})
        case "configuration":
            changed(file, path, configuration={"schemas": {}, "values": {}})
        case "method":
            schemas = {**saved["configuration"]["schemas"], "method": "dyno"}
            changed(file, path, configuration={**saved["configuration"], "schemas": schemas})
        case "value":
            values = {**saved["configuration"]["values"], "seed": "text"}
            changed(file, path, configuration={**saved["configuration"], "values": values})
        case "range":
            values = saved["configuration"]["values"]
            values = {**values, "backbone": {**values["backbone"], "depth": 0}}
            changed(file, path, configuration={**saved["configuration"], "values": values})
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "none": "cannot be read: No such file",
        "noise": "is not a valid checkpoint",
        "cut": "is not a valid checkpoint",
        "empty": "is not a valid checkpoint",
        "pickle": "is refused|is not a valid checkpoint",
        "code": "is refused: it contains .* besides weights",
        "checkpoint": "is not a step that a run has saved",
        "list": "contains a list",
        "channels": "has images that do not fit its configuration",
        "no images": "has no images",
        "weights": "has weights that do not fit its configuration",
        "shapes": "has weights that do not fit its configuration",
        "configuration": "holds no configuration that this version knows",
        "method": "is of method=dyno: .*dino",
        "value": "holds no configuration that this version knows",
        "range": "backbone.depth=0: expected at least 1",
    }.items(),
)
@pytest.mark.slow_after_first(8)
def test_other_files_are_refused(
    file: Path, tmp_path: Path, kind: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=words) as error:
        main([str(damaged(file, tmp_path, kind))])
    assert "\n" not in str(error.value)
    assert "this must not run" not in capsys.readouterr().out


def test_an_unknown_device(file: Path) -> None:
    with pytest.raises(UserError, match="device=tpu: did you mean .cpu"):
        main([str(file), "device=tpu"])


def test_the_command_line_reads_and_refuses(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dino(["replay"]) == 2
    assert capsys.readouterr().err == "dino replay: missing: file; see dino replay --help.\n"
    assert dino(["replay", str(file)]) == 0
    assert "It begins in" in capsys.readouterr().out
    assert dino(["replay", str(file.parent / "absent.pt")]) == 2
    assert capsys.readouterr().err.startswith("dino replay: ")
