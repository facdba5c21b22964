"""The HTML report: offline, small, escaped, and alive in a real headless Chromium."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from robustlab.report import Report, views
from tests.unit.report.sample import sample_report

VOID = {"meta", "img", "input", "br", "link", "hr"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests look at."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.resources, self.scripts, self.images, self.text = [], [], [], [], [], []
        self.anchors, self.unnamed = [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.resources += [found[name] for name in ("src", "href", "srcset", "data", "action") if name in found]
        self.anchors += [found["href"][1:]] if found.get("href", "").startswith("#") else []
        self.images += [found.get("alt")] if tag == "img" else []
        self.unnamed += [found] if tag == "svg" and not (found.get("role") == "img" and found.get("aria-label")) else []
        if tag == "script":
            self.scripts.append([found.get("type", ""), ""])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        elif self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


def _read(path):
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def report():
    return sample_report()


@pytest.fixture(scope="module")
def path(report, tmp_path_factory):
    return report.to_html(tmp_path_factory.mktemp("html") / "report.html")


def test_it_parses_and_every_link_has_a_target(path):
    page = _read(path)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.anchors) <= set(page.ids)
    assert len(page.anchors) > 5


def test_nothing_comes_from_a_network(path):
    page = _read(path)
    assert [r for r in page.resources if not r.startswith(("#", "data:"))] == []
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", text)


def test_it_is_small_without_and_with_a_gallery(path, tmp_path):
    assert path.stat().st_size < 1.5e6
    pictured = sample_report(gallery=True).to_html(tmp_path / "gallery.html")
    assert pictured.stat().st_size < 4e6
    page = _read(pictured)
    assert len(page.images) == 11
    assert all(page.images)
    assert _read(path).images == []


def test_the_script_is_short(path):
    (script,) = (text for kind, text in _read(path).scripts if not kind)
    assert len(script.strip().splitlines()) <= 60


def test_embedded_json_is_the_report(report, path):
    (text,) = (text for kind, text in _read(path).scripts if kind == "application/json")
    assert json.loads(text) == json.loads(report.to_json())
    assert Report.from_json(text).to_json() == report.to_json()


def test_names_are_escaped_everywhere(tmp_path):
    report = sample_report(class_names=("normal", EVIL))
    rows = tuple(
        replace(row, target=EVIL if row.target == "pneumonia" else row.target, group=row.group and f"{row.group}{EVIL}")
        for row in report.rows
    )
    manifest = {**report.manifest, "not_tested": [EVIL], "model": {"name": EVIL}, "threat_model": EVIL}
    manifest["conditions"] = [{**c, "unit": EVIL} for c in manifest["conditions"]]
    path = Report(rows, manifest, report.predictions).to_html(tmp_path / "evil.html")
    text = path.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "alert(1)" in text
    page = _read(path)
    assert len(page.scripts) == 2
    (embedded,) = (text for kind, text in page.scripts if kind)
    assert json.loads(embedded)["manifest"]["model"]["name"] == EVIL


def test_charts_speak_to_those_who_do_not_see_them(path):
    page = _read(path)
    assert page.unnamed == []


def test_sample_ids_are_not_printed(report, path):
    text = path.read_text(encoding="utf-8")
    printed = {int(digits) for digits in re.findall(r"(?<![\d.])\d{4,9}(?![\d.])", text)}
    assert not printed & set(report.predictions["clean"].ids[100:].tolist())


def test_undefined_numbers_are_dashes_with_reasons(report, tmp_path):
    rows = tuple(
        replace(row, value=math.nan, low=math.nan, high=math.nan, reason="single_class")
        if row.metric in ("auroc", "silent-failure-rate")
        else row
        for row in report.rows
    )
    path = Report(rows, {**report.manifest, "val": None}).to_html(tmp_path / "undefined.html")
    text = " ".join(_read(path).text)
    assert "only one class is present" in text
    assert "Pass val=" in text
    assert not re.search(r"\bnan\b", text)


def test_a_bare_report_renders(tmp_path):
    text = " ".join(_read(Report((), {}).to_html(tmp_path / "bare.html")).text)
    assert "What was not tested" in text
    assert "No attack on the answers was run" in text


CHROMIUM = shutil.which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")


def _chromium(folder, *arguments):
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=folder,
    )
    return done.stdout, done.stderr


@browser
def test_a_browser_shows_the_verdict_and_no_script_error(report, path, tmp_path):
    probe = path.read_text(encoding="utf-8").replace(
        "<head>", "<head><script>addEventListener('error', (e) => { document.title = 'ERROR ' + e.message; });</script>"
    )
    act = """<script>
    const heads = [...document.querySelectorAll("#conditions th button")];
    heads.find((b) => b.textContent === "Accuracy").click();
    const first = document.querySelector("#conditions tbody tr").cells[3].textContent;
    const input = document.querySelector("input[data-filter]");
    input.value = "jpeg"; input.dispatchEvent(new Event("input"));
    const shown = [...document.querySelectorAll("#conditions tbody tr")].filter((row) => !row.hidden).length;
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const bottom = (s) => document.querySelector(s).getBoundingClientRect().bottom;
    document.body.dataset.probe = JSON.stringify({first, shown, wide,
      rates: bottom(".rates"), untested: bottom(".untested"), headline: bottom(".first table")});
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text(probe.replace("</body>", act), encoding="utf-8")
    dom, log = _chromium(tmp_path, "--enable-logging=stderr", "--window-size=1280,800", "--dump-dom", page.as_uri())
    assert "<title>ERROR" not in dom
    assert "Uncaught" not in log
    assert "Content Security Policy" not in log
    assert views.verdict(report).sentence in dom
    seen = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    best = max(item.accuracy.value for item in views.drops(report))
    assert seen["first"] == f"{100 * best:.1f} %"  # the first click sorts downwards
    assert seen["shown"] == 5
    assert seen["wide"] == 0
    for part in ("rates", "untested", "headline"):
        assert seen[part] <= 800, f"{part} is below the first screen"


@browser
def test_a_narrow_window_does_not_scroll_sideways(path, tmp_path):
    act = """<script>document.body.dataset.wide =
      document.documentElement.scrollWidth - document.documentElement.clientWidth;</script></body>"""
    page = tmp_path / "narrow.html"
    page.write_text(path.read_text(encoding="utf-8").replace("</body>", act), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe src="{page.as_uri()}" width="420" height="900"></iframe>', encoding="utf-8")
    picture = tmp_path / "narrow.png"
    dom, _ = _chromium(tmp_path, "--window-size=500,900", "--dump-dom", page.as_uri())
    assert 'data-wide="0"' in dom
    _chromium(tmp_path, f"--screenshot={picture}", "--window-size=500,900", frame.as_uri())
    assert picture.stat().st_size > 10_000
