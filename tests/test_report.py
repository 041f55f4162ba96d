"""The report page: what it says, that it is safe, and that it asks nothing of the network."""

import copy
import html
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medistill.errors import DataError, UsageError
from medistill.metrics import Score
from medistill.pictures import png, sheet
from medistill.records import read_json, write_json
from medistill.report import report
from medistill.report.figures import confusions, loss_figure
from medistill.report.words import amount, apart, findings

Json = dict[str, Any]


def score(mean: float, half: float | None = 0.01, n: int = 5) -> Json:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "n": n}


def arm(mean: float, half: float | None = 0.01) -> Json:
    names = ("accuracy", "balanced_accuracy", "auc", "f1")
    shifts = dict(zip(names, (0.0, -0.03, 0.06, -0.02), strict=True))
    return {name: score(mean + shift, half) for name, shift in shifts.items()} | {
        "ece": score(0.2 * (1 - mean), half)
    }


RUN: Json = {
    "format": "medistill run 1",
    "source": "pneumoniamnist",
    "command": "medistill distill pneumoniamnist --method dm --ipc 10 --out runs/dm",
    "method": "dm",
    "settings": {"lr_images": 1.0, "bank": 30, "augmentation": {"flip": True, "scale": 1.2}},
    "seed": 0,
    "ipc": 10,
    "images": 20,
    "backbone": {"family": "convnet", "depth": 3, "width": 128, "norm": "instance"},
    "device": "cpu",
    "versions": {"medistill": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    "data": {
        "name": "pneumoniamnist",
        "task": "binary",
        "classes": ["normal", "pneumonia"],
        "channels": 1,
        "shape": [28, 28],
        "mean": [0.5719],
        "std": [0.1684],
        "normalization": "training split",
        "modality": "chest X-ray",
        "license": "CC BY 4.0",
        "citation": "Yang et al., MedMNIST v2, Scientific Data 10:41 (2023). doi:10.1038/s41597",
        "url": "https://medmnist.com",
        "digest": "5c9e" * 16,
    },
    "start": "noise",
    "real_pixels": False,
    "steps": 600,
    "paper_steps": 20000,
    "seconds": 154.3,
    "peak_memory_bytes": 812_000_000,
    "bytes": 62_720,
    "finished": True,
}
MATRICES = {
    "synthetic": [[170, 64], [40, 350]],
    "random": [[150, 84], [70, 320]],
    "full": [[190, 44], [9, 381]],
}


def evaluation(synthetic: float = 0.832, random: float = 0.776, full: float = 0.912) -> Json:
    means = {"synthetic": synthetic, "random": random, "full": full}
    images = {"synthetic": 20, "random": 20, "full": 4708}
    rows = [
        {"arm": name, "backbone": backbone, "seed": seed, "images": images[name]}
        | {"accuracy": mean + 0.004 * (seed - 2), "balanced_accuracy": mean - 0.03}
        | {"auc": mean + 0.06, "f1": mean - 0.02, "ece": 0.04}
        | {"confusion": MATRICES[name], "lr": 0.01, "stop": 300, "seconds": 3.1}
        for name, mean in means.items()
        for backbone in ("convnet-3-128", "resnet18")
        for seed in range(5)
    ]
    pilots = [
        {"arm": name, "backbone": backbone, "lr": lr, "chosen": lr == 0.01}
        | {
            "curve": [
                {"step": s, "loss": 0.5, "accuracy": mean * (1 - math.exp(-s * lr * 1.2))}
                for s in range(75, 376, 75)
            ]
        }
        for name, mean in means.items()
        for backbone in ("convnet-3-128", "resnet18")
        for lr in (0.003, 0.01, 0.03)
    ]
    closed = (synthetic - random) / (full - random) if full > random else None
    gaps = {name: score(closed, 0.12) if closed else None for name in ("accuracy", "auc")}
    text = "Learning rates were chosen on the validation split; the test split was read once."
    return {
        "format": "medistill evaluation 1",
        "command": "medistill evaluate runs/dm --data pneumoniamnist",
        "protocol": {"name": "fair", "text": text, "interval": "t over trainings"},
        "students": ["convnet-3-128", "resnet18"],
        "seeds": [0, 1, 2, 3, 4],
        "rows": rows,
        "pilots": pilots,
        **{name: arm(mean) for name, mean in means.items()},
        "gap_closed": gaps,
        "worth": {"mean": 34.2, "low": 25.0, "high": 47.8, "n": 5},
        "seconds": 210.0,
    }


Maker = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Write a run folder with what is asked for and return it."""

    def write(run: Json = RUN, judged: Json | None = None, full: bool = True) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run))
        if full:
            generator = torch.Generator().manual_seed(0)
            lines = (
                {"step": s, "seconds": 0.25 * s, "loss": 40 * math.exp(-s / 90) + 2 + 0.3 * (s % 3)}
                for s in range(1, 601)
            )
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            rows = [
                (f"{name}\n{kind}", torch.rand(10, 1, 28, 28, generator=generator))
                for name in run["data"]["classes"]
                for kind in ("real", "synthetic")
            ]
            (folder / "sheet.png").write_bytes(png(sheet(rows)))
        if judged is not None:
            (folder / "evaluation.json").write_text(json.dumps(judged))
        return folder

    return write


def page(folder: Path) -> str:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    out = folder.parent / "report.html"
    report(folder, out)
    return out.read_text(encoding="utf-8")


def without_library(text: str) -> str:
    """Leave out the one long script that is plotly, which is full of addresses it never loads."""
    return re.sub(r"<script>/\*\*\s*\* plotly.*?</script>", "", text, flags=re.S)


def words(text: str) -> str:
    """Return what a reader sees: no scripts, no styles, no tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_page_tells_the_whole_story(make: Maker) -> None:
    text = words(page(make(judged=evaluation())))
    for expected in (
        "pneumoniamnist in 20 synthetic images",
        "83.2%",
        "Random real (20)",
        "convnet (depth 3, width 128, norm instance)",
        "Full data (4,708)",
        "none: no image is, or started from, a real image",
        "600; the paper makes 20,000",
        "2 min 34 s",
        "812.0 MB",
        "62.7 kB",
        "CC BY 4.0",
        "Yang et al., MedMNIST v2",
        "augmentation.scale",
        "the test split was read once",
        "medistill distill pneumoniamnist --method dm --ipc 10 --out runs/dm",
        "medistill evaluate runs/dm --data pneumoniamnist",
        "That the synthetic images are anonymous.",
        "Every training behind these means (30)",
    ):
        assert expected in text


def test_the_page_says_that_an_image_holds_tiles(make: Maker) -> None:
    folder = make(judged=evaluation())
    assert "tiles" not in words(page(folder))
    run = read_json(folder / "run.json")
    run["settings"]["factor"] = 2
    write_json(folder / "run.json", run)
    assert "Each holds 4 tiles, and students train on every tile" in words(page(folder))


def test_the_page_is_the_same_each_time(make: Maker) -> None:
    folder = make(judged=evaluation())
    assert page(folder) == page(folder)


def test_nothing_is_loaded_from_elsewhere(make: Maker) -> None:
    text = page(make(judged=evaluation()))
    own = without_library(text)
    assert len(own) < len(text) / 4, "the library was not found in the page"
    loads = re.findall(r"""(?:src|href|srcset|action)=\s*["']?([^"'\s>]+)""", own)
    assert loads
    assert [url for url in loads if not url.startswith(("data:", "#"))] == []
    places = {url[1:] for url in loads if url.startswith("#")}
    assert places == places & set(re.findall(r'id="([^"]+)"', own)), "a link leads nowhere"
    assert not re.search(r"@import|url\(|<iframe|<object|<embed|<base\b", own)
    assert "default-src 'none'" in own


def test_what_the_files_say_is_text_and_never_markup(make: Maker) -> None:
    evil = "<script>alert(1)</script>"
    run = copy.deepcopy(RUN)
    run["data"]["classes"] = ["normal", evil]
    run["data"]["citation"] = '"><img src=x onerror=alert(2)>'
    run["settings"] = {"</pre><b>": evil}
    run["command"] = f"medistill distill '{evil}' --out runs/dm"
    judged = evaluation()
    for row in judged["rows"] + judged["pilots"]:
        row["backbone"] = evil + row["backbone"]
    text = page(make(run, judged))
    own = without_library(text)
    assert evil not in text
    assert "<img src=x" not in own
    assert "</pre><b>" not in own
    assert own.count("<script") == own.count("</script>") == 2
    assert words(own).count(evil) >= 4
    found = re.search(r'id="figures">(.*?)</script>', own, flags=re.S)
    assert found is not None
    # plotly makes elements of what looks like HTML in the name of a line.
    names = [trace["name"] for trace in json.loads(found[1])["pilots"]["traces"]]
    assert all("&lt;script&gt;" in name and "<" not in name for name in names)


def told(run: Json = RUN, judged: Json | None = None) -> tuple[str, str]:
    paragraph, warnings = findings(run, judged)
    return paragraph, " ".join(warnings)


def test_words_for_a_difference_beyond_its_interval() -> None:
    paragraph, warnings = told(judged=evaluation())
    assert "83.2% of the test split correctly (95% interval 82.2 to 84.2, 5 seeds)" in paragraph
    assert "5.6 points above as many random real images (77.6%)" in paragraph
    assert "beyond its interval" in paragraph
    assert "41.2% of the gap" in paragraph
    assert "about 34 random real images per class (95% interval 25 to 48)" in paragraph
    assert warnings == ""


def test_words_for_intervals_that_overlap() -> None:
    paragraph, _ = told(judged=evaluation(synthetic=0.79))
    assert "1.4 points above" in paragraph
    assert "not settled" in paragraph
    assert "beyond its interval" not in paragraph


def test_words_where_random_images_do_better() -> None:
    paragraph, warnings = told(judged=evaluation(synthetic=0.75))
    assert "2.6 points below" in paragraph
    assert "beyond its interval" in paragraph
    assert "none of the gap" in paragraph
    assert "distillation has not paid here" in warnings
    same, warnings = told(judged=evaluation(synthetic=0.776))
    assert "reach the same" in same
    assert "distillation has not paid here" in warnings


def test_words_where_full_data_is_no_ceiling() -> None:
    paragraph, warnings = told(judged=evaluation(full=0.80))
    assert "it is no ceiling here" in warnings
    assert "of the gap" not in paragraph


def test_words_for_one_training_a_run_cut_short_and_real_pixels() -> None:
    judged = evaluation() | {
        name: {"accuracy": score(mean, None, 1)}
        for name, mean in (("synthetic", 0.83), ("random", 0.70), ("full", 0.9))
    }
    paragraph, warnings = told(RUN | {"finished": False, "real_pixels": True}, judged)
    assert "beyond" not in paragraph
    assert "without an interval" in paragraph
    assert "has one seed only" in warnings
    assert "did not finish" in warnings
    assert "images of real patients" in warnings


def test_apart_needs_two_intervals() -> None:
    one, other, single = Score(0.8, 0.7, 0.9, 5), Score(0.6, 0.5, 0.7, 5), Score(0.1, None, None, 1)
    assert not apart(one, other), "they touch"
    assert apart(one, Score(0.6, 0.5, 0.69, 5))
    assert apart(Score(0.6, 0.5, 0.69, 5), one)
    assert not apart(one, single)


def test_missing_files_are_replaced_by_the_command_that_makes_them(make: Maker) -> None:
    run = RUN | {"source": "npz:my data.npz", "steps_done": 120}
    text = words(page(make(run, full=False)))
    assert "has not been measured yet" in text
    assert "120 of 600; the paper makes 20,000" in text
    assert text.count("medistill evaluate runs/dm --data 'npz:my data.npz'") >= 4
    assert "holds no picture sheet. This command makes it: medistill distill" in text
    assert "holds no log of its loss. This command makes it: medistill distill" in text


def test_arms_and_scores_that_are_absent_leave_a_page(make: Maker) -> None:
    judged = evaluation() | {"full": None, "gap_closed": None, "worth": None, "pilots": []}
    judged["synthetic"]["auc"]["mean"] = float("nan")
    judged["rows"] = []
    text = words(page(make(judged=judged)))
    assert "nan" not in text.lower().replace("finance", "")
    assert "holds no confusion matrices" in text
    assert "holds no curves" in text


def test_refusals_name_what_was_found(make: Maker, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(DataError, match=r"found no run\.json in"):
        report(tmp_path, out)
    with pytest.raises(DataError, match="found format 'medistill run 9'; expected 'medistill run"):
        report(make(RUN | {"format": "medistill run 9"}), out)
    with pytest.raises(DataError, match="lacks method, images"):
        report(make({k: v for k, v in RUN.items() if k not in ("method", "images")}), out)
    folder = make()
    (folder / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is no JSON object"):
        report(folder, out)
    assert not out.exists()


def test_a_line_cut_short_at_the_end_of_the_log_is_dropped(make: Maker) -> None:
    folder = make()
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 601, "lo')
    assert "Distillation loss" in page(folder)


def test_a_missing_extra_is_named(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r"pip install medistill\[report\]"):
        report(make(), make().parent / "report.html")


def test_confusions_are_shares_of_the_true_class() -> None:
    rows = [
        {"arm": "synthetic", "confusion": [[3, 1], [0, 0]]},
        {"arm": "synthetic", "confusion": [[5, 1], [0, 0]]},
        {"arm": "random", "confusion": [[1]]},
    ]
    (only,) = confusions({"rows": rows}, ["a", "b"])
    assert (only["arm"], only["trainings"]) == ("synthetic", 2)
    assert [[cell["share"] for cell in row["cells"]] for row in only["rows"]] == [
        [0.8, 0.2],
        [0, 0],
    ]
    assert [cell["count"] for cell in only["rows"][0]["cells"]] == [8, 2]
    # Two labels that may both be there have a table each, which is no matrix of two classes.
    both = {"arm": "synthetic", "confusion": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}
    assert confusions({"rows": [both]}, ["a", "b"]) == []


def test_long_logs_are_drawn_as_means_of_blocks() -> None:
    figure = loss_figure([{"step": s, "loss": float(s)} for s in range(1, 2001)])
    assert figure is not None
    assert figure["block"] == 3
    assert figure["traces"][0]["x"][:2] == [3, 6]
    assert figure["traces"][0]["y"][:2] == [2.0, 5.0]
    assert loss_figure([{"step": 1, "loss": float("nan")}, {"seconds": 3}]) is None


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(3.14, "s", "3.1 s"), (59.7, "s", "1 min 0 s"), (7322, "s", "2 h 2 min"), (999, "B", "999 B")],
)
def test_amounts_come_in_units_that_people_use(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme", "judged"),
    [(1280, "light", True), (390, "dark", True), (390, "light", False)],
)
def test_in_a_browser(make: Maker, visit: Any, width: int, scheme: str, judged: bool) -> None:
    folder = make(judged=evaluation() if judged else None)
    page(folder)
    view = visit(folder.parent / "report.html", width, scheme)
    plots = view.locator(".plot")
    assert plots.count() == (3 if judged else 1)
    assert view.locator(".plot .main-svg").count() >= plots.count()
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    for summary in view.locator("summary").all():
        summary.click()
    view.get_by_role("button", name="Copy").click()
    view.wait_for_function("document.getElementById('copied').textContent !== ''")
    view.locator("#sheet-open").focus()
    view.keyboard.press("Enter")
    assert view.locator("dialog img").evaluate("image => image.decode().then(() => image.width)")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    view.keyboard.press("Escape")
    assert not view.locator("dialog").is_visible()
    view.locator("#sheet-open").click()
    view.get_by_role("button", name="Close").click()
    assert not view.locator("dialog").is_visible()
    view.emulate_media(color_scheme="dark" if scheme == "light" else "light")
