"""The pictures of docs/report.md, from two commands' runs:

    python train.py data.train_images=2000 data.val_images=300 trainer.max_epochs=8 \
        callbacks.pictures.every_n_epochs=1 cpu_threads=1 output_dir=outputs/shown/quick
    python train.py --multirun optim.lr=0.002,0.008 data.train_images=1200 data.val_images=300 \
        trainer.max_epochs=6 callbacks.pictures.every_n_epochs=2 cpu_threads=1 output_dir=outputs/shown/lr
    python docs/images/screenshots.py outputs/shown          # with the browser extra and a Chromium
"""

import io
import sys
from pathlib import Path
from typing import Any

from dino_lightning.report_runs import write
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "unit"))
from browser import launched  # noqa: E402

WIDTH, HEIGHT = 1120, 800


def main(folder: Path) -> None:
    """`report_run.webp`, light, and `report_runs.webp`, dark, both while a step is pointed at."""
    with launched() as browser:
        save(shown(browser, write([str(folder / "quick")]), "Training loss", "light"), "report_run")
        save(shown(browser, write([str(folder / "lr")]), "Training loss: one step", "dark"), "report_runs")


def shown(browser: Any, page: Path, chart: str, scheme: str) -> bytes:
    """A PNG of the page from its curves on."""
    opened = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
    opened.goto(page.resolve().as_uri())
    opened.locator("#tools").evaluate("form => window.scrollTo(0, form.getBoundingClientRect().top + scrollY - 16)")
    heading = opened.get_by_role("heading", name=chart, exact=True)
    box = opened.locator(".chart").filter(has=heading).locator(".plot").bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    opened.wait_for_timeout(200)
    return opened.screenshot()


def save(png: bytes, name: str) -> None:
    """As WebP, which needs a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").save(HERE / f"{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
