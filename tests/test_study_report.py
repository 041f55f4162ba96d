"""The page of a study: what it says follows from the rows, and it works in a browser."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medistill.cli import app
from medistill.engine import Here
from medistill.errors import RunRefused
from medistill.indicator import SEED, Example, Indicator
from medistill.plan import Data, Study, Way
from medistill.report import opened, study_prints
from medistill.report.paper import _hours, paper
from medistill.report.paper_answers import claim, noise_floor
from medistill.report.paper_variation import by_variation
from medistill.report.study import render_study
from medistill.report.study_figures import (
    cost_figure,
    curve_figure,
    gap_figure,
    heat,
    indicator_figure,
    methods_of,
)
from medistill.report.study_opened import Opened
from medistill.report.study_words import against_random, findings
from medistill.study import Folder, Options, run_study
from medistill.tabulate import Book, read_rows, write_rows
from test_study import TINY, tiny

NET = "convnet-2-8"
FACTS = {"classes": 2, "train": 9, "key": "k", "steps_done": 20, "paper_steps": 2000}


def row(source: str, method: str, ipc: int, seed: int, accuracy: float) -> dict[str, Any]:
    baseline = method in ("random", "full")
    return {
        "source": source,
        "group": "made",
        "method": method,
        "ipc": ipc,
        "backbone": NET,
        "synthesis": 0 if baseline else seed,
        "student_seed": seed,
        "accuracy": accuracy,
        "balanced_accuracy": accuracy,
        "auc": accuracy,
        "seconds": 1.0,
        "distill_seconds": None if baseline else 3.0,
        "data_digest": source,
        "version": "0.1.0",
        "device": "cpu",
    }


def book(gain: float, sources: int = 4, seeds: int = 3) -> Book:
    """Return a study in which dm gains so much over random images and kcenter loses 0.1."""
    rows = []
    for number in range(sources):
        base = 0.5 + 0.02 * number
        for seed in range(seeds):
            shift = 0.001 * seed
            for size in (1, 10):
                step = 0.1 if size == 10 else 0.0
                rows.append(row(f"s{number}", "random", size, seed, base + step + shift))
            rows.append(row(f"s{number}", "full", 0, seed, 0.9 + shift))
            rows.append(row(f"s{number}", "dm", 1, seed, base + gain + shift))
            rows.append(row(f"s{number}", "kcenter", 1, seed, base - 0.1 + shift))
    return Book(rows, (1,))


def test_words_follow_the_numbers() -> None:
    told, warned = findings(book(0.05), NET, {"done": 30, "missing": 2, "failed": 1})
    text = " ".join(told)
    assert "30 of 33 cells are done" in text
    assert "At 1 per class dm gains most" in text
    assert (
        "+5.0 points of accuracy on average over 4 sources, beyond both intervals on 4 of 4 "
        in text
    )
    assert "kcenter stays behind random images" in text
    assert [warning.split()[0] for warning in warned] == ["2", "1"]
    told, warned = findings(book(-0.2, seeds=1), NET, {"done": 9})
    assert "kcenter loses least to as many random images: -10.0" in told[1]
    assert "kcenter and dm stay behind" in told[1]
    assert "beyond" not in told[1]  # no interval, nothing that could part
    assert "one synthesis" in warned[0]
    assert "dm" not in " ".join(findings(book(0.05, sources=2), NET, {"done": 9})[0])
    rows = [one for group in book(0.05).groups.values() for one in group.rows]
    for number, one in enumerate(rows):
        if one["method"] == "kcenter":  # it wins as often as it loses
            one["accuracy"] += 0.1 + (0.06 if number % 2 else -0.07)
    told, _ = findings(Book(rows, (1,)), NET, {"done": 9})
    assert "kcenter cannot be told from them on average." in told[1]
    assert "stay" not in told[1]


def test_data_that_changed_while_a_study_ran_is_named() -> None:
    rows = [one for group in book(0.05).groups.values() for one in group.rows]
    assert Book(rows, (1,)).changed() == []
    mixed = [{**one, "data_digest": "new"} if one is rows[0] else one for one in rows]
    _, warned = findings(Book(mixed, (1,)), NET, {"done": 9})
    assert any(
        "Cells of s0 were made of data with different digests" in warning for warning in warned
    )


def test_intervals_are_counted_on_their_side() -> None:
    first, last = against_random(book(0.05), 1, NET)
    assert (first.method, first.above, first.below) == ("dm", 4, 0)
    assert (last.method, last.above, last.below) == ("kcenter", 0, 4)
    assert first.gain == pytest.approx(0.05)


def test_figures_hold_what_the_rows_say() -> None:
    found = book(0.05)
    assert methods_of(found) == ["dm", "kcenter"]
    (first, *_) = heat(found, 1, NET, ["dm", "kcenter"])
    assert [cell["gain"] for cell in first["cells"]] == ["+5.0", "-10.0"]
    assert [cell["shade"] for cell in first["cells"]] == pytest.approx([0.25, -0.5])
    curve = curve_figure(found, "s0", NET, ["dm"])
    assert curve is not None
    assert [trace["name"] for trace in curve["traces"]] == ["random images", "full data", "dm"]
    assert curve["traces"][0]["x"] == [1, 10]
    assert curve["traces"][2]["y"] == pytest.approx([55.1])
    axis = {"title": {"text": "spread"}}
    spread = {f"s{n}": 0.1 * (n + 1) for n in range(4)}
    varied = gap_figure(found, spread, 1, ["dm"], axis)
    assert varied is not None
    (trace,) = varied["traces"]
    assert trace["x"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    # s0: (0.551 - 0.501) / (0.901 - 0.501).
    assert trace["y"] == pytest.approx([100 * 0.05 / (0.4 - 0.02 * n) for n in range(4)])
    assert varied["layout"]["xaxis"] == axis
    flat = Book([row("s", m, i, 0, 0.9) for m, i in (("random", 1), ("full", 0), ("dm", 1))], (1,))
    assert gap_figure(flat, {"s": 1.0}, 1, ["dm"], axis) is None  # no gap to close
    cost = cost_figure(found, 1, NET, ["dm"])
    assert cost is not None
    assert (cost["traces"][0]["x"], cost["traces"][0]["y"]) == ([3.0], pytest.approx([5.0]))
    assert curve_figure(found, "absent", NET, ["dm"]) is None
    assert gap_figure(found, {}, 1, ["dm"], axis) is None
    assert cost_figure(found, 1, NET, ["absent"]) is None


def test_the_indicators_figure_predicts_each_dataset_by_other_families() -> None:
    def measured(score: float) -> dict[str, Any]:
        varied = {"fisher": 1.0, "modes": 2.0, "dimension_mle": 8.0, "majority": 0.5}
        sizes = {"1": {name: [score] for name in ("accuracy", "balanced_accuracy", "auc")}}
        return {"random": sizes, "variation": varied, "classes": 2, "train": 100}

    examples = [
        Example(
            f"s{n}", (f"s{n}",), measured(n / 20), {"dm": {1: {"accuracy": n / 10, "auc": 1.0}}}
        )
        for n in range(9)
    ]
    # One dataset breaks the line: it is predicted by the others all the same.
    examples[4] = examples[4]._replace(reached={"dm": {1: {"accuracy": 0.9, "auc": 1.0}}})
    found = indicator_figure(examples, 1, ["dm", "mtt"], "random accuracy alone")
    assert found is not None
    line, marks = found["traces"]
    assert line["name"] == "equal"
    assert marks["x"][4] == pytest.approx(40)
    assert marks["y"][4] == pytest.approx(90)
    # Eight lie on a line but for the odd one's pull; the 8th of 9 errors is the half width.
    errors = sorted(abs(x - y) for x, y in zip(marks["x"], marks["y"], strict=True))
    assert marks["error_x"]["array"] == pytest.approx([errors[7]] * 9)
    assert indicator_figure(examples[:5], 1, ["dm"], "random accuracy alone") is None
    twins = [one._replace(families=("s3",)) if n == 4 else one for n, one in enumerate(examples)]
    found = indicator_figure(twins, 1, ["dm"], "random accuracy alone")
    assert found is not None
    assert found["traces"][1]["x"][3] != pytest.approx(marks["x"][3])  # its twin is not seen either


def toy(found: Book) -> Opened:
    """Return an opened study around a book: s0 and s1 real, s2 and s3 phantoms of a design."""
    sources = tuple(
        Data(f"s{n}", group="real" if n < 2 else "phantom", variation=None if n < 2 else n / 3)
        for n in range(4)
    )
    study = Study("toy", sources, (Way("dm"), Way("kcenter")), (1,), (NET,), about="A toy.")
    measured = {f"s{n}": {"variation": {"fisher": 0.1 * (n + 1)}} for n in range(4)}
    return Opened(Folder(Path("runs/toy")), study, [], found, measured, [], None)


def test_the_paper_says_what_the_rows_say() -> None:
    rows = [r for group in book(0.05).groups.values() for r in group.rows]
    for one in rows:  # of balanced accuracy dm gains 7 points
        one["balanced_accuracy"] += 0.02 * (one["method"] == "dm")
    full = Book([{**FACTS, **one} for one in rows], (1,))
    text = paper(toy(full))
    # All four gains are 5 points; of 16 flips of signs one is as large: p is 1 / 16.
    (line,) = [line for line in text.splitlines() if line.startswith("| dm | 5.0")]
    assert line.startswith("| dm | 5.0 [5.0, 5.0]; 4 above, 0 below of 4; p = 0.06")
    assert "| dm | 7.0 [7.0, 7.0]; 4 above, 0 below of 4" in text
    assert "| kcenter | -10.0 [-10.0, -10.0]; 0 above, 4 below of 4; p = 1 |" in text
    assert "At 1 per class the best mean is that of dm on 4 of 4 sources." in text
    # Gaps of 0.05 / 0.4 and 0.05 / 0.38: 12.5% and 13.2%, the median of both.
    assert "| dm | 1 | 13% of 2 | 14% of 2 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| 1 | s3 |")]
    assert "| 61.1 [" in line
    assert "| 1 | s1 |" not in text.split("Phantoms whose variation")[1].split("## Cost")[0]
    assert "| s0 | real | 2 | 9 | 0.100 | 90.1 [89.9, 90.3] |" in text
    assert "| dm | 3.0 s |" in text
    assert "beat all data" not in text
    # 2 x 4 groups of 3 syntheses each; three are what the study asked for.
    assert "3 syntheses of each method asked for (8 of 3 syntheses among 8 numbers)" in text
    assert "make 1% to 1% of their papers' steps (median 1%)" in text
    assert "as random images chose them" not in text  # each set has pilots of its own
    alike = [{**r, "accuracy": 0.99} if r["method"] != "full" else r for r in rows]
    told = paper(toy(Book([{**FACTS, **r} for r in alike], (1,))))
    assert "At 1 per class the best mean is that of" not in told  # nobody is best alone
    mixed = [{**r, "accuracy": 0.99} if r["source"] == "s0" else r for r in rows]
    told = paper(toy(Book([{**FACTS, **r} for r in mixed], (1,))))
    assert "that of dm on 3 of 4 sources; on 1 several are best alike." in told
    assert "s0 at 1" not in text.split("## Limits")[1].split("## Settings")[0]
    over = Book([{**FACTS, **r} for r in rows if r["method"] != "dm"], (1,))
    assert "## The indicator" not in paper(toy(over))
    high = [{**r, "accuracy": 0.99} if r["method"] == "dm" else r for r in rows]
    told = paper(toy(Book([{**FACTS, **r} for r in high], (1,))))
    assert "At 1 per class 4 sets beat all data beyond both intervals: dm on s0, dm on s1" in told


def test_the_floor_is_the_error_of_true_means() -> None:
    """Two syntheses of dm 0.2 apart have s = 0.1 sqrt(2); kcenter has one, and is left out."""
    rows = [row("a", "dm", 1, seed, 0.5 + 0.2 * seed) for seed in range(2)]
    rows += [
        row("b", "dm", 1, 0, 0.5),
        row("a", "kcenter", 1, 0, 0.5),
        row("a", "random", 1, 0, 0.1),
    ]
    s = 0.1 * math.sqrt(2)
    each = math.sqrt(2 / math.pi) * s
    error, sources = noise_floor(toy(Book(rows, (1,))))
    assert (error, sources) == (pytest.approx((each / math.sqrt(2) + each) / 2), 1)
    assert math.isnan(noise_floor(toy(Book(rows[2:], (1,))))[0])


def test_variation_is_told_in_words() -> None:
    """Eight sources: dm closes more of the gap the higher the Fisher ratio, kcenter at random."""
    rows = []
    for n in range(8):
        closed = {"dm": n / 10, "kcenter": (n * 5 % 8) / 10, "random": 0.0, "full": 1.0}
        for name, share in closed.items():
            ipc = 0 if name == "full" else 1
            rows += [row(f"s{n}", name, ipc, seed, 0.4 + 0.4 * share) for seed in range(2)]
    found = toy(Book(rows, (1,)))
    measured = {f"s{n}": {"variation": {"fisher": 0.1 * (n + 1)}} for n in range(8)}
    told, *_ = by_variation(replace(found, measured=measured))
    assert told.startswith(
        "At 1 per class dm (+1.00) closes more of the gap where classes lie further apart for "
        "their spread (rank correlation with the Fisher ratio over 8 sources"
    )
    measured = {f"s{n}": {"variation": {"fisher": 0.9 - 0.1 * n}} for n in range(8)}
    told, *_ = by_variation(replace(found, measured=measured))
    assert "dm (-1.00) closes more of the gap where they lie closer (rank" in told
    assert not any("Fisher" in text for text in by_variation(found))  # four measured: too few


def test_designed_and_pooled_sources_are_told_in_words() -> None:
    """dm closes 0.2 of the gap of sets alone, 0.6 of pooled ones; kcenter the other way round."""
    rows = []
    for n in range(4):
        closed = {"dm": 0.6, "kcenter": 0.1} if n > 1 else {"dm": 0.2, "kcenter": 0.3}
        for name, share in (closed | {"random": 0.0, "full": 1.0}).items():
            ipc, gap = 0 if name == "full" else 1, 0.01 if n == 3 else 0.4
            rows += [row(f"s{n}", name, ipc, seed, 0.4 + gap * share) for seed in range(2)]
            rows += [row(f"t{n}", name, ipc, seed, 0.4 + 0.4 * share) for seed in range(2)]
    found = toy(Book(rows, (1,)))
    groups = [("real", None), ("real", None), ("pooled", None), ("pooled", 1.0)]
    sources = tuple(
        Data("breastmnist", name=f"{letter}{n}", group=kind, variation=moved)
        for letter in "st"
        for n, (kind, moved) in enumerate(groups)
    )
    told = by_variation(replace(found, study=replace(found.study, sources=sources)))
    assert told[0].startswith(
        "Of 2 sources whose variation alone moves, random images are 5 points"
    )
    assert " below all data on 1 (at 1 per class)" in told[0]
    assert told[1].startswith(
        "On 3 pooled sources against 4 sets alone, at 1 per class dm closes more of the gap and "
        "kcenter closes less of the gap"
    )


def test_hours_count_a_synthesis_once_however_many_students_it_has() -> None:
    rows = [
        {**FACTS, **row("s0", "dm", 1, seed, 0.5), "key": "k", "distill_seconds": 3600.0}
        for seed in range(2)
    ]
    rows += [{**FACTS, **row("s0", "random", 1, 0, 0.5), "key": "r", "seconds": 7198.0}]
    rows += [{**FACTS, **row("s0", "full", 0, 0, 0.5), "key": "f", "seconds": 0.0}]
    assert "students took 3.0 hours of single" in _hours(toy(Book(rows, (1,))))


def test_accuracy_of_one_class_alone_is_named() -> None:
    rows = [{**FACTS, **r} for group in book(0.05).groups.values() for r in group.rows]
    text = paper(toy(Book(rows, (1,))))
    assert "naming the larger class" not in text
    for one in rows:
        if (one["source"], one["method"]) == ("s0", "dm"):
            one["balanced_accuracy"] = 1 / one["classes"] + 0.01
    text = paper(toy(Book(rows, (1,))))
    assert "less than 2 points above chance for dm on s0 at 1.\n" in text


def test_tiles_and_soft_labels_are_told() -> None:
    found = toy(book(0.05))
    study = replace(found.study, methods=(Way("dm"), Way("sketch"), Way("datm")))
    rows = [{**FACTS, **r} for group in found.book.groups.values() for r in group.rows]
    text = paper(replace(found, study=study, book=Book(rows, (1,))))
    assert "An image of sketch is 2 x 2 tiles" in text
    assert "Labels of datm are learned and soft" in text
    assert "tiles" not in paper(toy(Book(rows, (1,))))


def test_the_claim_is_held_against_the_numbers() -> None:
    def judged(spearman: float, gain: float, p: float) -> dict[str, Any]:
        at = {"spearman": spearman, "gain_spearman": gain}
        by = {
            "dm": {"1": {"spearman": spearman, "gain_spearman": gain}},
            "dc": {"1": {"spearman": 0.2, "gain_spearman": -gain}},
        }
        at |= {"family_error": 0.07 if gain > 0.7 else 0.09}
        tests = {"p_value": p, "p_better": better, "p_better_at": [better]}
        return {"family_error": 0.05, **tests, "budgets": {"1": at}, "methods": by}

    better = 0.01

    def told(seed: dict[str, Any], chosen: str = SEED) -> str:
        report = {"accuracy": {SEED: seed, "ridge, few": judged(0.95, 0.8, 0.001)}}
        return claim(Indicator((), chosen, report, "toy"))[0]

    assert "the distilled set's holds at fixed" in told(judged(0.9, 0.1, 0.001))
    assert "hardly tells what distillation adds" in told(judged(0.9, 0.1, 0.001))
    assert "also tells" in told(judged(0.9, 0.5, 0.001))
    assert "does not hold" in told(judged(0.4, 0.1, 0.001))
    assert "does not hold" in told(judged(0.9, 0.1, 0.2))
    assert "No candidate with more numbers errs less" in told(judged(0.9, 0.1, 0.01))
    assert "also tells" in told(judged(0.9, -0.5, 0.001))  # the more random gives the less is added
    assert "not for dc at 1." in told(judged(0.9, 0.1, 0.001))
    assert "not for dm at 1 and dc at 1." in told(judged(0.4, 0.1, 0.001))
    text = told(judged(0.9, 0, 0.01), "ridge, few")
    assert "ridge, few, errs by 0.050 (0.070 against 0.090 at 1 per class); better by more" in text
    assert "from dc at 1 -0.50 to dm at 1 +0.50 (mean size 0.50 to 0.50" in told(
        judged(0.9, 0.5, 0.001)
    )
    better = 0.8
    assert "not shown to be better by more" in told(judged(0.9, 0, 0.01), "ridge, few")


def test_the_command_line_writes_words_and_figures(page: Path, tmp_path: Path) -> None:
    study, out = str(page.parent / "out"), str(tmp_path / "found.md")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["report", *words])

    assert run(study, "--out", out).exit_code == 0
    text = Path(out).read_text()
    assert "# What the study tiny found" in text
    assert "<i>" not in text  # names are no markup here either
    made = run(study, "--out", str(tmp_path / "p.html"), "--figures", str(tmp_path / "figures"))
    assert made.exit_code == 0
    assert "figures in" in made.stdout
    assert list((tmp_path / "figures").glob("*.pdf"))
    for words, said in (
        ((str(tmp_path), "--figures", out), "a folder that study run wrote"),
        ((str(tmp_path), "--indicator", "x.json"), "a folder that study run wrote"),
    ):
        wrong = run(*words)
        assert wrong.exit_code == 2
        assert said in wrong.stderr


def test_rows_survive_their_file() -> None:
    columns = {"f1": None, "ece": 0.1234567, "key": "ab", "images": 3, "kappa": None}
    given = [{**row("a, b", "dm", 1, 2, 0.75), **columns}]
    (again,) = read_rows(write_rows(given))
    for name in ("source", "method", "ipc", "synthesis", "accuracy", "key", "images", "f1"):
        assert again[name] == given[0][name]
    assert again["ece"] == pytest.approx(0.123457)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a study whose names try to be markup, with some cells missing."""
    folder = tmp_path_factory.mktemp("study")
    study = tiny(folder, TINY.replace("name: alike", 'name: "<i>alike</i>"'))
    options = Options(only=("<i>alike</i>",))
    run_study(study, folder / "out", Here(), cache=folder / "cache", options=options)
    result = CliRunner().invoke(
        app, ["report", str(folder / "out"), "--out", str(folder / "page.html")]
    )
    assert result.exit_code == 0, result.output
    return folder / "page.html"


def test_names_are_text_and_never_markup(page: Path) -> None:
    text = page.read_text()
    assert "<i>alike" not in text
    assert "&lt;i&gt;alike&lt;/i&gt;" in text
    assert "12 cells have not been run" in text
    assert render_study(opened(Folder(page.parent / "out"))) == text


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_figures_are_files_for_papers_and_repeat(page: Path, tmp_path: Path, form: Any) -> None:
    study = opened(Folder(page.parent / "out"))
    written = study_prints(study, tmp_path / "one", form)
    again = study_prints(study, tmp_path / "two", form)
    assert {path.name for path in written} >= {f"curve-0.{form}", f"cost-1.{form}"}
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    text = (tmp_path / "one" / f"curve-0.{form}").read_bytes()
    assert text.startswith(b"%PDF" if form == "pdf" else b"<?xml")
    if form == "svg":
        assert b"random images" in text
        assert b"images per class" in text
        assert b"<i>" not in text


def test_an_empty_study_has_a_page(tmp_path: Path) -> None:
    run_study(tiny(tmp_path), tmp_path / "out", Here(), cache=tmp_path, options=Options(minutes=0))
    with pytest.raises(RunRefused, match="no finished cell"):
        study_prints(opened(Folder(tmp_path / "out")), tmp_path / "figures")
    text = render_study(opened(Folder(tmp_path / "out")))
    assert "No cell is done yet" in text
    assert "0 of 24 cells are done" in text


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_control_works_in_a_browser(page: Path, visit: Any, width: int, scheme: str) -> None:
    view = visit(page, width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    for group in view.locator(".choices").all():
        for button in group.locator("button").all():
            button.focus()
            view.keyboard.press("Enter")
            assert button.get_attribute("aria-pressed") == "true"
            assert group.locator('[aria-pressed="true"]').count() == 1
    view.get_by_role("button", name="Accuracy", exact=True).click()
    table = view.locator("table:visible").first
    heads = table.locator("th button").all()
    for head in heads:
        head.click()
        values = table.locator("tbody tr").evaluate_all(
            "(rows, i) => rows.map(r => r.children[i].dataset.value)", heads.index(head)
        )
        known = [value for value in values if value]
        numbers = all(value.replace(".", "").isdigit() for value in known)
        order = sorted(known, key=float if numbers else str, reverse=True)
        assert known == order
        assert table.locator('[aria-sort="descending"]').count() == 1
    for option in view.locator("select option").all():
        view.locator("select").select_option(option.get_attribute("value"))
    assert view.locator("#plot-curve .main-svg").count() >= 1
    for thumb in view.locator(".thumbs button").all():
        thumb.click()
        assert view.locator("dialog img").evaluate(
            "image => image.decode().then(() => image.width)"
        )
        view.keyboard.press("Escape")
        assert not view.locator("dialog").is_visible()
    for summary in view.locator("summary:visible").all():
        summary.click()
    numbers = view.locator("figure:has(#plot-curve) details li").all_inner_texts()
    assert len(numbers) >= 4
    assert any(text.startswith("random images: 1 per class: ") for text in numbers)
    assert any(text.startswith("dm: 1 per class: ") for text in numbers)
    for link in view.locator("nav a").all():
        link.click()
    view.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
