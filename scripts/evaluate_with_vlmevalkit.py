#!/usr/bin/env python3
"""Measures an exported multimodal model by VLMEvalKit's own run module, its class `SailVL` and exact matching, without network.

    target/vlmevalkit/bin/python scripts/evaluate_with_vlmevalkit.py mllm --tsv MMStar.tsv --out measured
    target/vlmevalkit/bin/python scripts/evaluate_with_vlmevalkit.py mllm --shards 'data/demo/vqa-heldout-*.tar' --out measured

The model is what `sail-train export --what mllm --layout sail` wrote. --tsv takes multiple-choice questions as VLMEvalKit
keeps them (`index`, `image` in base64, `question`, `A`, `B`, ..., `answer`). --shards makes such a file of conversations
about one image: of every question whose answer is of a closed set, with up to three other answers of the set.

OUT must be new. It gets the questions (LMUData/NAME.tsv), all that VLMEvalKit writes (vlmevalkit/), its table of accuracies
(accuracy.csv) and a line for each sample (predictions.jsonl).

Exit status: 0 measured, 1 a sample or the measurement failed, 2 the input cannot be used. docs/evaluate-with-vlmevalkit.md
says more.
"""

import argparse
import base64
import csv
import glob
import importlib.util
import json
import os
import random
import shutil
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

# The closed sets of answers in the demo corpora: easy-VQA's and Fashion-MNIST's.
CHOICES = {
    "color": ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"],
    "shape": ["circle", "rectangle", "triangle"],
    "clothing": ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"],
}
LETTERS = "ABCD"
# VLMEvalKit's files are called by it. Names with those of other models in them are treated as those.
MODEL = "SailVL"
# In the prediction of a sample that failed.
FAILED = "Failed to obtain answer"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TILE_PX = 448


class InputError(Exception):
    """What cannot be used, and a hint."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class MeasureError(Exception):
    """Why there is no accuracy, or one that does not count."""


# --- Questions -----------------------------------------------------------------------------------


def read_samples(shard: Path):
    """(key, annotation, image file or None) of every sample; None also where there are several images."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                if member.isfile():
                    samples.setdefault(os.path.join(folder, stem), {})[suffix] = tar.extractfile(member).read()
        for key, files in samples.items():
            annotation = json.loads(files.pop("json", b"{}"))
            yield key, annotation, next(iter(files.values())) if len(files) == 1 else None
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"`{shard}` cannot be read: {error}", "`sail-data check` says what is wrong in shards") from error


def make_questions(shards: list[Path], choices: dict[str, list[str]], seed: int) -> list[dict[str, str]]:
    """Rows of a TSV. Options depend on the seed, the sample's key and the turn alone."""
    kinds = {answer: kind for kind, answers in choices.items() for answer in answers}
    rows = []
    for shard in shards:
        for key, annotation, image in read_samples(shard):
            turns = annotation.get("conversations", []) if image else []
            for turn, (asked, answered) in enumerate(zip(turns[::2], turns[1::2])):
                truth = answered.get("value")
                if truth not in kinds:
                    continue
                rng = random.Random(f"{seed}/{key}/{turn}")
                others = [answer for answer in choices[kinds[truth]] if answer != truth]
                options = [truth, *rng.sample(others, min(len(LETTERS) - 1, len(others)))]
                rng.shuffle(options)
                rows.append({
                    "index": str(len(rows)),
                    "image": base64.b64encode(image).decode(),
                    "question": asked.get("value", "").replace("<image>", "").strip(),
                    **dict.fromkeys(LETTERS, ""),
                    **dict(zip(LETTERS, options)),
                    "answer": LETTERS[options.index(truth)],
                    "category": kinds[truth],
                    "sample": f"{key}/{turn}",
                })
    return rows


def write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_tsv(path: Path) -> None:
    """Refuses what is no file of multiple-choice questions with images and answers."""
    hint = "it needs `index`, `question`, `A`, `B`, `answer`, and `image` (base64) or `image_path`"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file, delimiter="\t"), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"`{path}` cannot be read: {error}", hint) from error
    missing = [column for column in ("index", "question", "A", "B", "answer") if column not in columns]
    if "image" not in columns and "image_path" not in columns:
        missing.append("image")
    if path.suffix != ".tsv" or missing:
        what = f"has no column `{'`, `'.join(missing)}`" if missing else "is not called `NAME.tsv`"
        raise InputError(f"`{path}` {what}", hint)


# --- The model -----------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "name what `sail-train export --what mllm --layout sail --dtype bf16 --out DIR` wrote"
        raise InputError(f"`{path}` cannot be read: {error}", hint) from error


def check_model(folder: Path, msac: bool) -> list[str]:
    """What `SailVL` does to images otherwise than training did."""
    config = read_json(folder / "config.json")
    preprocessor = read_json(folder / "preprocessor_config.json")
    if config.get("model_type") != "sailvl":
        hint = "`SailVL` loads the layout of `sail-train export --what mllm --layout sail`"
        raise InputError(f"`{folder}` is of the type `{config.get('model_type')}`", hint)
    differences = []
    if msac:
        differences.append("each image is shown at two scales")
    elif config["force_image_size"] != TILE_PX:
        differences.append(f"tiles have {TILE_PX} px, and had {config['force_image_size']} px")
    if not (config["dynamic_image_size"] and config["use_thumbnail"]):
        differences.append("images are cut into up to 10 tiles, with a thumbnail")
    if any(preprocessor.get(key) != value for key, value in IMAGENET.items()):
        differences.append("pixels are scaled by ImageNet's mean and deviation")
    return differences


def on_cpu(**options):
    """`SailVL` where there is no GPU: its calls of `.cuda()` leave things where they are."""
    import torch
    from vlmeval.vlm import SailVL

    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *_: self
    model = SailVL(**options)
    model.device = "cpu"
    return model


# --- The measurement -----------------------------------------------------------------------------


def run_vlmevalkit(args, name: str) -> None:
    """Answers the questions of LMUData/NAME.tsv and scores them. Whether that went well, its files say."""
    # Before VLMEvalKit and transformers are imported. Whatever would be fetched is refused at once.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    os.environ.update(nowhere | {key.upper(): value for key, value in nowhere.items()}, no_proxy="", NO_PROXY="")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # Cells of a table of xlsx are cut, and those of tsv may be read as numbers or nothing.
    os.environ.update(LMUData=str(args.out / "LMUData"), PRED_FORMAT="tsv", EVAL_FORMAT="csv")
    os.environ.pop("MMEVAL_ROOT", None)
    with tempfile.TemporaryDirectory() as modules:
        os.environ["HF_MODULES_CACHE"] = modules  # a copy of the model's Python code
        import torch
        import vlmeval.run
        from vlmeval.vlm import SailVL

        kind = SailVL if torch.cuda.is_available() else on_cpu
        options = {"model_path": str(args.model), "use_msac": args.msac, "max_new_tokens": args.max_new_tokens}
        vlmeval.run.supported_VLM[MODEL] = partial(kind, **options)
        sys.argv = ["vlmeval", "--data", name, "--model", MODEL, "--judge", "exact_matching"]
        sys.argv += ["--work-dir", str(args.out / "vlmevalkit")]
        vlmeval.run.main()


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def collect(out: Path, name: str) -> tuple[str, list[dict]]:
    """VLMEvalKit's table, and a row for each sample: what was asked, what the model said, whether that was right."""
    folder = out / "vlmevalkit" / MODEL
    status = read_json(folder / "status.json")["datasets"].get(name, {})
    accuracy = folder / f"{MODEL}_{name}_acc.csv"
    reason = status.get("error_message") or status.get("skip_reason")
    if reason or not accuracy.exists():
        raise MeasureError(f"VLMEvalKit gave no accuracy: {reason or 'it does not say why'}")
    hits = {row["index"]: row["hit"] for row in read_tsv(folder / f"{MODEL}_{name}_exact_matching_result.tsv")}
    rows = read_tsv(folder / f"{MODEL}_{name}.tsv")
    # Of circular questions VLMEvalKit scores the groups and not each sample.
    rows = [{**row, "hit": float(hits[row["index"]]) == 1 if row["index"] in hits else None} for row in rows]
    shutil.copyfile(accuracy, out / "accuracy.csv")
    return accuracy.read_text(encoding="utf-8"), rows


def measure(args, name: str) -> None:
    run_vlmevalkit(args, name)
    table, rows = collect(args.out, name)
    with (args.out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"\n{len(rows)} samples, each in {args.out}/predictions.jsonl\n\n{table}", flush=True)
    asked = len(read_tsv(args.out / "LMUData" / f"{name}.tsv"))
    failed = sum(FAILED in row["prediction"] for row in rows)
    if failed or len(rows) != asked:
        raise MeasureError(f"of {asked} samples {asked - len(rows)} were left out and {failed} failed")


def run(args) -> None:
    csv.field_size_limit(sys.maxsize)  # an image is one field
    if importlib.util.find_spec("vlmeval") is None:
        hint = "./scripts/check_vlmevalkit.sh --install, then use target/vlmevalkit/bin/python"
        raise InputError("VLMEvalKit is not installed", hint)
    differences = check_model(args.model, args.msac)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"`{args.out}` is not empty", "name a new folder for `--out`")
    data = args.out / "LMUData"
    if args.tsv:
        check_tsv(args.tsv)
        name = args.tsv.stem
        data.mkdir(parents=True)
        # A copy, since VLMEvalKit replaces files of benchmarks that it knows when their sums are others.
        shutil.copyfile(args.tsv, data / args.tsv.name)
    else:
        name = "heldout"
        shards = sorted(Path(path) for pattern in args.shards for path in glob.glob(pattern))
        choices = {line: line.split(",") for line in args.choices} or CHOICES
        rows = make_questions(shards, choices, args.seed)
        if not shards:
            raise InputError(f"`{' '.join(args.shards)}` matches no file", "name shards as `data/demo/vqa-heldout-*.tar`")
        if not rows:
            message = f"`{' '.join(args.shards)}` has no question about one image whose answer is of a closed set"
            raise InputError(message, "`--choices` names the answers of a set")
        data.mkdir(parents=True)
        write_tsv(data / f"{name}.tsv", rows)
    for difference in differences:
        print(f"warning: not as in training: {difference}", file=sys.stderr)
    measure(args, name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MLLM", help="the exported model, its Python code included")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tsv", type=Path, metavar="FILE", help="multiple-choice questions; VLMEvalKit goes by the file's name")
    source.add_argument("--shards", nargs="+", metavar="GLOB", help="shards of conversations to make questions of")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the results")
    parser.add_argument("--choices", action="append", default=[], metavar="A,B,...", help="a closed set of answers for --shards; may be given again (default: the colours, shapes and clothing of the demo corpora)")
    parser.add_argument("--seed", type=int, default=42, help="of the other options of --shards and their order (default: %(default)s)")
    parser.add_argument("--msac", action="store_true", help="show each image at two scales, as SailVL does by default")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (default: %(default)s, as of SailVL)")
    args = parser.parse_args()
    args.out = args.out.resolve()
    try:
        run(args)
        return 0
    except InputError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return 2
    except MeasureError as error:
        hint = f"{args.out}/vlmevalkit has VLMEvalKit's log and files"
        print(f"error: {error}\n\nhint: {hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
