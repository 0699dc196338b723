"""Has VLMEvalKit measure an exported tiny model, and asks the model the same questions without VLMEvalKit: the same answers, and
the accuracy that follows from them.

    python tests/reference/check_vlmevalkit.py SAIL_TRAIN      (package: ms-vlmeval; scripts/check_vlmevalkit.sh)

The model is trained for some steps to answer with a letter, from weights so wide that the letter depends on everything it is
shown.
"""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRATCH = tempfile.TemporaryDirectory()
# Before transformers is imported.
os.environ.update(HF_MODULES_CACHE=f"{SCRATCH.name}/modules", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(ROOT / "scripts"))

import evaluate_with_vlmevalkit as bridge
import torch
from check_mllm_export import load_tiles
from PIL import Image
from transformers import AutoModel, AutoTokenizer

TOKENS = 8
DEMO = ROOT / "data" / "demo"
# `SailVL` on an image of any shape at one scale, and on a square one, of the encoder's size or less, at two.
ONE_SCALE = {"dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 10, "use_thumbnail": True}
TWO_SCALES = [{**ONE_SCALE, "min_dynamic_patch": 4, "max_dynamic_patch": 4, "use_thumbnail": False}, ONE_SCALE]


def prompt(row: dict[str, str]) -> str:
    options = "".join(f"\n{letter}. {row[letter]}" for letter in "ABCD" if row[letter])
    return f"<image>\n{row['question']}{options}\nAnswer with the option's letter from the given choices directly."


def image_of(row: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")


def write_shard(path: Path, rows: list[dict[str, str]]) -> None:
    """Training samples that ask as VLMEvalKit does and answer with the letter."""
    with tarfile.open(path, "w") as tar:
        for row in rows:
            turns = [{"from": "human", "value": prompt(row)}, {"from": "gpt", "value": row["answer"]}]
            files = {"png": base64.b64decode(row["image"]), "json": json.dumps({"conversations": turns}).encode()}
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{row['index']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def train(sail_train: str, folder: Path) -> Path:
    """The exported model."""
    rows = bridge.make_questions(sorted(DEMO.glob("vqa-train-*.tar")), bridge.CHOICES, seed=1)
    write_shard(folder / "letters.tar", rows)
    sources = f"[{{name: letters, shards: {folder}/letters.tar}}]"
    settings = [
        f"run.root={folder}", "model.llm.random.initializer_range=0.3",
        "train={vision: {lr: 1e-3}, projector: {lr: 1e-3}, llm: {lr: 1e-3}}",
        f"data.sources={sources}", f"eval.sources={sources}", "eval.samples=1", "eval.generate=0",
        "schedule.steps=12", "checkpoint.every=12", "batch.packs_per_step=1",
    ]
    command = [sail_train, "--config", "configs/tiny/stage1.yaml"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    export = [sail_train, "export", "--checkpoint", str(folder / "runs/tiny/stage1"), "--what", "mllm"]
    export += ["--layout", "sail", "--dtype", "bf16", "--out", str(folder / "mllm")]
    subprocess.run(export, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "mllm"


def run_bridge(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/evaluate_with_vlmevalkit.py", *map(str, arguments), "--max-new-tokens", str(TOKENS)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def right(row: dict[str, str]) -> bool:
    """Exact matching: the letter of one option as a word near the end, else the text of one option."""
    said, options = row["prediction"], {letter: row[letter].lower() for letter in "ABCD" if row[letter]}
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", said).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0] == row["answer"]
    named = [letter for letter, text in options.items() if text in said.lower()]
    return len(said) <= 2 * sum(map(len, options.values())) and named == [row["answer"]]


class Reference:
    """The exported model, as `SailVL` loads it, by transformers alone."""

    def __init__(self, folder: Path):
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def answer(self, image: Image.Image, question: str, msac: bool) -> str:
        px = self.model.config.vision_config.image_size if msac else 448
        assert not msac or (image.width == image.height <= px)
        scales = TWO_SCALES if msac else [ONE_SCALE]
        tiles = torch.cat([load_tiles(image, {**scale, "force_image_size": px}, bridge.IMAGENET) for scale in scales])
        options = {"do_sample": False, "max_new_tokens": TOKENS}
        return self.model.chat(self.tokenizer, tiles.bfloat16(), question, options, num_patches_list=[len(tiles)])


def check(name: str, reference: Reference, out: Path, msac: bool) -> None:
    """Compares what VLMEvalKit wrote with the answers of the model itself, and with answers about other images."""
    (questions,) = (out / "LMUData").glob("*.tsv")
    asked = bridge.read_tsv(questions)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [row["index"] for row in asked]
    for row, question in zip(rows, asked, strict=True):
        answer = reference.answer(image_of(question), prompt(question), msac)
        assert row["prediction"] == answer, f"{name}, sample {row['index']}: {row['prediction']!r}, the model says {answer!r}"
        assert row["hit"] == right(row), row
    # The comparison sees other pixels.
    others = zip(rows, asked, [*asked[1:], asked[0]], strict=True)
    changed = (row["prediction"] != reference.answer(image_of(other), prompt(question), msac) for row, question, other in others)
    assert any(changed), f"{name}: no answer depends on the image"

    with (out / "accuracy.csv").open(newline="") as file:
        (table,) = csv.DictReader(file)
    kinds = {"Overall": rows} | {kind: [row for row in rows if row["category"] == kind] for kind in bridge.CHOICES}
    expected = {kind: sum(map(right, found)) / len(found) for kind, found in kinds.items() if found}
    found = {kind: float(value) for kind, value in table.items() if kind != "split"}
    assert found.keys() == expected.keys() and all(abs(found[kind] - expected[kind]) < 1e-9 for kind in found), (found, expected)
    counts = dict(Counter(row["prediction"] for row in rows).most_common(4))
    print(f"ok: {name}: {len(rows)} answers are the model's own, accuracy {found['Overall']:.4f}; answers {counts}", flush=True)


def wide(row: dict[str, str], index: int) -> dict[str, str]:
    """The same question about the image on a wide ground, which is cut into two tiles and a thumbnail."""
    ground, image, file = Image.new("RGB", (128, 64), (40, 90, 160)), image_of(row), io.BytesIO()
    ground.paste(image, (32, 0))
    ground.save(file, "PNG")
    return {**row, "index": str(index), "image": base64.b64encode(file.getvalue()).decode()}


def main() -> None:
    csv.field_size_limit(sys.maxsize)
    folder = Path(SCRATCH.name)
    mllm = train(str(Path(sys.argv[1]).resolve()), folder)
    reference = Reference(mllm)

    heldout = folder / "heldout"
    done = run_bridge(mllm, "--shards", DEMO / "vqa-heldout-*.tar", "--msac", "--out", heldout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (heldout / "accuracy.csv").read_text() in done.stdout
    check("held-out questions at two scales", reference, heldout, msac=True)

    rows = bridge.read_tsv(heldout / "LMUData" / "heldout.tsv")[:3]
    bridge.write_tsv(folder / "shapes.tsv", [*rows, *(wide(row, 3 + index) for index, row in enumerate(rows))])
    done = run_bridge(mllm, "--tsv", folder / "shapes.tsv", "--out", folder / "shapes")
    assert done.returncode == 0, done.stdout + done.stderr
    check("a file of questions in tiles", reference, folder / "shapes", msac=False)

    # A sample that cannot be answered, one without an image, and mistakes.
    broken = base64.b64encode(base64.b64decode(rows[2]["image"])[:60]).decode()
    for name, image, reason in [("broken", broken, "gave no accuracy"), ("empty", "", "1 were left out and 0 failed")]:
        bridge.write_tsv(folder / f"{name}.tsv", [*rows[:2], {**rows[2], "image": image}])
        done = run_bridge(mllm, "--msac", "--tsv", folder / f"{name}.tsv", "--out", folder / name)
        assert done.returncode == 1 and reason in done.stderr, done.stderr
    mistakes = [
        (mllm, "--tsv", folder / "letters.tar", "--out", folder / "new"),
        (mllm, "--shards", DEMO / "text-*.tar", "--out", folder / "new"),
        (mllm, "--tsv", folder / "shapes.tsv", "--out", heldout),
        (folder, "--tsv", folder / "shapes.tsv", "--out", folder / "new"),
    ]
    for arguments in mistakes:
        done = run_bridge(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "hint: " in done.stderr, done
    print("ok: samples that fail and input that cannot be used")


if __name__ == "__main__":
    main()
