"""`dino data` on folders of small images: what it prints, writes and returns."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from programs import run_program

from dino_lightning.cli.main import main
from dino_lightning.data.sources.detect import detect_source


def draw(path: Path, *, seed: int, size: tuple[int, int] = (48, 40), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of valid images with a validation split."""
    root = tmp_path / "photos"
    for index in range(6):
        draw(root / "train" / ("cat" if index < 2 else "dog") / f"{index}.jpg", seed=index)
        draw(root / "val" / ("cat" if index < 2 else "dog") / f"{index}.jpg", seed=100 + index)
    return root


def run(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["data", *map(str, words), "workers=0"])
    done = capsys.readouterr()
    return status, done.out, done.err


def test_check_of_good_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    status, text, _ = run("check", photos, f"output={output}", capsys=capsys)
    assert status == 0
    assert "6 train, 6 val" in text
    assert "all 48 × 40 px" in text
    assert "12  JPEG RGB" in text
    assert "2 classes, from 2 (cat) to 4 (dog) images" in text
    assert "exact copies in train: 0 of 6 images" in text
    assert text.rstrip().endswith("Nothing to set.")
    assert [path.name for path in output.iterdir()] == ["crops.png"]
    sheet = Image.open(output / "crops.png")
    cell = 112 + 6
    assert sheet.width == 2 * cell + 6  # the two global crops of experiment=photos32
    assert sheet.height >= 6 * cell


def test_check_lists_all_problems(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cats = photos / "train" / "cat"
    (cats / "same.jpg").write_bytes((photos / "train" / "dog" / "5.jpg").read_bytes())
    (photos / "val" / "cat" / "known.jpg").write_bytes((cats / "0.jpg").read_bytes())
    (cats / "cut.jpg").write_bytes((cats / "1.jpg").read_bytes()[:700])
    (cats / "empty.png").touch()
    Image.fromarray(np.array([[5, 3000]], np.uint16)).save(cats / "deep.png")
    exif = Image.Exif()
    exif[274] = 8
    draw(cats / "turned.jpg", seed=50, exif=exif)
    draw(cats / "small.png", seed=51, size=(20, 90))

    output = tmp_path / "out"
    status, text, _ = run("check", photos, f"output={output}", capsys=capsys)
    assert status == 1
    assert f"exact copies in train: 1 of 12 images\n{'':14}{photos / 'train' / 'dog' / '5.jpg'} = " in text
    assert "val images that are also in train: 1 of 7" in text
    assert f"{photos / 'val' / 'cat' / 'known.jpg'} = {cats / '0.jpg'}" in text
    assert "1 image (6.2%) smaller than crops.global_size=32" in text
    assert "20 / 40 / 40 px, the shorter side" in text
    assert "1 image with an EXIF rotation, not applied" in text
    assert f"broken      3, see {output / 'bad_images.txt'}" in text
    lines = (output / "bad_images.txt").read_text().splitlines()
    named = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    assert named[str(cats / "empty.png")] == "the file is empty"
    assert named[str(cats / "deep.png")] == "16-bit image; set data.value_range, such as [0,65535]"
    assert "truncated" in named[str(cats / "cut.jpg")].lower()
    assert len(named) == 3
    _, advice = text.split("to set:")
    assert "data.value_range=[0,4095]" in advice
    assert "data.apply_exif_rotation=true" in advice
    assert "remove copies from val" in advice


def test_a_later_check_removes_the_list_of_bad_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = photos / "train" / "cat" / "empty.png"
    broken.touch()
    output = tmp_path / "out"
    status, text, _ = run("check", photos, f"output={output}", capsys=capsys)
    assert status == 1
    assert "data.max_bad_share=1" in text
    broken.unlink()
    assert run("check", photos, f"output={output}", capsys=capsys)[0] == 0
    assert not (output / "bad_images.txt").exists()


def test_check_and_stats_of_five_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = tmp_path / "scans", tmp_path / "out"
    root.mkdir()
    for index in range(3):
        array = np.random.default_rng(index).integers(0, 900, (40, 40, 5)).astype(np.uint16)
        tifffile.imwrite(root / f"{index}.tif", array, photometric="minisblack", planarconfig="contig")
    status, text, _ = run("check", root, f"output={output}", capsys=capsys)
    assert status == 1
    assert "data.value_range=[0,1023]" in text
    assert "data.channels=5" in text
    assert not (output / "crops.png").exists()
    settings = ("data.channels=5", "data.value_range=[0,1023]")
    status, text, _ = run("check", root, f"output={output}", *settings, capsys=capsys)
    assert status == 0
    assert text.rstrip().endswith("Nothing to set.")
    assert (output / "crops.png").exists()
    status, text, _ = run("stats", root, *settings, capsys=capsys)
    assert text.count(",") == 4 + 4 + 1  # five numbers each, and one comma in the heading
    assert "ImageNet" not in text


def test_stats(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run("stats", photos, capsys=capsys)
    assert status == 0
    values = np.concatenate(
        [np.asarray(Image.open(path)).reshape(-1, 3) for path in (photos / "train").rglob("*.jpg")]
    ).astype(float)
    lines = dict(line.split("=") for line in text.splitlines() if line.startswith("crops."))
    for key, expected in (("crops.mean", values.mean(0) / 255), ("crops.std", values.std(0) / 255)):
        np.testing.assert_allclose([float(v) for v in lines[key].strip("[]").split(",")], expected, atol=5e-5)
    assert text.startswith("# 6 of 6 training images")
    assert "ImageNet's, the default: [0.485,0.456,0.406] and [0.229,0.224,0.225]" in text
    _, sampled, _ = run("stats", photos, "images=2", capsys=capsys)
    assert sampled.startswith("# 2 of 6 training images")
    assert sampled == run("stats", photos, "images=2", capsys=capsys)[1]  # the seed selects them
    assert sampled != run("stats", photos, "images=2", "seed=1", capsys=capsys)[1]


def test_detect_source_by_path_and_content(photos: Path, tmp_path: Path) -> None:
    assert detect_source(str(photos)) == "folder"
    for name, expected in (
        ("a.csv", "listing"),
        ("a.txt", "listing"),
        ("a.TSV", "listing"),
        ("a.zip", "archive"),
        ("a.tar", "archive"),
        ("a.parquet", "parquet"),
        ("nowhere", "folder"),
    ):
        assert detect_source(str(tmp_path / name)) == expected
    for inside, expected in (("data/train-0.parquet", "parquet"), ("n01.tar", "archive"), ("state.json", "parquet")):
        folder = tmp_path / f"of {expected} {inside[:2]}"
        (folder / inside).parent.mkdir(parents=True)
        (folder / "README.md").touch()
        (folder / inside).touch()
        assert detect_source(str(folder)) == expected


def test_stats_of_archives_and_lists(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((photos / "train").rglob("*.jpg"))
    archive, table = tmp_path / "a,b = c.zip", tmp_path / "list.csv"  # Hydra's grammar does not allow this path
    with zipfile.ZipFile(archive, "w") as file:
        for path in files:
            file.write(path, path.relative_to(photos))
    table.write_text("path\n" + "".join(f"{path}\n" for path in files[:4]))
    assert "# 6 of 6" in run("stats", archive, f"data.cache_dir={tmp_path}", "data.holdout=0", capsys=capsys)[1]
    assert "# 4 of 4" in run("stats", table, f"data.cache_dir={tmp_path}", capsys=capsys)[1]
    assert "# 6 of 6" in run("stats", "data=folder", photos / "train", "data.holdout=0", capsys=capsys)[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["check"], "expected one PATH and settings such as data.channels=1, got: nothing"),
        (["check", "a", "b"], "expected one PATH"),
        (["check", "/nowhere-at-all"], "data.path=/nowhere-at-all does not exist"),
        (["check", "x", "data.chanels=1"], "data.chanels is not a key of the configuration"),
        (["check", "x", "data=foldr"], "data=foldr is not an option of data; did you mean 'folder'?"),
        (["x", "--images"], "--images: settings are written key=value, without dashes; write images=…"),
        (["check", "x", "data=builtin"], "this data has no PATH; leave out 'x'"),
        (["check", "data=folder"], "data.path has no value"),
        (
            ["check", "some", "data.value_range=[5,1]"],
            "data.value_range=[5.0,1.0]: expected two numbers, the smaller first.",
        ),
        (["stats", "some", "images=0"], "images=0"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "some" / "a.png", seed=0)
    status, text, error = run(*(word.replace("some", "some") for word in words), capsys=capsys)
    assert status == 2
    assert error.startswith("dino data: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert text == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some"]


def test_the_command_with_loader_processes_and_the_default_output(photos: Path, tmp_path: Path) -> None:
    """The default output is a folder named after the data."""
    (photos / "train" / "cat" / "cut.jpg").write_bytes((photos / "train" / "cat" / "1.jpg").read_bytes()[:-9])
    words = ["data", "check", str(photos), "workers=2", "crops.local_count=3"]
    done = run_program("dino_lightning", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip() == ""  # earlier versions of rich print empty lines after an empty progress bar
    assert "dino-data-photos/bad_images.txt" in done.stdout
    assert Image.open(tmp_path / "dino-data-photos" / "crops.png").width == 5 * (112 + 6) + 6
