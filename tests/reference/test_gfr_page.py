#!/usr/bin/env python3
"""The statistics of the page about gradual refinement, on figures whose differences are known.

    python3 tests/reference/test_gfr_page.py
"""

import math
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import gfr_page  # noqa: E402

WAYS = ["three-stages", "direct", "untouched"]


def figures(loss: float, top1: float) -> dict:
    losses = [{"name": "vqa", "loss": loss, "images": {"true_image": loss, "shuffled_image": loss + 0.5}}]
    model = {"loss": losses, "generation": [{"exact_match": 0.25}]}
    side = {"nearest": 1.0, "wasserstein": 2.0, "mean": 3.0}
    return {
        "samples": 10,
        "encoder": {"recognition": [{"name": "shape", "tests": [{"top1": {"mlp": top1}}]}]},
        "model": model,
        "fresh": model | {"affinity": [{"before": side, "after": side}]},
    }


def results(seeds: int) -> dict:
    """`direct` is worse in loss by 0.2 with every seed, and in recognition by chance better or worse."""
    noise = [0.1, -0.1, 0.02]
    of = {
        "three-stages": [figures(1.0 + noise[i], 0.5) for i in range(seeds)],
        "direct": [figures(1.2 + noise[i] + 0.001 * i, 0.5 + noise[i]) for i in range(seeds)],
        "untouched": [figures(1.0 + noise[i], 0.5) for i in range(seeds)],
    }
    by_seed = {way: {str(i): made for i, made in enumerate(of[way])} for way in WAYS}
    plan = {"steps": [1, 2, 3], "fresh": 4}
    about = {"scale": "smoke", "command": "c", "program": "p", "data": "d", "plan": plan}
    return about | {"seeds": list(range(seeds)), "figures": by_seed}


class Page(unittest.TestCase):
    def test_intervals_are_those_of_students_t(self):
        # scipy.stats.t.interval(0.95, 2, loc=2, scale=scipy.stats.sem([1, 2, 3]))
        mean, half = gfr_page.interval([1.0, 2.0, 3.0])
        self.assertAlmostEqual(mean - half, -0.484138, places=3)
        self.assertEqual(gfr_page.interval([1.0]), (1.0, math.inf))

    def test_differences_of_the_same_seeds_decide(self):
        page, plot = gfr_page.draw(results(3))
        # Losses vary more between seeds than between ways: only seed by seed is the difference seen.
        self.assertIn("against `direct`: 2 better, 0 worse, 5 undecided of 7", page)
        self.assertIn("fresh loss, vqa −0.2010 ± ", page)
        self.assertIn("against `untouched`: 0 better, 0 worse, 7 undecided of 7", page)
        self.assertIn("| shape, mlp (higher is better) | 0.5000 ± 0.0000 |", page)
        self.assertEqual(plot.count("<circle"), 4 * len(WAYS))

    def test_one_seed_decides_nothing(self):
        page, _ = gfr_page.draw(results(1))
        self.assertIn("against `direct`: 0 better, 0 worse, 7 undecided of 7", page)
        self.assertNotIn("inf", page)


if __name__ == "__main__":
    unittest.main()
