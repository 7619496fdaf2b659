"""The report, parsed as a browser would, against the files it is made from."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from report_cases import CONFIG, SUMMARY, Page, draw, rows, write_metrics
from rich.console import Console

from dino_lightning.errors import UserError
from dino_lightning.report import results_table, write_report
from dino_lightning.report.curves import MAX_POINTS, downsample
from dino_lightning.report.gallery import MAX_EPOCHS

LOADING = {"src", "srcset", "href", "action", "poster", "data", "xlink:href"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_metrics(tmp_path, rows())
    draw(tmp_path, "attention", "neighbors", "crops", "attention_epoch0010", "attention_epoch0002")
    return tmp_path


def test_is_one_file_that_loads_nothing(run: Path):
    report = write_report(run)
    assert report == run / "report.html"
    assert not list(run.glob("*.tmp"))
    page = Page(report)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in LOADING & attributes.keys():
            assert str(attributes[name]).startswith("data:image/webp;base64,"), (tag, name)
    assert not re.search(r"url\(|@import", page.css)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|WebSocket", page.scripts[2])
    # The only address is the name of the SVG namespace; and the page forbids the browser to load anything.
    assert set(re.findall(r"https?://[^\"'\s<]*", page.source)) == {"http://www.w3.org/2000/svg"}
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")


def test_is_accessible(run: Path):
    page = Page(write_report(run))
    assert page.all("html")[0]["lang"] == "en"
    assert all(len(str(image["alt"])) > 10 for image in page.all("img"))
    assert all(plot["aria-label"] for plot in page.all("div") if plot.get("class") == "plot")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)


def test_pictures_are_those_of_the_folder(run: Path):
    page = Page(write_report(run))
    images = page.all("img")
    expected = ["attention_epoch0002", "attention_epoch0010", "attention", "neighbors", "crops"]
    for image, name in zip(images, expected, strict=True):
        decoded = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
        # WebP keeps a plain color but for rounding; those of the pictures lie further apart.
        np.testing.assert_allclose(decoded, Image.open(run / "pictures" / f"{name}.png"), atol=4)
    assert [place for place, frame in enumerate(frames(page)) if "now" in str(frame["class"])] == [2, 3, 4]


def frames(page: Page) -> list[dict[str, str | None]]:
    """What a slider chooses from, in the order of the page."""
    return [span for span in page.all("span") if str(span.get("class")).startswith("frame")]


def test_wide_pictures_are_made_smaller(run: Path):
    Image.new("RGB", (3000, 60)).save(run / "pictures" / "crops.png")
    image = Page(write_report(run)).all("img")[-1]
    assert (image["width"], image["height"]) == ("1400", "28")


def test_long_sheets_stay_within_the_limit_of_webp(run: Path):
    Image.new("RGB", (400, 32766)).save(run / "pictures" / "crops.png")
    image = Page(write_report(run)).all("img")[-1]
    assert (image["width"], image["height"]) == ("200", "16383")


def test_a_broken_picture_is_reported_and_left_blank(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "pictures" / "crops.png").write_bytes(b"no picture")
    assert len(Page(write_report(run)).all("img")) == 5
    assert "crops.png cannot be read" in capsys.readouterr().err


def test_of_many_epochs_the_first_the_last_and_some_between_are_shown(run: Path):
    draw(run, *(f"neighbors_epoch{epoch:04d}" for epoch in range(10, 300, 10)))
    page = Page(write_report(run))
    slider = next(box for box in page.all("input") if "alike" in str(box.get("aria-label")))
    epochs = str(slider["data-stops"]).split(" ")
    assert len(epochs) == MAX_EPOCHS
    assert (epochs[0], epochs[-1]) == ("10", "")


def test_an_unfinished_run_shows_its_latest_epoch(run: Path):
    (run / "pictures" / "attention.png").unlink()
    page = Page(write_report(run))
    assert [frame["data-epoch"] for frame in frames(page) if frame["class"] == "frame now"] == ["10", "", ""]


def test_figures_are_those_of_the_summary(run: Path):
    page = Page(write_report(run))
    keys = ["knn_top1_pixels", "knn_top1_untrained", "knn_top1"]
    assert [float(str(data["value"])) for data in page.all("data")] == [SUMMARY[key] for key in keys]
    widths = [str(span["style"]) for span in page.all("span") if span.get("class") == "bar"]
    assert widths == ["width:27.67%", "width:53.92%", "width:76.67%"]
    for shown in (
        "76.7 %",
        "22.8 points more than",
        "53.9 %",
        "27.7 %",
        "1,395 steps",
        "15 epochs",
        "1,312.4 images/s",
        "3f2a9c1e8b and changes",
        "ViT: 2 blocks, width 64, patch 8",
        "20 most similar",
    ):
        assert shown in page.text
    assert "Unreadable images" not in page.text


def test_curves_are_those_of_the_metrics(run: Path):
    curves = Page(write_report(run)).curves()
    names = {
        "one step": "train/loss",
        "mean of the epoch": "train/loss_epoch",
        "top-1": "knn/top1",
        "k = 10": "knn/top1_k10",
        "learning rate": "schedule/lr",
        "one crop": "collapse/teacher_entropy",
        "mean output": "collapse/mean_output_entropy",
        "directions": "collapse/effective_rank",
        "dead": "collapse/dead_prototypes",
        "alarm": "collapse/alarm",
    }
    for name, column in names.items():
        assert curves[name] == [[row["step"], row[column]] for row in rows() if column in row]
    assert "momentum" not in curves


def test_order_starts_with_loss_and_knn(run: Path):
    page = Page(write_report(run))
    titles = re.findall(r"<h4>([^<]*)</h4>", page.source.partition('id="learning"')[2])
    assert titles[:2] == ["Training loss", "k-NN accuracy"]
    assert len(titles) == len(page.data["charts"])


def test_reference_lines(run: Path):
    lines = Page(write_report(run)).references()
    assert lines["ln 256: all prototypes alike"] == pytest.approx(math.log(256))
    assert lines["ln 256: one prototype"] == pytest.approx(math.log(256))
    assert lines["1/√D: evenly spread"] == pytest.approx(1 / 8)
    assert lines["alarm"] in (pytest.approx(1 / 64), 2.0)
    assert lines["untrained, top-1"] == SUMMARY["knn_top1_untrained"]
    assert lines["raw pixels, top-1"] == SUMMARY["knn_top1_pixels"]


def test_a_collapse_is_reported_above_its_curves(run: Path):
    assert "ollapse:" not in Page(write_report(run)).text
    assert "A collapse was detected" not in Page(write_report(run)).text
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "collapse": "uniform at step 120"}))
    first, _, signs = Page(write_report(run)).text.partition("Signs of collapse")
    assert "A collapse was detected (uniform at step 120)" in first
    assert "Collapse: uniform at step 120." in signs


def test_all_signals_have_a_chart_of_their_own_section(run: Path):
    page = Page(write_report(run))
    assert "Everything else" not in page.text
    section = page.source.partition('id="signs-of-collapse"')[2].partition("</section>")[0]
    titles = [
        "Entropy of the teacher",
        "Teacher against student",
        "Mean output against uniform",
        "Dead prototypes",
        "Spread of the features",
        "Effective rank of the features",
        "Alarm",
    ]
    assert re.findall(r"<h4>([^<]*)</h4>", section) == titles


def test_epochs_are_counted_from_one(run: Path):
    assert Page(write_report(run)).data["epochs"] == [[9, 1], [109, 2], [209, 3], [309, 4]]


def test_repeated_steps_and_values_that_are_no_numbers(run: Path):
    values = [(1, 5.0), (2, 4.0), (3, "nan"), (2, 3.5), (4, "inf"), (5, "3.0")]
    write_metrics(run, [{"step": step, "train/loss": value} for step, value in values])
    assert Page(write_report(run)).curves() == {"one step": [[1, 5.0], [2, 3.5], [5, 3.0]]}


def test_unknown_columns_get_a_chart(run: Path):
    write_metrics(run, [{"step": step, "mine/<b>": 10.0**step} for step in range(5)])
    page = Page(write_report(run))
    assert page.curves() == {"mine/<b>": [[step, 10.0**step] for step in range(5)]}
    assert "mine/<b>" in page.text
    assert "checked" in next(box for box in page.all("input") if box["type"] == "checkbox")  # a logarithmic axis


def test_thinning_keeps_ends_and_spikes():
    rng = np.random.default_rng(0)
    curve = [(step, float(value)) for step, value in enumerate(rng.normal(size=50_000))]
    curve[12_345], curve[40_000] = (12_345, 99.0), (40_000, -99.0)
    kept = downsample(curve)
    assert len(kept) <= MAX_POINTS
    assert set(kept) <= set(curve)
    assert {curve[0], curve[-1], curve[12_345], curve[40_000]} <= set(kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert downsample(curve[:MAX_POINTS]) == curve[:MAX_POINTS]


HOSTILE = "</script></pre></details><img src=x onerror=alert(1)>{{data}}\"'&amp;\u2028"


def test_hostile_text_stays_text(run: Path):
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "experiment": HOSTILE, "backbone": {"name": HOSTILE}}))
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "experiment": HOSTILE, "seed": HOSTILE, "commit": "<i>"}))
    write_metrics(run, [{"step": 1, HOSTILE: 1.0}])
    draw(run, "<img src=x onerror=alert(1)>&quot;")
    page = Page(write_report(run))
    assert len(page.all("script")) == 3
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert all(str(image["src"]).startswith("data:image/webp") for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 4  # title, network, seed, chart
    assert page.curves() == {HOSTILE: [[1, 1.0]]}
    assert (run / "config.yaml").read_text() in page.text


def test_the_configuration_is_complete_and_folded(run: Path):
    page = Page(write_report(run))
    assert (run / "config.yaml").read_text() in page.text
    assert "open" not in page.all("details")[0]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("summary.json", "There are no k-NN figures: the images have no labels, or"),
        ("config.yaml", "The configuration is unknown: config.yaml is missing."),
        ("metrics.csv", "There are no curves: metrics.csv is missing or empty."),
        (
            "pictures/attention.png pictures/attention_epoch0002.png pictures/attention_epoch0010.png",
            "There are no attention maps",
        ),
    ],
)
def test_missing_files_are_reported(run: Path, missing: str, sentence: str):
    assert sentence not in Page(write_report(run)).text
    for name in missing.split():
        (run / name).unlink()
    assert sentence in Page(write_report(run)).text


def test_an_empty_folder_has_a_report(tmp_path: Path):
    page = Page(write_report(tmp_path))
    assert tmp_path.name in page.text
    assert page.data["charts"] == []
    assert "nothing to judge it by" in page.text
    assert "There are no pictures: the run has drawn none." in page.text


@pytest.mark.parametrize("name", ["knn", "pictures"])
def test_disabled_features_are_reported(tmp_path: Path, name: str):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"callbacks": {name: {"enabled": False}}}))
    assert f"callbacks.{name}.enabled is false." in Page(write_report(tmp_path)).text


def test_without_baselines_only_the_trained_figure_is_shown(run: Path):
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "knn_top1_untrained": None, "knn_top1_pixels": None}))
    page = Page(write_report(run))
    assert [data["value"] for data in page.all("data")] == [repr(SUMMARY["knn_top1"])]
    assert "Not evaluated: raw pixels, untrained network." in page.text
    assert " points more than" not in page.text
    assert not [label for label in page.references() if "top-1" in label]


def test_broken_files_are_named(run: Path):
    (run / "config.yaml").write_text("a: [1, <2\n")
    assert "a: [1, <2" in Page(write_report(run)).text
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json: expected JSON"):
        write_report(run)
    with pytest.raises(UserError, match="expected the folder of a run"):
        write_report(run / "nowhere")


def test_results_table_has_the_three_figures():
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(results_table(SUMMARY))
    console.print(results_table({"knn_top1": None}))
    shown = console.export_text()
    for name, figure in [("Raw pixels", "27.7 %"), ("Untrained network", "53.9 %"), ("Trained network", "76.7 %")]:
        assert re.search(rf"{name}\s+\W\s+{figure}", shown)
    assert shown.count("not evaluated") == 3
