#!/usr/bin/env python3
"""Does refining a vision encoder in three stages make a better one here? Trains it in five ways and measures what comes out.

    .venv/bin/python scripts/reproduce_gfr.py --scale smoke|cpu|gpu [--out DIR] [--data DIR] [--seeds 1 2 3]

All ways make as many steps, of packs of as many tokens, from the same weights:

    three-stages     the projector; the encoder and the projector; everything
    direct           everything from the start, through a fresh projector
    without-stage2   the projector; everything
    without-stage1   the encoder and a fresh projector; everything
    untouched        the projector; the projector and the language model: the encoder stays as it was

Stages are those of configs/demo, for `smoke` of configs/tiny. Each seed draws its own projector (of configs/tiny the whole
model) and order of samples. Measured are the model at the end and its encoder: by probes, and as a backbone for a new model,
whose projector begins anew and is trained alone with another seed. DIR/results.json has all figures, DIR/results.md their
page. A run that was killed goes on with the same command; what is measured is not trained or measured again.

DIR of --data is a folder made by fetch_corpus.py, by default data/corpus, which is made if it is not there; of `smoke`
data/demo. Needs `target/release/sail-train`, or --program.
"""

import argparse
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gfr_page

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Scale:
    """How much is trained and measured."""

    base: str  # folder of configs with the stages
    steps: tuple[int, int, int]  # of the three stages; other ways share the same sum
    fresh: int  # steps of the new model's projector
    loss_samples: int
    answers: int
    probe_images: tuple[int, int]  # to train a probe, to test it
    sets: tuple[str, ...] = ()


SCALES = {
    "smoke": Scale("tiny", (4, 4, 4), 4, 8, 4, (96, 48)),
    "cpu": Scale("demo", (16, 16, 32), 24, 100, 60, (1000, 400)),
    "gpu": Scale(
        "demo", (200, 200, 600), 200, 400, 400, (8000, 400),
        ("model.vision.image_px=224", "batch={tokens_per_pack: 4096, packs_per_step: 4}", "data.streams=4"),
    ),
}  # fmt: skip

# Stage files with the number of their steps and what is set besides; the first begins with a fresh projector.
WAYS = {
    "three-stages": lambda a, b, c: [("stage1", a, {}), ("stage2", b, {}), ("stage3", c, {})],
    "direct": lambda a, b, c: [("stage3", a + b + c, {})],
    "without-stage2": lambda a, b, c: [("stage1", a, {}), ("stage3", b + c, {})],
    "without-stage1": lambda a, b, c: [("stage2", a + b, {}), ("stage3", c, {})],
    "untouched": lambda a, b, c: [("stage1", a, {}), ("stage3", b + c, {"train.vision": "frozen"})],
}

# A class of an image is the answer to the question that matches.
PROBES = {"shape": r"what shape", "colour": r"what color is", "clothing": r"what piece of clothing"}


class Experiment:
    def __init__(self, args: argparse.Namespace):
        self.scale, self.program = SCALES[args.scale], args.program.resolve()
        self.out = (args.out or ROOT / f"target/gfr-{args.scale}").resolve()
        self.data = (args.data or ("data/demo" if args.scale == "smoke" else "data/corpus")).rstrip("/")
        self.prepare()
        kinds = ["caption", "ocr", "doc", "chart", "vqa", "text"]
        self.kinds = [kind for kind in kinds if list((ROOT / self.data).glob(f"{kind}-train-*.tar"))]
        if "vqa" not in self.kinds:
            sys.exit(f"error: `{self.data}` has no shards vqa-train-*.tar\n\nhint: name a folder made by fetch_corpus.py, or data/demo")

    def prepare(self) -> None:
        """Fetches what is not there."""
        wanted = [("weights/smollm2-135m-instruct", "fetch_demo_weights.py")] if self.scale.base == "demo" else []
        wanted += [("data/corpus/card.json", "fetch_corpus.py")] if self.data == "data/corpus" else []
        for path, script in wanted:
            if not (ROOT / path).exists():
                subprocess.run([sys.executable, f"scripts/{script}"], cwd=ROOT, check=True, stdout=sys.stderr)

    def sail(self, *command: str) -> None:
        """Runs a command of the trainer, whose words stay on the screen."""
        subprocess.run([str(self.program), *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)

    def train(self, folder: Path, stage: str, steps: int, seed: int, sets: dict) -> None:
        """A stage of so many steps in `folder`; one that is finished stays as it is."""
        named = {"run.name": folder.name, "run.dir": folder, "run.seed": seed, "schedule.steps": steps, "export": "null"}
        # What is measured is asked for afterwards.
        named |= {"eval": "null", "checkpoint": "{every: 50, keep_last: 1}", "log.every": max(1, steps // 4)}
        named |= {"data.sources": self.sources(stage)} | sets
        words = [*self.scale.sets, *(f"{path}={value}" for path, value in named.items())]
        self.sail("--config", f"configs/{self.scale.base}/{stage}.yaml", *(word for each in words for word in ("--set", each)))

    def sources(self, stage: str) -> str:
        """Each stage sees kinds that the one before did not, captions more often than the others."""
        seen = {"stage1": {"caption", "ocr"}, "stage2": {"caption", "ocr", "doc", "chart"}}.get(stage, set(self.kinds))
        lines = [
            f'{{name: {kind}, shards: "{self.data}/{kind}-train-*.tar", weight: {2 if kind in ("caption", "vqa") else 1}}}'
            for kind in self.kinds
            if kind in seen
        ]
        return f"[{', '.join(lines)}]"

    def measure(self, seed: int, way: str) -> dict:
        """All figures of one way, which are kept."""
        of_seed = self.out / f"seed-{seed}"
        folder = of_seed / way
        done = folder / "figures.json"
        if done.exists():
            return json.loads(done.read_text())
        print(f"== {way}, seed {seed}", file=sys.stderr, flush=True)
        started = time.time()
        before, samples = None, 0
        for stage, steps, sets in WAYS[way](*self.scale.steps):
            # Ways that begin alike share these runs.
            name = "-".join([stage, str(steps), *sets.values()])
            run = of_seed / "runs" / (f"{before.name}+{name}" if before else name)
            self.train(run, stage, steps, seed, sets | {"init": f"{{from: {before}}}" if before else "null"})
            before = run
            samples += json.loads((run / "summary.json").read_text())["totals"]["samples"]
        vit = folder / "vit"
        self.sail("export", "--checkpoint", str(before), "--out", str(vit))
        fresh = folder / "fresh"
        self.train(fresh, "stage1", self.scale.fresh, seed + 1000, {"init": "null", "model.vision.from": vit} | self.anew())
        figures = {
            "samples": samples,
            "model": self.tasks(folder / "measured-model", self.language_tasks(), "--checkpoint", before),
            "encoder": self.tasks(folder / "measured-encoder", self.recognition_tasks(), "--vit", vit),
            "fresh": self.tasks(folder / "measured-fresh", self.language_tasks() + self.affinity_task(), "--checkpoint", fresh),
            "seconds": round(time.time() - started),
        }
        write(done, json.dumps(figures, indent=1))
        for trained in fresh.glob("step-*"):
            shutil.rmtree(trained)
        return figures

    def measure_all(self, seed: int) -> dict[str, dict]:
        """Figures of all ways; the weights that were trained for them are removed at the end."""
        figures = {way: self.measure(seed, way) for way in WAYS}
        for trained in self.out.glob(f"seed-{seed}/runs/*/step-*"):
            shutil.rmtree(trained)
        return figures

    def anew(self) -> dict:
        """The encoder comes from a folder, also where the stage's file draws one."""
        return {"model.vision.random": "null"} if self.scale.base == "tiny" else {}

    def tasks(self, folder: Path, tasks: str, subject: str, path: Path) -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "tasks.yaml"
        write(file, tasks)
        self.sail("eval", "--tasks", str(file), subject, str(path), "--out", str(folder / "out"))
        return json.loads((folder / "out/results.json").read_text())

    def language_tasks(self) -> str:
        lines = ["loss:"]
        for kind in self.kinds:
            lines.append(f'  - {{ name: {kind}, shards: "{self.data}/{kind}-heldout-*.tar", samples: {self.scale.loss_samples} }}')
        lines += ["generation:"]
        shards = f'"{self.data}/vqa-heldout-*.tar"'
        lines += [f"  - {{ name: answers, shards: {shards}, samples: {self.scale.answers}, max_new_tokens: 6 }}"]
        return "\n".join(lines) + "\n"

    def affinity_task(self) -> str:
        return f'affinity:\n  - {{ name: words, shards: "{self.data}/caption-heldout-*.tar", images: 5, points: 500 }}\n'

    def recognition_tasks(self) -> str:
        lines = ["recognition:"]
        for probe in sorted(self.probes()):
            train, test = (self.out / "probes" / f"{probe}-{side}.tar" for side in ["train", "test"])
            lines.append(f"  - {{ name: {probe}, train: {{ shards: {train} }}, tests: [{{ name: test, shards: {test} }}], mlp: {{}}, knn: {{}} }}")
        return "\n".join(lines) + "\n"

    def probes(self) -> list[str]:
        """Shards of images with classes, made once from the questions about pictures and their answers."""
        folder = self.out / "probes"
        names = folder / "probes.json"
        if not names.exists():
            folder.mkdir(parents=True, exist_ok=True)
            made = [name for name, question in PROBES.items() if self.make_probe(folder, name, re.compile(question, re.I))]
            write(names, json.dumps(made))
        return json.loads(names.read_text())

    def make_probe(self, folder: Path, name: str, question: re.Pattern) -> bool:
        """Whether there are images of at least two classes on both sides."""
        most_train, most_test = self.scale.probe_images
        train = self.labelled("vqa-train", question, most_train)
        known = {label for _, _, label in train}
        test = [image for image in self.labelled("vqa-heldout", question, most_test) if image[2] in known]
        if len(known) < 2 or len({label for _, _, label in test}) < 2:
            return False
        for side, images in [("train", train), ("test", test)]:
            with tarfile.open(folder / f"{name}-{side}.tar", "w") as tar:
                for key, png, label in images:
                    for member, content in [(f"{key}.png", png), (f"{key}.cls", label.encode())]:
                        info = tarfile.TarInfo(member)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        return True

    def labelled(self, shards: str, question: re.Pattern, most: int) -> list[tuple[str, bytes, str]]:
        """The first images whose question is asked once: key, file and answer."""
        found = []
        for shard in sorted((ROOT / self.data).glob(f"{shards}-*.tar")):
            with tarfile.open(shard) as tar:
                content = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
            for name in sorted(name for name in content if name.endswith(".json")):
                turns = json.loads(content[name])["conversations"]
                answers = {answer["value"] for asked, answer in zip(turns[::2], turns[1::2]) if question.search(asked["value"])}
                if len(answers) == 1:
                    key = name.removesuffix(".json")
                    found.append((key, content[f"{key}.png"], answers.pop().replace(" ", "-")))
        return found[:most]


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: target/gfr-SCALE")
    parser.add_argument("--data", metavar="DIR", help="shards, seen from the repository's root")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/sail-train")
    args = parser.parse_args()
    if twice := sorted({seed for seed in args.seeds if args.seeds.count(seed) > 1}):
        named = ", ".join(map(str, twice))
        sys.exit(f"error: `--seeds` has {named} more than once\n\nhint: each counts as a measurement of its own, so name others")
    experiment = Experiment(args)
    experiment.out.mkdir(parents=True, exist_ok=True)
    about = {
        "scale": args.scale,
        "plan": asdict(experiment.scale),
        "data": experiment.data,
        "kinds": experiment.kinds,
        "program": subprocess.run([experiment.program, "--version"], capture_output=True, text=True, check=True).stdout.split("\n")[0],
        "machine": platform.machine(),
    }
    claim(experiment.out / "experiment.json", about)
    by_seed = {str(seed): experiment.measure_all(seed) for seed in args.seeds}
    figures = {way: {seed: of_seed[way] for seed, of_seed in by_seed.items()} for way in WAYS}
    command = f"scripts/reproduce_gfr.sh --scale {args.scale} --seeds {' '.join(map(str, args.seeds))}"
    results = about | {"command": command, "seeds": args.seeds, "figures": figures}
    write(experiment.out / "results.json", json.dumps(results, indent=1) + "\n")
    page, plot = gfr_page.draw(results)
    write(experiment.out / "results.svg", plot)
    write(experiment.out / "results.md", page)
    print(page)
    return 0


def claim(path: Path, about: dict) -> None:
    """The folder is one of this experiment."""
    told = json.loads(json.dumps(about))
    if path.exists() and json.loads(path.read_text()) != told:
        sys.exit(f"error: `{path.parent}` is of another experiment, see `{path.name}` there\n\nhint: name another folder for `--out`, or remove it")
    write(path, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
