"""The report in a real browser: nothing is asked of the network, nothing complains, and what is shown is the JSON."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.report import write_report
from evaluation.results import Report
from tests.evaluation.browser import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report(report, path)
    return path


@pytest.fixture(scope="module")
def browser(chromium: str, folder: Path) -> Iterator[Browser]:
    with Browser(chromium) as started:
        started.view(1280, 900)
        started.open(folder / "report.html")
        yield started


def test_no_errors_and_no_network(browser: Browser, folder: Path) -> None:
    browser.evaluate("document.getElementById('all').click()")

    outside = [url for url in browser.requests if not url.startswith("data:")]
    assert outside == [(folder / "report.html").as_uri()]
    assert browser.console == []
    assert browser.exceptions == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_the_window(browser: Browser, width: int, dark: bool) -> None:
    browser.view(width, 844, dark=dark, mobile=width < 700)

    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


def test_hovering_and_focus_show_values(browser: Browser) -> None:
    browser.view(1280, 900)
    browser.evaluate("scrollTo(0, 0)")
    box = browser.evaluate(
        "(() => { const m = document.querySelector('#accuracy-latency [tabindex]');"
        "m.scrollIntoView({block: 'center'});"
        "const b = m.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    # The scrolling must be over: it hides what is shown.
    browser.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    hovered = browser.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    hidden = browser.evaluate("document.getElementById('tip').hidden")
    browser.evaluate("document.querySelector('#accuracy-latency [tabindex]').focus()")
    focused = browser.evaluate("document.getElementById('tip').innerText")

    assert "FP32, batch" in hovered
    assert hidden
    assert "FP32, batch" in focused


def test_details_open_by_keyboard_and_for_print(browser: Browser) -> None:
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = false; })")
    browser.evaluate("document.querySelector('#layers summary').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )

    assert browser.evaluate("document.getElementById('layers').open")
    opened = "[...document.querySelectorAll('details')].every(d => d.open)"
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser.evaluate(opened)
    browser.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not browser.evaluate(opened)


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""

    def luminance(colour: list[float]) -> float:
        parts = [value / 255 for value in colour]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(browser: Browser, dark: bool) -> None:
    browser.view(1280, 900, dark=dark)
    colours = browser.evaluate(
        """(() => {
          const numbers = text => text.match(/[\\d.]+/g).map(Number);
          const style = e => getComputedStyle(e);
          const back = e => { const c = numbers(style(e).backgroundColor);
            return c.length < 4 || c[3] === 1 ? c : e.parentElement ? back(e.parentElement) : [255, 255, 255]; };
          const text = [...document.querySelectorAll('h1,p,.verdict b,td,th,dt,dd,summary span,figcaption,button,a')];
          const marks = [...document.querySelectorAll('.chart text')];
          return [...text.map(e => [numbers(style(e).color), back(e)]),
                  ...marks.map(e => [numbers(style(e).fill), back(e)])];
        })()"""
    )

    assert min(contrast(front[:3], back[:3]) for front, back in colours) >= 4.5
