"""The pages and plots that people look at, opened in a browser: `make check-pages`.

Screenshots are written to ``build/pages`` (or ``ACE_PAGES``), for a person to look at.
"""

import os
import shutil
from pathlib import Path

import pytest
from folders import TEXT, save_dense

from ace_ext.cli.main import main

pytestmark = pytest.mark.browser

VIEWPORTS = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
SMALLEST = 12.0
"""Pixels of a letter's line (``font-size``) that a phone's reader can be asked for."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

FOUND_WRONG = """
() => {
  const wide = document.documentElement.clientWidth, found = [];
  const named = node => `${node.tagName.toLowerCase()} ${JSON.stringify((node.textContent || node.alt).slice(0, 40))}`;
  const inScroll = node => node.closest(".scroll") !== null && !node.matches(".scroll");
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  for (const node of document.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (!inScroll(node) && (box.right > wide + 0.5 || box.left < -0.5))
      found.push(`${named(node)} is wider than the viewport`);
    const ownText = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (ownText && parseFloat(getComputedStyle(node).fontSize) < SMALLEST) found.push(`${named(node)} is too small`);
    if (ownText && !node.matches(".scroll *") && node.scrollWidth > node.clientWidth + 1 && node.clientWidth)
      found.push(`${named(node)} runs out of its box`);
  }
  for (const image of document.images) {
    const box = image.getBoundingClientRect();
    if (!image.complete || !image.naturalWidth) found.push(`${named(image)} is no picture`);
    if (!image.checkVisibility() || box.width < 200 || box.height < 60) found.push(`${named(image)} is not to be seen`);
    if (Math.abs(box.width / box.height - image.naturalWidth / image.naturalHeight) > 0.02)
      found.push(`${named(image)} is distorted`);
  }
  for (const table of document.querySelectorAll("table")) {
    const box = table.getBoundingClientRect();
    if (!table.checkVisibility() || box.width < 50 || box.height < 20) found.push(`${named(table)} is not to be seen`);
    for (const cell of table.querySelectorAll("td, th"))
      if (cell.textContent.trim() && (!cell.clientWidth || cell.scrollWidth > cell.clientWidth + 1))
        found.push(`cell ${named(cell)} is cut off`);
  }
  return found;
}
""".replace("SMALLEST", str(SMALLEST))
"""In the page: what is wrong with what it shows, one sentence each."""


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a screen. Where there is none this is an error, not a skip."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("pages are checked with playwright, which is not installed; pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.fail(f"pages are checked in a browser, and there is none of {', '.join(BROWSERS)}; install chromium")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not start as root
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=["--disable-gpu", "--disable-quic", *as_root])
        yield started
        started.close()


@pytest.fixture(scope="session")
def screenshots():
    folder = Path(os.environ.get("ACE_PAGES", Path(__file__).parents[2] / "build" / "pages"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """What a run with a distillation, a comparison and a measurement of a tiny model write for people, by name."""
    place = tmp_path_factory.mktemp("pages")
    dense = save_dense(place / "dense")
    (place / "held-out.txt").write_text(TEXT)
    common = ("--model", dense, "--calibration", place / "text.txt", "--seqlen", 16, "--device", "cpu")
    few = ("--nsamples", 24, "--method", "best(tokens=4096)")
    grid = ("--methods", "wanda; published-sparsegpt; fast; balanced", "--sparsities", "0.5,0.6", "--patterns", "2:4")
    texts = (
        "--texts",
        place / "held-out.txt",
        "--eval-seqlen",
        16,
        "--eval-windows",
        4,
        "--lengths",
        "8x16,4x16,2x16",
    )
    short = ("--tokens", 2, "--rounds", 1, "--prefill", 20, "--quiet")
    commands = [
        ("run", *common, *few, "--output", place / "pruned", "--report", place / "run.html"),
        ("compare", *common[:4], *grid, *texts, "--seeds", "0,1", "--output", place / "study"),
        ("pack", place / "pruned", "--output", place / "packed"),
        ("bench", place / "packed", *short, "--plot", place / "bench.png"),
    ]
    for command in commands:
        assert main([str(part) for part in command]) == 0, command
    return {"run": place / "run.html", "compare": place / "study" / "report.html", "bench": place / "bench.png"}


@pytest.fixture
def opened(browser, shown):
    """Opens one of what was written, in a viewport; the page, and what it asked for and complained about."""
    contexts = []

    def open_page(name: str, viewport: str, scheme: str = "light"):
        phone = viewport == "phone"
        context = browser.new_context(
            viewport=VIEWPORTS[viewport], device_scale_factor=2, is_mobile=phone, has_touch=phone, color_scheme=scheme
        )
        contexts.append(context)
        page, complaints = context.new_page(), []
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"asks for {request.url[:80]}"))
        address = shown[name].as_uri()
        page.goto(address)
        assert complaints.pop(0) == f"asks for {address[:80]}"
        return page, [each for each in complaints if not each.startswith("asks for data:image/png;base64,")]

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("viewport", VIEWPORTS)
@pytest.mark.parametrize("name", ["run", "compare"])
def test_a_page(opened, screenshots, name, viewport):
    for scheme in ("light", "dark"):
        page, complaints = opened(name, viewport, scheme)
        page.screenshot(path=screenshots / f"{name}-{viewport}-{scheme}.png", full_page=True)
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.evaluate(FOUND_WRONG) == []
        assert complaints == []
        assert page.locator("img").count() >= 4
        assert page.locator("table").count() >= 3
    page.screenshot(path=screenshots / f"{name}-{viewport}-open.png", full_page=True)


@pytest.mark.parametrize("viewport", VIEWPORTS)
def test_a_plot(opened, screenshots, viewport):
    page, complaints = opened("bench", viewport)
    page.screenshot(path=screenshots / f"bench-{viewport}.png")
    box, wide = page.locator("img").bounding_box(), page.evaluate("window.innerWidth")
    assert 0.6 * wide <= box["width"] <= wide  # a phone's browser shows the whole picture
    assert box["height"] >= 60
    assert complaints == []


@pytest.mark.parametrize(
    ("markup", "message"),
    [
        ("<p style='width: 2000px'>wide</p>", "is wider than the viewport"),
        ("<p style='font-size: 9px'>small</p>", "is too small"),
        ("<img src='data:image/png;base64,AA' alt='broken'>", "is no picture"),
        ("<div style='display: none'><table><tr><td>hidden</td></tr></table></div>", "is not to be seen"),
        (
            "<table style='table-layout: fixed; width: 60px'><tr><td style='white-space: nowrap; overflow: hidden'>"
            "a long cell that is cut</td></tr></table>",
            "is cut off",
        ),
    ],
    ids=["wide", "small", "broken", "hidden", "cut"],
)
def test_the_check_notices(browser, markup, message):
    page = browser.new_page(viewport=VIEWPORTS["phone"])
    page.set_content(f"<!DOCTYPE html><html><body>{markup}</body></html>")
    found = page.evaluate(FOUND_WRONG)
    page.close()
    assert any(message in one for one in found), found
