"""The layout of DAVIS: lists, objects of both years, and what is refused in one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from davis_cases import (
    FRAMES,
    HEIGHT,
    PALETTE,
    WIDTH,
    disks,
    frame_path,
    mask_path,
    write_davis,
    write_frame,
    write_mask,
)
from PIL import Image

from dino_lightning.config import DavisData
from dino_lightning.data.benchmarks.davis import BrokenSequenceError, open_davis
from dino_lightning.errors import UserError


def test_sequences_come_in_the_order_of_the_list(tmp_path: Path) -> None:
    davis = open_davis(write_davis(tmp_path, sequences={"cow": 5, "bus": 4}))
    assert [(sequence.name, len(sequence)) for sequence in davis.sequences] == [("cow", 5), ("bus", 4)]
    cow = davis.sequences[0]
    assert cow.frames == [frame_path(tmp_path, "cow", i) for i in range(5)]
    assert cow.masks == [mask_path(tmp_path, "cow", i) for i in range(5)]
    assert cow.size == (HEIGHT, WIDTH)
    assert cow.palette is not None
    assert cow.palette[:9] == PALETTE[:9]
    assert not davis.broken


def test_2017_keeps_objects_apart_and_2016_takes_them_together(tmp_path: Path) -> None:
    labels = disks(HEIGHT, WIDTH, shift=6)
    apart = open_davis(write_davis(tmp_path, year=2017)).sequences[0]
    np.testing.assert_array_equal(apart.labels(2), labels)
    assert apart.objects == 2
    together = open_davis(write_davis(tmp_path, year=2016)).sequences[0]
    np.testing.assert_array_equal(together.labels(2), labels > 0)
    assert together.objects == 1


@pytest.mark.parametrize("year", [2016, 2017])
def test_void_is_background(tmp_path: Path, year: int) -> None:
    config = write_davis(tmp_path, year=year)
    expected = open_davis(config).sequences[0].labels(0)
    labels = disks(HEIGHT, WIDTH, shift=0)
    labels[:4, :9] = 255
    write_mask(tmp_path, "cow", 0, labels)
    sequence = open_davis(config).sequences[0]
    np.testing.assert_array_equal(sequence.labels(0), expected)
    assert sequence.objects == expected.max()


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_the_release_of_2016_paints_its_object_white(tmp_path: Path, mode: str) -> None:
    config = write_davis(tmp_path, year=2016)
    for index in range(FRAMES):
        white = Image.fromarray((disks(HEIGHT, WIDTH, shift=3 * index) > 0).astype(np.uint8) * 255)
        white.convert(mode).save(mask_path(tmp_path, "cow", index))
    sequence = open_davis(config).sequences[0]
    np.testing.assert_array_equal(sequence.labels(1), disks(HEIGHT, WIDTH, shift=3) > 0)
    assert sequence.objects == 1
    assert sequence.palette is None


def test_lists_of_2016_name_frames(tmp_path: Path) -> None:
    config = write_davis(tmp_path, year=2016)
    lines = [
        f"/JPEGImages/480p/{name}/{index:05}.jpg /Annotations/480p/{name}/{index:05}.png"
        for name in ("bus", "cow")
        for index in range(3)
    ]
    (tmp_path / "ImageSets/2016/val.txt").write_text("\n".join([*lines, "", "  "]))
    davis = open_davis(config)
    assert [(sequence.name, len(sequence)) for sequence in davis.sequences] == [("bus", FRAMES + 1), ("cow", FRAMES)]


def test_an_object_without_a_pixel_in_the_first_frame_counts(tmp_path: Path) -> None:
    """As in the official evaluation: objects are 1 ... the largest number of the first mask."""
    config = write_davis(tmp_path)
    labels = disks(HEIGHT, WIDTH, shift=0)
    labels[labels == 1] = 0
    write_mask(tmp_path, "cow", 0, labels)
    assert open_davis(config).sequences[0].objects == 2


BREAK: dict[str, Callable[[Path], object]] = {
    "a frame's header": lambda root: frame_path(root, "cow", 3).write_bytes(b"\xff\xd8nothing"),
    "the first frame's header": lambda root: frame_path(root, "cow", 0).write_bytes(b""),
    "a mask's header": lambda root: mask_path(root, "cow", 2).write_bytes(b"\x89PNG nothing"),
    "the first mask's pixels": lambda root: shorten(mask_path(root, "cow", 0)),
}


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("what", BREAK)
def test_a_broken_sequence_is_named_and_left_out(tmp_path: Path, what: str) -> None:
    config = write_davis(tmp_path)
    BREAK[what](tmp_path)
    davis = open_davis(config)
    assert [sequence.name for sequence in davis.sequences] == ["bus"]
    path, reason = davis.broken["cow"]
    assert "cow" in path
    assert reason
    shutil.rmtree(tmp_path / "JPEGImages/480p/bus")
    (tmp_path / "ImageSets/2017/val.txt").write_text("cow\n")
    with pytest.raises(UserError, match=r"none of the 1 sequences can be read \(.*cow"):
        open_davis(config)


def test_a_truncated_mask_is_named(tmp_path: Path) -> None:
    sequence = open_davis(write_davis(tmp_path)).sequences[0]
    shorten(mask_path(tmp_path, "cow", 4))
    with pytest.raises(BrokenSequenceError) as caught:
        sequence.labels(4)
    assert caught.value.args[0] == str(mask_path(tmp_path, "cow", 4))


def lose(root: Path, *parts: str) -> None:
    path = root.joinpath(*parts)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def list_wrongly(root: Path, text: str) -> None:
    (root / "ImageSets/2017/val.txt").write_text(text)


WRONG: dict[str, tuple[Callable[[Path], object], dict, str]] = {
    "no folder": (lambda root: None, {"path": "nowhere"}, "data.path=nowhere"),
    "no lists": (lambda root: lose(root, "ImageSets"), {}, "has no ImageSets; expected the extracted folder"),
    "the folder above": (lambda root: None, {"path": "above"}, "has no ImageSets; did you mean "),
    "year": (lambda root: None, {"year": 2071}, "data.year=2071 is not a folder in .*; did you mean '2017'?"),
    "split": (lambda root: None, {"split": "vall"}, r"data.split=vall: .* has no vall.txt; did you mean 'val'\?"),
    "empty list": (
        lambda root: list_wrongly(root, "\n"),
        {},
        "data.split=val: .*val.txt contains no names of sequences",
    ),
    "resolution": (lambda root: None, {"resolution": "480"}, r"data.resolution=480 is .*did you mean '480p'\?"),
    "no annotations": (lambda root: lose(root, "Annotations"), {}, "has no Annotations"),
    "sequence": (lambda root: list_wrongly(root, "coww"), {}, r"no frames of the sequence coww; did you mean 'cow'\?"),
    "masks": (
        lambda root: lose(root, "Annotations/480p/cow"),
        {},
        "6 of 6 masks of cow are missing, such as .*00000.png",
    ),
    "a mask": (
        lambda root: mask_path(root, "cow", 4).unlink(),
        {},
        "1 of 6 masks of cow are missing, such as .*00004.png",
    ),
    "short": (lambda root: write_davis(root, sequences={"cat": 2}), {}, "sequence cat has 2 frames; .*at least 3"),
    "size of a mask": (
        lambda root: write_mask(root, "cow", 4, np.ones((WIDTH, HEIGHT))),
        {},
        "cow/00004.png has 66 x 100 pixels; expected the size of .*cow/00000.jpg, 100 x 66",
    ),
    "size of a frame": (
        lambda root: write_frame(root, "bus", 2, Image.new("RGB", (90, 66))),
        {},
        "bus/00002.jpg has 90 x 66 pixels; expected",
    ),
    "no object": (lambda root: write_mask(root, "bus", 0, np.zeros((HEIGHT, WIDTH))), {}, "contains no object"),
    "colors": (
        lambda root: Image.new("RGB", (WIDTH, HEIGHT), "red").save(mask_path(root, "cow", 3)),
        {},
        r"cow/00003.png is a color image \(mode RGB\); expected one number per pixel",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_sentence(tmp_path: Path, what: str) -> None:
    spoil, changed, sentence = WRONG[what]
    config = write_davis(tmp_path / "DAVIS")
    spoil(tmp_path / "DAVIS")
    path = {"nowhere": "nowhere", "above": str(tmp_path)}.get(changed.get("path", ""), config.path)
    with pytest.raises(UserError, match=sentence) as caught:
        open_davis(DavisData(**{"path": path, **{key: value for key, value in changed.items() if key != "path"}}))
    assert "\n" not in str(caught.value)


def test_real_sequences(shared_data: Path) -> None:
    davis = open_davis(DavisData(path=str(shared_data / "davis_mini6")))
    assert [(sequence.name, len(sequence), sequence.objects) for sequence in davis.sequences] == [
        ("blackswan", 50, 1),
        ("camel", 90, 1),
        ("car-shadow", 40, 1),
        ("dog", 60, 1),
        ("goat", 90, 1),
        ("libby", 49, 1),
    ]
    assert {sequence.size for sequence in davis.sequences} == {(480, 854)}
    assert not davis.broken
