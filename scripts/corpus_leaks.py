"""Whether what is held out occurs in training: read from written shards, by what images decode to and by what texts say.

Used by `fetch_corpus.py`, before it writes and for `--check`, and by `tests/reference/test_corpus.py`. A shard is named
`{kind}-{train|heldout}-{number}.tar`. Two samples are the same in one respect where they share a mark:

- `image`: the SHA-256 of the size and the RGB pixels that the trainer decodes (transparency is dropped);
- `caption`: within a kind, the first answer without letter case, punctuation and a leading article. Not for `vqa`, whose
  answers are a few classes;
- `thing`: of the kind `caption`, the same without the sort of thing before a colon (`fruit: lemon` and `A lemon.`);
- `line`: a line of six words or more of any answer, in any kind;
- `fact`: what the annotation lists under `facts`, such as a subject of a table.

Pictures of the kind `caption` are also compared by their look, so that one picture in two formats is found.
"""

import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_sources as sources
import numpy as np
from PIL import Image

SHARD = re.compile(r"([a-z]+)-(train|heldout)-(\d{6})\.tar")
LINE_WORDS = 6
LOOK_SIDE = 16
# How far two looks of one picture are apart at most, as a share of the contrast of the flatter one. The demo corpus' pictures
# and the same ones stored anew in other sizes and formats: 0.1 or less for 98 in 100. Nearest two others: 0.096, 0.128.
SAME_LOOK = 0.12


@dataclass(frozen=True)
class Marked:
    """One sample and what it can be recognised by."""

    place: str  # shard and key, for messages
    kind: str
    side: str
    marks: frozenset[tuple[str, str]]
    look: bytes | None  # LOOK_SIDE x LOOK_SIDE RGB

    @property
    def image(self) -> str | None:
        """The mark of its image."""
        return next((value for name, value in self.marks if name == "image"), None)


@dataclass(frozen=True)
class Leak:
    """What a held-out sample and another share."""

    what: str
    heldout: str
    other: str

    def __str__(self) -> str:
        return f"{self.heldout} and {self.other}: {self.what}"


def image_hash(image: Image.Image) -> str:
    """Of the size and the pixels as they are decoded for training."""
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow clips 16 bits where it converts them
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()


def look_of(image: Image.Image) -> bytes:
    return image.convert("RGB").resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX).tobytes()


def normalised(text: str) -> str:
    """Words alone; a text without any letter or digit stays as it is."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold().replace("'", ""))
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words) or text.strip()


def marked(place: str, kind: str, side: str, annotation: dict, image: bytes | None) -> Marked:
    """Of an annotation as it stands in a shard, and its image file."""
    answers = [turn["value"] for turn in annotation["conversations"] if turn["from"] == "gpt"]
    marks, look = {("fact", fact) for fact in annotation.get("facts", [])}, None
    if kind != "vqa":
        marks.add(("caption", f"{kind}: {normalised(answers[0])}"))
    if kind == "caption":
        marks.add(("thing", normalised(re.sub(r"^[a-z ]{1,20}: ", "", answers[0]))))
    for line in (line for answer in answers for line in answer.splitlines()):
        # Of a page of a dictionary, the definition alone as well.
        for part in {line, line.split(": ", 1)[-1]}:
            if len(normalised(part).split()) >= LINE_WORDS:
                marks.add(("line", normalised(part)))
    if image is not None:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            marks.add(("image", image_hash(opened)))
            look = look_of(opened) if kind == "caption" else None
    return Marked(place, kind, side, frozenset(marks), look)


def same_look(a: list[bytes], b: list[bytes]) -> Iterator[tuple[int, int]]:
    """Pairs of positions in two lists of looks that are one picture."""
    if not a or not b:
        return
    # Products and sums of whole numbers below 2^53, so exact in double precision, in any order.
    left, right = (np.frombuffer(b"".join(looks), np.uint8).reshape(len(looks), -1).astype(np.float64) for looks in (a, b))
    squares, limit = (right**2).sum(1), SAME_LOOK**2 * right.var(1) * right.shape[1]
    for start in range(0, len(left), 512):
        part = left[start : start + 512]
        distance = (part**2).sum(1)[:, None] + squares[None] - 2 * part @ right.T
        allowed = np.minimum(SAME_LOOK**2 * part.var(1)[:, None] * part.shape[1], limit[None])
        for i, j in zip(*np.nonzero(distance <= allowed)):
            yield start + int(i), int(j)


def leaks(heldout: Iterable[Marked], others: Iterable[Marked]) -> list[Leak]:
    """All that a held-out sample shares with one of the others."""
    heldout, others, found = list(heldout), list(others), []
    of_mark = defaultdict(list)
    for sample in heldout:
        for mark in sample.marks:
            of_mark[mark].append(sample)
    for other in others:
        for mark in sorted(other.marks):
            found += [
                Leak(f"the same {mark[0]} `{mark[1][:80]}`", sample.place, other.place) for sample in of_mark.get(mark, [])
            ]
    seen, trained = ([sample for sample in side if sample.look is not None] for side in (heldout, others))
    for i, j in same_look([sample.look for sample in seen], [sample.look for sample in trained]):
        found.append(Leak("pictures that look the same", seen[i].place, trained[j].place))
    return found


def read_folder(folder: Path) -> list[Marked]:
    """Every sample of a folder's shards. What cannot be read, and a sample without a licence, is an error."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise sources.SourceError(f"{folder} has no shards", "name a folder that scripts/fetch_corpus.py has written")
    samples = []
    for path in paths:
        name = SHARD.fullmatch(path.name)
        if name is None:
            raise sources.SourceError(
                f"{path}: the name of a shard is {{kind}}-train-000000.tar or {{kind}}-heldout-000000.tar",
                "move other files elsewhere",
            )
        samples += [
            marked(f"{path.name} {key}", name[1], name[2], annotation, image) for key, annotation, image in read_shard(path)
        ]
    return samples


def read_shard(path: Path) -> Iterator[tuple[str, dict, bytes | None]]:
    """(key, annotation, image file) of every sample, in order."""
    hint = "build the corpus again"
    try:
        with tarfile.open(path) as tar:
            members: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, suffix = member.name.partition(".")
                members.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise sources.SourceError(f"{path} cannot be read: {error}", hint)
    for key, files in members.items():
        try:
            annotation = json.loads(files.pop("json"))
            if not annotation.get("license") or not annotation.get("source"):
                raise ValueError("it has no `license` or no `source`")
            if len(files) != ("image" in annotation):
                raise ValueError(f"it has {len(files)} images")
        except (KeyError, ValueError) as error:
            raise sources.SourceError(f"{path}, sample {key}: {error}", hint)
        yield key, annotation, next(iter(files.values()), None)
