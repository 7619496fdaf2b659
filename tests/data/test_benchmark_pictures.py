"""Images and clips to look at: what a path is taken for, and the frames that come out."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lightning.config import PicturesData
from dino_lightning.data.benchmarks import pictures
from dino_lightning.data.benchmarks.pictures import Animation, Clip, FrameFiles, Video, open_pictures
from dino_lightning.errors import UserError
from dino_lightning.evaluation.video.clips import clip_suffix, write_clip

WITH_AV = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV: pip install av")


def gray(value: int, size: tuple[int, int] = (16, 12)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def opened(path: Path, **config: Any) -> pictures.Pictures:
    return open_pictures(PicturesData(path=str(path), **config))


def frames_of(clip: Clip | None) -> tuple[list[int], list[Image.Image], list[tuple[str, str]]]:
    assert clip is not None
    bad: list[tuple[str, str]] = []
    found = list(clip.frames(lambda name, reason: bad.append((name, reason))))
    return [number for number, _ in found], [frame for _, frame in found], bad


def values(frames: list[Image.Image]) -> list[int]:
    return [int(np.asarray(frame).mean().round()) for frame in frames]


def write_frames(folder: Path, names: list[str], **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        gray(20 * i, **options).save(folder / name)


def test_one_image(tmp_path: Path):
    write_frames(tmp_path, ["a.png", "b.png"])
    found = opened(tmp_path / "a.png")
    assert (found.images, found.clip, found.root) == ([tmp_path / "a.png"], None, tmp_path)


def test_folder_of_images_with_those_below(tmp_path: Path):
    write_frames(tmp_path, ["b.png", "a.jpg"])
    write_frames(tmp_path / "more", ["c.png"])
    (tmp_path / "notes.txt").write_text("no image")
    found = opened(tmp_path)
    assert found.clip is None
    assert [str(path.relative_to(tmp_path)) for path in found.images] == ["a.jpg", "b.png", "more/c.png"]


@pytest.mark.parametrize(
    ("names", "clip"),
    [
        (["00000.png", "00001.png", "00002.png"], True),
        (["frame_8.png", "frame_9.png", "frame_10.png"], False),  # sorted by name, 10 comes first
        (["f08.png", "f09.png", "f10.png"], True),
        (["2011_000003.png", "2011_000006.png", "2011_000025.png"], False),
        (["a1.png", "b2.png", "c3.png"], False),
        (["0.png", "1.png"], False),
    ],
)
def test_numbered_images_of_one_size_are_a_clip(names: list[str], clip: bool, tmp_path: Path):
    write_frames(tmp_path, names)
    assert (opened(tmp_path).clip is not None) is clip
    assert opened(tmp_path, clip=not clip).clip is None if clip else opened(tmp_path, clip=True).clip is not None


def test_numbered_images_of_several_sizes_are_no_clip(tmp_path: Path):
    write_frames(tmp_path, ["0.png", "1.png", "2.png"])
    gray(9, (16, 13)).save(tmp_path / "1.png")
    assert opened(tmp_path).clip is None
    _, frames, _ = frames_of(opened(tmp_path, clip=True).clip)
    assert {frame.size for frame in frames} == {(16, 12)}


def test_frames_of_a_folder_and_a_broken_one(tmp_path: Path):
    write_frames(tmp_path, [f"{i}.png" for i in range(4)])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    clip = opened(tmp_path).clip
    assert isinstance(clip, FrameFiles)
    assert clip.count() == 4
    numbers, frames, bad = frames_of(clip)
    assert numbers == [0, 1, 3]
    assert values(frames) == [0, 20, 60]
    assert [name for name, _ in bad] == [str(tmp_path / "2.png")]


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp", "clip.png"])
def test_animations(name: str, tmp_path: Path):
    shown = [gray(value) for value in (0, 80, 160, 240)]
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    shown[0].save(tmp_path / name, save_all=True, append_images=shown[1:], duration=40, **options)
    clip = opened(tmp_path / name).clip
    assert isinstance(clip, Animation)
    assert (clip.name, clip.count()) == ("clip", 4)
    numbers, frames, bad = frames_of(clip)
    assert (numbers, bad) == ([0, 1, 2, 3], [])
    assert values(frames) == pytest.approx([0, 80, 160, 240], abs=2)
    assert {frame.mode for frame in frames} == {"RGB"}
    still = opened(tmp_path / name, clip=False)
    assert (still.clip, still.images) == (None, [tmp_path / name])


def test_transparent_parts_of_an_animation_are_white(tmp_path: Path):
    shown = [Image.new("RGBA", (8, 8), (200, 0, 0, 0)), Image.new("RGBA", (8, 8), (0, 0, 0, 255))]
    shown[0].save(tmp_path / "a.webp", save_all=True, append_images=shown[1:], lossless=True, exact=True)
    _, frames, _ = frames_of(opened(tmp_path / "a.webp").clip)
    assert values(frames) == [255, 0]


def test_pages_of_a_tiff_are_no_clip(tmp_path: Path):
    gray(0).save(tmp_path / "a.tif", save_all=True, append_images=[gray(100)])
    assert opened(tmp_path / "a.tif").clip is None


def test_a_truncated_animation_is_reported(tmp_path: Path):
    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    shown[0].save(tmp_path / "a.gif", save_all=True, append_images=shown[1:])
    path = tmp_path / "b.gif"
    path.write_bytes((tmp_path / "a.gif").read_bytes()[: (tmp_path / "a.gif").stat().st_size // 2])
    clip = opened(path).clip
    assert isinstance(clip, Animation)
    numbers, _, bad = frames_of(clip)
    assert 0 < len(numbers) == clip.count() < 6
    assert [name for name, _ in bad] == [f"{path}, after frame {len(numbers) - 1}"]


def test_nothing_there(tmp_path: Path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match=r"does not exist.*did you mean 'photo.png'"):
        opened(tmp_path / "phto.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no images"):
        opened(tmp_path / "empty")


def test_video_without_pyav_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"a\.mp4 is not an image format that PIL supports.*pip install av"):
        opened(tmp_path / "a.mp4")


@WITH_AV
def test_file_of_neither(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(b"nothing that anyone knows")
    with pytest.raises(UserError, match="neither an image format that PIL supports nor a video that PyAV reads"):
        opened(tmp_path / "a.mp4")


@WITH_AV
def test_videos_are_read_as_written(tmp_path: Path):
    written = (gray(value, (65, 49)) for value in (10, 90, 170, 250))
    write_clip(tmp_path / "a.mp4", written, frames_per_second=12.5)
    clip = opened(tmp_path / "a.mp4").clip
    assert isinstance(clip, Video)
    assert (clip.name, clip.count()) == ("a", 4)
    numbers, frames, bad = frames_of(clip)
    assert (numbers, bad) == ([0, 1, 2, 3], [])
    assert frames[0].size == (64, 48)  # H.264 has even sizes
    assert values(frames) == pytest.approx([10, 90, 170, 250], abs=6)


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animations_are_read_as_written(suffix: str, tmp_path: Path):
    path = tmp_path / f"a{suffix}"
    write_clip(path, (gray(value) for value in (10, 90, 170, 250)), frames_per_second=12.5)
    _, frames, _ = frames_of(opened(path).clip)
    assert values(frames) == pytest.approx([10, 90, 170, 250], abs=6)
    with Image.open(path) as image:
        image.seek(1)
        image.load()
        assert image.info["duration"] == 80


def test_best_ending(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert clip_suffix() == ".webp"
    monkeypatch.setattr("dino_lightning.evaluation.video.clips.features.check", lambda _: False)
    assert clip_suffix() == ".gif"


def test_no_frames_no_file(tmp_path: Path):
    write_clip(tmp_path / "a.webp", [], frames_per_second=12)
    assert not list(tmp_path.iterdir())


def test_real_frames(shared_data: Path):
    clip = opened(shared_data / "davis_mini6" / "JPEGImages" / "480p" / "dog").clip
    numbers, frames, bad = frames_of(clip)
    assert (numbers, bad) == (list(range(60)), [])
    assert {frame.size for frame in frames} == {(854, 480)}
