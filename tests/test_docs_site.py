"""The documentation site builds without a warning, its links work, and its pages load nothing from other hosts."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from slow_params import first

pytest.importorskip("mkdocs_jupyter", reason='the site needs pip install -e ".[docs]"')
pytest.importorskip("material", reason='the site needs pip install -e ".[docs]"')

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
QUESTIONS = [
    "Attention maps and masks",
    "Grayscale, 16-bit and multi-channel images",
    "The loss stays at 11.09",
    "Is DDP correct, and what does it cost?",
    "Export: ONNX, transformers, timm",
    "Small images, unusual aspect ratios, CIFAR",
    "Millions of images and streaming datasets",
    "Multiple GPUs without SLURM",
    "Which learning rate for my batch size?",
    "Multi-crop with a timm network",
    "My loss is NaN",
    "Training on one GPU with small batches",
    "My results differ from the paper",
    "Short runs: what the schedules do",
    "Slow data loading: the GPU waits for images",
    "Fine-tune or continue training from weights",
]
"""Questions of users; each has a how-to page."""
LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}


class Page(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("canonical", "next", "prev"):
            return
        self.loads += [values[key] for key in ("src", "href") if (tag, key) in LOADS and key in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI builds it; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DINO_REPOSITORY": "https://github.com/o/dino-lightning"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    remarks = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert (done.returncode, done.stdout, remarks) == (0, "", [])
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def navigation(node: Any) -> Iterator[tuple[str, str]]:
    """Title and file of each page."""
    for entry in node if isinstance(node, list) else []:
        for title, value in entry.items() if isinstance(entry, dict) else [("", entry)]:
            yield from navigation(value) if isinstance(value, list) else [(title, value)]


@pytest.fixture(scope="module")
def nav() -> dict[str, str]:
    """File of each page -> its title in the navigation."""

    class Loader(yaml.SafeLoader):
        """Ignores MkDocs' own tags."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    return {path: title for title, path in navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])}


def test_every_page_is_in_the_navigation(nav: dict[str, str]) -> None:
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(nav) == files | notebooks | {"CHANGELOG.md", "CONTRIBUTING.md"}


def test_every_question_has_a_page(nav: dict[str, str]) -> None:
    titles = {path: title for path, title in nav.items() if path.startswith("howto/") and "index" not in path}
    assert sorted(titles.values()) == sorted(QUESTIONS)
    index = (ROOT / "docs" / "howto" / "index.md").read_text()
    for path, title in titles.items():
        text = (ROOT / "docs" / path).read_text()
        assert text.startswith(f"# {title}\n")
        assert "```bash" in text
        assert "Asked in https://github.com/" in text
        assert 25 <= len(text.splitlines()) <= 60
        assert f"[{title}]({Path(path).name})" in index


def test_links_and_anchors_exist(site: Path, pages: dict[Path, Page]) -> None:
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":  # served for every address, so its links begin at the root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if target in pages and parts.fragment:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.relative_to(site)}: {link}"
            checked += 1
    assert checked > 1000


def test_links_to_the_repository_name_existing_files(pages: dict[Path, Page]) -> None:
    start = "https://github.com/o/dino-lightning/blob/HEAD/"
    links = {urlsplit(link)._replace(fragment="").geturl() for page in pages.values() for link in page.links}
    found = [link.removeprefix(start) for link in links if link.startswith(start)]
    assert "conf/hydra/launcher" in found
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_pages_load_nothing_from_other_hosts(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert [url for url in page.loads if urlsplit(url).netloc] == [], path.relative_to(site)
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text()


def test_the_site_contains_no_path_of_this_machine(site: Path) -> None:
    for path in site.rglob("*"):
        if path.suffix in (".html", ".json", ".xml", ".js", ".css"):
            assert str(ROOT) not in path.read_text(), path.relative_to(site)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of a server of the site, which the search needs."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from browser import launched

    with launched() as found:
        yield found


class Reader:
    """A page in the browser, with its console messages and requests."""

    def __init__(self, browser: Any, address: str, path: str, **context: Any) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = address
        self.page.goto(f"{address}/{path}", wait_until="networkidle")

    def close(self) -> None:
        """Check that there were no console messages and no requests to other hosts."""
        assert self.messages == []
        own = (self.address, "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(own)] == []
        self.context.close()


SEEN = {
    "": "Where to go",
    "tutorial/": "Your own images",
    "howto/nan/": "My loss is NaN",
    "api/mathematics/": "cross_view_entropy",
    "notebooks/train/": "Where the teacher looks",
    "configuration/": "method.teacher_momentum",
}
"""Page -> text on it."""


@pytest.mark.parametrize("path", first(SEEN))
def test_a_page_in_the_browser_and_at_a_phones_width(browser: Any, address: str, path: str) -> None:
    reader = Reader(browser, address, path)
    assert reader.page.locator("article").get_by_text(SEEN[path]).first.is_visible()
    assert reader.page.locator("img").evaluate_all("all => all.every(one => one.naturalWidth > 0)")
    reader.page.set_viewport_size({"width": 360, "height": 740})
    width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert reader.page.evaluate(width) <= 0
    reader.close()


def test_search_finds_a_page(browser: Any, address: str) -> None:
    reader = Reader(browser, address, "")
    reader.page.locator("input.md-search__input").click()
    box = reader.page.locator("input.md-search__input")
    box.click()  # which loads the index
    box.press_sequentially("stays at 11.09")
    result = reader.page.locator("a.md-search-result__link").first
    result.wait_for()
    assert "/howto/collapse/" in str(result.get_attribute("href"))
    reader.close()


@pytest.mark.parametrize("system", first(["dark", "light"]))
def test_the_scheme_follows_the_system_and_can_be_switched(browser: Any, address: str, system: str) -> None:
    reader = Reader(browser, address, "howto/nan/", color_scheme=system)
    background = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    )
    assert (reader.page.evaluate(background) > 600) == (system == "light")
    backgrounds = set()
    for _ in range(3):
        reader.page.locator("label[for^=__palette]:visible").click()
        backgrounds.add(reader.page.evaluate(background) > 600)
    assert backgrounds == {True, False}
    reader.close()
