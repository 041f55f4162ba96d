"""The tables of the page: facts of the run and its data, and scores, as text in order."""

from typing import Any

from ..metrics import Score
from ..records import Json
from .figures import LOWER_IS_BETTER, METRICS
from .words import ARMS, amount, arm_score, finite, percent, score

Facts = list[tuple[str, str]]


def run_facts(run: Json) -> Facts:
    """Return what was distilled, from what, how and at what cost."""
    data = run["data"]
    classes = data.get("classes") or []
    per_class = f", {run['ipc']} per class" if run.get("ipc") else ""
    paper = f"; the paper makes {run['paper_steps']:,}" if run.get("paper_steps") else ""
    channels = data.get("channels", 1)
    size = " x ".join(str(side) for side in data.get("shape") or [])
    rows = [
        ("Data", f"{data.get('name', run['source'])}, {data.get('modality') or 'images'}"),
        ("Classes", f"{len(classes)} ({data.get('task', '')}): {', '.join(map(str, classes))}"),
        ("Image", f"{size} pixels, {channels} channel{'s' if channels != 1 else ''}"),
        ("Method", str(run["method"])),
        ("Synthetic images", f"{run['images']}{per_class}"),
        ("Started from", str(run.get("start", "unknown"))),
        ("Pixels of real images", _pixels(run.get("real_pixels"))),
        ("Steps", f"{_steps(run)}{paper}"),
        ("Backbone", _spec(run.get("backbone"))),
        ("Seed", str(run.get("seed", ""))),
        ("Device", str(run.get("device", ""))),
    ]
    for label, name, unit in (
        ("Time", "seconds", "s"),
        ("Peak memory", "peak_memory_bytes", "B"),
        ("Size of the set", "bytes", "B"),
    ):
        number = finite(run.get(name))
        rows.append((label, amount(number, unit) if number is not None else ""))
    return [(label, value) for label, value in rows if value]


def _steps(run: Json) -> str:
    asked, done = run.get("steps"), run.get("steps_done")
    if asked is None:
        return ""
    return f"{asked:,}" if done in (None, asked) else f"{done:,} of {asked:,}"


def _pixels(real: Any) -> str:
    if real is None:
        return "unknown"
    some = "yes: some images are, or started from, real images"
    return some if real else "none: no image is, or started from, a real image"


def _spec(record: Any) -> str:
    if not isinstance(record, dict):
        return str(record or "")
    rest = {name: value for name, value in record.items() if name != "family"}
    fields = ", ".join(f"{name} {value}" for name, value in pairs(rest))
    return " ".join(
        part for part in (record.get("family"), f"({fields})" if fields else "") if part
    )


def pairs(record: Json, above: str = "") -> Facts:
    """Return nested settings as (dotted name, value) pairs."""
    found: Facts = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += pairs(value, f"{above}{name}.")
        elif isinstance(value, list):
            found.append((above + name, ", ".join(map(str, value))))
        else:
            found.append((above + name, "none" if value is None else str(value)))
    return found


def data_facts(card: Json) -> Facts:
    """Return what a reader must know of the data: its terms, whom to cite, which bytes it was."""
    rounded = {
        name: ", ".join(f"{number:.4f}" for number in card.get(name) or [])
        for name in ("mean", "std")
    }
    rows = [
        ("License", card.get("license")),
        ("Citation", card.get("citation")),
        ("Source", card.get("url")),
        ("Mean, std", f"{rounded['mean']}; {rounded['std']}" if rounded["mean"] else ""),
        ("Normalization", card.get("normalization")),
        ("Digest", card.get("digest")),
    ]
    return [(label, str(value)) for label, value in rows if value]


def arm_names(evaluation: Json | None) -> dict[str, str]:
    """Return the heading of each arm, with the number of images it trains on where that is one."""
    names = {"synthetic": "Synthetic", "random": "Random real", "full": "Full data"}
    for arm in ARMS:
        rows = [row for row in (evaluation or {}).get("rows") or [] if row.get("arm") == arm]
        counts = {row.get("images") for row in rows}
        if len(counts) == 1 and isinstance(count := counts.pop(), int):
            names[arm] += f" ({count:,})"
    return names


def training_rows(evaluation: Json) -> list[dict[str, str]]:
    """Return every training as text: which arm, student and seed, how trained, its scores."""
    plain = ("arm", "backbone", "seed", "images", "lr", "stop")
    return [
        {name: str(row.get(name, "-")) for name in plain}
        | {
            name: percent(x) if (x := finite(row.get(name))) is not None else "-"
            for name in METRICS
        }
        for row in evaluation.get("rows") or []
    ]


def score_table(evaluation: Json) -> list[Json]:
    """Return one line per metric: the three arms, the better of the two sets of equal size."""
    lines = []
    for name, label in METRICS.items():
        scores = {arm: arm_score(evaluation, arm, name) for arm in ARMS}
        if not any(scores.values()):
            continue
        equal = {arm: found.mean for arm in ARMS[:2] if (found := scores[arm]) is not None}
        choose = min if name in LOWER_IS_BETTER else max
        best = choose(equal.values()) if len(set(equal.values())) > 1 else None
        gap = score((evaluation.get("gap_closed") or {}).get(name))
        lines.append(
            {
                "label": label,
                "lower": name in LOWER_IS_BETTER,
                "scores": scores,
                "best": [arm for arm, mean in equal.items() if mean == best],
                "gap": gap,
            }
        )
    return lines


def by_student(evaluation: Json) -> list[Json]:
    """Return mean, least and greatest accuracy per backbone and arm, where backbones differ."""
    rows = evaluation.get("rows") or []
    backbones = list(dict.fromkeys(str(row.get("backbone")) for row in rows))
    table = []
    for backbone in backbones if len(backbones) > 1 else []:
        line: Json = {"backbone": backbone, "arms": {}}
        for arm in ARMS:
            mine = (row for row in rows if (row.get("arm"), row.get("backbone")) == (arm, backbone))
            found = [x for row in mine if (x := finite(row.get("accuracy"))) is not None]
            if found:
                mean = sum(found) / len(found)
                line["arms"][arm] = Score(mean, min(found), max(found), len(found))
        table.append(line)
    return table
