#!/usr/bin/env python3
"""Writes as many bytes as `bench_checkpoint --parameters N` saves, with torch.save and with safetensors.

    .venv/bin/python tests/reference/checkpoint.py FOLDER [--parameters 500000000] [--json FILE]

A hundred parameters with two moments each, fp32, in one file that is then synced to the disk.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

TENSORS = 100
KINDS = ("param", "exp_avg", "exp_avg_sq")


def seconds_to_disk(write, path: Path) -> float:
    """Until what `write` puts into a new file is on the disk."""
    begun = time.perf_counter()
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--parameters", type=int, default=500_000_000)
    parser.add_argument("--json", type=Path, help="writes the result for machines")
    args = parser.parse_args()

    numel = args.parameters // TENSORS
    state = {f"llm.layers.{i}.weight.{kind}": torch.randn(numel) for i in range(TENSORS) for kind in KINDS}
    # What was written before is no part of it.
    os.sync()
    report = {
        "torch_save": seconds_to_disk(lambda path: torch.save(state, path), args.folder / "reference.pt"),
        "safetensors": seconds_to_disk(lambda path: save_file(state, path), args.folder / "reference.safetensors"),
    }
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.items()))
    if args.json:
        args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
