"""The parts of bench.py that measure what is around the steps, and what is asked of this trainer: see `Limits`."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench_common import (
    EXAMPLES, PROGRAMS, PYTHON, ROOT, STEPS_ALONE,
    Failure, Figure, Limit, Table, environment, execute, failed, in_turn, turns, with_sets,
)

# Seconds from the command to the end of the first step.
START_UP_SECS = 5.0
# Share of a step's time spent waiting for data.
DATA_WAIT = 0.03
# How much the samples a second of the first thousand and of all samples may differ, as a share of the latter.
UNEVENNESS = 0.10
FIRST_SAMPLES = 1_000
# Growth of resident memory after the warm-up, as a share.
DRIFT = 0.01

DEMO, TINY = "configs/demo/stage1.yaml", "configs/tiny/stage1.yaml"
# A language model of one narrow block, so that 100,000 samples take a minute.
SMALL_LLM = [
    *(f"model.llm.random.{key}={value}" for key, value in {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 32,
    }.items()),
    "train={vision: frozen, projector: frozen, llm: {lr: 1e-4}}",
]
BATCH = "batch={tokens_per_pack: 1024, packs_per_step: 2}"
# Everything is trained, with an image in nearly every sample.
SMALL_VLM = [
    "model.vision.image_px=56", "model.vision.random.image_size=56", "batch={tokens_per_pack: 128, packs_per_step: 2}",
    "train={vision: {lr: 1e-5}, projector: {lr: 1e-5}, llm: {lr: 1e-5}}",
]
# What is seen of a run's course is read this often.
WATCH_SECS = 0.01
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Limits:
    def __init__(self, args, table: Table):
        self.args, self.table = args, table

    def start_up(self):
        """Seconds from the command to the first step, and until it is done."""
        sets = [*STEPS_ALONE, "schedule.steps=1", "log.every=1"]
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            folder = Path(folder)
            dump = folder / "dump"
            prepare = with_sets([EXAMPLES / "bench_train", "--config", DEMO, "--steps", 1, "--warmup", 0], STEPS_ALONE)
            execute([*prepare, "--dump", dump, "--dump-only"])
            theirs = [PYTHON, "tests/reference/train.py", dump, "--collate", "padded", "--warmup", 0]
            took = {"ours": [], "theirs": []}
            steps = {"ours": [], "theirs": []}
            for number in range(self.args.rounds):
                for side in in_turn(number):
                    run = folder / f"{side}-{number}"
                    if side == "ours":
                        took[side].append(until_first_step(train(DEMO, sets, run)))
                        steps[side].append(trained_steps(run)[0]["step_secs"])
                    else:
                        took[side].append(until_first_step([*theirs, "--json", run]))
                        steps[side].append(json.loads(run.read_text())["seconds"][0])
        before = {side: [a - b for a, b in zip(took[side], steps[side], strict=True)] for side in took}
        self.table.compare("start-up", [
            Figure("to the first step, s", False, before["ours"], before["theirs"]),
            Figure("first step done, s", False, took["ours"], took["theirs"]),
        ])
        self.table.judge("start-up", [Limit("first step done, s", took["ours"], START_UP_SECS)])

    def data_wait(self):
        """What of the steps' time goes into waiting for data."""
        sets = [*STEPS_ALONE, f"schedule.steps={self.args.warmup + self.args.steps}"]
        shares = []
        for _ in range(self.args.rounds):
            with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
                run = Path(folder) / "run"
                execute(train(DEMO, sets, run))
                steps = trained_steps(run)[self.args.warmup :]
            shares.append(sum(step["data_wait_secs"] for step in steps) / sum(step["step_secs"] for step in steps))
        self.table.judge("data-wait", [Limit("waiting, of a step", shares, DATA_WAIT, ".2%")])

    def data(self):
        """Samples a second from shards to packs, without training."""
        ours = [EXAMPLES / "bench_data", "--config", DEMO]
        ours = with_sets(ours, [*STEPS_ALONE, f"data.epochs={self.args.data_epochs}", "data.threads=2"])
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            folder = Path(folder)
            # The specification that both sides follow.
            execute([*ours, "--samples", 1, "--json", folder / "spec.json"])
            theirs = [PYTHON, "tests/reference/data.py", folder / "spec.json", "--workers", 2]
            pairs = turns(ours, theirs, folder, self.args.rounds)
        for report, other in pairs:
            if report["skipped"]:
                raise Failure(f"data: {report['skipped']} samples were skipped")
            for counted in ("samples", "tokens"):
                if sum(report[counted]) != sum(other[counted]):
                    raise Failure(f"data: {sum(report[counted])} {counted} here, {sum(other[counted])} on the other side")
        rates = [[rate(report) for report in side] for side in zip(*pairs)]
        self.table.compare("data", [Figure("samples/s", True, *rates)])

    def checkpoint(self):
        """Seconds in which the state of trained parameters is on the disk."""
        parameters = ["--parameters", self.args.parameters]
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            ours = [EXAMPLES / "bench_checkpoint", "--dir", folder, "--rounds", 1, *parameters]
            theirs = [PYTHON, "tests/reference/checkpoint.py", folder, *parameters]
            pairs = turns(ours, theirs, Path(folder), self.args.rounds)

        def figure(name: str, of_ours: str, of_theirs: str) -> Figure:
            values = [(ours[of_ours][0], theirs[of_theirs]) for ours, theirs in pairs]
            return Figure(name, False, *map(list, zip(*values)), form=".2f")

        self.table.compare("checkpoint", [
            figure("torch.save, s", "waited", "torch_save"),
            figure("safetensors, s", "waited", "safetensors"),
            figure("training waits, s", "blocked", "torch_save"),
        ])

    def linear(self):
        """Whether samples cost as much at the end of many as at their beginning."""
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            folder = Path(folder)
            shards = write_lines(folder, self.args.samples)
            sets = [*STEPS_ALONE, *SMALL_LLM, BATCH, "data.epochs=1", "checkpoint.every=null"]
            sets.append(f"data.sources=[{{name: lines, shards: \"{shards}\"}}]")
            limits = [self.evenness("data", self.data_steps(folder, sets))]
            limits.append(self.evenness("training", self.training_steps(folder, sets)))
        self.table.judge("linear", limits)

    def evenness(self, name: str, runs: list[list[tuple[int, float]]]) -> Limit:
        """How far the rate of the first samples, over several runs, is from that of all of the last run."""
        total = sum(samples for samples, _ in runs[-1])
        if total != self.args.samples:
            raise Failure(f"linear: {total} samples of {self.args.samples} came through")
        first, whole = statistics.median(map(first_rate, runs)), samples_per_sec(runs[-1])
        print(f"{'linear':<20} {name}: {first:.0f} samples/s of the first {FIRST_SAMPLES}, {whole:.0f} of all {total}")
        return Limit(f"{name}, difference", [abs(first / whole - 1)], UNEVENNESS, ".1%")

    def data_steps(self, folder: Path, sets: list[str]) -> list[list[tuple[int, float]]]:
        """Samples and seconds of each step's data: short runs, and last one over all samples."""
        command = with_sets([EXAMPLES / "bench_data", "--config", TINY], sets)
        runs = []
        for samples in [2 * FIRST_SAMPLES] * (self.args.rounds - 1) + [self.args.samples]:
            execute([*command, "--samples", samples, "--json", folder / "data.json"])
            report = json.loads((folder / "data.json").read_text())
            runs.append(list(zip(report["samples"], report["seconds"], strict=True)))
        return runs

    def training_steps(self, folder: Path, sets: list[str]) -> list[list[tuple[int, float]]]:
        """The same of steps that are made."""
        runs = []
        # More steps than there are samples: the last run ends with its data.
        for number, steps in enumerate([FIRST_SAMPLES // 20] * (self.args.rounds - 1) + [self.args.samples]):
            run = folder / f"run-{number}"
            execute(train(TINY, [*sets, f"schedule.steps={steps}", f"log.every={steps}"], run))
            runs.append([(step["samples"], step["step_secs"]) for step in trained_steps(run)])
        return runs

    def leak(self):
        """How much resident memory grows over many steps."""
        steps = self.args.leak_steps
        sets = [*STEPS_ALONE, *SMALL_VLM, f"schedule.steps={steps}", f"log.every={steps}", f"checkpoint.every={steps // 20}"]
        with tempfile.TemporaryDirectory(dir=self.args.work) as folder:
            seen = resident_by_step(train(TINY, sets, Path(folder) / "run"), Path(folder) / "run/metrics.jsonl")
        # A fifth of the steps warms up; of the rest the first and the last quarter are compared.
        early, late = ([size for step, size in seen if low <= step / steps < high] for low, high in [(0.2, 0.4), (0.8, 1.0)])
        if min(len(early), len(late)) < 20:
            raise Failure(f"leak: memory was seen {len(early)} and {len(late)} times, too seldom for a median")
        before, after = statistics.median(early), statistics.median(late)
        print(f"{'leak':<20} {before / 1e6:.1f} MB resident early, {after / 1e6:.1f} MB late in {steps} steps")
        self.table.judge("leak", [Limit("growth of memory", [after / before - 1], DRIFT, ".2%")])

    def parts(self) -> dict:
        """What can be measured, by name."""
        return {
            "start-up": self.start_up,
            "data-wait": self.data_wait,
            "data": self.data,
            "checkpoint": self.checkpoint,
            "linear": self.linear,
            "leak": self.leak,
        }


def train(config: str, sets: list[str], run: Path) -> list:
    """The command that trains a stage in this folder."""
    return with_sets([PROGRAMS / "sail-train", "--config", config], [*sets, f"run.dir={run}"])


def trained_steps(run: Path) -> list[dict]:
    """The steps of a run as it recorded them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def until_first_step(command: list) -> float:
    """Seconds from the command until it says that its first step is done."""
    begun = time.perf_counter()
    said, took = [], None
    with start(command, subprocess.PIPE) as process:
        for line in process.stdout:
            said.append(line)
            if took is None and "step 1" in line:
                took = time.perf_counter() - begun
    if process.returncode or took is None:
        raise failed(command, process.returncode, "".join(said))
    return took


def start(command: list, output) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, text=True
    )


def resident_by_step(command: list, metrics: Path) -> list[tuple[int, int]]:
    """Steps done and bytes resident, again and again while a training runs."""
    seen, steps, lines = [], 0, None
    with tempfile.TemporaryFile("w+") as said, start(command, said) as process:
        while process.poll() is None:
            if lines is None and metrics.exists():
                lines = metrics.open()
            # Lines are appended whole.
            steps += lines.read().count('"kind":"train"') if lines else 0
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            # A process that has just ended has nothing resident.
            if resident:
                seen.append((steps, resident * PAGE_BYTES))
            time.sleep(WATCH_SECS)
        if process.returncode:
            said.seek(0)
            raise failed(command, process.returncode, said.read())
    return seen


def write_lines(folder: Path, samples: int) -> str:
    """Shards of conversations without images, ten of them; the pattern that names all."""
    for shard in range(10):
        with (folder / f"{shard}.jsonl").open("w") as file:
            for number in range(shard, samples, 10):
                turns = [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"It is {number * 7919}."}]
                file.write(json.dumps({"id": str(number), "conversations": turns}) + "\n")
    return str(folder / "*.jsonl")


def rate(report: dict) -> float:
    """Samples a second; what came first was made ahead."""
    return sum(report["samples"][1:]) / sum(report["seconds"][1:])


def samples_per_sec(steps: list[tuple[int, float]]) -> float:
    """The same of samples and seconds by step."""
    samples, seconds = zip(*steps[1:])
    return sum(samples) / sum(seconds)


def first_rate(steps: list[tuple[int, float]]) -> float:
    """Of the first samples."""
    taken = 0
    for count, (samples, _) in enumerate(steps, 1):
        taken += samples
        if taken >= FIRST_SAMPLES:
            return samples_per_sec(steps[:count])
    raise Failure(f"linear: a run ended after {taken} samples, before the first {FIRST_SAMPLES}")
