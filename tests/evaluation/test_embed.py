"""`embed`: features of whatever holds images are those of the images, and a kill costs a block."""

import csv
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding_cases import CHECKPOINT, SIZE, expected_features, picture_files, pictures
from PIL import Image

import dino_lightning
from dino_lightning.checkpoints import load_network
from dino_lightning.config import BuiltinData, FolderData, WebDatasetData
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.output import Embeddings
from dino_lightning.evaluation.features import cache as feature_cache
from dino_lightning.evaluation.features.images import center_view
from dino_lightning.evaluation.features.spec import FeatureSpec

BUILTIN = BuiltinData(train_images=12, val_images=5, num_workers=0)


def embed(images: Any, **options: Any) -> Embeddings:
    options = {"image_size": SIZE, "feature_cache": None, "num_workers": 0, "accelerator": "cpu", **options}
    return dino_lightning.embed(images, options.pop("checkpoint", CHECKPOINT), **options)


def equal(a: Embeddings, b: Embeddings) -> bool:
    return np.array_equal(a.features, b.features) and a.labels == b.labels


def test_a_folder_with_classes(tmp_path: Path) -> None:
    files = picture_files(tmp_path, 10, classes=("cats", "dogs"))
    found = embed(tmp_path)
    assert found.names == [str(path) for path in files]
    assert found.labels == ["cats"] * 5 + ["dogs"] * 5
    assert found.splits is None
    assert not found.bad
    assert found.features.dtype == np.float32
    # A batch and single images round differently in the last bits.
    np.testing.assert_allclose(found.features, expected_features(files).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.image(7)), np.asarray(Image.open(files[7])))


def test_features_do_not_depend_on_the_data_source(tmp_path: Path) -> None:
    files = picture_files(tmp_path / "folder", 6)
    want = embed(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in files:
            archive.write(path, path.name)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in files))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in files))
    arrays = pictures(6)
    for images in (
        tmp_path / "x.zip",
        str(tmp_path / "list.csv"),
        tmp_path / "list.txt",
        FolderData(path=str(tmp_path / "folder")),
        files,
        [str(path) for path in files],
        arrays,
        np.stack(arrays),
        [Image.fromarray(pixels) for pixels in arrays],
        [files[0], arrays[1], Image.fromarray(arrays[2]).convert("RGBA"), *files[3:]],
    ):
        assert equal(embed(images), want), type(images)
    assert embed([*arrays[:1], files[1]]).names == ["image 0", str(files[1])]


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = picture_files(tmp_path, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embed([f"~/{file.name}", Path("~", file.name)]).names == [str(file)] * 2


def test_both_splits_and_one_of_them() -> None:
    both, val = embed(BUILTIN), embed(BUILTIN, split="val")
    assert both.splits == ["train"] * 12 + ["val"] * 5
    assert both.names[11:13] == ["built-in train picture 11 (daisy)", "built-in val picture 0 (clownfish)"]
    assert val.splits is None
    np.testing.assert_array_equal(both.features[12:], val.features)
    assert both.labels is not None
    assert both.labels[12:] == val.labels
    assert np.array_equal(np.asarray(both.image(14)), np.asarray(val.image(2)))


@pytest.mark.parametrize(("options", "tokens"), [({"features": "mean_patch"}, 1), ({"n_last_blocks": 2}, 2)])
def test_other_features_equal_timm(options: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    embed(BUILTIN, split="val", feature_cache=tmp_path)  # kept features of another kind are not taken
    found = embed(BUILTIN, split="val", feature_cache=tmp_path, **options)
    backbone: Any = load_network(CHECKPOINT).backbone
    images = torch.stack([embed_view(found.image(row)) for row in range(5)])
    blocks = backbone.get_intermediate_layers(images, n=tokens, return_prefix_tokens=True, norm=True)
    if options.get("features"):
        want = blocks[-1][0].mean(dim=1)
    else:
        want = torch.cat([prefix[:, 0] for _, prefix in blocks], dim=1)
    np.testing.assert_allclose(found.features, want.detach().numpy(), rtol=1e-4, atol=1e-5)


def embed_view(image: Image.Image) -> torch.Tensor:
    """As evaluation prepares it at 32 pixels."""
    return center_view(load_network(CHECKPOINT), size=SIZE)(image)


# ------------------------------------------------------------------------------------------------------- files


def test_parquet(tmp_path: Path) -> None:
    found = embed(BUILTIN, output=tmp_path / "new" / "a.parquet")
    assert found.output == tmp_path / "new" / "a.parquet"
    table = pq.read_table(found.output)
    assert table.column_names == ["name", "label", "split", "embedding"]
    assert table["name"].to_pylist() == found.names
    assert table["label"].to_pylist() == found.labels
    assert table["split"].to_pylist() == found.splits
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), found.features)
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert about["weights"] == load_network(CHECKPOINT).digest
    assert about["image_size"] == "32"
    embed(BUILTIN, output=tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").read_bytes() == found.output.read_bytes()
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "a.parquet", "b.parquet"}, "and nothing else"


def test_npy_and_its_names(tmp_path: Path) -> None:
    files = picture_files(tmp_path / 'a, "b"', 4)
    found = embed(files, output=str(tmp_path / "x.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), found.features)
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": str(path)} for path in files]
    with pytest.raises(UserError, match=r"output=.*x\.npy already exists; .* overwrite=true"):
        embed(files, output=tmp_path / "x.npy")
    embed(files[:2], output=tmp_path / "x.npy", overwrite=True)
    assert len(np.load(tmp_path / "x.npy")) == 2


# -------------------------------------------------------------------------------------------------- interruptions


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", 5)
    whole, options = tmp_path / "whole.parquet", {"feature_cache": tmp_path / "cache", "split": "train"}
    embed(BUILTIN, split="train", output=whole, batch_size=3)
    seen, at_most = [], 6
    original = FeatureSpec.of

    def counting(spec: FeatureSpec, backbone: torch.nn.Module) -> Any:
        def forward(images_BCHW: torch.Tensor) -> torch.Tensor:
            if sum(seen) > at_most:
                raise KeyboardInterrupt
            seen.append(len(images_BCHW))
            return original(spec, backbone)(images_BCHW)

        return forward

    monkeypatch.setattr(FeatureSpec, "of", counting)
    with pytest.raises(KeyboardInterrupt):
        embed(BUILTIN, output=tmp_path / "x.parquet", batch_size=3, **options)
    assert not (tmp_path / "x.parquet").exists()
    assert seen == [3, 2, 3]
    seen, at_most = [], 100
    embed(BUILTIN, output=tmp_path / "x.parquet", batch_size=3, **options)
    assert seen == [3, 2, 2], "the first block was there"
    assert (tmp_path / "x.parquet").read_bytes() == whole.read_bytes()


# -------------------------------------------------------------------------------------------------------- bad images


def test_bad_images_are_left_out_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = picture_files(tmp_path / "photos", 6)
    good = embed([files[0], *files[2:5]])
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:70])
    files[5].write_text("no picture")
    options = {"output": tmp_path / "x.parquet", "overwrite": True, "feature_cache": tmp_path / "cache"}
    for _ in range(2):  # the second time from kept blocks
        found = embed(tmp_path / "photos", **options)
        assert equal(found, good)
        assert found.positions.tolist() == [0, 2, 3, 4]
        assert list(found.bad) == [str(files[1]), str(files[5])]
        assert "2 images could not be read and were left out" in " ".join(capfd.readouterr().err.split())
        named = (tmp_path / "x.bad_images.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in named] == [str(files[1]), str(files[5])]
    assert not list(tmp_path.glob(".*"))
    files[1].write_bytes(whole)
    files[5].unlink()
    assert not embed(tmp_path / "photos", **options).bad
    assert not (tmp_path / "x.bad_images.txt").exists(), "of the time before"


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    files = picture_files(tmp_path, 2)
    mixed = embed([files[0], tmp_path / "none.png", pictures(2)[1]], feature_cache=tmp_path / "cache")
    assert (mixed.names, list(mixed.bad)) == ([str(files[0]), "image 2"], [str(tmp_path / "none.png")])
    found = embed([files[0], tmp_path / "none.png", files[1]], num_workers=1)
    assert json.dumps(found.bad) == json.dumps({str(tmp_path / "none.png"): "no such file or directory"})
    with pytest.raises(UserError, match=r"none of the images can be read \(.*none\.png: no such file"):
        embed([tmp_path / "none.png"])


# ------------------------------------------------------------------------------------------------------------- words

GRAY = np.zeros((8, 8), np.uint8)
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "images: the list is empty; expected at least one image."),
    ([{}], {}, "images[0] is of type dict; expected a path, a PIL image"),
    ([GRAY.astype(float)], {}, "images[0] is an array (8, 8) of float64; expected"),
    (np.zeros((8, 8, 3), np.uint8), {}, "images is an array (8, 8, 3) of uint8; expected (N, H, W, C)"),
    ([Image.fromarray(GRAY.astype(np.int32))], {}, "images[0] is a PIL image of mode I; expected a mode with 8 bits."),
    (7, {}, "images: int is not a list; expected"),
    ("/nowhere", {}, "images=/nowhere does not exist"),
    (__file__, {}, "is a file of an unknown type; expected a folder"),
    ([GRAY], {"split": "test"}, "split=test: choose one of all, train, val"),
    (BUILTIN, {"features": "mean_patches"}, "features=mean_patches: did you mean 'mean_patch'?"),
    ([GRAY], {"n_last_blocks": 9}, "n_last_blocks=9: untrained has 2 blocks; expected 1 to 2."),
    ([GRAY], {"n_last_blocks": 2, "features": "mean_patch"}, "n_last_blocks=2 is for features=class"),
    (
        [GRAY],
        {"n_last_blocks": 2, "checkpoint": "untrained:resnet18"},
        "n_last_blocks=2: untrained is not a ViT and has only one kind of features; set n_last_blocks=1.",
    ),
    (
        [GRAY],
        {"image_size": 30},
        "image_size=30 is not a multiple of the patch size 8 of untrained; the nearest is 32.",
    ),
    ([GRAY], {"batch_size": 0}, "batch_size_per_device=0: expected at least 1"),
    ([GRAY], {"num_workers": -1}, "data.num_workers=-1: expected at least 0"),
    ([GRAY], {"output": "x.h5"}, "output=x.h5: expected a file name that ends in .parquet or .npy."),
    ([GRAY], {"output": "/proc/x.npy"}, "output=/proc cannot be written"),
    ([GRAY], {"precision": "half"}, "trainer.precision=half: choose one of"),
    ([GRAY], {"accelerator": "cuda"}, "trainer.accelerator=cuda: this machine has no GPU"),
    ([GRAY], {"checkpoint_key": "techer"}, "checkpoint_key=techer: did you mean 'teacher'?"),
    ([GRAY], {"checkpoint": "/nowhere.pth"}, "checkpoint=/nowhere.pth: this file does not exist"),
    (BuiltinData(channels=1), {}, "data.channels=1: the network untrained expects images with 3 channels."),
]


@pytest.mark.parametrize(("images", "options", "expected"), WRONG, ids=[expected[:40] for *_, expected in WRONG])
def test_one_sentence(images: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        embed(images, **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unused_settings_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture_files(tmp_path / "photos", 2, classes=("train", "others"))
    assert len(embed(tmp_path / "photos")) == 1
    assert f"not used in '{tmp_path / 'photos'}': others\n" in capfd.readouterr().err
    embed(tmp_path / "photos", progress=False)
    assert not capfd.readouterr().err
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        shard.add(tmp_path / "photos" / "train" / "000.png", "000.png")
    with pytest.raises(UserError, match="which streams do not have; use data=archive for local tar files"):
        embed(WebDatasetData(shards=str(tmp_path / "x.tar"), images=1))
    assert len(embed(tmp_path / "x.tar")) == 1


def test_the_input_list_is_not_overwritten(tmp_path: Path) -> None:
    files = picture_files(tmp_path, 2)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in files))
    with pytest.raises(UserError, match=r"output=.*list\.npy would overwrite data\.path=.*list\.csv"):
        embed(tmp_path / "list.csv", output=tmp_path / "list.npy", overwrite=True)
