"""Folders saved by the transformers library, and repositories of the Hugging Face Hub, as `checkpoint=…`."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from network_cases import with_noise
from programs import run_code
from safetensors.torch import load_file
from slow_params import first
from torch import Tensor

from dino_lightning.checkpoints import load_network
from dino_lightning.errors import UserError
from dino_lightning.models.vit import OriginalViT

transformers = pytest.importorskip("transformers")
VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}


def saved(folder: Path, kind: str = "ViTModel", *, processor: Any = None, **changes: Any) -> Any:
    """Save a transformers network in `folder`."""
    config = transformers.ViTConfig(**{**VIT, **changes})
    network = with_noise(getattr(transformers, kind)(config))
    network.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return network


def check_same(folder: Path, features: Tensor, images: Tensor, *, tolerance: float = 1e-5) -> None:
    """Check that `folder` loads as a network with these features, up to the order of summation."""
    network = load_network(str(folder))
    assert features.std() > 0.1
    torch.testing.assert_close(network.backbone(images), features, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_a_vit(kind: str, tmp_path: Path) -> None:
    """A ViT with a pooler or a classifier, which are not part of the features."""
    theirs = saved(tmp_path / "dino", kind)
    inner = theirs if kind == "ViTModel" else theirs.vit
    images = torch.randn(2, 3, 64, 64)
    check_same(tmp_path / "dino", inner(images).last_hidden_state[:, 0], images)
    network = load_network(str(tmp_path / "dino"))
    assert isinstance(network.backbone, OriginalViT)
    assert (network.name, network.resize, network.size) == ("dino", 256, 224)
    assert load_network(str(tmp_path / "dino" / "model.safetensors")).digest == network.digest
    assert load_network(f"untrained:{tmp_path / 'dino'}").digest != network.digest


def test_the_layer_norm_epsilon_of_published_configurations(tmp_path: Path) -> None:
    """The published `config.json` of DINO says 1e-12, but the original code has 1e-6, which we use."""
    theirs = saved(tmp_path / "dino", layer_norm_eps=1e-12)
    images = torch.randn(2, 3, 64, 64)
    check_same(tmp_path / "dino", theirs(images).last_hidden_state[:, 0], images, tolerance=1e-3)


def test_tensor_names_are_those_of_published_files(tmp_path: Path) -> None:
    """The names in facebook/dino-vits16, and the same weights as a pickle."""
    theirs = saved(tmp_path / "dino")
    images = torch.randn(1, 3, 64, 64)
    expected = theirs(images).last_hidden_state[:, 0]
    from safetensors.torch import load_file

    state = load_file(tmp_path / "dino" / "model.safetensors")
    parts = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "layernorm_before",
        "layernorm_after",
    )
    block = {f"encoder.layer.1.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {name for name in state if name.startswith("encoder.layer.1.")} == block
    torch.save(state, tmp_path / "dino" / "pytorch_model.bin")
    (tmp_path / "dino" / "model.safetensors").unlink()
    check_same(tmp_path / "dino", expected, images)


@pytest.mark.parametrize(("kind", "depths"), first([("basic", [2, 2, 2, 2]), ("bottleneck", [3, 4, 6, 3])]))
def test_a_resnet(kind: str, depths: list[int], tmp_path: Path) -> None:
    widths = [64, 128, 256, 512] if kind == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=widths)
    theirs = with_noise(transformers.ResNetModel(config))
    theirs.save_pretrained(tmp_path / "resnet")
    images = torch.randn(2, 3, 64, 64)
    features = theirs(images).pooler_output.flatten(1)
    assert features.std() > 0.01
    scale = features.abs().max()
    check_same_scaled = load_network(str(tmp_path / "resnet")).backbone(images) / scale
    torch.testing.assert_close(check_same_scaled, features / scale, rtol=1e-5, atol=1e-5)


def test_the_preparation_of_images(tmp_path: Path) -> None:
    normal: dict[str, Any] = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    crop = transformers.BitImageProcessor(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}, **normal)
    saved(tmp_path / "crop", processor=crop)
    network = load_network(str(tmp_path / "crop"))
    assert (network.mean, network.std) == (normal["image_mean"], normal["image_std"])
    assert (network.resize, network.size) == (80, 64)
    saved(tmp_path / "whole", processor=transformers.ViTImageProcessor(size={"height": 224, "width": 224}))
    network = load_network(str(tmp_path / "whole"))
    assert (network.resize, network.size, network.mean) == (256, 224, [0.5, 0.5, 0.5])
    saved(tmp_path / "plain", processor=transformers.ViTImageProcessor(do_normalize=False))
    network = load_network(str(tmp_path / "plain"))
    assert (network.mean, network.std) == ([0.0] * 3, [1.0] * 3), "values from 0 to 1 as they are"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "relu"}, "hidden_act=relu in its config.json is not supported; expected g"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001 in its config.json is not supported"),
        ({"qkv_bias": False}, "qkv_bias=False in its config.json"),
        (
            {"intermediate_size": 96},
            r"does not fit the detected architecture.*mlp.fc1.weight has shape \(96, 48\) instead of \(192, 48\)",
        ),
        ({"model_type": "dinov2"}, "is a transformers network of type 'dinov2'; expected one of vit, resnet"),
        ({"architecture": "vit_x", "model_type": None}, "was written by timm; load it with"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    saved(tmp_path / "dino", **{key: value for key, value in changes.items() if key in ("intermediate_size",)})
    file = tmp_path / "dino" / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UserError, match=sentence) as caught:
        load_network(str(tmp_path / "dino"))
    assert "\n" not in str(caught.value)


def test_there_is_no_student(tmp_path: Path) -> None:
    saved(tmp_path / "dino")
    with pytest.raises(UserError, match="checkpoint_key=student: .* contains only one network"):
        load_network(str(tmp_path / "dino"), key="student")


# --------------------------------------------------------------------------------------------------------- the Hub


class Hub(SimpleHTTPRequestHandler):
    """A server with the Hub's answers to requests for OWNER/NAME/resolve/REVISION/FILE."""

    def translate_path(self, path: str) -> str:
        owner, name, _, revision, file = path.strip("/").split("/")
        return str(Path(self.directory) / owner / name / revision / file)

    def end_headers(self) -> None:
        self.send_header("X-Repo-Commit", "0" * 39 + "1")
        self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
        super().end_headers()

    def send_error(self, code: int, *rest: Any, **options: Any) -> None:
        self.send_response(code)
        known = Path(self.directory, *self.path.strip("/").split("/")[:2]).is_dir()
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a local Hub, and the folder of its repositories."""
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served"
    server.shutdown()
    server.server_close()


LOAD_FROM_HUB = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]  # it reads its variables when it is imported
from dino_lightning.checkpoints import load_network
from dino_lightning.errors import UserError
print(load_network("hf:facebook/dino-vits16").digest, load_network("hf:facebook/older").digest)
for name in sys.argv[1:]:
    try:
        load_network(name)
    except UserError as error:
        print(error)
"""


def test_a_repository_of_the_hub(hub: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, in a separate process because it reads the server's address when it is imported."""
    address, served = hub
    saved(served / "facebook" / "dino-vits16" / "main")
    (served / "facebook" / "empty" / "main").mkdir(parents=True)
    older = served / "facebook" / "older" / "main"
    saved(older)
    torch.save(load_file(older / "model.safetensors"), older / "pytorch_model.bin")
    (older / "model.safetensors").unlink()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    refused = ("hf:facebook/empty", "hf:facebook/dino-vits61", "hf:a/b/c")
    done = run_code(LOAD_FROM_HUB, *refused, cwd=tmp_path, variables=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    digests, *sentences = done.stdout.splitlines()
    folders = (served / "facebook" / "dino-vits16" / "main", older)
    assert digests.split() == [load_network(str(folder)).digest for folder in folders]
    assert sentences == [
        "checkpoint=hf:facebook/empty: the repository contains neither model.safetensors nor pytorch_model.bin.",
        "checkpoint=hf:facebook/dino-vits61: the Hub has no such repository or revision, or it requires an "
        "account (`hf auth login`).",
        "checkpoint=hf:a/b/c: 'a/b/c' is not the name of a repository on the Hugging Face Hub; expected hf:OWNER/NAME "
        "or hf:OWNER/NAME@REVISION.",
    ]
    again = run_code(LOAD_FROM_HUB, cwd=tmp_path, variables=variables | {"HF_HUB_OFFLINE": "1"})
    assert again.stdout.split() == digests.split(), again.stderr[-3000:]
