"""The report in a real browser: charts drawn, nothing complained of, readable on a phone, and the
screenshots kept in $REPORT_SCREENSHOTS."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mlx_grpo.report.write import write_report
from tests.helpers.runs import write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

OUTSIDE = """() => [...document.querySelectorAll('figure > svg')].flatMap(svg => {
    const all = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < all.left || box.right > all.right || box.bottom > all.bottom;
    }).map(text => text.textContent);
})"""
"""Labels of charts that are cut off."""
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser, or the reason why there is none."""
    from tests.helpers.browser import browser

    with ExitStack() as stack:
        try:
            launched = stack.enter_context(browser())
        except sync_api.Error as e:
            pytest.skip(f"no browser here; type: playwright install chromium ({e.message[:80]})")
        yield launched


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("REPORT_SCREENSHOTS")
    directory = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.mark.parametrize("seeds", [(42,), (42, 123, 777)])
def test_a_phone_shows_before_after_and_change_side_by_side(
    seeds: tuple[int, ...], browser: Any, tmp_path: Path
) -> None:
    report = write_report([write_run(tmp_path / f"seed-{s}", seed=s) for s in seeds])
    page = browser.new_page(viewport={"width": PHONE[0], "height": PHONE[1]}, offline=True)
    page.goto(report.as_uri())
    for row in page.locator(".figures tr").all():
        cells = [cell.bounding_box() for cell in row.locator("th, td").all()[:4]]
        assert cells[3]["x"] + cells[3]["width"] <= PHONE[0]
    # where more is beside them, the page says so
    assert page.locator(".swipe:visible").count() == (len(seeds) > 1)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("runs", [1, 3])
def test_the_page_draws_its_charts_and_fits(
    runs: int,
    size: tuple[int, int],
    scheme: Any,
    browser: Any,
    screenshots: Path,
    tmp_path: Path,
) -> None:
    report = write_report([write_run(tmp_path / f"seed-{s}", seed=s) for s in range(42, 42 + runs)])
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True
    )
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(report.as_uri())
    page.screenshot(path=screenshots / f"report-{runs}-{size[0]}-{scheme}.png", full_page=True)

    assert complaints == []
    assert "42" in page.title()  # a model's answer tried to change it
    charts = page.locator("figure > svg")
    assert charts.count() >= 8
    for chart in charts.all():
        box = chart.bounding_box()
        assert box["width"] > 250 and box["height"] > 100
        assert chart.locator("polyline").count() >= 1
        assert "nan" not in chart.inner_html().lower()
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert page.evaluate(OUTSIDE) == []
    page.evaluate("document.querySelector('.figures').parentElement.scrollLeft = 10000")
    label = page.locator(".figures tbody th").first.bounding_box()
    assert label["x"] == page.locator("main h2").first.bounding_box()["x"]  # it stays
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 128) == (scheme == "dark")
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    page.close()


def shown(page: Any) -> list[str]:
    """What the rows of the table that are to be seen begin with."""
    rows = page.locator(".answers tbody tr:visible")
    return [row.locator("td").first.inner_text() for row in rows.all()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_answers_are_sorted_and_filtered(
    size: tuple[int, int], scheme: Any, browser: Any, screenshots: Path, tmp_path: Path
) -> None:
    report = write_report([write_run(tmp_path / "seed-42")])
    page = browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True
    )
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(report.as_uri())
    page.locator(".answers summary").click()
    assert shown(page)[0] == "Why is number 4 as it is?"  # the largest gain
    page.get_by_role("button", name="reward before").click()
    highest = shown(page)
    assert highest[0] == "Why is number 11 as it is?" and len(highest) == 12
    page.get_by_role("button", name="reward before").click()
    assert shown(page) == highest[::-1]
    page.screenshot(path=screenshots / f"answers-{size[0]}-{scheme}.png", full_page=True)
    page.get_by_role("checkbox").check()
    assert shown(page) == [f"Why is number {i} as it is?" for i in (0, 4, 8)]
    page.get_by_role("searchbox").fill("NUMBER 8")
    assert shown(page) == ["Why is number 8 as it is?"]
    assert page.locator(".count").inner_text() == "1 of 12"
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    assert complaints == [] and "42" in page.title()
    page.close()


def test_paper_is_white_in_the_dark_too(browser: Any, screenshots: Path, tmp_path: Path) -> None:
    report = write_report([write_run(tmp_path / "seed-42")])
    page = browser.new_page(color_scheme="dark", offline=True)
    page.goto(report.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('h1')).color,"
        " getComputedStyle(document.querySelector('figure')).backgroundColor]"
    )
    assert (ink, paper) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
    assert page.locator(".tools:visible, figcaption a:visible").count() == 0
    page.pdf(path=screenshots / "report.pdf")
    page.close()
