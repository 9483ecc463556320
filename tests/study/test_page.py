"""The HTML report of a table: its parts, and the page in a real Chromium."""

import base64
import dataclasses
import html as html_module
import re

import chromium
import pytest
import yaml
from chromium import Parsed, in_chromium
from commands import SMALL

from anorm.study import formats, grid, records, tally
from anorm.study.page import html, mean_curve, ticks


@pytest.fixture(scope="module")
def filled(tmp_path_factory, trained):
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    overrides = [a for a in SMALL if not a.startswith("norm=")]
    path.write_text(
        yaml.safe_dump(
            {"title": "Tiny <norms> & others", "overrides": overrides, "axes": {"norm": ["bn", "gn", "an"]}}
        )
    )
    return tally.tally(grid.open_grid(str(path)), records.find_runs(trained), 2)


@pytest.fixture(scope="module")
def printed():
    return tally.tally(grid.open_grid("table3"), [], 1)


def test_the_page_holds_the_table(filled, printed):
    for found in (filled, printed):
        page = html(found)
        parsed = Parsed(page)
        expected = [cell(e) for e in found.entries for cell in formats.columns(found).values()]
        assert parsed.cells == expected and parsed.addresses == []
        assert not re.search(r"<!--\w+-->", page)
        for command in formats.missing(found):
            assert command in html_module.unescape(page)
    assert "Tiny &lt;norms&gt; &amp; others" in html(filled)


def test_curves_hold_every_evaluation(filled):
    page = html(filled)
    top = page[page.index("<svg") : page.index("</svg>")]
    for i, entry in enumerate(filled.entries[:2]):
        drawn = top.split(f'data-line="{i}"')[1].split("</g>")[0]
        assert drawn.count('class="seed"') == 2 and drawn.count("<circle") == 2  # two seeds, two epochs
        errors = [100 - run.evaluations()[0]["top1"] for run in entry.runs.values()]
        assert f"{entry.line.label}, epoch 1: {sum(errors) / 2:.2f}" in drawn
    assert 'data-line="2"' not in page  # an has no run
    for c in filled.comparisons:
        assert formats.comparison(c, filled) in html_module.unescape(page)


def test_mean_of_curves_that_differ_in_length():
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (21.3, 22.2, [21.2, 21.4, 21.6, 21.8, 22.0, 22.2]), (3, 3, None)],
)
def test_ticks(low, high, expected):
    found = ticks(low, high)
    assert expected is None or found == pytest.approx(expected)
    assert found[0] <= low <= high <= found[-1] and len(found) > 1
    assert all(t == int(t) for t in ticks(1, 3, whole=True))


def shown(page, column=0):
    return page.run(
        f"[...document.querySelectorAll('#cells tbody tr')].filter(r => r.offsetParent).map(r => r.cells[{column}].textContent)"
    )


@pytest.fixture(scope="module")
def page_file(filled, printed, tmp_path_factory):
    """Both kinds of rows in one page: printed numbers of two groups, and curves."""
    entries = (
        *printed.entries,
        *(dataclasses.replace(e, line=dataclasses.replace(e.line, group="Tiny")) for e in filled.entries),
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html(dataclasses.replace(filled, entries=entries)), encoding="utf-8")
    return path


@in_chromium
def test_in_chromium(page_file, tmp_path):
    page = chromium.Page(tmp_path / "profile")
    page.open(page_file)
    assert page.run("document.title").startswith("tiny: Tiny <norms>")
    assert len(shown(page)) == 9 and page.run("document.getElementById('count').textContent") == "9 of 9 rows"

    heads = page.run("[...document.querySelectorAll('#cells th')].map(t => t.textContent)")
    column = heads.index("printed top-1")
    click = f"document.querySelectorAll('#cells th button')[{column}].click()"
    page.run(click)
    up = [float(v) for v in shown(page, column) if v != "-"]
    assert up == sorted(up) and len(up) == 6 and shown(page, column)[-3:] == ["-"] * 3
    page.run(click)
    assert [float(v) for v in shown(page, column)[:6]] == up[::-1] and shown(page, column)[-3:] == ["-"] * 3
    params = heads.index("#Params")
    page.run(f"document.querySelectorAll('#cells th button')[{params}].click()")
    sizes = [float(v.split()[0]) for v in shown(page, params)]
    assert sizes == sorted(sizes)

    page.run(
        "(f => { f.value = 'resnet50-an not'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"
    )
    assert sorted(shown(page)) == ["ResNet50-AN (All)", "ResNet50-AN (w/BN2)", "ResNet50-AN (w/BN3)"]
    assert page.run("document.getElementById('count').textContent") == "3 of 9 rows"
    page.run(
        "(f => { f.value = ''; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"
    )
    page.run(
        "(g => { g.value = 'Tiny'; g.dispatchEvent(new Event('change')); })(document.getElementById('group'))"
    )
    assert sorted(shown(page)) == ["an", "bn", "gn"]

    visible = "[...document.querySelectorAll('svg [data-line]')].filter(g => getComputedStyle(g).display !== 'none').length"
    assert page.run(visible) == 4  # two lines in two charts
    page.run("document.querySelector('.legend input').click()")
    assert page.run(visible) == 2

    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("file:")] == [] and len(page.requests) == 1
    page.close()


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_in_light_and_dark(page_file, tmp_path, dark):
    page = chromium.Page(tmp_path / "profile", 360, 740, dark, mobile=True)
    page.open(page_file)
    # the table scrolls by itself
    assert page.run("innerWidth") == 360 and page.run("document.documentElement.scrollWidth") == 360
    assert page.run("document.querySelector('.wide').scrollWidth") > 360
    assert (
        page.run(
            "Math.min(...[...document.querySelectorAll('body *')].filter(e => e.offsetParent && !e.closest('svg'))"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        >= 12
    )
    assert page.run("document.querySelector('svg text').getBoundingClientRect().height") >= 9
    # every colour of text against the page: at least WCAG's 4.5
    assert (
        page.run("""(() => {
        const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
        const light = c => rgb(c).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0), back = light(getComputedStyle(document.body).backgroundColor);
        const all = [...document.querySelectorAll('td, p, h1, li, .legend span')].map(e => light(getComputedStyle(e).color));
        return Math.min(...all.map(v => (Math.max(v, back) + .05) / (Math.min(v, back) + .05)));
    })()""")
        >= 4.5
    )
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)") == dark
    picture = base64.b64decode(page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    (tmp_path / "page.png").write_bytes(picture)
    assert page.complaints == []
    page.close()
