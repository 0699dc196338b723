#!/usr/bin/env python3
"""How much of the communication between ranks hides behind the computation.

    python3 scripts/bench_overlap.py [--steps 12] [--runs 3]

Two ranks on this machine train a small random model, alternately over the real loopback and over a link that is
slowed down (SAIL_SIMULATED_LINK_BYTES_PER_SEC) until the bytes of a step take a given share of the time that the
computation takes. Prints, for each strategy, the step time against the longer of both and against their sum. Step
times are medians over steps and runs; needs `target/release/sail-train` and two idle cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Wider than the tiny model, so that there are several buckets and a step takes a while.
MODEL = {
    "model.llm.random.hidden_size": 512,
    "model.llm.random.intermediate_size": 1536,
    "model.llm.random.num_hidden_layers": 8,
    "model.llm.random.num_attention_heads": 8,
    "model.vision.random.hidden_size": 384,
    "model.vision.random.intermediate_size": 1024,
    "train.llm": "{lr: 2e-4}",
    "init": "null",
    "eval": "null",
    "export": "null",
    "batch.packs_per_step": 2,
    "batch.tokens_per_pack": 512,
    "parallel.bucket_mb": 4,
    "schedule.warmup": 1,
}


def run(strategy: str, steps: int, link: float | None) -> tuple[float, float]:
    """Median step time and bytes a rank sends in a step."""
    with tempfile.TemporaryDirectory() as root:
        sets = {**MODEL, "parallel.strategy": strategy, "schedule.steps": steps, "run.root": root}
        command = [ROOT / "target/release/sail-train", "launch", "--nproc", "2", "--"]
        command += ["--config", "configs/tiny/stage2.yaml"]
        for path, value in sets.items():
            command += ["--set", f"{path}={value}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if link:
            env["SAIL_SIMULATED_LINK_BYTES_PER_SEC"] = str(link)
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        lines = (Path(root) / "runs/tiny/stage2/metrics.jsonl").read_text().splitlines()
    steps_made = [line for line in map(json.loads, lines) if line["kind"] == "train"][2:]
    return (
        statistics.median(line["step_secs"] - line["data_wait_secs"] for line in steps_made),
        statistics.median(line["sent_bytes"] for line in steps_made),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{'strategy':<9} {'compute s':>9} {'link s':>7} {'step s':>7} {'of the longer':>13} {'of the sum':>10}")
    for strategy in ["ddp", "zero1", "zero2"]:
        for share in [0.5, 1.0]:
            rows = []
            for _ in range(args.runs):
                compute, sent = run(strategy, args.steps, None)
                link = share * compute
                step, _ = run(strategy, args.steps, sent / link)
                rows.append((compute, link, step, step / max(compute, link), step / (compute + link)))
            compute, link, step, longer, total = (statistics.median(column) for column in zip(*rows))
            print(f"{strategy:<9} {compute:>9.3f} {link:>7.3f} {step:>7.3f} {longer:>12.2f}x {total:>9.2f}x", flush=True)


if __name__ == "__main__":
    main()
