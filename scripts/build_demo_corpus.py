#!/usr/bin/env python3
"""Makes the demo corpus: data/demo/*.tar, and the table of counts in data/demo/LICENSES.md.

Four sources (caption, ocr, vqa, text), each with training shards and one held-out shard, as
WebDataset tars of `{key}.{png,jpg,webp}` + `{key}.json` in the LLaVA conversation form. What the
held-out shards ask for does not occur in training: captions, rendered texts, glosses and images
are disjoint, which is asserted before anything is written.

The same packages of `requirements-reference.txt` give the same bytes: every choice is drawn from
SEED, and members carry no time or owner. Image formats vary on purpose (palette with and without
transparency, gray, gray with alpha, RGBA, RGB, 16-bit gray; PNG, JPEG, WebP). The decoder drops
alpha, so whatever an image hides is white.

    .venv/bin/python scripts/build_demo_corpus.py    on Debian 12, with npm; 240 MB are downloaded once
"""

import argparse
import io
import random
import re
import sys
from collections import Counter
from pathlib import Path

import demo_sources as sources
from corpus_samples import COLOURS, FONTS, Sample, choose, encode, on_white, render, tar_of
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEED = 20240917
SIDE_PX = 144  # longest side of an openclipart image
MAX_TOTAL_BYTES = 5_000_000
MAX_PIXELS = 4_000_000  # of an openclipart image; checked before anything is decoded
Image.MAX_IMAGE_PIXELS = None  # so that the check above is the only one
# Weapons, drugs and trade names, left out of captions and rendered texts.
LEFT_OUT = set("ammo blazer bomb cannabis coca cocaine destroyer dope gallows gun icbm laudanum musket rana sprint toyota virus".split())
SHARDS = {"caption": 3, "ocr": 2, "vqa": 2, "text": 1}
TRAIN = {"caption": 540, "ocr": 220, "vqa": 200, "text": 200}
HELDOUT = {"caption": 48, "ocr": 40, "vqa": 40, "text": 40}


# --- Captions ------------------------------------------------------------------------------------

CAPTION_PROMPTS = ["What is this?", "Describe the image.", "What does the image show?", "Name what you see.", "Write a short caption."]

# Unicode subcategory -> (kind in the caption, how many emoji at most).
EMOJI_KINDS = {
    **{name: ("face", 9) for name in ["face-smiling", "face-affection", "face-concerned", "face-unwell", "face-neutral-skeptical", "face-hand"]},
    "cat-face": ("cat", 9), "heart": ("heart", 12),
    "animal-mammal": ("animal", 45), "animal-bird": ("bird", 14), "animal-marine": ("sea animal", 12), "animal-bug": ("insect", 12),
    "plant-flower": ("flower", 9), "plant-other": ("plant", 10),
    "food-fruit": ("fruit", 18), "food-vegetable": ("vegetable", 16), "food-prepared": ("food", 24), "food-sweet": ("food", 12), "drink": ("drink", 14),
    "transport-ground": ("vehicle", 24), "transport-water": ("boat", 7), "place-building": ("building", 14),
    "time": ("clock", 14), "country-flag": ("flag", 30), "geometric": ("shape", 20),
    "clothing": ("clothing", 22), "musical-instrument": ("instrument", 10), "tool": ("tool", 14), "person-role": ("person", 16),
}
# openclipart's top folder -> (kind in the caption, lexical files that the last word of a title may have).
CLIPART_KINDS = {
    "animals": ("animal", {5}),
    "food": ("food", {6, 13, 20}),
    "plants": ("plant", {20}),
    "tools": ("tool", {6}),
    "transportation": ("vehicle", {6}),
    "buildings": ("building", {6}),
    "office": ("object", {6}),
    "electronics": ("object", {6}),
}
TITLE_STOP_WORDS = set("clipart contour icon outline set svg symbol vector version".split())
TITLE_SMALL_WORDS = set("and in of on the with".split())


def is_plain(label: str) -> bool:
    """At most four words of letters, none of them left out."""
    words = label.lower().split()
    return bool(re.fullmatch(r"[A-Za-z' -]+", label)) and len(words) <= 4 and not LEFT_OUT & set(words)


def emoji_captions(folders) -> list[tuple[str, sources.Picture]]:
    """(caption, picture) of a spread of emoji; flags and clocks are named as Unicode names them."""
    rng = random.Random(f"{SEED}/emoji")
    groups: dict[str, list[sources.Picture]] = {}
    for picture in sources.emoji(folders):
        label = picture.title.removeprefix("flag: ")
        if picture.group in EMOJI_KINDS and is_plain(label):
            groups.setdefault(picture.group, []).append(picture)
    found = []
    for group, pictures in groups.items():
        kind, limit = EMOJI_KINDS[group]
        for picture in rng.sample(pictures, min(limit, len(pictures))):
            found.append((f"{kind}: {picture.title.removeprefix(kind + ': ')}", picture))
    return found


def clipart_title(title: str, lexical_files: dict[str, int], allowed: set[int]) -> str | None:
    """A title as lower-case words that WordNet knows, or None when it is no plain name of a thing."""
    text = re.sub(r"[\s_]*\d+$", "", title.replace("_", " ")).lower()
    text = re.sub(r"^(a|an|the) ", "", text)
    if not re.fullmatch(r"[a-z]{3,}( [a-z]+){0,3}", text):
        return None
    words = text.split()
    known = all(word in lexical_files or word in TITLE_SMALL_WORDS for word in words)
    if not known or (TITLE_STOP_WORDS | LEFT_OUT) & set(words) or lexical_files.get(words[-1]) not in allowed:
        return None
    return text


def clipart_captions(folders, nouns: list[sources.Noun]) -> list[tuple[str, sources.Picture]]:
    """(caption, picture) of openclipart images with a plain title and a moderate shape; one per caption."""
    lexical_files = {noun.text: noun.lexical_file for noun in nouns}
    found: dict[str, sources.Picture] = {}
    for picture in sources.openclipart(folders):
        if picture.group not in CLIPART_KINDS:
            continue
        kind, allowed = CLIPART_KINDS[picture.group]
        title = clipart_title(picture.title, lexical_files, allowed)
        if title is None or f"{kind}: {title}" in found:
            continue
        with Image.open(picture.path) as image:
            width, height = image.size
        if max(width, height) <= 3 * min(width, height) and min(width, height) >= 48 and width * height <= MAX_PIXELS:
            found[f"{kind}: {title}"] = picture
    return list(found.items())


def emoji_sample(caption: str, picture: sources.Picture, rng: random.Random) -> Sample:
    style = choose(rng, {"palette": 30, "webp": 35, "jpg": 20, "rgba": 4, "palette-transparent": 6})
    with Image.open(picture.path) as image:
        encoded = encode(image, style)
    source = "emoji-datasource-google 16.0.0, emojibase-data 17.0.0"
    return Sample(caption, [(rng.choice(CAPTION_PROMPTS), caption)], encoded, "Apache-2.0 AND MIT", source)


def clipart_sample(caption: str, picture: sources.Picture, rng: random.Random) -> Sample:
    """Keeps the mode of the original where that costs little: gray stays gray, palette stays palette."""
    with Image.open(picture.path) as image:
        gray = image.mode in ("L", "LA")
        image = image.convert("RGBA")
    image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    style = choose(rng, {"gray": 2, "gray-alpha": 1} if gray else {"palette": 25, "webp": 45, "jpg": 25, "rgba": 2, "palette-transparent": 8})
    return Sample(caption, [(rng.choice(CAPTION_PROMPTS), caption)], encode(image, style), "CC-PDDC", "openclipart 0.18")


def distinct(pairs: list[tuple[str, sources.Picture]]) -> list[tuple[str, sources.Picture]]:
    """The first of the pictures that look the same: clip art that was sent in twice, flags that two places share."""
    seen, kept = set(), []
    for caption, picture in pairs:
        with Image.open(picture.path) as image:
            look = on_white(image).resize((24, 24), Image.Resampling.BOX).tobytes()
        if look not in seen:
            seen.add(look)
            kept.append((caption, picture))
    return kept


def captions(folders, nouns: list[sources.Noun]) -> list[Sample]:
    rng = random.Random(f"{SEED}/caption")
    samples = [emoji_sample(caption, picture, rng) for caption, picture in distinct(emoji_captions(folders))]
    samples += [clipart_sample(caption, picture, rng) for caption, picture in distinct(clipart_captions(folders, nouns))]
    return shuffled(unique(samples), rng)


# --- Text in images ------------------------------------------------------------------------------

OCR_PROMPTS = ["Read the text.", "What does the text say?", "Transcribe the image.", "Which words are written here?"]
CONCRETE = {5, 6, 13, 17, 20}  # animal, artifact, food, natural object, plant


def ocr(folders, nouns: list[sources.Noun]) -> list[Sample]:
    """Common concrete nouns of one to three words, rendered; mostly single words."""
    rng = random.Random(f"{SEED}/ocr")
    form = re.compile(r"[a-z]{3,9}( [a-z]{2,9}){0,2}")
    common = [noun.text for noun in nouns if noun.lexical_file in CONCRETE and noun.seen > 0 and form.fullmatch(noun.text)]
    common = [text for text in common if not LEFT_OUT & set(text.split())]
    single = [text for text in common if " " not in text]
    several = [text for text in common if " " in text]
    texts = rng.sample(single, 180) + rng.sample(several, 80)
    samples = []
    for text in texts:
        written = rng.choice([text, text, text.upper(), text.capitalize()])
        ink, paper = rng.choice(COLOURS)
        image = render(written, sources.font(folders, rng.choice(FONTS)), ink, paper, rng)
        style = choose(rng, {"gray": 30, "palette": 25, "rgb": 5, "jpg": 20, "webp": 15, "gray-16": 2})
        conversations = [(rng.choice(OCR_PROMPTS), written)]
        samples.append(Sample(text, conversations, encode(image, style), "WordNet-3.0 AND Bitstream-Vera", "wordnet 3.0, fonts-dejavu-core 2.37"))
    return shuffled(unique(samples), rng)


# --- Questions and plain text --------------------------------------------------------------------


def vqa(folders) -> list[Sample]:
    """Three turns per easy-VQA image: its shape, its colour, and one yes/no question, in any order."""
    rng = random.Random(f"{SEED}/vqa")
    samples, seen = [], set()
    for quiz in rng.sample(sources.easy_vqa(folders), 800):
        kinds: dict[str, list[tuple[str, str]]] = {}
        for question, answer in quiz.pairs:
            kind = "yes-no" if answer in ("yes", "no") else "colour" if question.startswith("what color") else "shape"
            kinds.setdefault(kind, []).append((question[0].upper() + question[1:], answer))
        with Image.open(quiz.path) as image:
            pixels = image.convert("RGB").tobytes().hex()
        if len(kinds) < 3 or pixels in seen:
            continue
        seen.add(pixels)
        turns = [rng.choice(pairs) for pairs in kinds.values()]
        rng.shuffle(turns)
        samples.append(Sample(pixels, turns, ("png", quiz.path.read_bytes()), "MIT", "easy-vqa 1.0, train"))
    return samples


TEXT_PROMPTS = ["What is a {}?", "Define the word {}.", "What does {} mean?", "Explain the word {}."]


def text(nouns: list[sources.Noun]) -> list[Sample]:
    """Definitions of common concrete nouns; no image."""
    rng = random.Random(f"{SEED}/text")
    plain = re.compile(r"[a-z][a-z ,-]+")
    chosen = [
        noun for noun in nouns
        if noun.lexical_file in CONCRETE and noun.seen > 0 and noun.text.isalpha() and plain.fullmatch(noun.gloss) and 4 <= len(noun.gloss.split()) <= 14
    ]
    samples = []
    for noun in rng.sample(chosen, 300):
        prompt = rng.choice(TEXT_PROMPTS).format(noun.text)
        if noun.text[0] in "aeiou":
            prompt = prompt.replace("is a ", "is an ")
        samples.append(Sample(noun.gloss, [(prompt, noun.gloss)], None, "WordNet-3.0", "wordnet 3.0"))
    return unique(samples)


# --- Splits and shards ---------------------------------------------------------------------------


def unique(samples: list[Sample]) -> list[Sample]:
    """The first sample of each truth, letter case aside."""
    return list({sample.truth.lower(): sample for sample in reversed(samples)}.values())[::-1]


def shuffled(samples: list[Sample], rng: random.Random) -> list[Sample]:
    return rng.sample(samples, len(samples))


def check_split(name: str, train: list[Sample], heldout: list[Sample]) -> None:
    """Asserts that the held-out part asks for nothing that training shows, and that images open."""
    shared = {sample.truth.lower() for sample in train} & {sample.truth.lower() for sample in heldout}
    assert not shared, f"{name}: in both splits: {sorted(shared)[:5]}"
    pixels = {"train": set(), "heldout": set()}
    for split, samples in (("train", train), ("heldout", heldout)):
        for sample in samples:
            if sample.image is not None:
                with Image.open(io.BytesIO(sample.image[1])) as image:
                    pixels[split].add((image.size, image.convert("RGB").tobytes()))
    assert not pixels["train"] & pixels["heldout"], f"{name}: an image is in both splits"


def shards_of(name: str, samples: list[Sample]) -> dict[str, list[tuple[str, Sample]]]:
    """File name -> keyed samples: the training shards, then the held-out one."""
    wanted = TRAIN[name] + HELDOUT[name]
    if len(samples) < wanted:
        raise sources.SourceError(f"source {name} has {len(samples)} samples, {wanted} are wanted", "lower TRAIN or widen what the source takes")
    keyed = [(f"{name}-{index:05d}", sample) for index, sample in enumerate(samples[:wanted])]
    train, heldout = keyed[: TRAIN[name]], keyed[TRAIN[name] :]
    check_split(name, [sample for _, sample in train], [sample for _, sample in heldout])
    count = SHARDS[name]
    files = {}
    for shard in range(count):
        part = train[len(train) * shard // count : len(train) * (shard + 1) // count]
        files[f"{name}-train-{shard:06d}.tar"] = part
    files[f"{name}-heldout-000000.tar"] = heldout
    return files


def write_table(path: Path, rows: list[str]) -> None:
    """Replaces what stands between the two markers in LICENSES.md."""
    head, rest = path.read_text(encoding="utf-8").split("<!-- shards: begin -->\n")
    tail = rest.split("<!-- shards: end -->\n")[1]
    table = ["| shard | samples | bytes | licences |", "|---|---|---|---|", *rows]
    path.write_text(head + "<!-- shards: begin -->\n" + "\n".join(table) + "\n<!-- shards: end -->\n" + tail, encoding="utf-8")


def build(cache: Path, out: Path) -> None:
    folders = sources.fetch(cache, sources.DEMO_PACKAGES)
    nouns = sources.nouns(folders)
    made = {"caption": captions(folders, nouns), "ocr": ocr(folders, nouns), "vqa": vqa(folders), "text": text(nouns)}
    files = {file: part for name, samples in made.items() for file, part in shards_of(name, samples).items()}
    tars = {file: tar_of(part) for file, part in files.items()}
    total = sum(map(len, tars.values()))
    assert total < MAX_TOTAL_BYTES, f"{total} bytes, limit {MAX_TOTAL_BYTES}"
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.tar"):
        stale.unlink()
    rows = []
    for file, content in tars.items():
        (out / file).write_bytes(content)
        licences = Counter(sample.licence for _, sample in files[file])
        rows.append(f"| `{file}` | {len(files[file])} | {len(content)} | {', '.join(f'{name} ({count})' for name, count in sorted(licences.items()))} |")
    print("\n".join(rows))
    print(f"{sum(map(len, files.values()))} samples, {total} bytes in {out}")
    if (out / "LICENSES.md").exists():
        write_table(out / "LICENSES.md", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "demo-sources", help="where downloads are kept (about 600 MB)")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "demo", help="where the tars go")
    args = parser.parse_args()
    try:
        build(args.cache, args.out)
    except sources.SourceError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
