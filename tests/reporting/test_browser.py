"""In a browser, as people meet it: JupyterLab runs the first notebooks, a control redraws its figure, the report shows.

Needs Chromium and Playwright (``pip install 'faqd[browser]'``); skipped where there is none. ``FAQD_SCREENSHOTS`` names
a folder to keep pictures in.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from series_runs import NOTEBOOKS, environment, run

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'faqd[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.series,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
# All cells are kept in the page, and nothing is asked of the network.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings":
        '{"fetchNews": "false", "checkForUpdates": false}',
}  # fmt: skip
PATIENCE = 900  # seconds for a notebook: only to catch one that hangs


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port over copies of the first notebooks at smoke scale: (address, folder, token)."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    for path in NOTEBOOKS[:3]:
        text = path.read_text(encoding="utf-8")
        changed = text.replace('profile: str = \\"quick\\"', 'profile: str = \\"smoke\\"')
        changed = changed.replace('dataset: str = \\"\\"', 'dataset: str = \\"digits\\"')
        assert changed.count("smoke") > text.count("smoke")
        (folder / "work" / path.name).write_text(changed, encoding="utf-8")
    token, log = secrets.token_hex(16), folder / "lab.log"
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.port=0",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'work'}"]  # fmt: skip
    settings = environment(folder / "cache") | {"FAQD_RESULTS": str(folder / "results"), "JUPYTER_PREFER_ENV_PATH": "1"}
    settings |= {
        name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    for place, text in SETTINGS.items():
        (folder / "JUPYTERLAB_SETTINGS_DIR" / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / "JUPYTERLAB_SETTINGS_DIR" / place).write_text(text)
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=settings, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = wait_for(lambda: re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/", log.read_text()), "JupyterLab")[
            0
        ]
        yield address, folder / "work", token
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition, what: str, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.5)
    return found


def picture(page, name: str) -> None:
    if folder := os.environ.get("FAQD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def open_and_run(browser, lab, path: Path):
    address, folder, token = lab
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{address}lab/workspaces/{path.stem}/tree/{path.name}?token={token}")  # no other one open in it
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('li[data-command="runmenu:run-all"]').click()

    def done():
        page.keyboard.press("Control+s")
        time.sleep(3)
        cells = [cell for cell in nbformat.read(folder / path.name, 4).cells if cell.cell_type == "code"]
        failed = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert not failed, failed[0].evalue
        return cells if all(cell.execution_count for cell in cells) else None

    return page, wait_for(done, f"the end of {path.name}", PATIENCE)


@pytest.mark.parametrize("number", range(3))
def test_notebooks_run_in_jupyterlab(browser, lab, number):
    path = NOTEBOOKS[number]
    page, cells = open_and_run(browser, lab, path)
    figures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    static = sum(cell.source.rstrip().endswith("\nfigure") for cell in cells)
    assert static > 1
    assert len(figures) >= static
    picture(page, path.stem)
    if number > 0:
        control = page.locator(".jp-OutputArea .widget-hslider .noUi-handle").first
        control.scroll_into_view_if_needed(timeout=60_000)
        area = page.locator(".jp-OutputArea-output:has(.widget-hslider)").first
        image = area.locator("img").first
        image.wait_for(timeout=60_000)
        before = image.get_attribute("src")
        control.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        wait_for(lambda: area.locator("img").first.get_attribute("src") != before, "another figure", 60)
        picture(page, f"{path.stem}_control")
    page.close()


def test_the_report_shows_everything_and_fetches_nothing(browser, tmp_path):
    done = run(
        ["smoke", "--dataset", "digits", "--results", str(tmp_path / "results"), "--only", "00", "03"], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = tmp_path / "results" / "smoke-digits" / "report"
    pages = [report / "index.html", *sorted((report / "notebooks").glob("*.html"))]
    assert len(pages) == 3
    for width, name in ((1400, "desktop"), (390, "phone")):
        page = browser.new_page(viewport={"width": width, "height": 900})
        asked, complaints = [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
        page.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
        for path in pages:
            page.goto(path.as_uri())
            broken = page.evaluate("[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert (broken, wide) == (0, 0), (path.name, name)
            picture(page, f"report_{path.stem}_{name}")
        assert not complaints
        assert all(url.startswith(("file:", "data:")) for url in asked), asked
        page.close()
