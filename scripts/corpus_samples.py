"""What a sample of a corpus is, how its picture is drawn and stored, and how samples become a shard.

Used by `build_demo_corpus.py` and `fetch_corpus.py`. Knows no package and makes no choice of samples.
"""

import io
import json
import random
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold"]
COLOURS = [("black", "white"), ("black", "white"), ("white", "black"), ("navy", "lightyellow"), ("white", "darkgreen"), ("darkred", "white"), ("black", "lightgray")]


@dataclass(frozen=True)
class Sample:
    """One sample before it gets a key. `truth` is what must not occur in both splits.

    `facts` are written into the annotation: names of what an image shows that its text does not tell by itself, none of
    which may be in both splits either. A maker that has divided what it draws from says which `side` a sample is of.
    """

    truth: str
    conversations: list[tuple[str, str]]  # (question, answer); the first question without `<image>`
    image: tuple[str, bytes] | None  # suffix and file
    licence: str
    source: str
    facts: tuple[str, ...] = ()
    side: str | None = None  # train | heldout


# --- Images and shards ---------------------------------------------------------------------------


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparent places composited on white."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def encode(image: Image.Image, style: str) -> tuple[str, bytes]:
    """(suffix, file) of an image in one of the formats that loaders meet."""
    rgb, buffer = on_white(image), io.BytesIO()
    if style == "jpg":
        rgb.save(buffer, "JPEG", quality=85)
        return "jpg", buffer.getvalue()
    if style == "webp":
        rgb.save(buffer, "WEBP", quality=80, method=6)
        return "webp", buffer.getvalue()
    options = {}
    if style == "palette":
        made = rgb.quantize(48, dither=Image.Dither.NONE)
    elif style == "palette-transparent":  # the commonest colour, which is the white around the object
        made = rgb.quantize(48, dither=Image.Dither.NONE)
        options["transparency"] = Counter(made.tobytes()).most_common(1)[0][0]
    elif style == "rgba":
        made = rgb.copy()
        made.putalpha(image.convert("RGBA").getchannel("A"))
    elif style == "gray":
        made = rgb.convert("L")
    elif style == "gray-alpha":
        made = Image.merge("LA", [rgb.convert("L"), image.convert("RGBA").getchannel("A")])
    elif style == "gray-16":  # 257 takes 0..255 to 0..65535
        made = Image.frombytes("I;16", rgb.size, b"".join((257 * value).to_bytes(2, "little") for value in rgb.convert("L").tobytes()))
    else:
        assert style == "rgb", style
        made = rgb
    made.save(buffer, "PNG", optimize=True, **options)
    return "png", buffer.getvalue()


def choose(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def render(text: str, font_path: Path, ink: str, paper: str, rng: random.Random) -> Image.Image:
    """One word per line, as large as the picture lets it be, somewhere in the picture."""
    width, height = rng.choice([(112, 112), (128, 128), (144, 144), (168, 112), (112, 64)])
    lines = text.replace(" ", "\n")
    margin = 6
    for size in range(rng.choice([24, 30, 40]), 7, -1):
        font = ImageFont.truetype(str(font_path), size, layout_engine=ImageFont.Layout.BASIC)
        probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        left, top, right, bottom = probe.multiline_textbbox((0, 0), lines, font=font, spacing=2)
        if right - left <= width - 2 * margin and bottom - top <= height - 2 * margin:
            break
    x = rng.randint(margin, width - margin - int(right - left)) - left
    y = rng.randint(margin, height - margin - int(bottom - top)) - top
    image = Image.new("RGB", (width, height), paper)
    ImageDraw.Draw(image).multiline_text((x, y), lines, fill=ink, font=font, spacing=2)
    return image


def tar_of(samples: list[tuple[str, Sample]]) -> bytes:
    """A WebDataset tar of (key, sample); members have no time and no owner."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, sample in samples:
            annotation = {"id": key, "conversations": [], "license": sample.licence, "source": sample.source}
            members = []
            if sample.image is not None:
                suffix, content = sample.image
                annotation["image"] = f"{key}.{suffix}"
                members.append((f"{key}.{suffix}", content))
            if sample.facts:
                annotation["facts"] = list(sample.facts)
            for turn, (question, answer) in enumerate(sample.conversations):
                head = "<image>\n" if turn == 0 and sample.image is not None else ""
                annotation["conversations"] += [{"from": "human", "value": head + question}, {"from": "gpt", "value": answer}]
            members.append((f"{key}.json", json.dumps(annotation).encode()))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
