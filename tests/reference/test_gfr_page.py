#!/usr/bin/env python3
"""The statistics of the page about gradual refinement, on figures whose differences are known.

    python3 tests/reference/test_gfr_page.py
"""

import math
import subprocess
import sys
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import gfr_page  # noqa: E402

# scipy.stats.t.ppf(0.975, freedom)
QUANTILES = {1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 9: 2.2621572, 10: 2.2281389}
QUANTILES |= {29: 2.0452296, 30: 2.0422725, 121: 1.9797638, 1000: 1.9623391}
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

    def test_quantiles_are_those_of_students_t(self):
        for freedom, expected in QUANTILES.items():
            self.assertAlmostEqual(gfr_page.quantile(freedom), expected, places=6, msg=freedom)

    def test_differences_of_the_same_seeds_decide(self):
        page, plot = gfr_page.draw(results(3))
        # Losses vary more between seeds than between ways: only seed by seed is the difference seen.
        self.assertIn("against `direct`: 2 better, 0 worse, 6 undecided of 8", page)
        self.assertIn("fresh loss, vqa −0.2010 ± ", page)
        self.assertIn("against `untouched`: 0 better, 0 worse, 8 undecided of 8", page)
        self.assertIn("| shape, mlp (higher is better) | 0.5000 ± 0.0000 |", page)
        self.assertEqual(plot.count("<circle"), 4 * len(WAYS))

    def test_of_distances_to_words_one_alone_is_to_fall(self):
        made = results(3)
        for of_seed in made["figures"]["direct"].values():
            side = {"nearest": 1.5, "wasserstein": 1.0, "mean": 9.0}
            of_seed["fresh"]["affinity"] = [{"before": side, "after": side}]
        page, _ = gfr_page.draw(made)
        rows = [line.split(" | ")[0] for line in page.split("## Distance of visual tokens")[1].splitlines()[4:] if line]
        names = ["nearest, before", "wasserstein, before", "mean, before"]
        names += ["nearest, after (lower is better)", "wasserstein, after", "mean, after"]
        self.assertEqual(rows, [f"| {name}" for name in names])
        # What nobody says should rise or fall is neither better nor worse, however far it is away.
        self.assertIn("against `direct`: 3 better, 0 worse, 5 undecided of 8", page)
        held = page.split("## What held")[1].split("##")[0]
        self.assertIn("affinity nearest, after −0.5000", held)
        self.assertEqual(held.count("affinity"), 1)

    def test_a_seed_counts_once(self):
        command = [sys.executable, SCRIPTS / "reproduce_gfr.py", "--scale", "smoke", "--seeds", "1", "2", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn("error: `--seeds` has 1 more than once\n\nhint: ", done.stderr)

    def test_one_seed_decides_nothing(self):
        page, _ = gfr_page.draw(results(1))
        self.assertIn("against `direct`: 0 better, 0 worse, 8 undecided of 8", page)
        self.assertNotIn("inf", page)


if __name__ == "__main__":
    unittest.main()
