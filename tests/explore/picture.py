"""The picture of a report that pages show: ``python -m tests.explore.picture demo/report docs/inspect.webp``."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.explore.test_browser import CHROMIUM, OPTIONS

WIDTH, HEIGHT = 1200, 860


def main(report: str, picture: str) -> None:
    """Photograph the gallery of a report."""
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(f"{Path(report, 'gallery.html').resolve().as_uri()}#tab=disagree", wait_until="networkidle")
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        browser.close()
    shot.save(picture, "WEBP", quality=80, method=6)
    print(f"{picture}: {Path(picture).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
