#!/usr/bin/env python3
"""Writes docs/configuration.md from the doc comments of raw.rs, raw_train.rs and raw_data.rs in
    crates/sail-train/src/config.

    python3 scripts/build_configuration_docs.py           writes the page
    python3 scripts/build_configuration_docs.py --check   fails when the page is out of date
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMS = ROOT / "crates/sail-train/src/config"
SOURCES = [FORMS / name for name in ("raw.rs", "raw_train.rs", "raw_data.rs")]
PAGE = ROOT / "docs/configuration.md"
HEAD = """# Configuration

<!-- Made by scripts/build_configuration_docs.py from the doc comments of raw.rs, raw_train.rs and raw_data.rs in
     crates/sail-train/src/config. -->

A file describes one stage, or lists the stage files of a curriculum. `sail-train --config FILE` runs
it, `--dry-run` says what it would do, `--set path=value` overrides a value, `sail-train config show FILE`
prints all values. Unknown fields are refused; all mistakes are reported at once, each with its path, its line
and a hint. Paths are relative to the working folder unless said otherwise.
"""
STRUCT = re.compile(r"pub\(super\) struct (\w+) \{")
FIELD = re.compile(r"    pub\(super\) (?:r#)?(\w+): ")


def place(section: str, fields: list[str]) -> int:
    """Where a section belongs: in the order of a stage's fields, whatever file it is in."""
    first = re.match(r"\n## (?:An item of )?`(\w+)", section)
    if first:
        return fields.index(first[1])
    return -1 if section.startswith("\n## A stage\n") else len(fields)


def linked(text: str) -> str:
    """Other pages that a comment names become links."""
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)


def page() -> str:
    out, comment, inside = [], [], False
    for line in (line for source in SOURCES for line in source.read_text().splitlines()):
        text = line.strip()
        if text.startswith("///"):
            comment.append(text[3:].strip())
        elif STRUCT.match(line):
            title, _, rest = " ".join(comment).partition(". ")
            heading = title.rstrip(".")
            body = linked(rest)
            out.append(f"\n## {heading}\n" + (f"\n{body}\n" if body else "") + "\n| field | meaning |\n|---|---|")
            comment, inside = [], True
        elif inside and (field := FIELD.match(line)):
            meaning = linked(" ".join(comment).replace("|", "\\|"))
            out.append(f"| `{field[1]}` | {meaning} |")
            comment = []
        elif text.startswith(("#[", "//!")):
            continue
        else:
            inside, comment = inside and text != "}", []
    sections = re.split(r"\n(?=\n## )", "\n".join(["", *out]))[1:]
    stage = next(section for section in sections if section.startswith("\n## A stage\n"))
    fields = re.findall(r"^\| `(\w+)` \|", stage, re.MULTILINE)
    return HEAD + "\n".join(sorted(sections, key=lambda section: place(section, fields))) + "\n"


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text() == page():
            return 0
        print(f"error: {PAGE.relative_to(ROOT)} is out of date\n\nhint: run python3 {sys.argv[0]}", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
