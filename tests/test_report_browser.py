"""The page in a real browser: it loads without error or request, fits a phone, and can be read and used."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)"),
]


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    made = run.copy(tmp_path_factory.mktemp("browsed"))
    assert made("report", "--gpu", "cpu", "--cases", 1).exit_code == 0
    return (made.artifacts / "report" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright for Python")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens the page in a fresh context, offline; what went wrong is in ``page.trouble``."""
    contexts = []

    def open_it(width=1400, **settings):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.trouble = []
        page.on("console", lambda message: page.trouble.append(message.text))
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.on("request", lambda request: _note(page, request))
        page.goto(address)
        return page

    def _note(page, request):
        if not request.url.startswith("data:") and request.url != address:
            page.trouble.append(request.url)

    yield open_it
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 768, 1400])
def test_nothing_is_asked_of_the_network_and_nothing_sticks_out(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("node => node.open = true")
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= seen
    assert page.trouble == []
    outside = "[...document.querySelectorAll('p, h1, h2, caption span, figure, summary, .tiles div')].filter(node => "
    outside += "node.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(n => n.outerHTML)"
    assert page.evaluate(outside) == []
    pictures = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert pictures
    assert all(pictures)


def test_style_sheet_is_let_in_by_the_policy_and_nothing_else(open_page):
    page = open_page()
    assert page.evaluate("getComputedStyle(document.querySelector('.plots')).display") == "grid"
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\">')")
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in line for line in page.trouble)


CONTRAST = """
() => {
  const channel = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 };
  const parse = c => (c.match(/[0-9.]+/g) || []).map(Number);
  const weights = [0.2126, 0.7152, 0.0722];
  const light = c => parse(c).slice(0, 3).reduce((sum, v, i) => sum + weights[i] * channel(v), 0);
  const back = node => {
    for (let n = node; n; n = n.parentElement) {
      const c = getComputedStyle(n).backgroundColor;
      if (parse(c).length === 3 || parse(c)[3] > 0) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05) };
  const found = [];
  for (const node of document.querySelectorAll('h1, h2, p, a, dt, dd, th, td, caption, summary, figcaption, li, pre')) {
    found.push([ratio(getComputedStyle(node).color, back(node)), node.tagName]);
  }
  for (const node of document.querySelectorAll('svg text')) {
    found.push([ratio(getComputedStyle(node).fill, back(node.closest('figure'))), 'text']);
  }
  const lines = [];
  for (const node of document.querySelectorAll('.line, .bar')) {
    lines.push(ratio(getComputedStyle(node).stroke, back(node.closest('figure, li'))));
  }
  return { text: found.sort((a, b) => a[0] - b[0])[0], count: found.length, line: Math.min(...lines) };
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(open_page, scheme):
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for lines that carry meaning (1.4.11)."""
    page = open_page(color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    found = page.evaluate(CONTRAST)
    assert found["count"] > 100
    assert found["text"][0] >= 4.5, found
    assert found["line"] >= 3.0, found


def test_keys_lead_through_the_page(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    box = page.locator(".skip").bounding_box()
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    summary = page.locator("summary").first
    summary.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("node => node.open")
    scrolled = page.locator(".scroll").first
    scrolled.focus()
    assert page.evaluate("document.activeElement.className") == "scroll"


def test_print_is_black_on_white_and_opens_the_tables(open_page):
    page = open_page(800, color_scheme="dark")
    before = page.locator("details table").first.is_visible()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert not before
    assert page.locator("details table").first.bounding_box()["height"] > 20
    assert len(page.pdf(format="A4")) > 20_000


def test_text_is_large_enough_on_a_phone(open_page):
    page = open_page(400)
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)")
    assert size >= 16
    smallest = page.evaluate(
        """() => Math.min(...[...document.querySelectorAll('.plots svg text')].map(
            t => t.getBoundingClientRect().height))"""
    )
    assert smallest >= 9
    assert page.locator("h2").first.inner_text() == "At a glance"
