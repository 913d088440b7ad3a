"""A report says the same in JSON, Markdown and HTML, and says nothing it was not given."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightship.errors import BundleError, UnsupportedError, UsageError
from lightship.report import Metric, Report, compare_table, figure, table

V1 = Path(__file__).parent / "bundles" / "v1" / "report.json"
SIZE = Metric("size", 25.0, "bytes", 1, None, "lower", 100.0, "all files")
SPEED = Metric("decode", 30.0, "tokens/s", 5, 1.5, "higher", 10.0, "median")
KLD = Metric("kld", 0.01, "nats/token", 1536, 2e-4, "lower", 0.0, "full vocabulary", limit=0.02)
MEMORY = Metric("peak_rss", 50.0, "bytes", 1, None, "lower", 80.0, "VmHWM")
TOP1 = Metric("top1", 0.9, "share", 1536, 0.01, "higher", 1.0, "full vocabulary")
META = {"title": "m → int8", "verdict": "4× smaller", "source": "m", "machine": {"cpu": "x", "cores": 2},
        "versions": {"numpy": "2"}, "text": {"name": "wiki", "tokens": 9}, "accepted": ["kld<=0.3"]}  # fmt: skip
REPORT = Report((SIZE, SPEED, KLD, MEMORY, TOP1), META)


def rows(markdown):
    """The cells of the first table."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("|-")]


# ── Figures ─────────────────────────────────────────────────────────────────


def test_ratio_and_delta():
    assert (SIZE.ratio(), SIZE.delta()) == (0.25, -75.0)
    assert (KLD.ratio(), KLD.delta()) == (None, 0.01)
    alone = replace(SIZE, baseline=None)
    assert (alone.ratio(), alone.delta()) == (None, None)


@pytest.mark.parametrize(("direction", "value", "passed"), [
    ("lower", 1.9, True), ("lower", 2.0, True), ("lower", 2.1, False), ("lower", float("nan"), False),
    ("higher", 1.9, False), ("higher", 2.0, True), ("higher", 2.1, True), ("higher", float("nan"), False),
])  # fmt: skip
def test_limits_follow_the_direction(direction, value, passed):
    metric = replace(SIZE, direction=direction, value=value, limit=2.0)
    assert metric.passed is passed
    assert replace(metric, limit=None).passed is None


def test_get():
    assert REPORT.get("kld") is KLD and REPORT.get("nothing") is None


# ── JSON ────────────────────────────────────────────────────────────────────


def test_json_round_trip():
    text = REPORT.to_json()
    assert Report.from_json(text) == REPORT
    assert Report.from_json(text).to_json() == text
    assert Report(REPORT.metrics, dict(reversed(META.items()))).to_json() == text  # equal reports, equal bytes
    assert [metric["passed"] for metric in json.loads(text)["metrics"]] == [None, None, True, None, None]


def test_what_is_stored_as_passed_is_not_believed():
    text = REPORT.to_json().replace('"passed": true', '"passed": false').replace('"limit": 0.02', '"limit": 0.001')
    assert Report.from_json(text).get("kld").passed is False
    assert Report.from_json(text.replace('"passed": false', '"passed": true')).get("kld").passed is False


def test_fields_added_later_are_passed_over():
    data = json.loads(REPORT.to_json())
    data["more"] = 1
    for metric in data["metrics"]:
        metric["more"] = 1
    assert Report.from_json(json.dumps(data)) == REPORT


def test_a_report_from_before_limits_still_reads():
    assert "limit" not in json.loads(V1.read_text())["metrics"][0]
    assert Report.from_json(V1.read_text()).get("kld").limit is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_numbers_are_written(value):
    with pytest.raises(BundleError, match="wrong: size"):
        Report((replace(SIZE, value=value), SPEED)).to_json()
    with pytest.raises(BundleError, match="wrong: meta"):
        Report((SIZE,), {"x": value}).to_json()


@pytest.mark.parametrize("change", [
    {"value": "1"}, {"value": None}, {"value": True}, {"value": float("nan")}, {"value": 10**400}, {"n": 1.5},
    {"n": True}, {"name": 3}, {"unit": None}, {"method": []}, {"direction": "up"}, {"baseline": "x"}, {"limit": []},
    {"stderr": float("inf")},
])  # fmt: skip
def test_metrics_of_another_shape(change):
    data = json.loads(REPORT.to_json())
    data["metrics"][0].update(change)
    with pytest.raises(BundleError, match="not a report"):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("text", [
    "", "[]", "{}", "3", "[" * 100_000, '{"version":1,"meta":[],"metrics":[]}',
    '{"version":1,"meta":{},"metrics":[{}]}', '{"version":1,"meta":{"x":NaN},"metrics":[]}',
    '{"version":"1","meta":{},"metrics":[]}', '{"version":1,"meta":{},"metrics":[3]}',
    '{"version":1,"meta":{},"metrics":3}',
])  # fmt: skip
def test_what_is_no_report(text):
    with pytest.raises(BundleError, match="not a report"):
        Report.from_json(text)


def test_a_newer_report_is_refused():
    with pytest.raises(UnsupportedError, match="version 2"):
        Report.from_json('{"version":2}')


# ── Markdown ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("value", "text"), [
    (None, ""), (0, "0"), (1, "1"), (0.25, "0.25"), (1234.56, "1235"), (12345.6, "12,346"), (0.00012345, "1.23e-04"),
    (-0.5, "-0.5"),
])  # fmt: skip
def test_figures(value, text):
    assert figure(value) == text


def test_markdown_is_before_and_after():
    assert rows(REPORT.to_markdown()) == [
        ["measure", "original", "this", "ratio or Δ", "unit", "± s.e.", "n", "limit"],
        ["size", "100", "25", "0.25×", "bytes", "", "1", ""],
        ["decode", "10", "30", "3.00×", "tokens/s", "1.5", "5", ""],
        ["kld", "0", "0.01", "+0.01", "nats/token", "2.00e-04", "1536", "0.02 ✓"],
        ["peak_rss", "80", "50", "0.62×", "bytes", "", "1", ""],
        ["top1", "1", "0.9", "0.90×", "share", "0.01", "1536", ""],
    ]
    assert "0.02 ✗" in Report((replace(KLD, value=0.03),)).to_markdown()
    assert "limit" not in Report((SIZE,)).to_markdown()


def test_markdown_says_how_and_under_which_circumstances():
    text = REPORT.to_markdown()
    assert text.startswith("**4× smaller**\n")
    assert "- kld, top1: full vocabulary" in text and "- decode: median" in text
    assert "- limits accepted on purpose: kld<=0.3" in text
    assert "- machine: cores 2, cpu x" in text and "- text: name wiki, tokens 9" in text and "- source: m" in text
    short = REPORT.to_markdown(methods=False)
    assert "full vocabulary" not in short and "accepted on purpose" in short


def test_markdown_holds_its_form_whatever_the_text():
    """A report may come from elsewhere: no cell, line or terminal command of its own."""
    hostile = "a|b\n| c |\x1b[2J"
    text = Report((replace(SIZE, name=hostile, method=hostile),), {"verdict": hostile, "source": hostile}).to_markdown()
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 and "a\\|b \\| c \\|" in lines[2]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}


def test_tables_are_padded():
    assert table([["a", "b"], ["long", ""]]) == "| a    | b |\n|------|---|\n| long |   |\n"


def test_compare_table():
    int4 = Report((replace(SIZE, value=10.0), replace(SPEED, value=44.0, baseline=11.0, n=7), replace(KLD, value=0.05),
                   Metric("golden", 0.5, "share", 4, None, "higher", None, "cases")))  # fmt: skip
    assert rows(compare_table([("int8", REPORT), ("int4", int4)])) == [
        ["measure", "unit", "original", "int8", "int4", "n"],
        ["size", "bytes", "100", "25 (0.25×)", "10 (0.10×)", "1"],
        ["decode", "tokens/s", "10 – 11", "30 ± 1.5 (3.00×)", "44 ± 1.5 (4.00×)", "5 – 7"],
        ["kld", "nats/token", "0", "0.01 ± 2.00e-04 ✓", "0.05 ± 2.00e-04 ✗", "1536"],
        ["peak_rss", "bytes", "80", "50 (0.62×)", "", "1"],
        ["top1", "share", "1", "0.9 ± 0.01 (0.90×)", "", "1536"],
        ["golden", "share", "", "", "0.5", "4"],
    ]


def test_the_same_name_in_another_unit_is_another_row():
    other = Report((replace(SIZE, unit="MB"),))
    assert [row[:2] for row in rows(compare_table([("a", REPORT), ("b", other)]))[-1:]] == [["size", "MB"]]


def test_nothing_to_compare():
    with pytest.raises(UsageError, match="no report"):
        compare_table([])


# ── HTML ────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.bars, self.cells = [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "rect":
            self.bars.append((dict(attrs)["class"], float(dict(attrs)["width"])))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


def test_html_is_one_page_that_asks_for_nothing():
    text = REPORT.to_html()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "a", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text


def test_html_shows_what_markdown_shows():
    text = Page(REPORT.to_html()).text
    for shown in ("4× smaller", "0.25×", "+0.01", "0.02 ✓", "full vocabulary", "kld<=0.3", "cores 2", "1536", "wiki"):
        assert shown in text


def test_bars_are_to_scale():
    """Original, this, in the order size, speed, memory, quality; the wider of each pair fills the width."""
    assert Page(REPORT.to_html()).bars == [
        ("base", 500.0), ("this", 125.0),
        ("base", 166.7), ("this", 500.0),
        ("base", 500.0), ("this", 312.5),
        ("base", 0.0), ("this", 250.0),  # against its limit
        ("base", 500.0), ("this", 450.0),
    ]  # fmt: skip
    headings = re.findall(r"<h2>(\w+)</h2><svg", REPORT.to_html())
    assert headings == ["Size", "Speed", "Memory", "Quality"]


def test_a_failed_limit_is_drawn_as_one():
    assert ("failed", 500.0) in Page(Report((replace(KLD, value=0.04),)).to_html()).bars


@pytest.mark.parametrize("metric", [
    replace(SIZE, baseline=None), replace(SIZE, baseline=0.0, value=0.0), replace(SIZE, baseline=-1.0),
    replace(SIZE, value=-1.0), replace(TOP1, name="gate_top1"), replace(SIZE, limit=0.0, baseline=None),
])  # fmt: skip
def test_what_cannot_be_compared_is_not_drawn(metric):
    page = Page(Report((metric,)).to_html())
    assert page.bars == [] and metric.name in page.cells


def test_html_escapes_everything():
    hostile = "<script>alert(1)</script>'\"><b x="
    meta = {key: hostile for key in ("title", "verdict", "source", "text", "machine", "versions", hostile)}
    metrics = (replace(KLD, name=hostile, unit=hostile, method=hostile), replace(SIZE, name="size" + hostile))
    page = Page(Report(metrics, {**meta, "accepted": [hostile]}).to_html())
    plain = Page(Report((KLD, SIZE), {**dict.fromkeys(meta, "x"), "accepted": ["x"]}).to_html())
    assert page.tags == plain.tags
    assert hostile in page.text
