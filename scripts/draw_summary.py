#!/usr/bin/env python3
"""Draws what a curriculum did: docs/images/quickstart.png was made by it.

    .venv/bin/python scripts/draw_summary.py runs/demo docs/images/quickstart.png

Left: the training loss of every stage and the held-out loss before and after it. Right: held-out
images with the truth and the answer of the trained model.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, PLOT = 1240, 560, 640
INK, FAINT, GRID = "#1f2430", "#7a8190", "#e3e6ec"
STAGE_INKS = ["#3b6fd4", "#c2571a", "#2f8f5b"]


def font(size):
    return ImageFont.load_default(size)


def read_stage(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "summary": json.loads((folder / "summary.json").read_text()),
        "train": [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"],
        "eval": [(line["step"], line["report"]["total"]["loss"]) for line in lines if line["kind"] == "eval"],
    }


def draw_losses(draw, stages):
    left, top, right, bottom = 60, 70, PLOT - 30, HEIGHT - 70
    steps = sum(stage["summary"]["steps"] for stage in stages)
    losses = [loss for stage in stages for _, loss in stage["train"] + stage["eval"]]
    high = max(losses) * 1.02
    x_of = lambda step: left + (right - left) * step / steps
    y_of = lambda loss: bottom - (bottom - top) * loss / high
    draw.text((left, 20), "loss per answer token: line = training, dots = held out", INK, font(17))
    for tick in range(0, int(high) + 1):
        draw.line([(left, y_of(tick)), (right, y_of(tick))], GRID)
        draw.text((left - 12, y_of(tick)), str(tick), FAINT, font(14), anchor="rm")
    start = 0
    for stage, ink in zip(stages, STAGE_INKS):
        points = [(x_of(start + step), y_of(loss)) for step, loss in stage["train"]]
        draw.line(points, ink, 2)
        for step, loss in stage["eval"]:
            x, y = x_of(start + step), y_of(loss)
            draw.ellipse([x - 5, y - 5, x + 5, y + 5], ink, "white")
            above = step == 0  # the end of a stage and the start of the next are one place
            draw.text((x, y - 9 if above else y + 9), f"{loss:.2f}", ink, font(14), anchor="lb" if above else "rt")
        trained = [row["module"] for row in stage["summary"]["modules"] if row["plan"] != "frozen"]
        draw.text((x_of(start) + 4, bottom + 10), stage["summary"]["name"], ink, font(15))
        draw.text((x_of(start) + 4, bottom + 30), " + ".join(dict.fromkeys(trained)), FAINT, font(13))
        start += stage["summary"]["steps"]
        draw.line([(x_of(start), top), (x_of(start), bottom)], GRID)


def image_of(sample, shards):
    """The image of `source/shard/key`, by looking for the key in the held-out shards."""
    key = sample.rsplit("/", 1)[-1]
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.startswith(key + ".") and not member.name.endswith(".json"):
                    return Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
    return None


def draw_answers(sheet, draw, generations, shards):
    draw.text((PLOT, 20), "held-out images: truth, and the answer of the trained model", INK, font(17))
    shown = 0
    for generation in generations:
        image = image_of(generation["sample"], shards)
        if image is None or shown == 12:
            continue
        x, y = PLOT + (shown % 2) * 300, 64 + (shown // 2) * 80
        sheet.paste(image.resize((68, 68)), (x, y))
        draw.rectangle([x, y, x + 67, y + 67], outline=GRID)
        lines = [("truth", generation["truth"], INK), ("model", generation["answer"], STAGE_INKS[0])]
        for i, (name, text, ink) in enumerate(lines):
            draw.text((x + 78, y + 12 + i * 24), f"{name}  {text[:24]}", ink, font(14))
        shown += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with the stages' run folders")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=Path, default=Path("data/demo"), help="folder with *-heldout-*.tar")
    args = parser.parse_args()
    stages = [read_stage(folder.parent) for folder in sorted(args.runs.glob("stage*/summary.json"))]
    if not stages:
        parser.error(f"{args.runs} holds no finished stage")
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    draw_losses(draw, stages)
    generations = stages[-1]["summary"]["after"]["generations"]
    images = stages[-1]["summary"]["after"]["total"]["images"]
    verdict = f"held-out loss with the true image {images['true_image']:.3f}, with another image {images['shuffled_image']:.3f}"
    draw.text((PLOT, HEIGHT - 40), verdict, INK, font(15))
    draw_answers(sheet, draw, generations, sorted(args.shards.glob("*-heldout-*.tar")))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
