"""The page for the browser: it loads nothing, holds what the runs recorded, and no text of theirs is code in it."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.run.page import CURVES, MOST_PROMPTS, curves, make_page, side_by_side

HOSTILE = (
    "</script><script>document.title = 'taken'</script><!--<script><img src=x onerror=alert(1)> {{script}}"
)


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text in each script and style."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside, self.is_code = [], [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append("")
            self.is_code = True

    def handle_endtag(self, tag):
        self.is_code = False

    def handle_data(self, data):
        if self.is_code:
            self.inside[-1] += data


def page_of(names, records, answers=None, settings=(), figures=None):
    figures = figures or [{"steps": "1"} for _ in names]
    return make_page(names, records, figures, settings, answers or [[] for _ in names])


def content_of(page):
    (block,) = re.findall(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def a_run(length=4, scale=1.0):
    return [
        dict(step=i, loss=scale / i, eval_loss=2 * scale / i, lr=1e-4, grad_norm=0.5, memory=i << 30, tokens_per_second=9.0)
        for i in range(1, length + 1)
    ]  # fmt: skip


def test_the_page_loads_nothing_and_its_policy_allows_its_own_style_and_script_alone():
    page = page_of(["a", "b"], [a_run(), a_run(3)])
    elements = Elements(page)
    style, content, script = elements.inside
    addresses = {"src", "href", "srcset", "data", "action", "poster", "background"}
    for tag, attributes in elements.found:
        assert not addresses & attributes.keys() and tag not in ("link", "iframe", "object", "img", "base")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import", style)
    assert not re.search(
        r"fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", script
    )
    (policy,) = [a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'"
    )


def test_the_page_holds_the_records_of_every_run():
    runs = [a_run(5), a_run(3, scale=0.1)]
    found = content_of(page_of(["a", "b"], runs))
    assert found["names"] == ["a", "b"]
    for records, drawn in zip(runs, found["curves"], strict=True):
        assert drawn == {name: [[r["step"], r[name]] for r in records] for name in CURVES}


def test_curves_are_finite_and_in_the_order_of_their_steps():
    records = [
        dict(step=3, loss=1.0),
        dict(step=1, loss=math.nan),
        dict(step=2, loss=0.5, eval_loss=math.inf),
    ]
    assert curves(records) == {"loss": [(2, 0.5), (3, 1.0)]}


TEXTS = st.text() | st.just(HOSTILE) | st.text(st.sampled_from("</script!->&'\"{}\\"), max_size=30)


@given(name=TEXTS, key=TEXTS, value=TEXTS, prompt=TEXTS, answer=TEXTS)
def test_no_text_of_a_run_is_anything_but_text(name, key, value, prompt, answer):
    answers = [[dict(prompt=prompt, expected=answer, base=answer, adapted=answer)]]
    settings = [dict(name=key, values=[value], differs=True)]
    page = page_of([name], [a_run()], answers, settings, figures=[{"steps": value}])
    plain = page_of(["a"], [a_run()])
    assert [tag for tag, _ in Elements(page).found] == [tag for tag, _ in Elements(plain).found]
    block = page.partition('id="content">')[2]
    assert "<" not in block[: block.index("</script>\n<script>")]  # and so it ends where it should
    found = content_of(page)
    (row,) = found["prompts"]
    shown = row["adapted"][0]
    assert shown == row["expected"] and (shown == answer or "\\" in shown)  # as on a terminal: visible
    assert found["figures"] == [[value]]


def test_answers_stand_side_by_side_where_runs_share_a_prompt():
    def line(prompt, adapted, expected="yes"):
        return dict(prompt=prompt, expected=expected, base=f"base {prompt}", adapted=adapted)

    rows = side_by_side(
        [[line("p", "1"), line("q", "2"), line("p", "3")], [], [line("r", "4"), line("q", "5")]]
    )
    assert [(row["prompt"], row["adapted"]) for row in rows] == [
        ("p", ["1", None, None]), ("q", ["2", None, "5"]), ("r", [None, None, "4"]),
    ]  # fmt: skip
    assert rows[1]["base"] == ["base q", None, "base q"]
    assert len(side_by_side([[line("p", "1")], [line("p", "1", expected="no")]])) == 2


def test_the_page_says_how_many_prompts_it_leaves_out():
    answers = [[dict(prompt=str(i), expected="", base="", adapted="") for i in range(MOST_PROMPTS + 7)]]
    found = content_of(page_of(["a"], [a_run()], answers))
    assert len(found["prompts"]) == MOST_PROMPTS and found["left_out"] == 7


# ---- in a browser, where there is one ----


@pytest.fixture
def browse(tmp_path):
    """Open a page in Chromium and return its elements as HTML, after its script has run, and what it complained of."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")

    def run(page):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        options = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
            "--disable-component-update --enable-logging=stderr --dump-dom --virtual-time-budget=2000"
        ).split()
        command = [
            browser,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'page.html'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def count(html, tag, kind=None, **data):
    """How many elements have this tag, this class, and these attributes whose names begin with data-."""
    return sum(
        found == tag
        and (kind is None or kind in (attributes.get("class") or "").split())
        and all(attributes.get(f"data-{name}") == value for name, value in data.items())
        for found, attributes in Elements(html).found
    )


def test_the_script_draws_every_run_in_every_chart_without_an_error(browse):
    names = [f"run {i}" for i in range(12)]
    html, complaints = browse(page_of(names, [a_run(3 + i, scale=1 + i) for i in range(12)]))
    assert not complaints
    assert count(html, "svg", "chart") == len(CURVES)
    assert [count(html, "path", "curve", run=str(i)) for i in range(13)] == [len(CURVES)] * 12 + [0]
    assert html.count('aria-pressed="true"') == 12 and "run 11" in html and "NaN" not in html


def test_a_run_of_one_record_without_anything_else_is_a_page(browse):
    html, complaints = browse(page_of(["a"], [[dict(step=1, loss=0.0)]]))
    assert not complaints and "NaN" not in html and count(html, "circle", "dot") == 1


@pytest.mark.parametrize(
    "losses",
    [
        [1e17, 1e17 + 16],
        [5e-324, 1.0],
        [1e308, -1e308, 1.0, 2.0],
        [0.0, 0.0],
        [-1e-320, 3e-320],
        [1e100, -1e100],
    ],
    ids=str,
)
def test_losses_of_any_size_are_drawn_with_a_few_ticks(browse, losses):
    records = [dict(step=10**12 - i, loss=loss) for i, loss in enumerate(losses)]
    html, complaints = browse(page_of(["a"], [records]))
    assert not complaints and "NaN" not in html and "Infinity" not in html
    assert count(html, "path", "curve") == 1 and 0 < count(html, "line", "grid") < 40


def test_a_hostile_run_steers_nothing_in_a_browser(browse):
    answers = [[dict(prompt=HOSTILE, expected=HOSTILE, base="\u202e", adapted=HOSTILE)]]
    page = page_of([HOSTILE], [a_run()], answers, [dict(name=HOSTILE, values=[HOSTILE], differs=True)])
    html, complaints = browse(page)
    assert not complaints and "<title>Training runs: &lt;/script&gt;" in html
    assert count(html, "img") == 0 and count(html, "script") == 2 and count(html, "article") == 1
    stranger = "<script>document.title = 'taken'</script></body>"
    html, complaints = browse(page.replace("</body>", stranger))  # as if something had got through
    assert "<title>taken" not in html and "Content Security Policy" in " ".join(complaints)


def test_pointing_at_a_chart_shows_the_values_of_all_runs_at_that_step(browse):
    page = page_of(["low", "high"], [a_run(4, scale=1.0), a_run(4, scale=10.0)])
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    pointing = """<script>
    const chart = document.querySelector(".chart"), box = chart.getBoundingClientRect();
    const x = box.left + 58 + (chart.clientWidth - 72) * 0.52;  // of the axis: step 2.08 of 4
    chart.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: box.top + 50 }));
    </script></body>"""
    html, complaints = browse(page.replace("</body>", pointing))
    (tip,) = re.findall(r'<div class="tip" role="status"[^>]*>(<b>.*?)</figure>', html, re.DOTALL)
    assert not complaints and re.findall(r"<b>(.*?)</b>", tip) == ["step 2"]
    assert re.findall(r"<span>(.*?)</span><em>(.*?)</em>", tip) == [("high", "5"), ("low", "0.5")]
    assert html.count('class="cursor"') == len(CURVES)
