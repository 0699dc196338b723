#!/usr/bin/env python3
"""What scripts/check_docs.py finds in pages that are wrong, one fault each, and that it finds none where there is none.

    python3 tests/reference/test_check_docs.py   after cargo build --release --bins
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("check_docs", ROOT / "scripts/check_docs.py")
check_docs = importlib.util.module_from_spec(spec)
sys.modules["check_docs"] = check_docs
spec.loader.exec_module(check_docs)

GOOD = """# A page

## A `part` (of two), again

[itself](#a-part-of-two-again), [other](other.md#other), <https://example.com>, `configs/tiny/*.yaml`, `scripts/{setup,test}.sh`

```sh
sail-train launch --nproc 2 -- --config FILE --set 'batch.recompute={vision: block}' --set model.vision.random.num_hidden_layers=2 | tee log  # --nothing
srun sail-train --config FILE --set stages[1].schedule.steps=3 --dry-run --world 8 && sail-data check 'a.tar' --tokenizer x
cargo test --release -p sail-train --lib estimate
```

`sail-data pack|index|check` and `sail-train config check FILE`, `sail-train export --layout sail`

```yaml
schedule: { steps: 5 }
```

<!-- not a configuration -->
```yaml
command:
  - sail-train
  - launch
  - --nproc=8
```

<!-- exit: 2 -->
```sh
sail-train --confg FILE
```

<!-- file: a.yaml -->
```yaml
run: { name: a, dir: a }
```

```yaml
extends: a.yaml
train: { llm: frozen }
```
"""

# What is written into the page, and what must be said of it.
BAD = [
    ("[x](gone.md)", "`gone.md` leads to no file"),
    ("[x](../README.md)", "leads out of docs/"),
    ("[x](other.md#elsewhere)", "no heading there has this anchor"),
    ("[x](#A-part)", "no heading there has this anchor"),
    ("see docs/other.md there", "`docs/other.md` is no link"),
    ("`scripts/gone.py` and `configs/tiny/*.json5`", "there is no `scripts/gone.py`"),
    ("`configs/tiny/*.json5`", "there is no `configs/tiny/*.json5`"),
    ("`sail-train --confg FILE`", "`sail-train` has no option `--confg`"),
    ("```sh\nsail-train evaluate --checkpoint x\n```", "`sail-train` has no command `evaluate`"),
    ("```sh\nsail-train launch --nproc 2 -- --confg FILE\n```", "`sail-train` has no option `--confg`"),
    ("```sh\ntarget/release/sail-data stats 'a.tar' \\\n  --max-tile 3\n```", "`sail-data stats` has no option `--max-tile`"),
    ("```text\n$ sail-data index --thread 3 'a.tar'\n```", "`sail-data index` has no option `--thread`"),
    ("`sail-train export --layout apple`", "`--layout` of `sail-train export` is one of transformers, sail, original"),
    ("```sh\nsail-train --config F --set train.projectr.lr=1\n```", "no configuration has `projectr` there"),
    ("```sh\nsail-train --config F --set 'data.sources[0].wait=1'\n```", "no configuration has `wait` there"),
    ("<!-- not a configuration -->\n```yaml\ncommand:\n  - sail-train\n  - lunch\n```", "`sail-train` has no command `lunch`"),
    ("```sh\nsail-train --config F --set nonsense=1\n```", "no configuration has `nonsense`"),
    ("```yaml\nschedule: { step: 5 }\n```", "did you mean `steps`"),
    ("```yaml\nrun: { name: a }\nmodel: {}\ntrain: {}\ndata: {}\n```", "refuses it"),
    ("```yaml\nextends: nowhere.yaml\n```", "refuses it"),
]


INTERFACES = {program: check_docs.Interface(ROOT / "target/release" / program) for program in check_docs.PROGRAMS}


def faults(text: str, root: Path) -> list[str]:
    """Of a repository whose documentation is this page and another one."""
    (root / "docs/page.md").write_text(text)
    return check_docs.check(root, INTERFACES)


def main() -> int:
    assert check_docs.slug("The `run.dir`: what's in it?  (1/2)") == "the-rundir-whats-in-it--12"
    assert check_docs.braces("a{b,c}d{1,2}") == ["abd1", "abd2", "acd1", "acd2"]
    anchors = set()
    for heading in ("a", "a", "a"):
        check_docs.add_anchor(anchors, heading)
    assert anchors == {"a", "a-1", "a-2"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "docs").mkdir()
        for name in ("configs", "scripts"):
            (root / name).symlink_to(ROOT / name)
        (root / "README.md").write_text("[the book](docs/page.md#a-page)\n")
        (root / "docs/other.md").write_text("# Other\n")
        summary = root / "docs/SUMMARY.md"
        summary.write_text("[page](page.md)\n[other](other.md)\n")
        found = faults(GOOD, root)
        assert not found, found
        for text, expected in BAD:
            found = faults(f"# A page\n\n{text}\n", root)
            assert any(expected in fault and fault.startswith("docs/page.md:") for fault in found), (text, found)
        summary.write_text("[page](page.md)\n[page](page.md)\n")
        found = faults(GOOD, root)
        assert found == ["docs/SUMMARY.md: docs/page.md is listed twice", "docs/SUMMARY.md: docs/other.md is missing"], found
        book = root / "book"
        book.mkdir()
        (book / "a.html").write_text('<h1 id="a"></h1><a href="#a"></a><a href="b.html#b"></a><script src="a.js"></script>')
        (book / "b.html").write_text('<h1 id="b"></h1><a href="https://example.com"></a><img src="a.js">')
        (book / "a.js").touch()
        assert check_docs.check_book(book) == []
        (book / "b.html").write_text('<a href="a.html#b"></a><a href="c.html"></a><img src="https://example.com/a.png">')
        said = ["a.html: `b.html#b` leads to no heading", "b.html: `a.html#b` leads to no heading"]
        said += ["b.html: `c.html` leads to no file", "b.html fetches `https://example.com/a.png`"]
        assert check_docs.check_book(book) == said, check_docs.check_book(book)
    print(f"ok: check_docs.py: no fault in a page without any, {len(BAD) + 6} faults found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
