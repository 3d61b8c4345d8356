"""The book in a browser, opened from disk without a network: what a reader sees, and what axe says about it.

Chromium by playwright. Without them these tests are skipped, and with MORPH_REQUIRE_BROWSER=1 they fail.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import chapters

PAGES = [*chapters(), "search", "genindex"]
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# What the theme says on a reader's first page, when no choice of light or dark is stored; it then follows the system.
SAID_BY_THE_THEME = ("Got invalid theme mode: . Resetting to auto.",)
# What axe may find, because it is not ours to mend: (rule, selector, reason).
NOT_OURS: list[tuple[str, str, str]] = []


def absent(reason: str):
    (pytest.fail if os.environ.get("MORPH_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def context():
    """A browser's window that can reach nothing but files; what it asked for elsewhere is in ``context.asked``."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        absent("no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root may not use the sandbox
        context = browser.new_context(offline=True)
        context.asked = []

        def decide(route):
            if route.request.url.startswith("file:"):
                return route.continue_()
            context.asked.append(route.request.url)
            return route.abort()

        context.route("**/*", decide)
        yield context
        browser.close()


@pytest.fixture(scope="module")
def tab(context, book):
    """One tab for all pages; what it complained of since the last page is in ``tab.complaints``."""
    tab = context.new_page()
    tab.complaints = []
    tab.on("console", lambda message: message.type == "error" and tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    return tab


def opened(tab, path: Path, query: str = ""):
    tab.complaints.clear()
    tab.goto(path.as_uri() + query)
    # what fades in is looked at as it is in the end
    tab.add_style_tag(content="*, ::before, ::after { transition: none !important; animation: none !important; }")
    tab.evaluate("() => window.MathJax?.startup.promise")
    return tab


@pytest.fixture(scope="module", params=PAGES)
def page(tab, book, request):
    return opened(tab, book / f"{request.param}.html")


def in_theme(page, theme: str) -> None:
    """The page as the system's choice of light or dark makes it."""
    page.emulate_media(color_scheme=theme)
    page.locator(f"html[data-theme={theme}]").wait_for(state="attached")


def test_a_page_asks_for_nothing_and_complains_of_nothing(page, context):
    page.set_viewport_size(DESKTOP)
    page.evaluate("() => document.fonts.ready")
    assert context.asked == []
    assert [text for text in page.complaints if text not in SAID_BY_THE_THEME] == []


def test_formulas_are_set(page):
    unset = page.locator(".math:not(:has(mjx-container))")
    assert unset.all_text_contents() == []
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    prose = """() => {
        const words = [];
        const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
        while (walk.nextNode())
            if (!walk.currentNode.parentElement.closest("code, pre, script, style")) words.push(walk.currentNode.data);
        return words.join(" ");
    }"""
    assert not re.search(r"\\[(\[a-z]|\$\$", page.evaluate(prose))


# For each figure: size, and texts of too little contrast with the page, or with the shape that a coloured text is on.
FIGURES = """() => [...document.querySelectorAll(".bd-article svg[role=img][aria-label], .bd-article img")].map((figure) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const luminance = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let behind = figure;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const paper = behind ? getComputedStyle(behind).backgroundColor : "white";
    const shapes = [...figure.querySelectorAll("path")].filter((e) => !e.closest("defs, clipPath"))
        .map((e) => ({ e, fill: getComputedStyle(e).fill, box: e.getBoundingClientRect() }))
        .filter((shape) => shape.fill !== "none");
    const contrasts = [...figure.querySelectorAll("text")].map((e) => {
        const { fill, color } = getComputedStyle(e), box = e.getBoundingClientRect();
        const x = box.x + box.width / 2, y = box.y + box.height / 2;
        const under = fill === color ? undefined : shapes.findLast((shape) =>
            shape.box.left < x && x < shape.box.right && shape.box.top < y && y < shape.box.bottom
            && shape.e.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING);
        const ink = luminance(fill), ground = luminance(under?.fill ?? paper);
        return { text: e.textContent, contrast: (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05) };
    });
    const details = figure.closest("details");
    if (details) details.open = true;
    const box = figure.getBoundingClientRect();
    const faint = contrasts.filter((text) => text.contrast < 3);
    return { name: figure.ariaLabel || figure.alt, width: box.width, height: box.height, texts: contrasts.length, faint };
})"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_can_be_read(page, theme):
    in_theme(page, theme)
    for figure in page.evaluate(FIGURES):
        assert figure["width"] > 100 and figure["height"] > 50, figure
        assert figure["faint"] == [], figure


@pytest.mark.parametrize("width", [PHONE["width"], 800, 1100, DESKTOP["width"], 1920])
def test_no_window_has_to_be_scrolled_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


# axe takes a while for each of thousands of elements. It is given all that is folded away, and a little of what repeats:
# a figure as the one picture that it is to whom cannot see it, two rows of a table, of code each colour once.
ONE_OF_EACH = """() => {
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    document.querySelectorAll(".bd-article svg[role=img]").forEach((figure) => figure.replaceChildren());
    document.querySelectorAll("tbody tr:nth-child(n + 3)").forEach((row) => row.remove());
    for (const section of document.querySelectorAll("section"))  // of the functions of a module
        [...section.querySelectorAll(":scope > dl.py")].slice(2).forEach((one) => one.remove());
    const seen = new Set();
    document.querySelectorAll("pre span").forEach((span) => {
        const kind = span.className + " in " + span.closest("div[class*=highlight]")?.className;
        seen.has(kind) ? span.replaceWith(span.textContent) : seen.add(kind);
    });
}"""


@pytest.mark.parametrize(("theme", "size"), [("light", DESKTOP), ("dark", PHONE)], ids=["light-desktop", "dark-phone"])
def test_axe_finds_no_barrier(page, theme, size):
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size(size)
    in_theme(page, theme)
    page.evaluate(ONE_OF_EACH)
    # the theme looks again at what scrolls, a moment after the window has another size
    page.wait_for_function("[...document.querySelectorAll('pre')].every((e) => e.scrollWidth <= e.clientWidth || !e.tabIndex)")
    # preload is off, because a page from disk may not fetch its style sheets
    options = {"runOnly": ["wcag2a", "wcag2aa"], "resultTypes": ["violations"], "preload": False}
    found = Axe().run(page, options=options).response["violations"]
    barriers = [(rule["id"], *node["target"], node["failureSummary"]) for rule in found for node in rule["nodes"]]
    assert [barrier for barrier in barriers if barrier[:2] not in [known[:2] for known in NOT_OURS]] == []


def test_the_button_switches_the_theme_and_the_choice_is_kept(tab, book):
    tab.set_viewport_size(DESKTOP)
    tab.emulate_media(color_scheme="light")
    opened(tab, book / "book/introduction.html")
    seen = set()
    for _ in range(3):  # light, dark, as the system says
        tab.locator(".theme-switch-button:visible").first.click()
        seen.add(mode := tab.locator("html").get_attribute("data-mode"))
        assert tab.locator("html").get_attribute("data-theme") == {"auto": "light"}.get(mode, mode)
        opened(tab, book / "book/decisions.html")
        assert tab.locator("html").get_attribute("data-mode") == mode
    assert seen == {"light", "dark", "auto"}


def test_the_search_finds_a_word_and_leads_to_it(tab, book):
    tab.set_viewport_size(DESKTOP)
    opened(tab, book / "search.html", "?q=Levenberg")
    found = tab.locator("#search-results li a")
    found.first.wait_for()
    tab.locator(".search-summary", has_text="found").wait_for()
    assert tab.complaints == []
    found.first.click()
    assert "levenberg" in tab.locator("main").inner_text().lower()


def test_the_first_page_is_the_introduction(tab, book):
    tab.goto((book / "index.html").as_uri())
    tab.wait_for_url("**/book/introduction.html")


def column(table, number: int) -> list[str]:
    return table.evaluate(f"(table) => [...table.tBodies[0].rows].map((row) => row.cells[{number}].textContent.trim())")


def test_a_long_table_sorts_by_a_column(tab, book):
    """By mouse and by keyboard, up, down and back; where the names have two rows, by the lower one."""
    tab.set_viewport_size(DESKTOP)
    opened(tab, book / "notebooks/01_latency_motivation.html")
    table = tab.locator("table.sortable").first
    heads = table.locator("thead tr").last.locator("th")
    names = heads.all_inner_texts()
    place = next(number for number, name in enumerate(names) if name == "N")
    before = column(table, place)
    sizes = {"M": 1e6, "B": 1e9}
    up = sorted(before, key=lambda text: float(text[:-1]) * sizes[text[-1]])
    assert up != before
    button = heads.nth(place).get_by_role("button")
    assert button.evaluate("node => getComputedStyle(node).borderTopWidth") == "0px"  # it looks like the other names
    button.click()
    assert column(table, place) == up
    assert heads.nth(place).get_attribute("aria-sort") == "ascending"
    tab.keyboard.press("Enter")
    assert [float(text[:-1]) for text in column(table, place)] == [float(text[:-1]) for text in up[::-1]]
    tab.keyboard.press("Space")
    assert column(table, place) == before
    assert heads.nth(place).get_attribute("aria-sort") == "none"


def test_numbers_texts_and_what_is_missing_sort_as_a_reader_means(tab, book):
    """The script of the book over a table by report.table."""
    import pandas as pd

    from morphlib import report

    numbers = ["–", "1,024", "9.5", "-3", "1e-3", "78.9M", "0.92 to 0.97", "−4", "1.44B", "7%"]
    shapes = ["12x3072", "6x4096", "24x2048", "2x64", "–", "8x512", "9x1", "10x1", "11x1", "7x1"]
    dates = [f"2026-{month:02}-01" for month in (3, 1, 2, 10, 12, 11, 4, 6, 5, 7)]
    data = pd.DataFrame({("all", "number"): numbers, ("all", "shape"): shapes, ("own", "date"): dates})
    tab.goto("about:blank")
    tab.set_content(report.table(data, "numbers").data)
    tab.add_script_tag(content=(book / "_static/book.js").read_text(encoding="utf-8"))
    table = tab.locator("table.sortable")
    buttons = table.get_by_role("button")
    assert buttons.all_inner_texts() == ["number", "shape", "date"]
    up = ["−4", "-3", "1e-3", "0.92 to 0.97", "7%", "9.5", "1,024", "78.9M", "1.44B"]
    buttons.nth(0).click()
    assert column(table, 0) == [*up, "–"]
    buttons.nth(0).click()
    assert column(table, 0) == [*up[::-1], "–"]
    buttons.nth(1).click()
    assert column(table, 1) == ["2x64", "6x4096", "7x1", "8x512", "9x1", "10x1", "11x1", "12x3072", "24x2048", "–"]
    buttons.nth(2).click()
    assert column(table, 2) == sorted(dates)
    assert table.locator("th[aria-sort=ascending]").count() == 1


def test_a_page_prints(tab, book):
    opened(tab, book / "notebooks/03_fitting_the_law.html")
    pdf = tab.pdf()
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 1
    assert len(pdf) > 50_000
