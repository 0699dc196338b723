"""The page of reproduce_gfr.py: tables of what was measured, a plot of them, and what held."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

OURS = "three-stages"


@dataclass(frozen=True)
class Metric:
    group: str
    name: str
    higher_is_better: bool | None  # None where nobody says so
    of: Callable[[dict], float]


def metrics(figures: dict) -> list[Metric]:
    """What the figures of one way hold."""
    found = []
    for probe in figures["encoder"]["recognition"]:
        for kind in sorted(probe["tests"][0]["top1"]):
            found.append(Metric("encoder", f"{probe['name']}, {kind}", True, top1(probe["name"], kind)))
    for group in ["fresh", "model"]:
        for task in figures[group]["loss"]:
            found.append(Metric(group, f"loss, {task['name']}", False, loss(group, task["name"])))
        for task in figures[group]["loss"]:
            if task.get("images"):
                found.append(Metric(group, f"gap, {task['name']}", True, gap(group, task["name"])))
        found.append(Metric(group, "answers", True, lambda figures, group=group: figures[group]["generation"][0]["exact_match"]))
    for side in ["before", "after"]:
        for distance in ["nearest", "wasserstein", "mean"]:
            # In which direction it should move the paper says only of the nearest word, behind the projector.
            higher_is_better = False if (distance, side) == ("nearest", "after") else None
            found.append(Metric("affinity", f"{distance}, {side}", higher_is_better, affinity(side, distance)))
    return found


def by_name(results: list[dict], name: str) -> dict:
    return next(result for result in results if result["name"] == name)


def top1(probe: str, kind: str) -> Callable[[dict], float]:
    return lambda figures: by_name(figures["encoder"]["recognition"], probe)["tests"][0]["top1"][kind]


def loss(group: str, task: str) -> Callable[[dict], float]:
    return lambda figures: by_name(figures[group]["loss"], task)["loss"]


def gap(group: str, task: str) -> Callable[[dict], float]:
    def of(figures: dict) -> float:
        images = by_name(figures[group]["loss"], task)["images"]
        return images["shuffled_image"] - images["true_image"]

    return of


def affinity(side: str, distance: str) -> Callable[[dict], float]:
    return lambda figures: figures["fresh"]["affinity"][0][side][distance]


def quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by degrees of freedom."""

    def share(angle: float) -> float:
        # Of values within √freedom tan(angle): Abramowitz and Stegun, 26.7.3 and 26.7.4.
        is_odd = freedom % 2
        term, total = math.cos(angle) ** is_odd, 0.0
        for i in range(is_odd, freedom - 1, 2):
            total += term
            term *= (i + 1) / (i + 2) * math.cos(angle) ** 2
        return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; infinite for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, math.inf
    return mean, quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)


def shown(mean: float, half: float) -> str:
    return f"{mean:.4f}" if math.isinf(half) else f"{mean:.4f} ± {half:.4f}"


def verdict(metric: Metric, ours: list[float], others: list[float]) -> tuple[str, str]:
    """The difference to another way, of the same seeds, and what it says of a metric that has a direction."""
    mean, half = interval([a - b for a, b in zip(ours, others, strict=True)])
    better = mean if metric.higher_is_better else -mean
    said = "undecided" if abs(mean) <= half else "better" if better > 0 else "worse"
    sign = "+" if mean >= 0 else "−"
    width = "" if math.isinf(half) else f" ± {half:.4f}"
    return f"{sign}{abs(mean):.4f}{width}", said


GROUPS = {
    "encoder": "The encoder: share of test images that a probe on its frozen features gets right",
    "fresh": "The encoder in a new model, of which the projector alone was trained: held-out loss (nats a token), how much larger it is with another image (gap), answers that are exact",
    "model": "The model as it was trained, the same",
    "affinity": "Distance of visual tokens and words in the new model, before and after the projector",
}


def draw(results: dict) -> tuple[str, str]:
    """The page in Markdown and its plot in SVG."""
    figures, ways = results["figures"], list(results["figures"])
    seeds = [str(seed) for seed in results["seeds"]]
    known = metrics(figures[OURS][seeds[0]])
    values = {metric: {way: [metric.of(figures[way][seed]) for seed in seeds] for way in ways} for metric in known}
    lines = [
        f"# Gradual refinement at the scale `{results['scale']}`",
        "",
        f"`{results['command']}`, {results['program']}, data `{results['data']}`",
        "",
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}; means over them with 95 % intervals of Student's t. Steps of the stages: {', '.join(map(str, results['plan']['steps']))};"
        f" of the new model's projector: {results['plan']['fresh']}. Samples seen, mean: "
        + ", ".join(f"{way} {statistics.fmean(figures[way][seed]['samples'] for seed in seeds):.0f}" for way in ways)
        + ".",
        "",
        "![means and intervals](results.svg)",
        "",
    ]
    lines += ["## What held", "", *conclusions(values, ways), ""]
    for group, title in GROUPS.items():
        lines += [f"## {title}", "", f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
        for metric in (metric for metric in known if metric.group == group):
            cells = " | ".join(shown(*interval(values[metric][way])) for way in ways)
            direction = {True: " (higher is better)", False: " (lower is better)", None: ""}[metric.higher_is_better]
            lines.append(f"| {metric.name}{direction} | {cells} |")
        lines.append("")
    return "\n".join(lines), plot(values, ways)


def conclusions(values: dict, ways: list[str]) -> list[str]:
    """Against each other way: how many figures are better, worse, undecided, and all differences."""
    lines = [f"`{OURS}` minus the other, seed by seed; where the interval of the difference holds 0, it is undecided.", ""]
    for way in ways:
        if way == OURS:
            continue
        judged = {metric: of for metric, of in values.items() if metric.higher_is_better is not None}
        told = {metric: verdict(metric, of[OURS], of[way]) for metric, of in judged.items()}
        count = {said: sum(found == said for _, found in told.values()) for said in ["better", "worse", "undecided"]}
        lines.append(f"* against `{way}`: {count['better']} better, {count['worse']} worse, {count['undecided']} undecided of {len(told)}.")
        for wanted in ["better", "worse"]:
            named = [f"{metric.group} {metric.name} {difference}" for metric, (difference, said) in told.items() if said == wanted]
            if named:
                lines.append(f"  {wanted.capitalize()}: {'; '.join(named)}.")
    return lines


COLUMN, ROW, LEFT, INK, FAINT = 300, 20, 110, "#3b6fd4", "#7a8190"


def plot(values: dict, ways: list[str]) -> str:
    """A small field for each figure, with a dot and an interval for each way."""
    panels = [metric for metric in values if metric.group in ("encoder", "fresh")]
    height = ROW * (len(ways) + 2)
    columns = 3
    rows = math.ceil(len(panels) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * COLUMN} {rows * height}" font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, metric in enumerate(panels):
        x0, y0 = (i % columns) * COLUMN, (i // columns) * height
        spans = {way: interval(values[metric][way]) for way in ways}
        ends = [mean + sign * (0 if math.isinf(half) else half) for mean, half in spans.values() for sign in (-1, 1)]
        low, high = min(ends), max(ends)
        room = (high - low) or 1.0
        x_of = lambda value, x0=x0, low=low, room=room: x0 + LEFT + (value - low) / room * (COLUMN - LEFT - 30)
        parts.append(f'<text x="{x0 + 10}" y="{y0 + 16}" font-weight="bold">{metric.group}: {metric.name}</text>')
        for j, way in enumerate(ways):
            y = y0 + ROW * (j + 2) - 6
            mean, half = spans[way]
            ink = INK if way == OURS else FAINT
            parts.append(f'<text x="{x0 + LEFT - 10}" y="{y + 4}" text-anchor="end" fill="{ink}">{way}</text>')
            if not math.isinf(half):
                parts.append(f'<line x1="{x_of(mean - half):.1f}" x2="{x_of(mean + half):.1f}" y1="{y}" y2="{y}" stroke="{ink}"/>')
            parts.append(f'<circle cx="{x_of(mean):.1f}" cy="{y}" r="3.5" fill="{ink}"><title>{shown(mean, half)}</title></circle>')
        for value, anchor in [(low, "start"), (high, "end")]:
            parts.append(f'<text x="{x_of(value):.1f}" y="{y0 + height - 4}" text-anchor="{anchor}" fill="{FAINT}" font-size="9">{value:.3f}</text>')
    return "\n".join([*parts, "</svg>", ""])
