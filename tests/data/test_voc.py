"""The layout of Pascal VOC: lists, masks, and what is wrong with a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from voc_cases import write_voc

from dino_lightning.config import VOCData
from dino_lightning.data.benchmarks.voc import open_voc
from dino_lightning.data.decode import UnreadableImageError
from dino_lightning.data.sources import ImageSource
from dino_lightning.errors import UserError


def write_list(root: Path, split: str, text: str) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text(text)


def refusal(root: Path, *, split: str = "val") -> str:
    with pytest.raises(UserError) as caught:
        open_voc(VOCData(path=str(root), split=split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_lists_every_mask_has_its_image(tmp_path: Path):
    images = open_voc(VOCData(path=str(write_voc(tmp_path))))
    assert isinstance(images, ImageSource)
    assert [images.describe(i) for i in range(len(images))] == ["2007_1", "2007_2", "2008_3"]
    assert images.read(1) == (tmp_path / "JPEGImages" / "2007_2.jpg").read_bytes()
    mask = images.mask(2)
    assert mask.dtype == np.uint8
    assert mask.shape == (8, 12)
    # Numbers, not the colors of the palette.
    assert mask[1, 2:6].tolist() == [255] * 4
    assert mask[3, 1:7].tolist() == [0, 3, 3, 3, 3, 0]


def test_lists_select_and_order_images(tmp_path: Path):
    write_voc(tmp_path)
    write_list(tmp_path, "val", "2008_3\n2007_1  1\n\n")
    images = open_voc(VOCData(path=str(tmp_path)))
    assert [images.describe(i) for i in range(len(images))] == ["2008_3", "2007_1"]


def test_the_fingerprint_depends_on_the_masks(tmp_path: Path):
    before = open_voc(VOCData(path=str(write_voc(tmp_path)))).fingerprint()
    assert before == open_voc(VOCData(path=str(tmp_path))).fingerprint()
    Image.fromarray(np.ones((8, 12), np.uint8)).save(tmp_path / "SegmentationClass" / "2007_2.png")
    assert open_voc(VOCData(path=str(tmp_path))).fingerprint() != before


def test_the_parent_folder_is_refused_with_the_right_one(tmp_path: Path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    assert f"did you mean '{tmp_path / 'VOCdevkit' / 'VOC2012'}'?" in refusal(tmp_path)
    assert f"did you mean '{tmp_path / 'VOCdevkit' / 'VOC2012'}'?" in refusal(tmp_path / "VOCdevkit")


def test_folder_without_the_layout(tmp_path: Path):
    (tmp_path / "JPEGImages").mkdir()
    assert refusal(tmp_path).startswith(f"data.path={tmp_path} has no folder SegmentationClass; expected")
    assert "does not exist" in refusal(tmp_path / "nothing")
    (tmp_path / "SegmentationClass").mkdir()
    assert "contains no masks" in refusal(tmp_path)


def test_missing_split(tmp_path: Path):
    write_voc(tmp_path)
    write_list(tmp_path, "trainval", "2007_1\n")
    assert refusal(tmp_path, split="trainvall").endswith("did you mean 'trainval'?")
    write_list(tmp_path, "empty", "\n")
    assert "contains no names of images" in refusal(tmp_path, split="empty")


def test_missing_files(tmp_path: Path):
    write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "2007_1.jpg").unlink()
    (tmp_path / "JPEGImages" / "2007_2.jpg").unlink()
    assert "lacks 2 files of 3 images, such as JPEGImages/2007_1.jpg" in refusal(tmp_path)


def test_mask_of_another_size(tmp_path: Path):
    write_voc(tmp_path)
    Image.new("L", (11, 8)).save(tmp_path / "SegmentationClass" / "2008_3.png")
    found = refusal(tmp_path)
    assert "SegmentationClass/2008_3.png has 11 x 8 pixels, but its image has 12 x 8" in found


def test_broken_files_are_left_for_later(tmp_path: Path):
    write_voc(tmp_path)
    (tmp_path / "JPEGImages" / "2007_1.jpg").write_bytes(b"no image")
    assert len(open_voc(VOCData(path=str(tmp_path)))) == 3


def test_mask_in_color_is_refused(tmp_path: Path):
    write_voc(tmp_path)
    Image.new("RGB", (12, 8)).save(tmp_path / "SegmentationClass" / "2007_1.png")
    with pytest.raises(UnreadableImageError, match="expected one number per pixel"):
        open_voc(VOCData(path=str(tmp_path))).mask(0)


def test_real_photographs(shared_data: Path):
    images = open_voc(VOCData(path=str(shared_data / "voc_labelme3")))
    assert [images.describe(i) for i in range(len(images))] == ["2011_000003", "2011_000006", "2011_000025"]
    assert [sorted(set(np.unique(images.mask(i)).tolist()) - {0, 255}) for i in range(3)] == [
        [5, 15],
        [9, 15, 18],
        [6, 7],
    ]
