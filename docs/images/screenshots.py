"""Take the screenshots for docs/report.md from the runs of these two commands:

    dino train data.train_images=2000 data.val_images=300 trainer.max_epochs=8 \
        callbacks.pictures.every_n_epochs=1 cpu_threads=1 output_dir=outputs/screenshots/quick
    dino train --multirun optim.lr=0.002,0.008 data.train_images=1200 data.val_images=300 \
        trainer.max_epochs=6 callbacks.pictures.every_n_epochs=2 cpu_threads=1 output_dir=outputs/screenshots/lr
    python docs/images/screenshots.py outputs/screenshots          # needs the browser extra and Chromium
"""

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from dino_lightning.cli.report import write

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests" / "helpers"))
from browser import launched  # noqa: E402

WIDTH, HEIGHT = 1120, 800


def main(folder: Path) -> None:
    """Save `report_run.webp` (light) and `report_runs.webp` (dark), both with the pointer on a step."""
    with launched() as browser:
        save(screenshot(browser, write([str(folder / "quick")]), "Training loss", "light"), "report_run")
        save(screenshot(browser, write([str(folder / "lr")]), "Training loss: one step", "dark"), "report_runs")


def screenshot(browser: Any, page: Path, chart: str, scheme: str) -> bytes:
    """Return a PNG of the page, scrolled to its curves."""
    opened = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
    opened.goto(page.resolve().as_uri())
    opened.locator("#tools").evaluate("form => window.scrollTo(0, form.getBoundingClientRect().top + scrollY - 16)")
    heading = opened.get_by_role("heading", name=chart, exact=True)
    box = opened.locator(".chart").filter(has=heading).locator(".plot").bounding_box()
    opened.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    opened.wait_for_timeout(200)
    return opened.screenshot()


def save(png: bytes, name: str) -> None:
    """Save the PNG as WebP, which needs a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").save(HERE / f"{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
