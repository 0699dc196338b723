#!/usr/bin/env python3
"""Downloads the packages of the larger demo corpus and makes its shards: docs/corpus.md.

    .venv/bin/python scripts/fetch_corpus.py [--licence permissive|all] [--out data/corpus] [--limit N]
    .venv/bin/python scripts/fetch_corpus.py --check data/corpus

Six kinds (caption, ocr, doc, chart, vqa, text), each with training and held-out shards in the form of the demo corpus.
Samples that share an image or a caption are one group, and a group is on one side whole; the demo corpus' own sides are
kept, and images of the test splits of easy-VQA and Fashion-MNIST are left out. Before anything is written the sides are
compared, and `--check` compares them again as they stand in the shards. The same packages of requirements-reference.txt
give the same bytes. It may be killed at any moment: the same command goes on with what was downloaded, and the card,
card.json, is written last; a folder without it is not finished.

Needs Debian 12 with apt-get, npm and pip, and `./scripts/setup.sh --reference` before.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import corpus_leaks
import demo_sources as sources
from corpus_kinds import SEED, TRAIN, make
from corpus_leaks import Marked
from corpus_samples import Sample, tar_of

ROOT = Path(__file__).resolve().parent.parent
SAMPLES_PER_SHARD = 1000
UNFINISHED = ".unfinished"  # stands in a folder while it is written
FLAWS = [
    "Captions are names and titles that people gave their pictures: short, seldom full sentences, and some of them wrong.",
    "Almost no photographs: emoji, clip art, flags, cut-out stamps, screenshots, drawings of text and of tables.",
    "ocr, and the pages of doc, are drawn in six DejaVu fonts on plain paper: no noise, no perspective, no handwriting.",
    "vqa has 13 answers (easy-VQA) and 12 (Fashion-MNIST); three in four of its images are 28 pixels wide.",
    "Text is English alone; definitions are of the commonest sense of a noun, cut at the first semicolon.",
    "Near copies of a picture are found by their look at 16 x 16 pixels: mirrored and cropped ones are not.",
]


# --- Sides ---------------------------------------------------------------------------------------


class Groups:
    """Which things belong together (union by the smaller name, so that the order of joining does not matter)."""

    def __init__(self):
        self.parent: dict = {}

    def root(self, node):
        self.parent.setdefault(node, node)
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, a, b) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self.parent[b] = a


def choose_sides(
    samples: list[tuple[Sample, Marked]], demo: list[Marked], barred: set[str], wanted: dict[str, int]
) -> tuple[list[str | None], Counter]:
    """A side for each sample or None for one that is left out, and why how many were.

    A group is what shares a mark or a look. One with a sample of the demo corpus, or of a maker that has divided its
    subjects, goes where that is; one that would have to be on both sides, and one with an image that is `barred`, is
    left out. The rest is drawn: held out until there are as many of a kind as wanted, then for training.
    """
    groups = Groups()
    nodes = [("sample", f"{index:07d}") for index in range(len(samples))] + [
        ("demo", f"{index:07d}") for index in range(len(demo))
    ]
    everything = [marks for _, marks in samples] + demo
    for node, sample in zip(nodes, everything):
        for mark in sample.marks:
            if mark[0] != "fact":  # charts share subjects without end: their maker has divided those
                groups.join(node, ("mark", *mark))
    looks = [(node, sample.look) for node, sample in zip(nodes, everything) if sample.look is not None]
    for i, j in corpus_leaks.same_look([look for _, look in looks], [look for _, look in looks]):
        groups.join(looks[i][0], looks[j][0])

    members, sides, bad = defaultdict(list), defaultdict(set), {}
    for index, (sample, _) in enumerate(samples):
        root = groups.root(nodes[index])
        members[root].append(index)
        if sample.side:
            sides[root].add(sample.side)
        if samples[index][1].image in barred:
            bad[root] = "images of the test splits"
    for node, sample in zip(nodes[len(samples) :], demo):
        sides[groups.root(node)].add(sample.side)
    heldout, chosen, left_out = Counter(), [None] * len(samples), Counter()
    rank = {
        root: hashlib.sha256(f"{SEED}/{sorted(repr(sorted(samples[i][1].marks)) for i in of)[0]}".encode()).digest()
        for root, of in members.items()
    }
    # What is settled first, then the free groups in an order that is drawn.
    for root in sorted(members, key=lambda root: (not sides[root], rank[root])):
        kinds = Counter(samples[index][1].kind for index in members[root])
        if root in bad or len(sides[root]) > 1:
            left_out[bad.get(root, "on both sides of the demo corpus")] += len(members[root])
            continue
        room = all(heldout[kind] + count <= wanted[kind] for kind, count in kinds.items())
        side = next(iter(sides[root]), "heldout" if room else "train")
        heldout.update(kinds if side == "heldout" else {})
        for index in members[root]:
            chosen[index] = side
    return chosen, left_out


# --- Shards and card -----------------------------------------------------------------------------


def annotated(kind: str, sample: Sample) -> Marked:
    """A sample's marks, from the bytes that will stand in the shard."""
    with tarfile.open(fileobj=io.BytesIO(tar_of([("sample", sample)]))) as tar:
        annotation = json.load(tar.extractfile("sample.json"))
    return corpus_leaks.marked("", kind, "", annotation, sample.image and sample.image[1])


def build(cache: Path, out: Path, licence: str, limit: int | None, demo: list[Marked]) -> None:
    began = time.monotonic()
    packages = sources.PERMISSIVE_PACKAGES + (sources.COPYLEFT_PACKAGES if licence == "all" else [])
    folders = sources.fetch(cache, packages)
    claim(out)
    made, train, heldout = make(folders, limit)
    samples: list[tuple[Sample, Marked]] = []
    for kind in TRAIN:
        before = len(samples)
        samples += [(sample, annotated(kind, sample)) for sample in made[kind]]
        print(f"{kind}: {len(samples) - before} samples, {time.monotonic() - began:.0f} s", flush=True)
    barred = test_hashes(folders)
    sides, left_out = choose_sides(samples, demo, barred, heldout)

    keyed: dict[tuple[str, str], list[tuple[str, Sample]]] = defaultdict(list)
    marked: dict[str, list[Marked]] = defaultdict(list)
    seen: set[str] = set()
    for number, ((sample, marks), side) in enumerate(zip(samples, sides)):
        # One image twice with one text teaches nothing the second time.
        same = repr(sorted(marks.marks))
        if side is None or same in seen:
            left_out["the same again"] += side is not None
            continue
        seen.add(same)
        if side == "train" and len(keyed[marks.kind, side]) >= train[marks.kind]:
            left_out["more than wanted"] += 1
            continue
        key = f"{marks.kind}-{number:06d}"
        keyed[marks.kind, side].append((key, sample))
        marked[side].append(Marked(key, marks.kind, side, marks.marks, marks.look))
    refuse_leaks(marked["heldout"], marked["train"], demo, barred)
    write(
        out,
        keyed,
        {"licence": licence, "limit": limit, "seed": SEED, "packages": packages, "left_out": dict(sorted(left_out.items()))},
    )
    print(f"done in {time.monotonic() - began:.0f} s")


def refuse_leaks(heldout: list[Marked], train: list[Marked], demo: list[Marked], barred: set[str]) -> None:
    """An error if anything that is held out, here or in the demo corpus, or belongs to a test split, would be trained on."""
    found = corpus_leaks.leaks(heldout, train)
    found += corpus_leaks.leaks([sample for sample in demo if sample.side == "heldout"], train)
    found += corpus_leaks.leaks(heldout, [sample for sample in demo if sample.side == "train"])
    lines = [str(leak) for leak in found]
    lines += [f"{sample.place}: an image of a test split" for sample in train + heldout if sample.image in barred]
    if lines:
        more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise sources.SourceError(
            "held-out samples occur in training:\n" + "\n".join(lines[:20]) + more,
            "do not train on these shards; build them again with this script as it is",
        )


def claim(out: Path) -> None:
    """Makes the folder, or takes one that an earlier build has made; its card goes first."""
    if out.exists() and any(out.iterdir()) and not (out / "card.json").exists() and not (out / UNFINISHED).exists():
        raise sources.SourceError(
            f"{out} holds files that this script has not written", "name another folder with --out, or an empty one"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).write_text("scripts/fetch_corpus.py is at work here, or was stopped; run it again\n")
    (out / "card.json").unlink(missing_ok=True)


def write(out: Path, keyed: dict[tuple[str, str], list[tuple[str, Sample]]], about: dict) -> None:
    """Shards, then the two cards, then the mark of an unfinished build goes."""
    shards, kinds = {}, {}
    for stale in [*out.glob("*.tar"), *out.glob("*.tar.idx"), *out.glob("*.partial")]:
        stale.unlink()
    for (kind, side), samples in sorted(keyed.items()):
        rows = kinds.setdefault(kind, {})
        rows[side] = len(samples)
        rows[f"licences_{side}"] = dict(sorted(Counter(sample.licence for _, sample in samples).items()))
        rows[f"sources_{side}"] = dict(sorted(Counter(sample.source for _, sample in samples).items()))
        parts = -(-len(samples) // SAMPLES_PER_SHARD)
        for part in range(parts):
            chosen = samples[len(samples) * part // parts : len(samples) * (part + 1) // parts]
            content = tar_of(chosen)
            name = f"{kind}-{side}-{part:06d}.tar"
            put(out / name, content)
            shards[name] = {"samples": len(chosen), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    packages = [{"manager": p.manager, "name": p.name, "version": p.version, "sha256": p.sha256} for p in about["packages"]]
    card = about | {"packages": packages, "kinds": kinds, "shards": shards, "flaws": FLAWS}
    put(out / "README.md", readme(card).encode())
    put(out / "card.json", (json.dumps(card, indent=1) + "\n").encode())
    (out / UNFINISHED).unlink()
    total = sum(shard["bytes"] for shard in shards.values())
    print(
        f"{sum(shard['samples'] for shard in shards.values())} samples, {total / 1e6:.1f} MB in {len(shards)} shards in {out}"
    )


def put(path: Path, content: bytes) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def readme(card: dict) -> str:
    """The data card for people; card.json has the same and the shards' hashes."""
    size = Counter()
    for name, shard in card["shards"].items():
        size[name.split("-")[0]] += shard["bytes"]
    limit = f" --limit {card['limit']}" if card["limit"] else ""
    lines = [
        "# A corpus of images and text from package registries",
        "",
        f"Made by `scripts/fetch_corpus.py --licence {card['licence']}{limit}` with the seed {card['seed']}. Each sample's json has a",
        "`license` and a `source`, card.json the sha256 of each shard. The copyleft licences allow publishing on their conditions alone.",
        "",
    ]
    lines += ["| kind | training | held out | MB | licences |", "|---|---|---|---|---|"]
    for kind, rows in card["kinds"].items():
        licences = Counter(rows.get("licences_train", {})) + Counter(rows.get("licences_heldout", {}))
        named = ", ".join(f"{name} ({count})" for name, count in sorted(licences.items()))
        lines.append(f"| {kind} | {rows.get('train', 0)} | {rows.get('heldout', 0)} | {size[kind] / 1e6:.1f} | {named} |")
    lines += [
        "",
        "Held-out shards share no decoded image, caption, line or subject of a chart with training shards; neither do those of",
        "`data/demo`, in either direction. No image is of the test splits of easy-VQA or Fashion-MNIST.",
        "",
    ]
    lines += [
        f"Left out: {', '.join(f'{count} ({why})' for why, count in card['left_out'].items()) or 'nothing'}.",
        "",
        "## Sources",
        "",
    ]
    lines += ["| package | version | sha256 |", "|---|---|---|"]
    lines += [
        f"| {package['manager']} `{package['name']}` | {package['version']} | `{package['sha256']}` |"
        for package in card["packages"]
    ]
    return "\n".join([*lines, "", "## Known flaws", "", *(f"- {flaw}" for flaw in card["flaws"])]) + "\n"


# --- Check ---------------------------------------------------------------------------------------


def check(folder: Path, demo: list[Marked], barred: set[str]) -> None:
    """Reads the shards of a finished corpus; an error names what is wrong with them."""
    verify_card(folder)
    samples = corpus_leaks.read_folder(folder)
    sides = {side: [sample for sample in samples if sample.side == side] for side in ("train", "heldout")}
    refuse_leaks(sides["heldout"], sides["train"], demo, barred)
    print(f"{len(sides['train'])} training and {len(sides['heldout'])} held-out samples: nothing held out is trained on")


def test_hashes(folders: dict[str, Path]) -> set[str]:
    """Of the images that are never trained on."""
    return {corpus_leaks.image_hash(image) for image in sources.test_images(folders)}


def verify_card(folder: Path) -> None:
    """Compares the shards with the card that was written after them."""
    path = folder / "card.json"
    if not path.exists():
        raise sources.SourceError(
            f"{folder} has no card.json: it is not a finished corpus", "run scripts/fetch_corpus.py again"
        )
    shards = json.loads(path.read_text())["shards"]
    found = {shard.name for shard in folder.glob("*.tar")}
    if found != set(shards):
        raise sources.SourceError(
            f"{folder}: shards that are missing or not in card.json: {', '.join(sorted(found ^ set(shards)))}",
            "build the corpus again",
        )
    for name, shard in shards.items():
        if sources.sha256_of(folder / name) != shard["sha256"]:
            raise sources.SourceError(f"{folder / name} is not as it was written", "build the corpus again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--licence", choices=["permissive", "all"], default="all", help="permissive leaves out what is GPL, GFDL or CC BY-SA"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data" / "corpus", metavar="DIR", help="where the shards and the card go"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training samples of a kind")
    parser.add_argument(
        "--check", type=Path, metavar="DIR", help="build nothing; compare what is held out in DIR with what is trained on"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "target" / "demo-sources",
        metavar="DIR",
        help="where downloads are kept (about 1.4 GB)",
    )
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    try:
        demo = corpus_leaks.read_folder(ROOT / "data" / "demo")
        if args.check:
            wanted = [
                package for package in sources.PERMISSIVE_PACKAGES if package.name in ("easy-vqa", "dataset-fashion-mnist")
            ]
            check(args.check, demo, test_hashes(sources.fetch(args.cache, wanted)))
        else:
            build(args.cache, args.out, args.licence, args.limit, demo)
    except sources.SourceError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
