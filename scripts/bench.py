#!/usr/bin/env python3
"""Compares this trainer with a plain eager PyTorch one (`tests/reference/train.py`) on the same work; see bench.sh.

Both sides use the same libtorch, the same weights and the same samples, on two threads each. They take turns, so that
what else the machine does meets both; figures are medians over rounds, with the lowest and the highest, and a ratio is
that of the two runs of a round. Losses that differ by more than 1e-4 of theirs end the comparison with exit code 1.

Figures of a stage: tokens and samples a second, tokens a second of processor time of all threads, and the most memory
resident in the steps, in MB. Padding does not count as tokens.

With `--device cuda` the parts are the `gpu-*` ones: agreement of the losses in fp32, steps of models as large as one would
train, in bf16 (configs/gpu-check), and forward passes of vision transformers; and with each figure of time, model FLOPs
utilisation of both sides, where the card's peak is known. `--alone` leaves out PyTorch, where there is no transformers.

The parts from `start-up` on measure what is around the steps (bench_limits.py). Some of their figures have a limit: one
that is passed is marked FAIL, and the exit code is 1.
"""

import argparse
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import EXAMPLES, PYTHON, ROOT, STEPS_ALONE, Failure, Figure, Table, execute, turns, with_sets
from bench_limits import Limits

SMOLLM2 = ROOT / "weights/smollm2-135m-instruct"
# Largest relative difference of a loss.
LOSS_LIMIT = 1e-4
# In bf16, of random weights: one side has fp32 masters, the other none.
BF16_LIMIT = 2e-2
# Of a gradient norm: PyTorch sums squares in fp32 on a CPU, which for a table of 28M elements is off by more than
# the losses are.
NORM_LIMIT = 5e-3
# Rates at which training does not amplify rounding beyond the limit; they change no work. At 1e-5 the losses of stage 3
# differ by 6e-4 after 20 steps between one and two threads of the same program, so that they say nothing there.
RATES = {1: "1e-5", 2: "1e-5", 3: "1e-6"}
# The same of drawn sequences, which are noise: at 1e-5 those of stage 2 differ by 2.6e-3 between one and two threads.
DRAWN_RATE = "1e-6"
ALL_OF_TINY = f"train={{{', '.join(f'{module}: {{lr: 1e-4}}' for module in ['projector', 'vision', 'llm'])}}}"
MFU = "MFU, %"
TRAINED = {1: ["projector"], 2: ["projector", "vision"], 3: ["projector", "vision", "llm"]}

class Bench:
    def __init__(self, args, table: Table):
        self.args, self.table = args, table

    def stage(self, name: str, config: str, sets: list[str], work: str, memory_alone: bool = False):
        """Rounds of steps of a stage's configuration, `fixed` or `padded`."""
        warmup = 0 if memory_alone else self.args.warmup
        ours = [EXAMPLES / "bench_train", "--config", config, "--steps", self.steps(name), "--warmup", warmup]
        ours = with_sets(ours, [*STEPS_ALONE, *sets])
        if work == "fixed":
            ours += ["--fixed", "--sequence", self.sequence(name)]
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            dump = Path(folder) / "dump"
            if not self.args.alone:
                execute([*ours, "--dump", dump, "--dump-only"])
            theirs = [PYTHON, "tests/reference/train.py", dump, "--collate", work, "--warmup", warmup]
            theirs += ["--device", self.args.device, "--dtype", "fp32" if self.is_fp32(name) else "bf16"]
            if self.args.compile:
                theirs.append("--compile")
            rounds = 1 if "agreement" in name else self.args.rounds
            pairs = turns(ours, None if self.args.alone else theirs, Path(folder), rounds)
        figures = [Figure("peak memory, MB", False)]
        if not (memory_alone or "agreement" in name):
            figures += [Figure("tokens/s", True), Figure("samples/s", True), Figure("tokens/processor s", True)]
        self.show(name, figures, pairs, stage_value)
        if not self.args.alone:
            self.check(name, pairs)

    def show(self, name: str, figures: list[Figure], pairs: list[tuple[dict, dict | None]], value):
        """`value` gives a figure of a report; operations and peak are told by this side, and the same for the other."""
        if pairs[0][0]["peak_flops"] is not None and pairs[0][0]["flops"] is not None:
            figures.append(Figure(MFU, True))
        elif self.args.device == "cuda":
            print(f"{name:<20} no {MFU[:3]}: the peak of this card is not known")
        for figure in figures:
            figure.ours = [value(ours, figure.name) for ours, _ in pairs]
            counted = [(theirs, {key: ours[key] for key in ("flops", "peak_flops")}) for ours, theirs in pairs if theirs]
            figure.theirs = [value(theirs | of_ours, figure.name) for theirs, of_ours in counted]
        self.table.compare(name, figures)

    def forward(self, name: str, ours: list, theirs: list):
        """Rounds of a model without gradients."""
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            if "vit" in ours and not self.args.alone:
                dump = Path(folder) / "dump"
                execute([*ours, "--device", self.args.device, "--repeats", 0, "--dump", dump])
                theirs = [*theirs, dump]
            same = ["--device", self.args.device, "--repeats", self.args.repeats]
            theirs = None if self.args.alone else [*theirs, *same]
            pairs = turns([*ours, *same], theirs, Path(folder), self.args.rounds)
        if any(theirs and ours["ids"] != theirs["ids"] for ours, theirs in pairs):
            raise Failure(f"{name}: the texts differ:\n{pairs[0][0]['ids']}\n{pairs[0][1]['ids']}")
        figures = [Figure("tokens/s", True), Figure("tokens/processor s", True), Figure("peak memory, MB", False)]
        self.show(name, figures, pairs, forward_value)

    def steps(self, name: str) -> int:
        if "agreement" in name:
            return self.args.agreement_steps
        return 2 if name == "vocabulary" else self.args.steps

    def is_fp32(self, name: str) -> bool:
        return self.args.device == "cpu" or name == "gpu-agreement"

    def sequence(self, name: str) -> int:
        if "agreement" in name:
            return 64
        return 512 if name == "vocabulary" or name.startswith("gpu") else 128

    def check(self, name: str, pairs: list[tuple[dict, dict]]):
        """Says how far the sides' losses are apart, and what of the other side's work was padding."""
        losses, norms = zip(*(agreement(*pair) for pair in pairs))
        padded, tokens = (sum(pairs[0][1][key]) for key in ("padded_tokens", "tokens"))
        found = {"loss_difference": largest(losses), "norm_difference": largest(norms), "padding": 1 - tokens / padded}
        for key, value in {"steps": self.steps(name), **found}.items():
            self.table.record(name, key, value)
        losses, norms, padding = found.values()
        print(f"{name:<20} largest difference of a loss {losses:.1e}, of a gradient norm {norms:.1e}", end="")
        print(f"; {padding:.0%} of the padded batches is padding" if padding else "")
        limits = (LOSS_LIMIT, NORM_LIMIT) if self.is_fp32(name) else (BF16_LIMIT, 5 * BF16_LIMIT)
        for what, found, limit in zip(("losses", "gradient norms"), (losses, norms), limits):
            # Written so that a difference that is not a number fails.
            if not found <= limit:
                raise Failure(f"{name}: {what} differ by {found:.1e} of theirs, more than {limit:.0e}")

    def parts(self) -> dict:
        """What can be compared, by name."""
        if self.args.device == "cuda":
            return self.gpu_parts()
        parts = {}
        for stage, modules in TRAINED.items():
            config = f"configs/demo/stage{stage}.yaml"
            for work, rate in (("fixed", DRAWN_RATE), ("padded", RATES[stage])):
                sets = [f"train.{module}.lr={rate}" for module in modules]
                small = [*sets, "batch.tokens_per_pack=128"]
                for name, sets_of_part in [(f"stage{stage}-{work}", sets), (f"agreement-{stage}-{work}", small)]:
                    parts[name] = lambda args=(name, config, sets_of_part, work): self.stage(*args)
            if stage < 3:
                # What this stage trains, on the whole mix of the last stage, whose samples are of many lengths.
                mixed = f"train={{{', '.join(trains(stage, module) for module in TRAINED[3])}}}"
                args = (f"stage{stage}-mixed", "configs/demo/stage3.yaml", [mixed], "padded")
                parts[args[0]] = lambda args=args: self.stage(*args)
        # Without weights that have to be fetched; the usual tests run it.
        parts["agreement-tiny"] = lambda: self.stage("agreement-tiny", "configs/tiny/stage1.yaml", [ALL_OF_TINY], "padded")
        wide = [f"train.projector.lr={RATES[1]}", "model.llm.random.vocab_size=151936", "batch.tokens_per_pack=4096"]
        wide.append("batch.packs_per_step=1")
        parts["vocabulary"] = lambda: self.stage("vocabulary", "configs/tiny/stage1.yaml", wide, "fixed", True)
        python, ours = [PYTHON, "tests/reference/forward.py"], EXAMPLES / "bench_forward"
        parts["vit"] = lambda: self.forward("vit", [ours, "vit", "--image-px", 448], [*python, "vit"])
        llm = ["generate", "--llm", SMOLLM2, "--new-tokens", self.args.new_tokens, "--prompt", prompt()]
        parts["generate"] = lambda: self.forward("generate", [ours, *llm], [*python, *llm])
        return parts

    def gpu_parts(self) -> dict:
        # Random weights hide much in bf16: their losses are near that of guessing. Here is no rounding to hide behind.
        sets = [ALL_OF_TINY, "run.precision=fp32"]
        parts = {"gpu-agreement": lambda: self.stage("gpu-agreement", "configs/tiny/stage1.yaml", sets, "padded")}
        for stage in TRAINED:
            args = (f"gpu-stage{stage}", f"configs/gpu-check/stage{stage}.yaml", [], "fixed")
            parts[args[0]] = lambda args=args: self.stage(*args)
        for size in ("large", "huge"):
            ours = [EXAMPLES / "bench_forward", "vit", "--size", size, "--image-px", 448, "--images", 16]
            args = (f"gpu-vit-{size}", ours, [PYTHON, "tests/reference/forward.py", "vit"])
            parts[args[0]] = lambda args=args: self.forward(*args)
        return parts


def agreement(ours: dict, theirs: dict) -> tuple[float, float]:
    """Largest relative differences of losses and of gradient norms."""
    if (ours["tokens"], ours["samples"]) != (theirs["tokens"], theirs["samples"]):
        raise Failure("the sides had different samples")

    def difference(key: str) -> float:
        return largest([abs(a - b) / abs(a) for a, b in zip(ours[key], theirs[key], strict=True)])

    return difference("losses"), difference("grad_norms")


def largest(differences) -> float:
    """Not a number where one is not."""
    return float("nan") if any(value != value for value in differences) else max(differences)


def stage_value(report: dict, figure: str) -> float:
    if figure == "peak memory, MB":
        return report["peak_bytes"] / 1e6
    if figure == MFU:
        warmup = report["warmup"]
        return 100 * sum(report["flops"][warmup:]) / sum(report["seconds"][warmup:]) / report["peak_flops"]
    counted, seconds = {
        "tokens/s": ("tokens", "seconds"),
        "samples/s": ("samples", "seconds"),
        "tokens/processor s": ("tokens", "processor_seconds"),
    }[figure]
    return sum(report[counted][report["warmup"] :]) / sum(report[seconds][report["warmup"] :])


def forward_value(report: dict, figure: str) -> float:
    if figure == "peak memory, MB":
        return report["peak_bytes"] / 1e6
    if figure == MFU:
        return 100 * report["flops"] / statistics.median(report["seconds"]) / report["peak_flops"]
    seconds = {"tokens/s": "seconds", "tokens/processor s": "processor_seconds"}[figure]
    return report["tokens"] / statistics.median(report[seconds])


def trains(stage: int, module: str) -> str:
    """An entry of `train`."""
    return f"{module}: {{lr: {RATES[stage]}}}" if module in TRAINED[stage] else f"{module}: frozen"


def prompt() -> str:
    """Token ids of a chat, those of the golden that generation is tested with."""
    golden = json.loads((ROOT / "tests/goldens/smollm2_greedy.json").read_text())
    return ",".join(map(str, golden["cases"][0]["prompt_ids"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts, as `stage1-fixed`, `stage*`, `vit`")
    parser.add_argument("--list", action="store_true", help="names the parts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both sides compute")
    parser.add_argument("--alone", action="store_true", help="without PyTorch: this side's figures, compared with nothing")
    parser.add_argument("--rounds", type=int, default=5, help="how often both sides take their turn")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--agreement-steps", type=int, default=20, help="steps on small packs, to compare losses")
    parser.add_argument("--repeats", type=int, default=3, help="timed forward passes and texts of a run")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of a text")
    parser.add_argument("--data-epochs", type=int, default=20, help="how often `data` reads the demo's samples")
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of `checkpoint`, 12 bytes each")
    parser.add_argument("--samples", type=int, default=100_000, help="how many `linear` reads and trains on")
    parser.add_argument("--leak-steps", type=int, default=2_000, help="steps of `leak`")
    parser.add_argument("--compile", action="store_true", help="the other side with torch.compile")
    parser.add_argument("--work", type=Path, help="where weights and checkpoints are put meanwhile: a few GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures for machines")
    args = parser.parse_args()
    counts = [args.rounds, args.steps, args.repeats, args.new_tokens, args.agreement_steps, args.data_epochs]
    if min(counts) < 1 or args.warmup < 0:
        parser.error("rounds, steps and lengths count from 1")
    if args.parameters < 100 or args.samples < 5_000 or args.leak_steps < 200:
        parser.error("too little to measure: at least 100 parameters, 5000 samples and 200 steps of `leak`")

    if args.device == "cpu":
        # Neither side takes a GPU that is there.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    table = Table(args.json)
    parts = Bench(args, table).parts()
    if args.device == "cpu":
        parts |= Limits(args, table).parts()
    chosen = [name for name in parts if not args.only or any(fnmatch.fnmatch(name, only) for only in args.only)]
    unknown = [only for only in args.only or [] if not fnmatch.filter(parts, only)]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(parts)}")
    if args.list:
        print("\n".join(chosen))
        return 0
    work = args.work or Path(tempfile.gettempdir())
    # Of a checkpoint there are an old one, a new one and as many bytes by another program.
    room = max(2e9, 40 * args.parameters if "checkpoint" in chosen else 0)
    if not args.alone and any(name.startswith("gpu-stage") for name in chosen):
        # Weights in fp32, and the packs.
        room = 10e9
    if not work.is_dir() or shutil.disk_usage(work).free < room:
        parser.error(f"`{work}` is no folder with {room / 1e9:.0f} GB of room; give one as --work")
    args.work = work
    if not args.alone:
        found = subprocess.run([PYTHON, "-c", "import torch, transformers, safetensors"], capture_output=True, text=True)
        if found.returncode:
            parser.error(f"`{PYTHON}` does not have the other side, which `--alone` leaves out:\n{found.stderr}")
    table.head()
    failed = False
    for name in chosen:
        try:
            parts[name]()
        except Failure as failure:
            failed = True
            print(f"error: {failure}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
