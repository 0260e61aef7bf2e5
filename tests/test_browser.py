"""The page of scripts.report in headless Chromium, where there is one: no console message, every picture shown."""

import base64
import re
import shutil
import subprocess

import matplotlib.image
import pytest
from test_report import drawn, files  # noqa: F401 (fixtures)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH: apt-get install chromium")

ASK = """<script>onload = () => document.body.dataset.pictures =
[...document.images].map(image => image.complete && image.naturalWidth).join(" ")</script>"""


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a page and returns (console messages, the document after its scripts ran)."""

    def run(page, *flags):
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                *flags,
                f"--user-data-dir={tmp_path / 'profile'}",
                "--enable-logging=stderr",
                "--virtual-time-budget=5000",
                "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout

    return run


def test_a_browser_shows_every_picture_of_the_page_and_complains_of_nothing(drawn, files, browse, tmp_path):  # noqa: F811
    _, text, folder = drawn(*files())
    messages, _ = browse(folder / "index.html")
    assert messages == []
    asking = tmp_path / "asking.html"
    asking.write_text(text + ASK, encoding="utf-8")
    messages, document = browse(asking)
    widths = re.search(r'data-pictures="([\d ]*)"', document)[1].split()
    assert messages == [] and len(widths) == text.count("<img") > 2 and "0" not in widths

    screen = tmp_path / "screen.png"
    browse(folder / "index.html", f"--screenshot={screen}", "--window-size=1000,3000")
    seen = matplotlib.image.imread(screen)[..., :3]
    assert len({tuple(pixel) for pixel in seen[::7, ::7].reshape(-1, 3).tolist()}) > 50


def test_a_page_with_mistakes_is_told_from_one_without(browse, tmp_path):
    page, broken = tmp_path / "page.html", base64.b64encode(b"no picture").decode()
    page.write_text(f"<img src='data:image/png;base64,{broken}'><script>nothing.there()</script>{ASK}")
    messages, document = browse(page)
    assert "nothing is not defined" in messages[0] and 'data-pictures="0"' in document
