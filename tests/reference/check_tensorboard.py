"""Checks the event file of a run against its `metrics.jsonl`, with TensorBoard's own reader: every number is there once,
under its name and step, and so are pictures, answers, the plan and the freeze table. Norms of gradients by parameter add up
to the norm of all.

    python tests/reference/check_tensorboard.py RUN_DIR      (packages: requirements-reference.txt)
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ALL = {"scalars": 0, "images": 0, "tensors": 0, "histograms": 0, "compressedHistograms": 0, "audio": 0}
# Scalars are fp32.
TOLERANCE = 1e-6


def numbers(name: str, value: object) -> dict[str, float]:
    """Numbers in nested objects, by their place."""
    if isinstance(value, dict):
        return {tag: number for key, inner in value.items() for tag, number in numbers(f"{name}/{key}", inner).items()}
    return {name: value} if isinstance(value, (int, float)) else {}


def held_out(name: str, losses: dict) -> dict[str, float]:
    images = losses.get("images") or {}
    flat = {key: value for key, value in losses.items() if key != "images"}
    return numbers(name, flat | {f"loss_{image}": loss for image, loss in images.items()})


def expected_of(line: dict) -> dict[str, float]:
    if line["kind"] == "eval":
        report = line["report"]
        of_sources = [held_out(f"eval/{source}", losses) for source, losses in report["sources"].items()]
        return {tag: value for part in [held_out("eval", report["total"]), *of_sources] for tag, value in part.items()}
    if line["kind"] in ("train", "checkpoint"):
        return numbers(line["kind"], {key: line[key] for key in line if key not in ("kind", "step", "time")})
    return {}


def text_of(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}


def check_scalars(events: EventAccumulator, lines: list[dict]) -> int:
    expected = defaultdict(list)
    for line in lines:
        for tag, value in expected_of(line).items():
            expected[tag].append((line["step"], value))
    assert set(events.Tags()["scalars"]) == set(expected), set(events.Tags()["scalars"]) ^ set(expected)
    count = 0
    for tag, points in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        # What was added later comes last.
        assert [step for step, _ in sorted(found)] == sorted(step for step, _ in points), (tag, found, points)
        for (step, value), (_, wanted) in zip(sorted(found), sorted(points), strict=True):
            assert math.isclose(value, wanted, rel_tol=TOLERANCE), (tag, step, value, wanted)
        count += len(points)
    return count


def check_answers(events: EventAccumulator, lines: list[dict], run: Path) -> int:
    index = run / "held-out/pictures.json"
    pictures = json.loads(index.read_text()) if index.exists() else {}
    answered = defaultdict(dict)
    for line in lines:
        if line["kind"] == "eval":
            for generation in line["report"]["generations"]:
                answered[generation["sample"]][line["step"]] = generation
    tags = {f"eval/answers/{sample}" for sample in answered} | {"run/configuration", "run/freeze"}
    assert set(events.Tags()["tensors"]) == tags, events.Tags()["tensors"]
    for sample, by_step in answered.items():
        texts = text_of(events, f"eval/answers/{sample}")
        assert texts.keys() == by_step.keys(), (sample, texts.keys())
        for step, generation in by_step.items():
            for part in ("question", "truth", "answer"):
                assert generation[part].strip() in texts[step], (part, generation, texts[step])
    shown = {f"eval/pictures/{sample}" for sample in answered if sample in pictures}
    assert set(events.Tags()["images"]) == shown, events.Tags()["images"]
    for tag in shown:
        sample = tag.removeprefix("eval/pictures/")
        (image,) = events.Images(tag)
        assert image.encoded_image_string == (run / "held-out" / pictures[sample]).read_bytes()
        assert image.step == min(answered[sample]) and image.width > 0 and image.height > 0, image
    return len(shown)


def check_norms(events: EventAccumulator, lines: list[dict], every: int) -> int:
    steps = {line["step"]: line["grad_norm"] for line in lines if line["kind"] == "train" and line["step"] % every == 0}
    squares = defaultdict(float)
    for tag in events.Tags()["histograms"]:
        assert tag.startswith("train/grad_norms/"), tag
        for event in events.Histograms(tag):
            values = event.histogram_value
            assert sum(values.bucket) == values.num > 0 and values.min <= values.max, values
            squares[event.step] += values.sum_squares
    assert squares.keys() == steps.keys(), (squares.keys(), steps.keys())
    for step, norm in steps.items():
        assert math.isclose(math.sqrt(squares[step]), norm, rel_tol=1e-9), (step, squares[step], norm)
    return len(steps)


def main() -> None:
    run = Path(sys.argv[1])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = list((run / "tensorboard").iterdir())
    assert len(files) == 1, files
    events = EventAccumulator(str(run / "tensorboard"), size_guidance=ALL)
    events.Reload()
    plan = (run / "plan.yaml").read_text()
    texts = text_of(events, "run/configuration")
    assert plan.strip() in texts[max(texts)], "the plan is not that of plan.yaml"
    assert all("trained" in text for text in text_of(events, "run/freeze").values())
    every = next(int(line.split()[1]) for line in plan.partition("\nlog:")[2].splitlines() if "every:" in line)
    scalars = check_scalars(events, lines)
    pictures = check_answers(events, lines, run)
    norms = check_norms(events, lines, every)
    assert scalars > 0 and norms > 0
    print(f"{scalars} numbers, {pictures} pictures, norms of {norms} steps")


main()
