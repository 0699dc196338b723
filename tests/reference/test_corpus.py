#!/usr/bin/env python3
"""Checks what keeps held-out samples out of training: scripts/fetch_corpus.py, corpus_leaks.py, corpus_charts.py.

    .venv/bin/python tests/reference/test_corpus.py

Reads the committed demo corpus, and small shards made here that leak in each of the ways there are. Downloads nothing;
takes about ten seconds. `scripts/test.sh --extended` builds and checks the whole corpus.
"""

import contextlib
import hashlib
import io
import random
import re
import sys
import tempfile
import unittest
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import corpus_charts
import corpus_leaks
import demo_sources as sources
import fetch_corpus
import numpy as np
from corpus_leaks import Marked
from corpus_samples import Sample, encode, tar_of
from PIL import Image, ImageDraw, ImageFont

DEMO = corpus_leaks.read_folder(ROOT / "data" / "demo")


def drawing(seed: int, side: int = 96) -> Image.Image:
    """A picture like no other: discs in random colours."""
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), "white")
    for _ in range(8):
        x, y, r = rng.randrange(side), rng.randrange(side), rng.randrange(side // 10, side // 4)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), tuple(rng.randrange(256) for _ in range(3)))
    return image


def sample(answer: str, image: Image.Image | None = None, style: str = "rgb", **fields) -> Sample:
    return Sample("", [("What is this?", answer)], image and encode(image, style), "CC0-1.0", "made here", **fields)


def write_corpus(folder: Path, samples: dict[tuple[str, str], list[Sample]]) -> None:
    keyed = {(kind, side): [(f"{kind}-{side}-{i}", made) for i, made in enumerate(of)] for (kind, side), of in samples.items()}
    fetch_corpus.claim(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        fetch_corpus.write(folder, keyed, {"licence": "all", "limit": None, "seed": "0", "packages": [], "left_out": {}})


def check(folder: Path, barred: set[str] = frozenset()) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        fetch_corpus.check(folder, DEMO, set(barred))


class Leaks(unittest.TestCase):
    """A folder is built as the builder writes it, and checked as `--check` does."""

    def check(self, samples: dict[tuple[str, str], list[Sample]], barred: set[str] = frozenset()) -> str:
        """The error, or nothing."""
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "corpus"
            write_corpus(folder, samples)
            try:
                check(folder, barred)
            except sources.SourceError as error:
                self.assertTrue(error.hint)
                return error.args[0]
        return ""

    def assert_leak(self, what: str, train: tuple[str, Sample], heldout: tuple[str, Sample]) -> None:
        error = self.check({(train[0], "train"): [train[1]], (heldout[0], "heldout"): [heldout[1]]})
        self.assertIn(what, error)
        self.assertIn(f"{heldout[0]}-heldout-000000.tar {heldout[0]}-heldout-0", error)
        self.assertIn(f"{train[0]}-train-000000.tar {train[0]}-train-0", error)

    def test_what_differs_is_no_leak(self):
        train = {
            ("caption", "train"): [sample("A yellow disc.", drawing(1)), sample("A disc in the sun.", drawing(2))],
            ("vqa", "train"): [sample("blue", drawing(3))],
        }
        self.assertEqual(
            self.check(
                train
                | {
                    ("caption", "heldout"): [sample("A red disc.", drawing(4))],
                    ("vqa", "heldout"): [sample("blue", drawing(5))],
                }
            ),
            "",
        )

    def test_an_image_is_found_in_another_format_and_kind(self):
        self.assert_leak(
            "the same image", ("vqa", sample("blue", drawing(1))), ("caption", sample("A red disc.", drawing(1), "rgba"))
        )
        gray = drawing(1).convert("L").convert("RGB")
        self.assert_leak("the same image", ("ocr", sample("blue", gray, "gray")), ("ocr", sample("red", gray, "gray-16")))

    def test_an_image_is_found_compressed_and_in_another_size(self):
        for style in ["jpg", "webp", "palette"]:
            with self.subTest(style):
                small = drawing(1).resize((64, 64), Image.Resampling.LANCZOS)
                self.assert_leak(
                    "look the same", ("caption", sample("A disc.", drawing(1))), ("caption", sample("A wheel.", small, style))
                )

    def test_a_caption_is_found_in_another_spelling(self):
        self.assert_leak(
            "the same caption", ("caption", sample("A red DISC!", drawing(1))), ("caption", sample("the red disc", drawing(2)))
        )
        self.assert_leak(
            "the same thing", ("caption", sample("fruit: lemon", drawing(1))), ("caption", sample("A lemon.", drawing(2)))
        )
        self.assert_leak("the same caption", ("text", sample("A small bird.")), ("text", sample("a small bird")))

    def test_a_line_is_found_inside_other_answers(self):
        page = sample("auk: black-and-white short-necked web-footed diving bird\ntern: small slender gull", drawing(1))
        self.assert_leak(
            "the same line", ("doc", page), ("text", sample("Black-and-white short-necked web-footed diving bird"))
        )

    def test_a_subject_of_a_chart_is_found(self):
        train, heldout = (
            sample(text, drawing(seed), facts=("gapminder.json/Kenya",))
            for text, seed in [("Kenya, 1960.", 1), ("Kenya, 1970.", 2)]
        )
        self.assert_leak("the same fact `gapminder.json/Kenya`", ("chart", train), ("chart", heldout))

    def test_the_demo_corpus_held_out_is_not_trained_on(self):
        key, annotation, image = next(corpus_leaks.read_shard(ROOT / "data/demo/vqa-heldout-000000.tar"))
        taken = Sample("", [("What is this?", "blue")], ("png", image), "MIT", "easy-vqa")
        error = self.check({("vqa", "train"): [taken]})
        self.assertIn(f"vqa-heldout-000000.tar {key} and vqa-train-000000.tar vqa-train-0", error)
        _, annotation, _ = next(corpus_leaks.read_shard(ROOT / "data/demo/text-heldout-000000.tar"))
        self.assertIn(
            "the same caption", self.check({("text", "train"): [sample(annotation["conversations"][1]["value"].upper())]})
        )

    def test_an_image_of_a_test_split_is_found_on_both_sides(self):
        for side in ("train", "heldout"):
            error = self.check({("vqa", side): [sample("bag", drawing(1))]}, {corpus_leaks.image_hash(drawing(1))})
            self.assertIn(f"vqa-{side}-000000.tar vqa-{side}-0: an image of a test split", error)

    def test_the_demo_corpus_has_no_leak_but_three_that_are_alike(self):
        self.assertEqual(Counter(one.side for one in DEMO), {"train": 1160, "heldout": 168})
        found = corpus_leaks.leaks([one for one in DEMO if one.side == "heldout"], [one for one in DEMO if one.side == "train"])
        self.assertEqual(
            sorted(leak.what for leak in found),
            ["pictures that look the same", "the same thing `pencil`", "the same thing `watermelon`"],
        )


class Cards(unittest.TestCase):
    def test_shards_that_are_not_as_written_are_named(self):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            write_corpus(folder, {("text", "train"): [sample("A small bird.")], ("text", "heldout"): [sample("A large bird.")]})
            check(folder)
            shard = folder / "text-train-000000.tar"
            whole = shard.read_bytes()
            shard.write_bytes(whole.replace(b"small", b"brown"))
            with self.assertRaisesRegex(sources.SourceError, "text-train-000000.tar is not as it was written"):
                check(folder)
            shard.rename(folder / "text-train-000001.tar")
            with self.assertRaisesRegex(
                sources.SourceError, "missing or not in card.json: text-train-000000.tar, text-train-000001.tar"
            ):
                check(folder)
            (folder / "card.json").unlink()
            with self.assertRaisesRegex(sources.SourceError, "not a finished corpus"):
                check(folder)

    def test_a_sample_without_a_licence_is_named(self):
        with tempfile.TemporaryDirectory() as root:
            unlicensed = Sample("", [("What?", "A bird.")], None, "", "made here")
            (Path(root) / "text-train-000000.tar").write_bytes(tar_of([("text-7", unlicensed)]))
            with self.assertRaisesRegex(sources.SourceError, "text-train-000000.tar, sample text-7: it has no `license`"):
                corpus_leaks.read_folder(Path(root))

    def test_a_folder_of_something_else_is_left_alone(self):
        with tempfile.TemporaryDirectory() as root:
            (Path(root) / "thesis.tar").write_bytes(b"mine")
            with self.assertRaisesRegex(sources.SourceError, "has not written"):
                fetch_corpus.claim(Path(root))
            self.assertEqual((Path(root) / "thesis.tar").read_bytes(), b"mine")

    def test_a_build_that_was_stopped_is_taken_up(self):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root)
            fetch_corpus.claim(folder)
            (folder / "text-train-000003.tar.partial").write_bytes(b"cut")
            write_corpus(folder, {("text", "train"): [sample("A small bird.")]})
            self.assertEqual(
                sorted(path.name for path in folder.iterdir()), ["README.md", "card.json", "text-train-000000.tar"]
            )


class Sides(unittest.TestCase):
    """`choose_sides` on marks made up here."""

    def of(self, *marks: str, kind: str = "text", side: str = "") -> Marked:
        return Marked("", kind, side, frozenset(("caption", mark) for mark in marks), None)

    def choose(self, samples: list[Marked], demo=(), barred=frozenset(), wanted=2) -> list[str | None]:
        made = [(sample("x"), marks) for marks in samples]
        return fetch_corpus.choose_sides(made, list(demo), set(barred), {"text": wanted})[0]

    def test_what_shares_a_mark_stays_together(self):
        samples = [self.of(f"{group}", f"{group}-{i}") for group in range(40) for i in range(3)]
        sides = self.choose(samples, wanted=30)
        self.assertEqual(Counter(sides), {"train": 90, "heldout": 30})
        for group in range(40):
            self.assertEqual(len(set(sides[3 * group : 3 * group + 3])), 1)

    def test_a_chain_is_one_group(self):
        sides = self.choose([self.of(str(i), str(i + 1)) for i in range(50)], wanted=49)
        self.assertEqual(set(sides), {"train"})  # too many to be held out

    def test_the_demo_corpus_decides_and_what_it_has_on_both_sides_is_left_out(self):
        demo = [
            self.of("a", side="train"),
            self.of("b", side="heldout"),
            self.of("c", side="train"),
            self.of("d", side="heldout"),
        ]
        self.assertEqual(
            self.choose([self.of("a"), self.of("b"), self.of("c", "d")], demo, wanted=0), ["train", "heldout", None]
        )

    def test_images_of_test_splits_are_left_out_with_all_that_is_like_them(self):
        shown = Marked("", "text", "", frozenset({("image", "1234"), ("caption", "a")}), None)
        self.assertEqual(self.choose([shown, self.of("a"), self.of("b")], barred={"1234"}, wanted=0), [None, None, "train"])

    def test_the_order_of_the_samples_does_not_matter(self):
        samples = [self.of(str(i), str(i // 2)) for i in range(60)]
        straight = dict(zip([one.marks for one in samples], self.choose(samples, wanted=12)))
        mixed = random.Random(1).sample(samples, len(samples))
        self.assertEqual(straight, dict(zip([one.marks for one in mixed], self.choose(mixed, wanted=12))))


class Charts(unittest.TestCase):
    def table(self) -> corpus_charts.Table:
        rng = random.Random(5)
        values = {
            f"Land {letter}": {str(year): Decimal(rng.randrange(-200, 2000)) / 10 for year in range(1990, 2002)}
            for letter in "ABCDEFGHIJ"
        }
        return corpus_charts.Table("t.csv", "CC0-1.0", "rainfall", "mm", "country", "year", 1, values)

    def test_answers_are_those_of_the_numbers_in_the_chart(self):
        table, rng, asked = self.table(), random.Random(2), Counter()
        for _ in range(300):
            chart = corpus_charts.draw_chart(table, list(table.values), rng)
            axis = max(chart.values) - min(chart.values)
            for question, answer in corpus_charts.questions(chart, axis, rng):
                self.assertEqual(answer, self.answer(chart, question, asked), question)
        self.assertEqual(len(asked), 11, asked)  # every sort of question came up
        self.assertGreater(min(asked.values()), 20, asked)

    def answer(self, chart: corpus_charts.Chart, question: str, asked: Counter) -> str:
        """From the table itself."""

        def of(column: str, row: str = "") -> Decimal:
            rows = list(chart.rows)
            index = chart.columns.index(column)
            return chart.rows[row or rows[0]][index]

        def match(pattern: str) -> re.Match | None:
            found = re.fullmatch(pattern, question)
            asked.update([pattern] if found else [])
            return found

        if match(r"How many countries does the chart compare\?"):
            return str(len(chart.rows))
        if found := match(r"Which is higher in (.*), (.*) or (.*)\?"):
            return max(found[2], found[3], key=lambda row: of(found[1], row))
        if match(r"Which (country|year) has the highest value\?"):
            return max(chart.columns, key=of)
        if match(r"Which (country|year) has the lowest value\?"):
            return min(chart.columns, key=of)
        if match(r"How many (countries|years) are shown\?"):
            return str(len(chart.columns))
        if found := match(r"Which has the higher value, (.*) or (.*)\?"):
            return max(found[1], found[2], key=of)
        if found := match(r"Does the value rise or fall from (.*) to (.*)\?"):
            self.assertLess(int(found[1]), int(found[2]))
            return "rise" if of(found[2]) > of(found[1]) else "fall"
        # The others need values that can be read.
        self.assertTrue(chart.printed, question)
        if found := match(r"What is the value for (.*)\?"):
            return f"{of(found[1]):,}"
        if found := match(r"What is the difference between (.*) and (.*)\?"):
            return f"{abs(of(found[1]) - of(found[2])):,}"
        if found := match(r"What is the sum of (.*) and (.*)\?"):
            return f"{of(found[1]) + of(found[2]):,}"
        found = match(r"How many (?:countries|years) have a value above (.*)\?")
        return str(sum(of(column) > Decimal(found[1].replace(",", "")) for column in chart.columns))

    def test_what_is_not_printed_is_compared_only_where_it_shows(self):
        values = {"Land A": {str(year): Decimal(100 + year % 2) for year in range(1990, 2002)}}
        near = corpus_charts.Table("t.csv", "CC0-1.0", "rainfall", "mm", "country", "year", 0, values)
        rng = random.Random(3)
        for _ in range(50):
            chart = corpus_charts.draw_chart(near, ["Land A"], rng)
            if chart is not None and not chart.printed:
                asked = [question for question, _ in corpus_charts.questions(chart, Decimal(120), rng)]
                self.assertEqual(asked, ["How many years are shown?"])

    def test_a_bar_is_as_high_as_its_value(self):
        values = [Decimal(25), Decimal(100), Decimal(75)]
        for names in ["ABC", ["Land of the White Clouds", "B", "C"]]:  # standing and, for want of room, lying bars
            chart = corpus_charts.Chart(self.table(), "Rainfall", {"": values}, list(names), "country", False, "bars")
            small, head = ImageFont.load_default(12), ImageFont.load_default(14)
            for seed in range(8):
                image, axis = corpus_charts.picture(chart, small, head, random.Random(seed))
                self.assertEqual(axis, 100)
                lengths = self.bars(image if names == "ABC" else image.rotate(90, expand=True))
                for length, value in zip(lengths, values):
                    self.assertAlmostEqual(length / max(lengths), float(value) / 100, delta=1.5 / max(lengths))

    def bars(self, image: Image.Image) -> list[int]:
        """Heights of the bars in pixels, from left to right; letters are thinner."""
        pixels = np.asarray(image)
        colours = [tuple(bytes.fromhex(colour[1:])) for colour in corpus_charts.COLOURS]
        counts = max(((pixels == colour).all(2).sum(0) for colour in colours), key=lambda count: count.sum())
        groups = np.split(counts, np.nonzero(np.diff(counts > 4))[0] + 1)
        heights = [int(group.max()) for group in groups if group.max() > 4]
        self.assertEqual(len(heights), 3)
        return heights

    def test_subjects_are_on_one_side_in_all_tables_of_a_file(self):
        table = self.table()
        other = corpus_charts.Table(
            "t.csv", "CC0-1.0", "snow", "mm", "country", "year", 1, dict(list(table.values.items())[2:])
        )
        (_, first), (_, second) = corpus_charts.divided([table, other])
        self.assertEqual(len(first["heldout"]), 2)
        self.assertFalse(set(first["heldout"] + second["heldout"]) & set(first["train"] + second["train"]))


class Downloads(unittest.TestCase):
    """`fetch` on an archive that is in the cache already."""

    def setUp(self):
        self.root = tempfile.TemporaryDirectory()
        self.cache = Path(self.root.name)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as wheel:
            wheel.writestr("birds/list.txt", "auk")
        (self.cache / "birds-1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        self.package = sources.Package("pip", "birds", "1.0", "birds-1.0-py3-none-any.whl", digest)
        self.folder = self.cache / f"birds-{digest[:12]}"

    def tearDown(self):
        self.root.cleanup()

    def test_an_unpacking_that_was_killed_is_made_again(self):
        partial = self.folder.with_suffix(".partial")
        partial.mkdir()
        (partial / "left.txt").write_text("half a file")
        self.assertEqual(sources.fetch(self.cache, [self.package]), {"birds": self.folder.resolve()})
        self.assertEqual([path.name for path in self.folder.rglob("*.txt")], ["list.txt"])

    def test_an_archive_that_has_changed_is_refused(self):
        archive = self.cache / self.package.archive
        archive.write_bytes(archive.read_bytes()[:-1])
        with self.assertRaisesRegex(sources.SourceError, "birds-1.0-py3-none-any.whl has sha256 .*, expected"):
            sources.fetch(self.cache, [self.package])
        self.assertFalse(self.folder.exists())


if __name__ == "__main__":
    unittest.main()
