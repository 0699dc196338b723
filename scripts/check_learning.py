#!/usr/bin/env python3
"""Says whether a finished stage learned anything, from its summary.json.

    python3 scripts/check_learning.py runs/demo/stage3 --first runs/demo/stage1 [--images]

The held-out loss after the stage must be below the one before the first stage; with --images the loss
with the true image must also be below that with another sample's image. Exit status 1 otherwise.
"""

import argparse
import json
import sys
from pathlib import Path


def evaluation(run: Path, when: str) -> dict:
    """Losses by source, of the sources that were measured."""
    return json.loads((run / "summary.json").read_text())[when]["sources"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("last", type=Path, help="run folder of the last stage")
    parser.add_argument("--first", type=Path, required=True, help="run folder of the first stage")
    parser.add_argument("--images", action="store_true", help="also compare true with shuffled images")
    args = parser.parse_args()
    before, after = evaluation(args.first, "before"), evaluation(args.last, "after")
    verdicts = []
    for source in sorted(before.keys() & after.keys()):
        old, new = before[source]["loss"], after[source]["loss"]
        verdicts.append((f"held-out {source}: loss {old:.3f} before training, {new:.3f} after", new < old))
    if args.images:
        total = json.loads((args.last / "summary.json").read_text())["after"]["total"]["images"]
        true, shuffled = total["true_image"], total["shuffled_image"]
        verdicts.append((f"all images: loss {true:.4f} with the true image, {shuffled:.4f} with another", true < shuffled))
    for text, holds in verdicts:
        print(f"{'ok    ' if holds else 'FAILED'}  {text}")
    return 0 if verdicts and all(holds for _, holds in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
