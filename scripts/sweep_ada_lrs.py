#!/usr/bin/env python3
"""Whether AdaLRS finds the rate that a sweep of fixed rates finds, on the tiny model.

    python3 scripts/sweep_ada_lrs.py [--data DIR] [--json FILE] [--seeds 1 2 3 4 5] [--steps 150] [--window 10] [--jobs 2]

Trains the connector and the language model of configs/tiny/stage1.yaml at one rate, constant and without a warm-up, with
images of 56 pixels, the samples of all four kinds and 1,024 tokens a step: at each rate of the sweep, and by AdaLRS from
the best of them divided and multiplied by 10. The final loss is the training loss over the last tenth of the steps,
which is what a search sees; runs of a seed have the same samples there. The best rate has the lowest one, averaged over
the seeds. With fewer tokens a step, or more steps over these few samples, all rates come to much the same loss.
Prints all runs, with held-out losses; exit status 1 if a search ends at less than half or more than twice the best
rate, or at a loss more than 2 % above that of the best rate with the same seed. Means over the seeds are printed as well.

DIR is `data/demo` or a folder made by fetch_corpus.py, whose samples last for more steps.

Runs that FILE holds already are not made again. Needs `target/release/sail-train`, or the program named by --program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = {"caption": 2, "ocr": 1, "vqa": 1, "text": 1}
AWAY, RATE_LIMIT, LOSS_LIMIT = 10.0, 2.0, 1.02


def test_bed(data: str) -> dict[str, str]:
    """What is set for every run."""
    held_out = [f'{{name: {name}, shards: "{data}/{name}-heldout-*.tar"}}' for name in ["caption", "ocr"]]
    sources = [f'{{name: {name}, shards: "{data}/{name}-train-*.tar", weight: {weight}}}' for name, weight in WEIGHTS.items()]
    return {
        "model.vision.image_px": 56,
        "model.vision.random.image_size": 56,
        "batch": "{tokens_per_pack: 256, packs_per_step: 4}",
        "data.too_long": "truncate_text",
        "data.sources": f"[{', '.join(sources)}]",
        "eval": f"{{samples: 1000, generate: 0, sources: [{', '.join(held_out)}]}}",
    }


class Runs:
    """Runs of the trainer, each made once."""

    def __init__(self, program: Path, data: str, steps: int, file: Path | None, jobs: int):
        self.program, self.data, self.steps, self.file = program, data, steps, file
        self.pool, self.lock = ThreadPoolExecutor(jobs), threading.Lock()
        self.known = json.loads(file.read_text())["runs"] if file and file.exists() else {}

    def prepare(self, wanted: list[tuple]) -> None:
        """Makes the runs that `of` will be asked for, several at a time."""
        for _ in self.pool.map(lambda of: self.of(*of), wanted):
            pass

    def of(self, seed: int, rate: float, search: str | None = None) -> dict:
        """Final losses, and of a search its trials and the rate that it ended at."""
        kind = f"kind: constant, warmup: 0, steps: {self.steps}"
        schedule = f"{{{kind}}}" if search is None else f"{{{kind}, ada_lrs: {search}}}"
        sets = test_bed(self.data) | {"run.seed": seed, "schedule": schedule, "checkpoint.every": self.steps}
        sets |= {f"train.{module}": f"{{lr: {rate:g}}}" for module in ["projector", "llm"]}
        # Whatever decides a run is in its name; another program asks for another file.
        name = ", ".join(f"{path}={value}" for path, value in sets.items())
        if name not in self.known:
            made = self.make(sets, rate)
            with self.lock:
                self.known[name] = made
                self.save({})
        return self.known[name]

    def make(self, sets: dict, rate: float) -> dict:
        with tempfile.TemporaryDirectory() as root:
            command = [str(self.program), "--config", "configs/tiny/stage1.yaml"]
            for path, value in (sets | {"run.root": root}).items():
                command += ["--set", f"{path}={value}"]
            made = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{made.stderr[-2000:]}")
            folder = Path(root) / "runs/tiny/stage1"
            summary = json.loads((folder / "summary.json").read_text())
            lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        trials = [line["trial"] | {"step": line["step"]} for line in lines if line["kind"] == "ada_lrs"]
        return {
            "rate": rate * (trials[-1]["scale"] if trials else 1.0),
            "held_out_loss": summary["after"]["total"]["loss"],
            "train_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
            "trials": trials,
            "losses": [round(loss, 5) for loss in losses],
        }

    def save(self, verdict: dict) -> None:
        if self.file:
            self.file.write_text(json.dumps(verdict | {"runs": self.known}, indent=1) + "\n")


def sweep(runs: Runs, rates: list[float], seeds: list[int]) -> float:
    """Prints the losses of fixed rates; the best rate."""
    print(f"{'fixed rate':>12}  final loss by seed" + " " * max(0, 9 * len(seeds) - 18) + "  mean  held-out loss")
    means = {}
    runs.prepare([(seed, rate) for rate in rates for seed in seeds])
    for rate in rates:
        made = [runs.of(seed, rate) for seed in seeds]
        means[rate] = statistics.fmean(run["train_loss"] for run in made)
        by_seed = " ".join(f"{run['train_loss']:8.4f}" for run in made)
        held_out = statistics.fmean(run["held_out_loss"] for run in made)
        print(f"{rate:>12.3g}  {by_seed}  {means[rate]:.4f}  {held_out:.4f}", flush=True)
    best = min(means, key=means.__getitem__)
    if best in (rates[0], rates[-1]):
        sys.exit(f"the best rate, {best:g}, is at an end of the sweep: give others with --rates")
    near = [f"{rate:g}" for rate in rates if means[rate] <= LOSS_LIMIT * means[best]]
    print(f"best: {best:g}; mean losses within 2 % of it: {', '.join(near)}\n")
    return best


def search(runs: Runs, best: float, seeds: list[int], plan: str) -> list[dict]:
    """Prints what searches from below and above come to."""
    signs = {"keep": "+", "leave": "0", "go_back": "-"}
    print(f"AdaLRS {plan}; trials: + kept, 0 left, - gone back from")
    print(f"{'from':>10} {'seed':>5} {'trials':<12} {'ended at':>10} {'/ best':>7} {'loss':>8} {'/ best':>7} {'held out / best':>15}")
    rows = []
    runs.prepare([(seed, start, plan) for start in [best / AWAY, best * AWAY] for seed in seeds])
    for start in [best / AWAY, best * AWAY]:
        for seed in seeds:
            made, fixed = runs.of(seed, start, plan), runs.of(seed, best)
            row = {
                "from": start,
                "seed": seed,
                "trials": "".join(signs[trial["verdict"]] for trial in made["trials"]),
                "rate": made["rate"],
                "rate_ratio": made["rate"] / best,
                "loss": made["train_loss"],
                "loss_ratio": made["train_loss"] / fixed["train_loss"],
                "held_out_ratio": made["held_out_loss"] / fixed["held_out_loss"],
            }
            row["rate_holds"] = 1 / RATE_LIMIT <= row["rate_ratio"] <= RATE_LIMIT
            row["loss_holds"] = row["loss_ratio"] <= LOSS_LIMIT
            rows.append(row)
            missed = [what for what in ["rate", "loss"] if not row[f"{what}_holds"]]
            print(
                f"{start:>10.3g} {seed:>5} {row['trials']:<12} {row['rate']:>10.3g} {row['rate_ratio']:>7.2f} "
                f"{row['loss']:>8.4f} {row['loss_ratio']:>7.3f} {row['held_out_ratio']:>15.3f}  {'missed: ' + ', '.join(missed) if missed else 'ok'}",
                flush=True,
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/sail-train")
    parser.add_argument("--data", default="data/demo", metavar="DIR", help="shards of the four kinds, from the repository's root")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures; runs that it holds are not made again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread")
    parser.add_argument("--window", type=int, default=10)
    parser.add_argument("--alpha", type=int, default=2)
    parser.add_argument("--beta", type=int, default=3)
    parser.add_argument("--lambda", type=float, default=0.9, dest="decay")
    args = parser.parse_args()
    runs = Runs(args.program, args.data.rstrip("/"), args.steps, args.json, args.jobs)
    best = sweep(runs, sorted(args.rates), args.seeds)
    plan = f"{{window: {args.window}, alpha: {args.alpha}, beta: {args.beta}, lambda: {args.decay:g}}}"
    rows = search(runs, best, args.seeds, plan)
    fixed = statistics.fmean(runs.of(seed, best)["train_loss"] for seed in args.seeds)
    sides = {
        start: statistics.fmean(row["loss"] for row in rows if row["from"] == start) / fixed
        for start in [best / AWAY, best * AWAY]
    }
    holds = all(row["rate_holds"] and row["loss_holds"] for row in rows)
    runs.save({"best": best, "search": plan, "holds": holds, "mean_loss_ratios": sides, "searches": rows})
    met = {what: sum(row[f"{what}_holds"] for row in rows) for what in ["rate", "loss"]}
    print(f"\nwithin {RATE_LIMIT:g}x of the best rate: {met['rate']} of {len(rows)}; within 2 % of its loss: {met['loss']} of {len(rows)}")
    print("mean loss, as a multiple of the best rate's: " + ", ".join(f"{ratio:.3f} from {start:g}" for start, ratio in sides.items()))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
