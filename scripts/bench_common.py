"""What the parts of bench.py share: figures of both sides, limits of what is asked, turns, the table and its JSON."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "target/release"
EXAMPLES = PROGRAMS / "examples"
PYTHON = os.environ.get("PYTHON") or ROOT / ".venv/bin/python"
# What is no part of a step.
STEPS_ALONE = ["init=null", "eval=null", "export=null", "schedule.kind=constant", "schedule.warmup=0"]


@dataclass
class Figure:
    """What is compared: values of each round, and whether more is better."""

    name: str
    more_is_better: bool
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    form: str = ".1f"

    def ratios(self) -> list[float]:
        """How many times better ours is, round by round."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [ours / theirs if self.more_is_better else theirs / ours for ours, theirs in pairs]


@dataclass
class Limit:
    """A figure of this trainer of which the median is asked to be below `below`."""

    name: str
    values: list[float]
    below: float
    form: str = ".1f"

    def is_kept(self) -> bool:
        # A figure that is not a number keeps no limit.
        return statistics.median(self.values) < self.below


class Failure(Exception):
    pass


def environment() -> dict[str, str]:
    """Two threads a side."""
    # A thread that waits for the other gives its core away: where other work has that core, spinning took nine tenths
    # of the time of either side.
    return {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


def execute(command: list) -> None:
    """Runs one side; what it says is shown only when it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise failed(command, done.returncode, done.stdout + done.stderr)


def failed(command: list, code: int, said: str) -> Failure:
    return Failure(f"`{' '.join(map(str, command))}` failed with {code}:\n{said}")


def with_sets(command: list, sets: list[str]) -> list:
    """A command that overrides values of its configuration."""
    return command + [word for assignment in sets for word in ("--set", assignment)]


def spread(values: list[float], form: str) -> str:
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}-{max(values):{form}})"


class Table:
    """The lines of figures, also written for machines as they come."""

    def __init__(self, file: Path | None):
        self.file = file
        self.results: dict[str, dict] = {}

    def head(self):
        print(f"{'part':<20} {'figure':<26} {'ours':>26} {'PyTorch':>26} {'times better':>20}", flush=True)

    def compare(self, part: str, figures: list[Figure]):
        for figure in figures:
            sides = [spread(figure.ours, figure.form)]
            both = bool(figure.theirs)
            sides += [spread(figure.theirs, figure.form), spread(figure.ratios(), ".2f")] if both else ["-", "-"]
            print(f"{part:<20} {figure.name:<26} {sides[0]:>26} {sides[1]:>26} {sides[2]:>20}")
        self.record(part, "figures", {
            figure.name: {"ours": figure.ours, "theirs": figure.theirs, "ratios": figure.ratios() if figure.theirs else []}
            for figure in figures
        })

    def judge(self, part: str, limits: list[Limit]):
        """Shows figures beside what is asked of them.

        Raises `Failure` where a limit is passed."""
        for limit in limits:
            asked = f"asked: below {limit.below:{limit.form}}"
            print(f"{part:<20} {limit.name:<26} {spread(limit.values, limit.form):>26} {asked:>26} "
                  f"{'ok' if limit.is_kept() else 'FAIL':>20}")
        self.record(part, "limits", {
            limit.name: {"values": limit.values, "below": limit.below, "kept": limit.is_kept()} for limit in limits
        })
        passed = [limit.name for limit in limits if not limit.is_kept()]
        if passed:
            raise Failure(f"{part}: not within its limit: {'; '.join(passed)}")

    def record(self, part: str, key: str, value):
        self.results.setdefault(part, {})[key] = value
        sys.stdout.flush()
        if self.file:
            self.file.write_text(json.dumps(self.results, indent=2) + "\n")


def turns(ours: list, theirs: list | None, folder: Path, rounds: int) -> list[tuple[dict, dict | None]]:
    """The reports of both sides, by round; who is first changes from round to round. None of the other side where there is
    no command for it."""
    pairs = []
    for number in range(rounds):
        reports = {"theirs": None}
        for side in in_turn(number):
            if side == "theirs" and theirs is None:
                continue
            path = folder / f"{side}.json"
            execute([*(ours if side == "ours" else theirs), "--json", path])
            reports[side] = json.loads(path.read_text())
        pairs.append((reports["ours"], reports["theirs"]))
    return pairs


def in_turn(number: int) -> tuple[str, str]:
    """Who is first and who second in a round."""
    return ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
