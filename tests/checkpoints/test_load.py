"""`checkpoint=…`: the files of a run, timm's networks, untrained networks, and refused values."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import timm
import torch
from composing import SMALL, composed
from safetensors import safe_open
from torch import Tensor

from dino_lightning.checkpoints import Description, export_backbone, load_network, with_fresh_weights
from dino_lightning.checkpoints.timm_weights import load_pretrained, timm_description
from dino_lightning.config import ViTConfig
from dino_lightning.config.registry import backbone_config
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.models.vit import OriginalViT
from dino_lightning.training.run import train

TINY = ["trainer.max_steps=3", "callbacks.knn.enabled=false", "callbacks.pictures.enabled=false"]
SEEN = ["crops.mean=[0.4,0.5,0.6]", "crops.eval_resize=37", "crops.eval_size=32"]
OPTIM = ["optim.lr=0.5", "optim.lr_warmup=0ep"]  # so that student and teacher differ


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "first"
    train(composed(*SMALL, *TINY, *SEEN, *OPTIM, output_dir=output))
    return output


def weights_of(run: Path, key: str) -> dict[str, Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix(f"{key}.backbone."): w for name, w in state.items() if name.startswith(f"{key}.backbone")}


def same(network: FrozenNetwork, weights: dict[str, Tensor], *, sizes: tuple[int, ...] = (40,)) -> bool:
    """Whether the network has these weights, and its features are those of the equations."""
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        expected, _ = oracles.vit(weights, images, patch=8, heads=2)
        torch.testing.assert_close(network.backbone(images), expected, rtol=1e-5, atol=1e-5)
    state = network.backbone.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


# --------------------------------------------------------------------------------------------------------- our runs


@pytest.mark.parametrize("file", ["", "teacher.safetensors", "checkpoints/last.ckpt"])
def test_every_file_of_a_run_loads_the_teacher(run: Path, file: str) -> None:
    network = load_network(str(run / file))
    assert same(network, weights_of(run, "teacher"), sizes=(32, 40))
    assert isinstance(network.backbone, OriginalViT)
    assert (network.mean, network.std, network.resize, network.size) == ([0.4, 0.5, 0.6], [0.229, 0.224, 0.225], 37, 32)
    assert not network.backbone.training
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert network.digest == load_network(str(run)).digest
    assert network.trained
    assert network.name.startswith("first")


@pytest.mark.parametrize("file", ["", "checkpoints/last.ckpt"])
def test_the_student(run: Path, file: str) -> None:
    student = load_network(str(run / file), key="student")
    assert same(student, weights_of(run, "student"))
    assert student.digest != load_network(str(run)).digest
    assert student.name == "first/last (student)"


def test_an_interrupted_run_loads_its_last_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "second")
    (tmp_path / "second" / "teacher.safetensors").unlink()
    assert load_network(str(tmp_path / "second")).digest == load_network(str(run)).digest


@pytest.mark.parametrize("file", ["teacher.safetensors", "checkpoints/last.ckpt"])
def test_a_file_alone_describes_its_network(run: Path, file: str, tmp_path: Path) -> None:
    alone = load_network(str(shutil.copy(run / file, tmp_path / f"alone{Path(file).suffix}")))
    assert same(alone, weights_of(run, "teacher"))
    assert (alone.mean, alone.resize, alone.size) == ([0.4, 0.5, 0.6], 37, 32)
    with safe_open(run / "teacher.safetensors", framework="pt") as exported:
        assert json.loads(exported.metadata()["eval"]) == {"resize": 37, "size": 32}


def test_without_a_description_the_number_of_heads_is_unknown(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content.pop("network")
    content["state_dict"] = {name: w[:48] if w.shape[0] == 64 else w for name, w in content["state_dict"].items()}
    torch.save(content, tmp_path / "alone.ckpt")
    with pytest.raises(UserError, match=r"alone.ckpt: the number of heads of a ViT with width 48 is unknown"):
        load_network(str(tmp_path / "alone.ckpt"))


def test_a_convolutional_network_with_arguments(tmp_path: Path) -> None:
    config = backbone_config("vovnet_micro")
    ours = build_backbone(config, image_size=32, drop_path=False).eval()
    path, seen = tmp_path / "exported.safetensors", {"mean": [0.5] * 3, "std": [0.25] * 3}
    description = Description(config, 32, resize=36, size=32, **seen)  # type: ignore[arg-type]
    export_backbone(ours.state_dict(), path, description)
    state = {f"teacher.backbone.{name}": tensor for name, tensor in ours.state_dict().items()}
    torch.save({"state_dict": state, "network": description.to_dict()}, tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 40, 40)
    for file in (path, tmp_path / "last.ckpt"):
        loaded = load_network(str(file))
        assert torch.equal(loaded.backbone(images), ours(images))
        assert loaded.mean == [0.5] * 3
        assert (loaded.resize, loaded.size) == (36, 32)


def test_the_digest_is_of_names_and_values(run: Path) -> None:
    weights, found = weights_of(run, "teacher"), hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + weights[name].numpy().tobytes())
    assert load_network(str(run)).digest == found.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- fresh weights


def test_rebuilt_networks_have_the_weights_and_train(run: Path) -> None:
    network = load_network(str(run))
    fresh = network.rebuild(drop_path_rate=0.5)
    assert fresh.training
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert fresh.blocks[-1].drop_path1.drop_prob == 0.5  # type: ignore[index,union-attr]
    assert not torch.equal(fresh.pos_embed, network.backbone.pos_embed)  # type: ignore[arg-type]
    fresh.load_state_dict(network.backbone.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh.eval()(images), network.backbone(images))


def test_a_network_without_stochastic_depth_is_refused() -> None:
    network = load_network("untrained:timm:densenet121")
    with pytest.raises(UserError, match=r"eval.drop_path_rate=0.1: timm's densenet121 has no stochastic depth"):
        network.rebuild(drop_path_rate=0.1)


def test_the_baseline(run: Path) -> None:
    network, before = load_network(str(run)), torch.random.get_rng_state()
    first, again, other = (with_fresh_weights(network, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.digest == again.digest
    assert len({network.digest, first.digest, other.digest}) == 3
    assert (first.name, first.trained) == ("untrained", False)
    assert replace(first, backbone=network.backbone, name=network.name, digest=network.digest, trained=True) == network
    assert not first.backbone.training
    assert not any(parameter.requires_grad for parameter in first.backbone.parameters())
    assert first.backbone.state_dict().keys() == network.backbone.state_dict().keys()
    assert load_network(f"untrained:{run}", seed=1).digest == first.digest


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("vit_micro", OriginalViT, 224),
        ("vovnet_micro", timm.models.VovNet, 224),
        ("test_vit", None, 160),
        ("timm:test_resnet.r160_in1k", None, 160),
    ],
)
def test_fresh_weights_by_name(name: str, kind: type | None, size: int) -> None:
    network = load_network(f"untrained:{name}", seed=3)
    assert not network.trained
    assert network.size == size
    assert network.backbone(torch.randn(1, 3, 64, 64)).shape == (1, network.width)
    assert network.digest == with_fresh_weights(network, seed=3).digest != with_fresh_weights(network, seed=4).digest
    if kind is not None:
        assert type(network.backbone) is kind


# -------------------------------------------------------------------------------------------------- timm's networks


@pytest.mark.slow
def test_published_weights_of_dino_are_resampled_as_in_training(tmp_path: Path) -> None:
    name = "vit_small_patch16_224.dino"
    settings = timm_description(name, source="here")
    assert settings.backbone == ViTConfig(width=384, depth=12, heads=6, patch_size=16, drop_path_rate=0.1)
    assert (settings.resize, settings.size, settings.image_size) == (256, 224, 224)
    with torch.device("meta"):  # weights that are not used are not initialized
        ours = settings.build().eval()
        theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    weights = {key: torch.empty(tensor.shape).uniform_(-0.05, 0.05) for key, tensor in ours.state_dict().items()}
    weights["pos_embed"] *= 20
    weights["norm.weight"] += 1
    torch.save(weights, tmp_path / "weights.pth")
    for network in (ours, theirs):
        network.load_state_dict(weights, assign=True)
    network = load_pretrained(name, settings, source="here", file=tmp_path / "weights.pth").eval()
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(network(images), ours(images))
    assert (theirs(images) - ours(images)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k"])
def test_other_published_weights_use_timms_network(name: str, tmp_path: Path) -> None:
    theirs = timm.create_model(name).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    settings = timm_description(name, source="here")
    expected = timm.data.resolve_model_data_config(theirs)  # type: ignore[attr-defined]
    assert (settings.mean, settings.std) == (list(expected["mean"]), list(expected["std"]))
    assert (settings.size, settings.resize) == (160, int(160 / expected["crop_pct"]))
    network = load_pretrained(name, settings, source="here", file=tmp_path / "weights.pth").eval()
    images = torch.randn(2, 3, 160, 160)
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(network(images), features)
    assert network(torch.randn(1, 3, 96, 96)).shape == features[:1].shape
    assert settings.build().state_dict().keys() == network.state_dict().keys()


def test_descriptions_convert_to_plain_types_and_back() -> None:
    for name in ("test_resnet", "vit_small_patch16_224.dino"):
        description = timm_description(name, source="here")
        assert Description.from_dict(json.loads(json.dumps(description.to_dict()))) == description


# ------------------------------------------------------------------------------------------------------ what fails


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("timm:resnet5O", r"checkpoint=timm:resnet5O: timm \S+ has no network 'resnet5O'; did you mean 'resnet50'\?"),
        ("timm:vit_small_patch16_224.dinoo", "did you mean 'vit_small_patch16_224.dino'"),
        ("timm:vovnet39a", "its weights could not be loaded .No pretrained weights exist for vovnet39a"),
        ("untrained:vit_smal", "checkpoint=untrained:vit_smal: .* did you mean 'vit_small'"),
        ("resnet50", "this file does not exist; use checkpoint=timm:resnet50 for timm's weights"),
        ("vit_micro", "this file does not exist; use checkpoint=untrained:vit_micro"),
        ("", "checkpoint= is empty"),
        ("{run}/checkpoints/lost.ckpt", r"did you mean '\S*/checkpoints/last.ckpt'"),
        ("{run}/checkpoint/last.ckpt", r"did you mean '\S*/first/checkpoints'"),
        ("untrained:{run}/checkpoints/lost.ckpt", "checkpoint=untrained:.* this file does not exist"),
        ("{run}/nothing-of-the-kind", r"does not exist; \S*/first contains checkpoints, teacher.safetensors"),
        ("{run}/checkpoints", "is a folder without teacher.safetensors, student.safetensors or checkpoints/last.ckpt"),
        ("{run}/config.yaml", "config.yaml is not a valid checkpoint"),
    ],
)
def test_wrong_names(run: Path, checkpoint: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_network(checkpoint.format(run=run))


def test_weights_that_cannot_be_downloaded(tmp_path: Path) -> None:
    settings = timm_description("test_vit", source="checkpoint=timm:test_vit")
    with pytest.raises(
        UserError, match=r"checkpoint=timm:test_vit: its weights could not be loaded \(FileNotFoundError\)"
    ):
        load_pretrained("test_vit", settings, source="checkpoint=timm:test_vit", file=tmp_path / "nowhere.pth")


def test_wrong_keys(run: Path) -> None:
    with pytest.raises(UserError, match="checkpoint_key=techer: did you mean 'teacher'"):
        load_network(str(run), key="techer")
    with pytest.raises(UserError, match="checkpoint_key=student: .* contains only the teacher"):
        load_network(str(run / "teacher.safetensors"), key="student")


def test_damaged_files(run: Path, tmp_path: Path) -> None:
    for file in ("teacher.safetensors", "checkpoints/last.ckpt"):
        cut = tmp_path / f"cut{Path(file).suffix}"
        cut.write_bytes((run / file).read_bytes()[:-2000])
        with pytest.raises(UserError, match=rf"{cut.name} is not a valid"):
            load_network(str(cut))
