"""Regression tests for findings of fuzzing (tests/fuzz, docs/reliability.md), each with a minimal input."""

import base64
import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import tifffile
import torch
from decode_cases import decoder
from safetensors.torch import save_file

from dino_lightning.checkpoints import Description, load_network
from dino_lightning.config import ArchiveData, ParquetData, TimmConfig, ViTConfig, WebDatasetData
from dino_lightning.data.decode import UnreadableImageError
from dino_lightning.data.decode_formats import MAX_TIFF_PAGES, check_tiff_pages
from dino_lightning.data.sources import open_sources
from dino_lightning.errors import UserError

SMALL = ViTConfig(width=8, depth=1, heads=1, patch_size=4)


def npy(header: str) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(64)


def array(shape: str, kind: str = "|u1") -> bytes:
    return npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}")


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (array("(10000000000, 10000000000, 3)"), "is longer than the file"),  # MemoryError: it ended the run
        (array("(1000000, 1000000)"), "is longer than the file"),
        (array("(-1, 8, 8)"), "is longer than the file"),
        (npy("-" * 9000 + "1"), "not the header of an array"),  # MemoryError of Python's parser
        (npy("("), "not the header of an array"),
        (array("(1,)", "|O"), "allow_pickle"),
    ],
)
def test_arrays_with_impossible_headers_are_unreadable(content: bytes, reason: str) -> None:
    for decode in (decoder().pil, decoder().pixels, decoder().stored):
        with pytest.raises(UnreadableImageError, match=reason):
            decode(content)


def test_a_broken_array_in_a_shard_is_one_unreadable_image(tmp_path: Path) -> None:
    from webdataset_cases import write_tar

    tar = write_tar(tmp_path / "s.tar", [("a.npy", npy("(")), ("b.npy", array("(10000000000, 10000000000)"))])
    stream = open_sources(WebDatasetData(shards=str(tar), images=2, image_keys=["npy"]), seed=0).train
    assert [sample.content for sample in stream.read_shard(0)] == [None, None]  # type: ignore[union-attr]


def pages(*chain: int) -> bytes:
    """A TIFF with empty directories at offsets 8, 16, 24, …, each of which links to the next offset in `chain`."""
    return b"II*\0" + struct.pack("<I", 8) + b"".join(struct.pack("<HIH", 0, following, 0) for following in chain)


@pytest.mark.parametrize("chain", [(8,), (16, 8), (16, 24, 16)])
def test_a_loop_of_tiff_pages_is_unreadable(chain: tuple[int, ...]) -> None:
    """Earlier, a loader process followed the links forever."""
    with pytest.raises(ValueError, match="form a loop"):
        check_tiff_pages(pages(*chain))
    with pytest.raises(UnreadableImageError, match="form a loop|Invalid dimensions"):  # the latter is Pillow 11
        decoder().pixels(pages(*chain))


def test_tiff_pages_without_a_loop_are_accepted() -> None:
    check_tiff_pages(pages(16, 24, 0))
    check_tiff_pages(pages(16, 24, 10**6))
    check_tiff_pages(b"MM\0+" + struct.pack(">HHQ", 8, 0, 16) + struct.pack(">QQ", 0, 0))
    check_tiff_pages(b"II*\0")
    many = pages(*range(16, 16 + 8 * MAX_TIFF_PAGES, 8), 0)
    with pytest.raises(ValueError, match="more than 10000 pages"):
        check_tiff_pages(many)


def test_a_loop_of_big_endian_bigtiff_pages_is_refused() -> None:
    circle = b"MM\0+" + struct.pack(">HHQ", 8, 0, 16) + struct.pack(">QQ", 0, 16)
    with pytest.raises(ValueError, match="form a loop"):
        check_tiff_pages(circle)


def test_unknown_tiff_tags_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Fuzzing for four minutes printed 100 megabytes of warnings, which a run would write to its log."""
    with pytest.raises(UnreadableImageError):
        decoder(channels=5).pixels(pages(0)[:8] + struct.pack("<HHHIII", 1, 1, 0, 1, 0, 0))
    assert not caplog.records
    assert not tifffile.logger().isEnabledFor(logging.ERROR)


# -------------------------------------------------------------------------------------------------------- archives

NAMELESS = """UEsDBBQAAAAAAG+bel2DFtyMAQAAAAEAAAAFAAAAAC5wbmd4UEsBAhQDFAAAAAAAb5t6XYMW3IwBAAAAAQAAAAUAAAAAAAAAAAAAAIAB
AAAAAAAucG5nUEsFBgAAAAABAAEAMwAAACQAAAAAAA=="""
NOT_UTF8 = """UEsDBBQAAAAAAG+bel2DFtyMAQAAAAEAAAAFAAAAsC5wbmd4UEsBAhQDFAAACAAAb5t6XYMW3IwBAAAAAQAAAAUAAAAAAAAAAAAAAIAB
AAAAALAucG5nUEsFBgAAAAABAAEAMwAAACQAAAAAAA=="""


@pytest.mark.parametrize("content", [NAMELESS, NOT_UTF8], ids=["IndexError", "UnicodeDecodeError"])
def test_a_zip_with_a_damaged_directory_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    path.write_bytes(base64.b64decode(content))
    with pytest.raises(UserError, match=r"is not a readable zip file \(.+\); copy or download it again"):
        open_sources(ArchiveData(path=str(path), cache_dir=str(tmp_path)), seed=0)


def test_the_error_of_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    """Arrow's message ends with an empty line."""
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1" + b"\xff" * 40 + struct.pack("<I", 40) + b"PAR1")
    with pytest.raises(UserError, match="is not a readable parquet file") as caught:
        open_sources(ParquetData(path=str(path)), seed=0)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- checkpoints


def weights() -> dict[str, torch.Tensor]:
    return Description(SMALL, image_size=8).build().state_dict()


def described(tmp_path: Path, **changes: Any) -> str:
    """A weights file whose description of the network is updated with `changes`, also inside `backbone`."""
    description = Description(SMALL, image_size=8).to_dict()
    description["backbone"] |= changes.pop("backbone", {})
    file = tmp_path / "weights.safetensors"
    save_file(weights(), file, metadata={"network": json.dumps({**description, **changes})})
    return str(file)


def test_the_unchanged_file_loads(tmp_path: Path) -> None:
    network = load_network(described(tmp_path))
    assert network.backbone.state_dict().keys() == weights().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"width": 10**7}}, "the size 10000000 is too large"),  # all memory: the end of the process
        ({"backbone": {"depth": 10**7}}, "the size 10000000 is too large"),  # hours
        ({"backbone": {"width": 60_000}}, "does not fit the detected architecture"),  # 115 GB
        ({"backbone": {"heads": 0}}, "cannot be built"),
        ({"backbone": {"heads": 3}}, "cannot be built"),
        ({"backbone": {"width": "8"}}, "cannot be built"),
        ({"backbone": {"patch_size": 0}}, "cannot be built"),
        ({"image_size": 10**9}, "the size 1000000000 is too large"),
        ({"size": 10**12}, "is too large"),
        ({"size": -1}, "-1 is not an image size"),
        ({"resize": True}, "True is not an image size"),
        ({"mean": [0.5, float("nan"), 0.5]}, "are not a normalization"),
        ({"std": [1, 1]}, "are not a normalization"),
        ({"std": [1, 1, 0]}, "are not a normalization"),
        ({"mean": [], "std": []}, "are not a normalization"),
        ({"mean": "abc"}, "cannot read its description"),
    ],
)
def test_a_wrong_description_of_the_network_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = described(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_network(file)
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


def test_arguments_of_timm_cannot_name_another_file(tmp_path: Path) -> None:
    """`timm.create_model(checkpoint_path=…)` unpickles that file, in older versions with arbitrary code."""
    elsewhere = tmp_path / "elsewhere.pth"
    asks = {"checkpoint_path": str(elsewhere), "pretrained_cfg": {"file": str(elsewhere)}, "cache_dir": str(tmp_path)}
    asks |= {"pretrained_cfg_overlay": {"file": str(elsewhere)}, "pretrained": True}
    built = Description(TimmConfig(name="resnet18", arguments={**asks, "zero_init_last": False})).build()
    assert not built.state_dict()["layer1.0.bn2.weight"].eq(0).any()  # the other argument counts


def test_missing_blocks_are_refused(tmp_path: Path) -> None:
    """Earlier, the value was used as the number of blocks."""
    width_64 = Description(ViTConfig(width=64, depth=1, heads=1, patch_size=4), image_size=8).build().state_dict()
    torch.save({**width_64, "blocks.999999999.norm1.weight": torch.zeros(64)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="does not fit the detected architecture"):
        load_network(str(tmp_path / "a.pth"))


def test_expanded_tensors_of_a_small_file_are_refused(tmp_path: Path) -> None:
    """A small file could claim to contain terabytes."""
    state = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in weights().items()}
    network = Description(SMALL, image_size=8).to_dict()
    content = {"state_dict": {f"teacher.backbone.{name}": tensor for name, tensor in state.items()}, "network": network}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not contain the values of"):
        load_network(str(tmp_path / "a.ckpt"))


def test_sparse_and_meta_tensors_are_refused(tmp_path: Path) -> None:
    for odd in (torch.zeros(8, 8).to_sparse(), torch.zeros(8, 8, device="meta")):
        torch.save({"pos_embed": odd, "patch_embed.proj.weight": odd, "blocks.0.norm1.weight": odd}, tmp_path / "a.pth")
        with pytest.raises(UserError) as caught:
            load_network(str(tmp_path / "a.pth"))
        assert str(tmp_path / "a.pth") in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (64,), (64, 0, 0)])
def test_impossible_shapes_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    first = {"pos_embed": torch.zeros(shape), "patch_embed.proj.weight": torch.zeros(shape)}
    torch.save({**first, "blocks.0.norm1.weight": torch.zeros(64), 7: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="contains no weights of a known network"):
        load_network(str(tmp_path / "a.pth"))
