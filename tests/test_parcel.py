"""The page of a package: what its sender says is text, and leads nowhere."""

import html
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medistill.cli import app
from medistill.package import read
from medistill.pictures import png, synthetic_sheet
from medistill.records import to_record
from medistill.report import Parcel
from medistill.report.parcel import render_package

GOLDEN = Path(__file__).parent / "golden"
EVIL = """# Title <script>alert(1)</script>

<img src=x onerror=alert(2)> [a link](http://evil.example) ![a picture](http://evil.example/p.png)
<http://evil.example/auto> &lt;b&gt;; [by reference][r]

[r]: http://evil.example/r

<div onclick="alert(3)">

| head | <i>b</i> |
|---|---|
| one | `code <u>` |
"""


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Return a place with a package and its sender's key; what was seen is kept beside it."""
    for name in ("1.medistill", "1.pem"):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


@pytest.fixture
def parcel(golden: Path) -> Parcel:
    """Return what the golden package tells."""
    found = read(golden / "1.medistill", golden / "1.pem")
    sheet = png(synthetic_sheet(found.synthetic))
    record = to_record(found.manifest)
    return Parcel(
        record, found.evaluation, found.privacy, found.report, "me (17)", "ab" * 32, 5, sheet
    )


def words(text: str) -> str:
    """Return what a reader sees."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_page_tells_what_the_package_holds(golden: Path) -> None:
    page = golden / "page.html"
    by = ["--trust", str(golden / "1.pem"), "--out", str(page)]
    result = CliRunner().invoke(app, ["report", str(golden / "1.medistill"), *by])
    assert result.exit_code == 0, result.output
    text = words(page.read_text())
    for expected in (
        "golden, version 1",
        "Signed by 1 (17d24bc493370936)",
        "Golden hospital",
        "20 or more patients",
        "none: no image is, or started from, a real image",
        "for the data protection officer",
        "The three questions of WP216",
        "positive control: copies, must be found",
    ):
        assert expected in text, expected
    assert "Nobody signed" not in text


def test_a_package_is_checked_before_a_page_is_written(golden: Path) -> None:
    place, page = golden / "1.medistill", golden / "page.html"
    words_of = ["report", str(place), "--out", str(page)]
    assert CliRunner().invoke(app, words_of).exit_code == 4  # no --trust
    place.write_bytes(place.read_bytes()[:-1])
    result = CliRunner().invoke(app, [*words_of, "--trust", str(golden / "1.pem")])
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert not page.exists()
    wrong = CliRunner().invoke(app, ["report", str(place), "--out", str(golden / "page.md")])
    assert wrong.exit_code == 2


def test_what_a_sender_wrote_is_text_and_leads_nowhere(parcel: Parcel) -> None:
    evil = "<script>alert(4)</script>"
    manifest = {**parcel.manifest, "site": evil, "allowed": ["leaks"]}
    text = render_package(parcel._replace(report=EVIL, manifest=manifest, signer=""))
    body = text[text.index("</style>") :]
    assert "<script" not in body
    assert body.count("<img") == 1  # our own sheet
    assert set(re.findall(r'<a [^>]*href="([^"]*)"', body)) <= {
        *(f"#{name}" for name in ("content", "package", "pictures", "scores", "made")),
        *(f"#{name}" for name in ("privacy", "data", "limits")),
    }
    for raw in ("onerror=alert(2)>", '<div onclick="alert(3)">', "<i>b</i>", "<u>", "<b>;"):
        assert raw not in body
    for shown in (evil, "<img src=x onerror=alert(2)>", "[a link](http://evil.example)", "<u>"):
        assert shown in words(body), shown
    assert "Nobody signed this package" in body
    assert "in spite of: leaks" in body
    assert 'class="prose"' in body
    assert "<h3>Title" in body  # the sender's titles stand below the page's own


@pytest.mark.parametrize("factor", [[1], "x", None, 99])
def test_tiles_are_those_of_the_recipe(factor: object, parcel: Parcel) -> None:
    made = {**parcel.manifest["made"], "settings": {"factor": factor}}
    page = render_package(parcel._replace(manifest={**parcel.manifest, "made": made}))
    tiles = parcel.manifest["recipe"]["factor"] ** 2
    assert f"Each holds {tiles} tiles" in words(page)


def test_a_package_without_scores_says_so(parcel: Parcel) -> None:
    assert "declares no scores" in render_package(parcel._replace(evaluation={}))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(parcel: Parcel, visit: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_package(parcel._replace(report=parcel.report + EVIL)))
    view = visit(page, width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator("img").evaluate("image => image.decode().then(() => image.width)")
