#!/usr/bin/env python3
"""Checks what the documentation names: links and anchors, commands and their options, configurations, files.

    python3 scripts/check_docs.py                        README.md, CONTRIBUTING.md, CHANGELOG.md and docs/
    python3 scripts/check_docs.py --bin target/release   where sail-train and sail-data are (this is the default)

Without network, in some seconds. What is looked at in each page:

- a link leads to a file, and its anchor to a heading; a page of docs/ links to pages of docs/ alone, since they make
  a book, and every one of them is in docs/SUMMARY.md;
- every `sail-train` and `sail-data` in a code block or a code span: subcommands, options and their possible values
  as the programs' own `--help` has them, and what `--set` overrides as configs/schema.json has it;
- every YAML block is a configuration that `sail-train config check` accepts, whole or as an extension of a stage of
  configs/tiny, or has `<!-- not a configuration -->` in front of it;
- files and folders of the repository that a code span names are there.

A block with `<!-- file: NAME -->` in front of it is a file of the page; later blocks of the page may extend it. One with
`<!-- exit: 2 -->` shows a mistake, and its commands are not looked at.

    python3 scripts/check_docs.py --book target/book     links and anchors of the book that mdBook has made, and that
                                                         nothing in it is fetched from elsewhere
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("sail-train", "sail-data")
SHELL = ("sh", "bash", "shell", "console")
# A code span that begins so names a file of the repository.
OWN_PATHS = re.compile(r"(crates|scripts|tests|configs|docs|data/demo)/[\w./*{},?-]+")
# What a part of a configuration extends: the encoder is frozen in one, everything is trained in the other.
STAGES = ("configs/tiny/stage1.yaml", "configs/tiny/stage3.yaml")


@dataclass
class Block:
    """A code block, or a code span (`language` is None)."""

    line: int
    language: str | None
    text: str
    mark: str = ""  # the HTML comment in front of it


@dataclass
class Page:
    """What is looked at in a page."""

    path: Path
    links: list[tuple[int, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    blocks: list[Block] = field(default_factory=list)
    plain: list[tuple[int, str]] = field(default_factory=list)  # prose without code and links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mdBook make it of its text."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text.strip().lower()))


def read(path: Path) -> Page:
    """Takes a page apart."""
    page, fence, block, mark = Page(path), None, None, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        stripped = line.strip()
        if fence:
            if stripped.startswith(fence) and not stripped.strip("`"):
                page.blocks.append(block)
                fence = None
            else:
                block.text += line[indent:] + "\n" if not line[:indent].strip() else line + "\n"
            continue
        if opening := re.match(r"( *)(`{3,})([\w-]*)", line):
            indent, fence = len(opening[1]), opening[2]
            block, mark = Block(number, opening[3], "", mark), ""
            continue
        if comment := re.fullmatch(r"<!-- (.*) -->", stripped):
            mark = comment[1]
            continue
        if stripped:
            mark = ""
        if heading := re.match(r"#{1,6} +(.*)", line):
            add_anchor(page.anchors, slug(heading[1]))
        rest = line
        for span in re.finditer(r"`([^`]+)`", line):
            page.blocks.append(Block(number, None, span[1]))
            rest = rest.replace(span[0], " ", 1)
        # A link's text may hold code, its target may not.
        page.links += [(number, target) for target in re.findall(r"\]\(([^)\s]+)\)", line)]
        page.plain.append((number, re.sub(r"\]\([^)]*\)", "]", rest)))
    if fence:
        page.blocks.append(block)
    return page


def add_anchor(anchors: set[str], anchor: str) -> None:
    """A heading of the same text gets a number."""
    name, number = anchor, 0
    while name in anchors:
        number += 1
        name = f"{anchor}-{number}"
    anchors.add(name)


def check_links(page: Page, pages: dict[Path, Page], root: Path) -> list[str]:
    faults, docs = [], root / "docs"
    for line, target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        where = f"{page.path.relative_to(root)}:{line}: `{target}`"
        if not path.exists():
            faults.append(f"{where} leads to no file")
        elif docs in page.path.parents and docs not in path.parents:
            faults.append(f"{where} leads out of docs/, and so out of the book; name the file in a code span")
        elif anchor and path not in pages:
            faults.append(f"{where} has an anchor, and is no page that is looked at")
        elif anchor and anchor not in pages[path].anchors:
            faults.append(f"{where}: no heading there has this anchor; there are {sorted(pages[path].anchors)}")
    if docs in page.path.parents:
        for line, text in page.plain:
            for name in re.findall(r"docs/[\w/.-]+\.md", text):
                faults.append(f"{page.path.relative_to(root)}:{line}: `{name}` is no link; write [..]({name[5:]})")
    return faults


def check_summary(pages: dict[Path, Page], root: Path) -> list[str]:
    """Every page of the book is in its list of chapters, once."""
    summary = root / "docs/SUMMARY.md"
    listed = [(summary.parent / target).resolve() for _, target in pages[summary].links]
    there = {path for path in pages if summary.parent in path.parents and path != summary}
    faults = [f"docs/SUMMARY.md: {path.relative_to(root)} is listed twice" for path in {p for p in listed if listed.count(p) > 1}]
    return faults + [f"docs/SUMMARY.md: {path.relative_to(root)} is missing" for path in sorted(there - set(listed))]


def check_paths(page: Page, root: Path) -> list[str]:
    """Files of the repository that code spans name."""
    faults = []
    for block in page.blocks:
        path = block.text.split(":")[0]
        if block.language is not None or not OWN_PATHS.fullmatch(path):
            continue
        if not any(any(root.glob(one)) for one in braces(path.rstrip("/"))):
            faults.append(f"{page.path.relative_to(root)}:{block.line}: there is no `{path}`")
    return faults


def braces(pattern: str) -> list[str]:
    """`a{b,c}` as a shell takes it apart."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [rest for part in found[1].split(",") for rest in braces(pattern[: found.start()] + part + pattern[found.end() :])]


class Interface:
    """Subcommands and options of a program, as its `--help` says."""

    def __init__(self, program: Path):
        self.program = program
        self.commands: dict[tuple[str, ...], dict] = {}

    def of(self, command: tuple[str, ...]) -> dict:
        """What a subcommand takes: {"commands": names, "options": {name: possible values, True, or False for none}}."""
        if command not in self.commands:
            text = subprocess.run([self.program, *command, "--help"], capture_output=True, text=True, check=True).stdout
            self.commands[command] = parse_help(text)
        return self.commands[command]


def parse_help(text: str) -> dict:
    section, found, option = "", {"commands": set(), "options": {}}, None
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\S[^:]*):", line):
            section, option = heading[1], None
        elif section == "Commands" and (name := re.match(r"  (\S+)  ", line)):
            found["commands"].add(name[1])
        elif match := re.match(r"\s+(?:-(\w)(?:, )?)?(?:--([\w-]+))?( <| \[)?", line) if re.match(r"\s{2,6}-", line) else None:
            option = [f"-{match[1]}"] if match[1] else []
            option += [f"--{match[2]}"] if match[2] else []
            found["options"].update(dict.fromkeys(option, bool(match[3])))
        if option and (values := re.search(r"\[possible values: ([^]]*)\]", line)):
            found["options"].update(dict.fromkeys(option, values[1].split(", ")))
        elif option and (value := re.match(r"\s+- (\w+):? ", line + " ")):
            known = found["options"][option[-1]]
            found["options"].update(dict.fromkeys(option, [*(known if isinstance(known, list) else []), value[1]]))
    return found


def command_lines(block: Block) -> list[str]:
    """The lines of a block that a shell would run, each whole."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = text.splitlines()
    if block.language in SHELL:
        # Of a session only what is typed.
        return [re.sub(r"^\$ ", "", line) for line in lines]
    if block.language == "yaml":
        # A comment may be the command that a file is for.
        return container_commands(lines) + [line.strip("# ") for line in lines if line.strip().startswith("# sail-")]
    if block.language is None:
        return [block.text]
    return [line[2:] for line in lines if line.startswith("$ ")]


def container_commands(lines: list[str]) -> list[str]:
    """The `command:` of containers: a list, of which each item is an argument."""
    commands = [[]]
    for line in lines:
        item = re.fullmatch(r"\s+- ([^\s{]\S*)(\s+#.*)?", line)
        if item:
            commands[-1].append(item[1])
        else:
            commands.append([])
    return [" ".join(command) for command in commands if command]


def invocations(line: str) -> list[list[str]]:
    """The arguments of each of the programs that a line runs, its name first."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    found, current = [], None
    for before, word in zip(["", *words], words):
        name = word.rsplit("/", 1)[-1]
        if name in PROGRAMS and before not in ("-p", "--package", "--bin"):
            current = [name]
            found.append(current)
        elif word in ("|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1") or re.match(r"\d?>", word):
            current = None
        elif current is not None:
            ends = word.endswith(";")
            current.append(word.rstrip(";"))
            current = None if ends else current
    return found


def check_command(words: list[str], interfaces: dict[str, Interface], schema: dict) -> str | None:
    """What is wrong with the arguments of a program."""
    interface, command, rest = interfaces[words[0]], (), words[1:]
    while rest:
        word, rest = rest[0], rest[1:]
        known = interface.of(command)
        if word == "--":
            # `launch -- ARGS` hands them to the program itself.
            return check_command([words[0], *rest], interfaces, schema)
        if not word.startswith("-") or word == "-":
            # `pack|index|check` in a sentence is any of them.
            names = re.split(r"[|/]", word)
            if known["commands"] and re.fullmatch(r"[a-z|]+", word):
                if wrong := [name for name in names if name not in known["commands"]]:
                    return f"`{' '.join([words[0], *command])}` has no command `{wrong[0]}`"
                command = (*command, names[0])
            continue
        name, _, value = word.partition("=")
        if name not in known["options"]:
            return f"`{' '.join([words[0], *command])}` has no option `{name}`"
        takes = known["options"][name]
        if not takes:
            continue
        if "=" not in word:
            if not rest:
                # A sentence may name an option without its value.
                return None
            value, rest = rest[0], rest[1:]
        if isinstance(takes, list) and re.fullmatch(r"[a-z0-9]+", value) and value not in takes:
            return f"`{name}` of `{' '.join([words[0], *command])}` is one of {', '.join(takes)}, and not `{value}`"
        if name == "--set" and (fault := check_set(value, schema)):
            return fault
    return None


def check_set(override: str, schema: dict) -> str | None:
    """Whether configurations have what `--set PATH=VALUE` overrides."""
    path = override.partition("=")[0]
    if not re.fullmatch(r"[\w.\[\]]+", path) or path == "PATH":
        return None  # `--set path=value` in a sentence, `PATH=VALUE`
    if path == "path":
        return None
    keys = re.findall(r"\w+|\[\d+\]", path)
    if keys[0] == "stages" and len(keys) > 1:
        keys = keys[2:]
    nodes = [schema]
    for key in keys:
        nodes = [child for node in nodes for child in step(node, key, schema)]
        if not nodes:
            return f"`--set {path}`: no configuration has `{key}` there"
    return None


def step(node: dict, key: str, schema: dict) -> list[dict]:
    """What a schema says of a key of an object or an item of a list."""
    node = resolved(node, schema)
    choices = [choice for name in ("anyOf", "oneOf", "allOf") for choice in node.get(name, [])]
    choices += [node[name] for name in ("then", "else") if name in node]
    found = [child for choice in choices for child in step(choice, key, schema)]
    if key.startswith("["):
        return found + ([node["items"]] if isinstance(node.get("items"), dict) else [])
    if key in node.get("properties", {}):
        found.append(node["properties"][key])
    # The keys of `random` are those of another file.
    is_known = choices or any(name in node for name in ("properties", "const", "enum"))
    if not is_known and "object" in node.get("type", ["object"]) and node.get("additionalProperties") is not False:
        found.append({"type": "object"})
    return found


def resolved(node: dict, schema: dict) -> dict:
    while "$ref" in node:
        node = {**{key: value for key, value in node.items() if key != "$ref"}, **at(schema, node["$ref"])}
    return node


def at(schema: dict, reference: str) -> dict:
    for key in reference.removeprefix("#/").split("/"):
        schema = schema[key]
    return schema


def check_yaml(page: Page, sail_train: Path, root: Path) -> list[str]:
    """Every YAML block by `sail-train config check`."""
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for block in page.blocks:
            if block.language != "yaml" or block.mark == "not a configuration":
                continue
            name = block.mark.removeprefix("file: ") if block.mark.startswith("file: ") else "block.yaml"
            for text in configurations(block, root):
                (Path(folder) / name).write_text(text)
                done = subprocess.run([sail_train, "config", "check", name], capture_output=True, text=True, cwd=folder)
                if done.returncode == 0:
                    break
            else:
                said = done.stderr.strip().replace("\n", "\n    ")
                faults.append(f"{page.path.relative_to(root)}:{block.line}: `sail-train config check` refuses it\n    {said}")
    return faults


def configurations(block: Block, root: Path) -> list[str]:
    """A block as a file; a part of a stage may extend any of the tiny ones."""
    keys = re.findall(r"^(\w+):", block.text, re.MULTILINE)
    if "extends" in keys:
        # Relative to the file that the first line names, or to what the page has written.
        if named := re.match(r"# sail-train --config (\S+)", block.text):
            folder = (root / named[1]).parent
            return [re.sub(r"^extends: (\S+)", lambda found: f"extends: {folder / found[1]}", block.text, flags=re.MULTILINE)]
        return [block.text]
    if "stages" in keys or {"run", "model", "train", "data"} <= set(keys):
        return [block.text]
    return [f"extends: {root / stage}\n{block.text}" for stage in STAGES]


def check(root: Path, interfaces: dict[str, Interface]) -> list[str]:
    """What is wrong with all pages."""
    names = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (root / name).exists()]
    pages = {path: read(path) for path in [*names, *sorted((root / "docs").rglob("*.md"))]}
    schema = json.loads((root / "configs/schema.json").read_text())
    faults = check_summary(pages, root)
    for page in pages.values():
        faults += check_links(page, pages, root) + check_paths(page, root)
        # A block that must end as a mistake does may hold one.
        for block in (block for block in page.blocks if block.mark != "exit: 2"):
            for words in (words for line in command_lines(block) for words in invocations(line)):
                if fault := check_command(words, interfaces, schema):
                    faults.append(f"{page.path.relative_to(root)}:{block.line}: {fault}")
        faults += check_yaml(page, interfaces["sail-train"].program, root)
    return faults


class Html(HTMLParser):
    """Identifiers of a page, what it links to, and what it fetches."""

    def __init__(self, text: str):
        super().__init__()
        self.identifiers, self.links, self.fetched = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.identifiers.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("img", "script", "link", "iframe") and (target := values.get("src") or values.get("href")):
            self.fetched.append(target)


def check_book(book: Path) -> list[str]:
    """Links, anchors and files of a book as a browser finds them."""
    # One that is shown for any address has absolute links, and one for print repeats all others.
    paths = [path for path in sorted(book.rglob("*.html")) if path.name not in ("404.html", "print.html")]
    pages = {path: Html(path.read_text(encoding="utf-8")) for path in paths}
    faults = [] if pages else [f"{book}: there is no page"]
    for path, page in pages.items():
        where = path.relative_to(book)
        for target in page.links + page.fetched:
            scheme = re.match(r"([a-z]+:)?//|[a-z]+:", target)
            if scheme and target in page.fetched:
                faults.append(f"{where} fetches `{target}`")
            if scheme:
                continue
            name, _, anchor = unquote(target).partition("#")
            other = (path.parent / name).resolve() if name else path
            if not other.exists():
                faults.append(f"{where}: `{target}` leads to no file")
            elif anchor and other in pages and anchor not in pages[other].identifiers:
                faults.append(f"{where}: `{target}` leads to no heading")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = {"default": ROOT / "target/release", "help": "the folder of sail-train and sail-data"}
    parser.add_argument("--bin", type=Path, metavar="DIR", **programs)
    parser.add_argument("--book", type=Path, metavar="DIR", help="a built book, instead of the pages it is made of")
    args = parser.parse_args()
    if args.book:
        return tell(check_book(args.book.resolve()))
    for program in PROGRAMS:
        if not (args.bin / program).exists():
            print(f"error: there is no `{args.bin / program}`\n\nhint: cargo build --release --bins", file=sys.stderr)
            return 2
    return tell(check(ROOT, {program: Interface(args.bin.resolve() / program) for program in PROGRAMS}))


def tell(faults: list[str]) -> int:
    """Lists faults; the exit code."""
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print(f"\nhint: {len(faults)} in all; {sys.argv[0]} --help says what is looked at", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
