"""The report in a real browser: interaction and display, compared with the files of the runs."""

import csv
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import launched
from report_cases import CONFIG, SUMMARY, draw, rows, write_metrics
from slow_params import first

from dino_lightning.cli.report import write

LOSS, KNN = "Training loss", "k-NN accuracy"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the page of one and the page of both."""
    above = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("a", "b")):
        run = above / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "optim": {"lr": 0.001 * (1 + number)}}))
        (run / "summary.json").write_text(json.dumps(SUMMARY))
        write_metrics(
            run,
            [
                {**row, "train/loss": row.get("train/loss", 0) + number} if "train/loss" in row else row
                for row in rows()
            ],
        )
        draw(run, "attention_epoch0001", "attention_epoch0003", "attention", "pca", "crops")
    write([str(above / "a")])
    write([str(above)])
    return above


class Seen:
    """An open page, with its console messages and requests."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        options = {"viewport": {"width": 1200, "height": 900}, **context}
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if context.get("java_script_enabled", True):
            self.settle()

    def settle(self) -> None:
        """Wait until the page is drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def chart(self, title: str) -> Any:
        return self.page.locator(".chart").filter(has=self.page.get_by_role("heading", name=title, exact=True))

    def scroll_to(self, title: str) -> dict[str, float]:
        """The position of a chart, which is drawn when it comes into view."""
        plot = self.chart(title).locator(".plot")
        plot.scroll_into_view_if_needed()
        self.settle()
        return plot.bounding_box()

    def point_at(self, title: str, step: int) -> tuple[str, list[str]]:
        """Move the mouse to a step of a chart; returns the text above the chart and the values of its legend."""
        box = self.scroll_to(title)
        self.page.mouse.move(box["x"] + self.x(title, step), box["y"] + 100)
        self.settle()
        return self.chart(title).locator(".at").inner_text(), self.chart(title).locator(".key b").all_inner_texts()

    def x(self, title: str, step: float) -> float:
        """Pixels from the left of the chart, computed from the visible axis."""
        marks = (
            self.chart(title)
            .locator("svg text[text-anchor=middle]")
            .evaluate_all(
                "marks => marks.map(mark => [Number(mark.textContent.replaceAll(',', '')), mark.x.baseVal[0].value])"
            )
        )
        (low, left), (high, right) = marks[0], marks[-1]
        return left + (step - low) / (high - low) * (right - left)

    def path(self, title: str) -> str:
        return self.chart(title).locator("path.line").last.get_attribute("d") or ""

    def scale(self, title: str) -> list[str]:
        return self.chart(title).locator("svg text[text-anchor=end]").all_text_contents()


@pytest.fixture(scope="module")
def page_of_one_run(browser: Any, folder: Path) -> Iterator[Seen]:
    seen = Seen(browser, folder / "a" / "report.html")
    yield seen
    seen.context.close()


@pytest.fixture
def one(page_of_one_run: Seen) -> Iterator[Seen]:
    """The same page for all tests, which undo the settings that they change."""
    page_of_one_run.page.mouse.move(0, 0)
    yield page_of_one_run
    assert page_of_one_run.said == []


@pytest.fixture
def both(browser: Any, folder: Path) -> Iterator[Seen]:
    seen = Seen(browser, folder / "report.html")
    yield seen
    assert seen.said == []
    seen.context.close()


def column(run: Path, name: str) -> dict[int, float]:
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.mark.parametrize("name", ["a/report.html", "report.html"])
def test_opens_without_network_and_draws_every_chart(browser: Any, folder: Path, name: str):
    seen = Seen(browser, folder / name)
    assert seen.said == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [(folder / name).as_uri()]
    assert seen.page.locator(".chart").count() > 10
    assert seen.page.locator(".chart:not(:has(path.line[d*=L]))").count() == 0
    assert seen.page.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    seen.context.close()


@pytest.mark.slow
def test_the_mouse_shows_the_values_of_the_metrics(one: Seen, folder: Path):
    loss, mean = (column(folder / "a", name) for name in ("train/loss", "train/loss_epoch"))
    for step in (9, 109, 219, 399):
        at, values = one.point_at(LOSS, step)
        assert at == f"step {step} · epoch {step // 100 + 1}"
        expected = [next(each[s] for s in sorted(each, key=lambda s: abs(s - step))) for each in (loss, mean)]
        assert [float(value) for value in values] == pytest.approx(expected, rel=1e-4)
    # All charts show the same step.
    assert "step 399" in one.chart(KNN).locator(".at").inner_text()


def test_arrow_keys_show_values(one: Seen, folder: Path):
    plot = one.chart("Learning rate").locator(".plot")
    plot.focus()
    plot.press("Home")
    plot.press("ArrowRight")
    one.settle()
    rate = column(folder / "a", "schedule/lr")
    assert one.chart("Learning rate").locator(".at").inner_text() == "step 19 · epoch 1"
    assert float(one.chart("Learning rate").locator("b").inner_text()) == pytest.approx(rate[19], rel=1e-4)
    assert plot.evaluate("plot => plot.closest('figure').querySelector('output').ariaLive") == "polite"


def test_dragging_zooms_and_a_double_click_resets(one: Seen):
    plot = one.chart(LOSS).locator(".plot")
    box = one.scroll_to(LOSS)
    ends = [one.x(LOSS, step) for step in (100, 200)]
    whole = one.path(LOSS)
    one.page.mouse.move(box["x"] + ends[0], box["y"] + 90)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + ends[1], box["y"] + 110)
    one.page.mouse.up()
    one.settle()
    shown = [int(one.page.locator(f"#tools [name={name}]").input_value()) for name in ("from", "to")]
    assert shown == [pytest.approx(100, abs=2), pytest.approx(200, abs=2)]
    assert one.path(LOSS) != whole
    at, _ = one.point_at(KNN, 199)
    assert at.startswith("step 199")
    plot.dblclick()
    assert one.path(LOSS) == whole


def test_a_range_of_steps_can_be_typed(one: Seen):
    whole = one.scale("Training loss")
    one.page.fill("#tools [name=from]", "300")
    one.page.press("#tools [name=from]", "Tab")
    scale = [float(text) for text in one.scale("Training loss") if "." in text]
    loss = [5.5 - step / 200 for step in range(309, 400, 10)]
    assert min(scale) >= min(loss) - 0.1
    assert max(scale) <= max(loss) + 0.5
    one.page.get_by_role("button", name="All steps").click()
    assert one.scale("Training loss") == whole


def test_a_logarithmic_axis(one: Seen):
    box = one.chart("Mean output against uniform").get_by_label("log")
    one.scroll_to("Mean output against uniform")
    linear, before = one.scale("Mean output against uniform"), one.path("Mean output against uniform")
    box.check()
    assert {"0.1", "1"} <= set(one.scale("Mean output against uniform"))
    assert one.scale("Mean output against uniform") != linear
    assert one.path("Mean output against uniform") != before
    box.uncheck()
    assert one.path("Mean output against uniform") == before


def test_a_legend_hides_its_curve(one: Seen):
    key = one.chart(LOSS).get_by_role("button", name="one step")
    assert one.chart(LOSS).locator("path.line").count() == 2
    key.click()
    assert key.get_attribute("aria-pressed") == "false"
    assert one.chart(LOSS).locator("path.line").count() == 1
    assert one.chart("Learning rate").locator("path.line").count() == 1
    key.click()
    assert one.chart(LOSS).locator("path.line").count() == 2


def test_smoothing_is_the_mean_around_a_step(one: Seen, folder: Path):
    loss = column(folder / "a", "collapse/alarm")
    slider = one.page.locator("#tools [name=smooth]")
    slider.fill("10")
    assert one.page.locator("#tools output").inner_text() == "10 % of steps"
    _, values = one.point_at("Alarm", 309)
    half = 0.10 * (399 - 9) / 2
    around = [value for step, value in loss.items() if abs(step - 309) <= half]
    mean = one.chart("Alarm").locator("small").inner_text()
    assert 0 < sum(around) / len(around) < 1
    assert float(mean.removeprefix("mean ")) == pytest.approx(sum(around) / len(around), rel=1e-4)
    assert [float(value) for value in values] == [loss[309]]
    slider.fill("0")
    assert one.chart("Alarm").locator("small").inner_text() == ""


def test_a_slider_goes_through_the_epochs(one: Seen):
    figure = one.page.locator(".sheet").filter(has_text="Where the network looks")
    shown = figure.locator("img:visible")
    assert [shown.count(), shown.get_attribute("alt")[-13:]] == [1, "after the end"]
    slider = figure.get_by_role("slider")
    slider.focus()
    slider.press("Home")
    assert shown.get_attribute("alt").endswith("after epoch 1")
    slider.press("ArrowRight")
    assert shown.get_attribute("alt").endswith("after epoch 3")
    assert slider.get_attribute("aria-valuetext") == "epoch 3"


@pytest.mark.slow
def test_a_key_hides_a_run_in_all_charts(both: Seen, folder: Path):
    _, values = both.point_at("Training loss: one step", 209)
    expected = [column(folder / name, "train/loss")[209] for name in ("a", "b")]
    assert [float(value) for value in values] == pytest.approx(expected, rel=1e-4)
    assert values[0] != values[1]
    strokes = (
        both.chart("Training loss: one step")
        .locator("path.line")
        .evaluate_all("lines => lines.map(line => getComputedStyle(line).stroke)")
    )
    assert len(set(strokes)) == 2
    both.page.locator("#tools").get_by_role("button", name="b (lr=0.002)").click()
    counts = set()
    for i in range(both.page.locator(".chart").count()):
        both.page.locator(".plot").nth(i).scroll_into_view_if_needed()
        both.settle()
        counts.add(both.page.locator(".plot").nth(i).locator("path.line").count())
    assert counts == {1}


@pytest.mark.parametrize("name", ["a/report.html", "report.html"])
@pytest.mark.slow_after_first(1)
def test_a_phone_needs_no_scrolling_to_the_side(browser: Any, folder: Path, name: str):
    seen = Seen(browser, folder / name, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    small = seen.page.locator(":is(button, input, summary):visible").evaluate_all(
        "all => all.filter(one => one.getBoundingClientRect().width < 12 || one.getBoundingClientRect().right > 361)"
        ".filter(one => !one.closest('.wide, .view')).map(one => one.outerHTML)"
    )
    assert small == []
    seen.context.close()


CONTRASTS = (Path(__file__).parents[1] / "helpers" / "contrasts.js").read_text()


@pytest.mark.parametrize(("scheme", "name"), first(product(("dark", "light"), ("report.html", "a/report.html"))))
def test_contrast_is_that_of_wcag_aa(browser: Any, folder: Path, scheme: str, name: str):
    seen = Seen(browser, folder / name, color_scheme=scheme)
    found = seen.page.evaluate(CONTRASTS)
    assert found["page"] == {"light": "rgb(247, 247, 244)", "dark": "rgb(20, 22, 26)"}[scheme]
    assert len(found["text"]) > 100
    assert [words for ratio, words in found["text"] if ratio < 4.5] == []
    assert len(found["drawn"]) > 10
    assert [words for ratio, words in found["drawn"] if ratio < 3] == []
    seen.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_every_color_of_a_run_has_enough_contrast(browser: Any, folder: Path, scheme: str):
    seen = Seen(browser, folder / "report.html", color_scheme=scheme)
    seen.page.evaluate(
        """() => { for (let i = 0; i < 10; i++) document.querySelector(".chart .keys").insertAdjacentHTML("beforeend",
            `<button class="key"><i style="border-top-color:var(--s${i})"></i></button>`) }"""
    )
    drawn = seen.page.evaluate(CONTRASTS)["drawn"]
    colors = [(ratio, words) for ratio, words in drawn if "border-top-color:var(--s" in words]
    assert len({words for _, words in colors}) >= 10
    assert min(ratio for ratio, _ in colors) >= 3
    seen.context.close()


def test_without_scripts_everything_is_there(browser: Any, folder: Path):
    seen = Seen(browser, folder / "report.html", java_script_enabled=False)
    charts = seen.page.locator(".chart")
    assert charts.count() == seen.page.locator(".chart .plot > svg:has(path.line)").count() > 10
    assert charts.first.locator("svg").bounding_box()["height"] > 100
    # No controls without effect; every epoch is shown, one below the other.
    assert seen.page.locator(":is(form, .script, input):visible").count() == 0
    assert seen.page.locator("img:visible").count() == seen.page.locator("img").count() == 10
    seen.context.close()


@pytest.mark.slow
def test_on_paper_colors_are_light_and_nothing_is_cut_off(browser: Any, folder: Path):
    seen = Seen(browser, folder / "report.html", color_scheme="dark")
    seen.page.emulate_media(media="print", color_scheme="dark")
    seen.page.set_viewport_size({"width": 718, "height": 1000})  # A4 with margins
    seen.settle()
    assert seen.page.evaluate("getComputedStyle(document.body).color") == "rgb(30, 33, 39)"
    assert seen.page.locator(":is(#tools, .epochs):visible").count() == 0
    right = seen.page.locator(".chart svg").evaluate_all(
        "all => Math.max(...all.map(s => s.getBoundingClientRect().right))"
    )
    assert right <= 718
    assert seen.page.pdf(format="A4")[:5] == b"%PDF-"
    seen.context.close()
