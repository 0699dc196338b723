"""Times Pillow and torchvision on one thread, as InternVL's loader uses them, against sail-data's image path.

`python scripts/bench_images.py [ROUNDS]` after `cargo build --release -p sail-data --example bench_images`.
Both sides read a JPEG from the page cache and make normalised fp32 tiles of 448 pixels (at most 12, and a
thumbnail). Machines are noisy: both sides take turns, processor time is counted, and medians are printed.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "target/release/examples/bench_images"
PX, MAX_TILES, COUNT = 448, 12, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

torch.set_num_threads(1)
NORMALISE = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
GRIDS = sorted(
    ((i, j) for i in range(1, MAX_TILES + 1) for j in range(1, MAX_TILES + 1) if i * j <= MAX_TILES),
    key=lambda grid: grid[0] * grid[1],
)


def photograph(width, height, path, **options):
    """Blobs, edges and noise that compress like a photograph at quality 90 (about 1 bit a pixel)."""
    rng = np.random.default_rng(0)
    small = rng.uniform(0, 255, (height // 40, width // 40, 3)).astype(np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    soft[height // 3 : height // 2, width // 4 : width // 2] = [200, 40, 30]
    soft += rng.normal(0, 4, soft.shape)
    Image.fromarray(np.clip(soft, 0, 255).astype(np.uint8)).save(path, quality=90, **options)


def grid_of(width, height):
    best, distance = (1, 1), float("inf")
    for i, j in GRIDS:
        away = abs(width / height - i / j)
        if away < distance or (away == distance and width * height > 0.5 * PX * PX * i * j):
            best, distance = (i, j), away
    return best


def load(path):
    image = Image.open(path).convert("RGB")
    columns, rows = grid_of(*image.size)
    resized = image.resize((PX * columns, PX * rows), Image.Resampling.BICUBIC)
    boxes = [(PX * x, PX * y, PX * (x + 1), PX * (y + 1)) for y in range(rows) for x in range(columns)]
    tiles = [resized.crop(box) for box in boxes]
    if len(tiles) > 1:
        tiles.append(image.resize((PX, PX), Image.Resampling.BICUBIC))
    return torch.stack([NORMALISE(tile) for tile in tiles])


def processor_secs(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def time_python(path):
    """Milliseconds an image."""
    begin = processor_secs(resource.RUSAGE_SELF)
    for _ in range(COUNT):
        load(path)
    return (processor_secs(resource.RUSAGE_SELF) - begin) / COUNT * 1e3


def time_rust(path):
    """Milliseconds an image; the process's start is counted with them."""
    begin = processor_secs(resource.RUSAGE_CHILDREN)
    subprocess.run([BENCH, str(PX), str(MAX_TILES), str(3 * COUNT), path], check=True)
    return (processor_secs(resource.RUSAGE_CHILDREN) - begin) / (3 * COUNT) * 1e3


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        for width, height, options in [(640, 480, {}), (1920, 1080, {}), (1920, 1080, {"progressive": True})]:
            path = Path(folder) / "image.jpg"
            photograph(width, height, path, **options)
            theirs, ours = [], []
            for _ in range(rounds):
                theirs.append(time_python(path))
                ours.append(time_rust(path))
            python, rust = statistics.median(theirs), statistics.median(ours)
            kind = "progressive" if options else "baseline"
            print(
                f"{width}x{height} {kind}, {path.stat().st_size // 1024} KiB: "
                f"Pillow + torchvision {python:.1f} ms ({1e3 / python:.1f} images/s), "
                f"sail-data {rust:.1f} ms ({1e3 / rust:.1f} images/s), {python / rust:.2f} times faster"
            )


if __name__ == "__main__":
    main()
