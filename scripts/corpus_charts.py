"""Charts of real tables, with questions whose answers are computed from the numbers that the chart shows.

Used by `fetch_corpus.py`. A table here has subjects (countries, states, industries) and for each of them values at times
or in classes. Values are rounded once, to the digits that are printed; every answer is exact arithmetic on those. What a
chart without printed values cannot show is not asked of it: neither single values nor which of two nearly equal ones is
higher. Held-out charts show subjects that no training chart shows: see `divided`.
"""

import hashlib
import io
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import demo_sources as sources
from corpus_samples import Sample
from PIL import Image, ImageDraw, ImageFont

HELDOUT_SHARE = 0.12  # of the subjects of a table, where there are
FEWEST_DIVIDED = 8
SIZES = [(320, 240), (336, 336), (400, 300), (448, 336)]
COLOURS = ["#4c78a8", "#e45756", "#54a24b", "#b279a2", "#9d755d", "#1f77b4", "#333333", "#ff9900"]
PAPERS = ["white", "white", "white", "#f7f7f2", "#eef2f7"]
NEAR = Decimal("0.04")  # share of the axis below which two values that are not printed are too close to compare
ASK_CAPTION = [
    "What does the chart show?",
    "What is this chart about?",
    "Describe the chart.",
    "Write a caption for the chart.",
]


@dataclass(frozen=True)
class Table:
    """`values[subject][place]`; `measure` and `unit` name a value, `subject` and `place` what the two keys are."""

    file: str
    licence: str
    measure: str
    unit: str
    subject: str
    place: str
    digits: int
    values: dict[str, dict[str, Decimal]]

    @property
    def is_time(self) -> bool:
        return self.place in ("year", "month")


PLURALS = {
    "country": "countries",
    "industry": "industries",
    "series": "series",
    "phase of flight": "phases of flight",
    "time of day": "times of day",
}


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


def number(value: Decimal) -> str:
    return f"{value:,f}"


# --- Tables --------------------------------------------------------------------------------------

US = "LicenseRef-US-Government-Work"
MONTHS = "January February March April May June July August September October November December".split()
SHORT = [month[:3] for month in MONTHS]

# (subject, place, value) of a table; a value that is missing is "" or None.
Cells = Iterable[tuple[str, str, object]]


def made(file: str, licence: str, names: tuple[str, str, str, str], digits: int, cells: Cells, scale: int = 1) -> Table:
    """A table of cells in their order; what is missing, or given twice, is left out.

    `names` are those of the measure, its unit, a subject and a place.
    """
    values, twice = defaultdict(dict), set()
    for subject, place, value in cells:
        if value in ("", None):
            continue
        if place in values[subject]:
            twice.add((subject, place))
        values[subject][place] = (Decimal(str(value)) / scale).quantize(Decimal(1).scaleb(-digits))
    for subject, place in twice:
        del values[subject][place]
    return Table(file, licence, *names, digits, dict(values))


def counts(file: str, names: tuple[str, str, str, str], pairs: Iterable[tuple[str, str]]) -> Table:
    """How many rows have each (subject, place); none is a count as well."""
    found = Counter(pair for pair in pairs if all(pair))
    subjects, places = dict.fromkeys(subject for subject, _ in found), list(dict.fromkeys(place for _, place in found))
    places.sort(key=SHORT.index if names[3] == "month" else None)
    return made(file, US, names, 0, ((subject, place, found[subject, place]) for subject in subjects for place in places))


def means(file: str, licence: str, names: tuple[str, str, str, str], cells: Cells) -> Table:
    """The mean of the values of each (subject, place)."""
    found = defaultdict(list)
    for subject, place, value in cells:
        if value not in ("", None):
            found[subject, place].append(Decimal(str(value)))
    return made(file, licence, names, 1, ((*pair, sum(values) / len(values)) for pair, values in found.items()))


def tables(folders: dict[str, Path]) -> Iterator[Table]:
    """The tables of vega-datasets whose own licence is permissive and stated there (datapackage.json)."""

    def cells(file: str, subject: str, place: str, value: str) -> Cells:
        """Of three columns."""
        return ((row[subject], str(row[place]), row[value]) for row in sources.table(folders, file))

    for measure, unit, column, scale in [
        ("life expectancy", "years", "life_expect", 1),
        ("children per woman", "", "fertility", 1),
        ("population", "millions", "pop", 1_000_000),
    ]:
        names = (measure, unit, "country", "year")
        yield made("gapminder.json", "CC-BY-4.0", names, 1, cells("gapminder.json", "country", "year", column), scale)
    yield made("us-employment.csv", US, ("employees", "thousands", "industry", "year"), 0, employees(folders))
    file, names = "unemployment-across-industries.json", ("unemployment in January", "percent", "industry", "year")
    rows = [row for row in sources.table(folders, file) if row["month"] == 1]
    yield made(file, US, names, 1, ((row["series"], str(row["year"]), row["rate"]) for row in rows))
    file, names = "iowa-electricity.csv", ("electricity in Iowa", "GWh", "source", "year")
    yield made(
        file, US, names, 0, ((who, date[:4], value) for who, date, value in cells(file, "source", "year", "net_generation"))
    )
    yield made("flights-airport.csv", US, ("flights", "", "origin", "destination"), 0, flights(folders))

    weather = sources.table(folders, "weather.csv")
    where = [(f"{row['location']} {row['date'][:4]}", SHORT[int(row["date"][5:7]) - 1]) for row in weather]
    for measure, unit, column in [
        ("highest temperature of the day", "°C", "temp_max"),
        ("lowest temperature of the day", "°C", "temp_min"),
        ("wind", "m/s", "wind"),
    ]:
        columns = ((*pair, row[column]) for pair, row in zip(where, weather))
        yield means("weather.csv", US, (measure, unit, "series", "month"), columns)
    for kind in ["sun", "rain", "fog"]:
        pairs = (pair for pair, row in zip(where, weather) if row["weather"] == kind)
        yield counts("weather.csv", (f"days of {kind}", "", "series", "month"), pairs)

    birds = [row for row in sources.table(folders, "birdstrikes.csv") if row["Origin State"] != "N/A"]
    for place, column in [
        ("bird size", "Wildlife Size"),
        ("time of day", "Time of day"),
        ("phase of flight", "Phase of flight"),
    ]:
        names = ("bird strikes", "", "state", place)
        yield counts("birdstrikes.csv", names, ((row["Origin State"], row[column]) for row in birds))
    names = ("bird strikes", "", "state", "year")
    yield counts("birdstrikes.csv", names, ((row["Origin State"], row["Flight Date"][:4]) for row in birds))

    penguins = [row for row in sources.table(folders, "penguins.json") if row["Sex"] in ("MALE", "FEMALE")]
    bills = ((f"{row['Species']} on {row['Island']}", row["Sex"].lower(), row["Beak Length (mm)"]) for row in penguins)
    yield means("penguins.json", "CC0-1.0", ("bill length", "mm", "kind", "sex"), bills)
    file = "co2-concentration.csv"
    columns = ((MONTHS[int(date[5:7]) - 1], date[:4], value) for date, _, value in cells(file, "Date", "Date", "CO2"))
    yield made(file, "CC-BY-4.0", ("CO2 in the air", "ppm", "month", "year"), 1, columns)
    columns = (
        (name, str(row["year"]), row.get(column))
        for row in sources.table(folders, "wheat.json")
        for name, column in [("a quarter of wheat", "wheat"), ("a week's wages", "wages")]
    )
    yield made("wheat.json", "CC-PDDC", ("price in shillings", "", "good", "year"), 1, columns)


def employees(folders: dict[str, Path]) -> Cells:
    """Thousands of employees of each industry in January."""
    rows = [row for row in sources.table(folders, "us-employment.csv") if row["month"][5:7] == "01"]
    for row in rows:
        for column in row:
            if column not in ("month", "nonfarm_change"):
                yield column.replace("_", " ").replace("utilties", "utilities"), row["month"][:4], row[column]


def flights(folders: dict[str, Path]) -> Cells:
    """Flights between the sixty airports with most destinations."""
    rows, total = sources.table(folders, "flights-airport.csv"), Counter()
    for row in rows:
        total[row["origin"], row["destination"]] += int(row["count"])
    busy = {airport for airport, _ in Counter(row["origin"] for row in rows).most_common(60)}
    return ((*pair, count) for pair, count in total.items() if busy.issuperset(pair))


def divided(every: list[Table]) -> list[tuple[Table, dict[str, list[str]]]]:
    """Each table with its subjects by side. A subject is on one side in all tables of a file, so no number is on both."""
    heldout = {}
    for file in {table.file for table in every}:
        names = {subject for table in every if table.file == file for subject in table.values}
        ranked = sorted(names, key=lambda name: hashlib.sha256(f"{file}/{name}".encode()).digest())
        heldout[file] = set(ranked[: math.ceil(HELDOUT_SHARE * len(ranked))] if len(ranked) >= FEWEST_DIVIDED else [])
    return [
        (
            table,
            {
                "train": [name for name in table.values if name not in heldout[table.file]],
                "heldout": [name for name in table.values if name in heldout[table.file]],
            },
        )
        for table in every
    ]


# --- What a chart shows --------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """Rows of values over `columns`: of one subject or some over places, or of the subjects at one place."""

    table: Table
    title: str
    rows: dict[str, list[Decimal]]
    columns: list[str]
    column: str  # what a column is
    printed: bool  # whether the values stand in the chart
    form: str  # bars | line

    @property
    def values(self) -> list[Decimal]:
        return [value for row in self.rows.values() for value in row]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def draw_chart(table: Table, subjects: list[str], rng: random.Random) -> Chart | None:
    """One of the charts that these subjects of a table make, or None where they have too little in common."""
    kind = rng.choice(["one", "one", "many", "many", "some"]) if table.is_time else rng.choice(["one", "many"])
    unit = f" ({table.unit})" if table.unit else ""
    if kind == "many":
        places = list(dict.fromkeys(place for subject in subjects for place in table.values[subject]))
        place = rng.choice(places)
        able = [subject for subject in subjects if place in table.values[subject]]
        if len(able) < 3:
            return None
        columns = rng.sample(able, min(len(able), rng.randint(3, 7)))
        where = f"{'' if table.is_time else table.place + ' '}{place}"
        title = f"{capital(table.measure)}{unit}, {where}"
        return Chart(
            table,
            title,
            {"": [table.values[name][place] for name in columns]},
            columns,
            table.subject,
            rng.random() < 0.6,
            "bars",
        )
    chosen = [rng.choice(subjects)] if kind == "one" else rng.sample(subjects, min(len(subjects), rng.randint(2, 3)))
    shared = [place for place in table.values[chosen[0]] if all(place in table.values[subject] for subject in chosen)]
    if len(shared) < 3 or (kind == "some" and len(chosen) < 2):
        return None
    count = min(len(shared), rng.randint(4, 8) if kind == "one" else rng.randint(3, 6))
    if table.is_time:  # every so many of them, in order
        stride = rng.randint(1, max(1, (len(shared) - 1) // max(1, count - 1)))
        first = rng.randrange(len(shared) - stride * (count - 1))
        columns = shared[first : first + stride * (count - 1) + 1 : stride]
    else:
        columns = rng.sample(shared, count)
    title = f"{capital(table.measure)}{unit}" + (f", {chosen[0]}" if kind == "one" else "")
    form = rng.choice(["bars", "line"]) if table.is_time else "bars"
    rows = {subject: [table.values[subject][place] for place in columns] for subject in chosen}
    return Chart(table, title, rows, columns, table.place, kind == "one" and rng.random() < 0.6, form)


def caption(chart: Chart) -> str:
    """What the chart shows, with every name in it."""
    if list(chart.rows) == [""]:
        return f"{chart.title}: {listed(chart.columns)}."
    over = f"{chart.columns[0]} to {chart.columns[-1]}" if chart.table.is_time else listed(chart.columns)
    if len(chart.rows) == 1:
        return f"{chart.title}: {over}."
    return f"{chart.title}, {listed(list(chart.rows))}: {over}."


def questions(chart: Chart, axis: Decimal, rng: random.Random) -> list[tuple[str, str]]:
    """All questions that the chart answers, in random order; `axis` is the height of its axis."""
    noun = chart.column
    least = Decimal(0) if chart.printed else NEAR * axis
    asked = []
    if len(chart.rows) > 1:
        asked.append((f"How many {plural(chart.table.subject)} does the chart compare?", str(len(chart.rows))))
        names = list(chart.rows)
        for index, column in enumerate(chart.columns):
            a, b = rng.sample(names, 2)
            first, second = chart.rows[a][index], chart.rows[b][index]
            if abs(first - second) > least:
                asked.append((f"Which is higher in {column}, {a} or {b}?", a if first > second else b))
        return rng.sample(asked, len(asked))
    of = dict(zip(chart.columns, next(iter(chart.rows.values()))))
    ranked = sorted(of, key=of.__getitem__)
    low, high = ranked[0], ranked[-1]
    if of[high] - of[ranked[-2]] > least:
        asked.append((f"Which {noun} has the highest value?", high))
    if of[ranked[1]] - of[low] > least:
        asked.append((f"Which {noun} has the lowest value?", low))
    asked.append((f"How many {plural(noun)} are shown?", str(len(of))))
    a, b = rng.sample(chart.columns, 2)
    if abs(of[a] - of[b]) > least:
        asked.append((f"Which has the higher value, {a} or {b}?", a if of[a] > of[b] else b))
        if chart.table.is_time and noun == chart.table.place:
            early, late = (a, b) if chart.columns.index(a) < chart.columns.index(b) else (b, a)
            asked.append((f"Does the value rise or fall from {early} to {late}?", "rise" if of[late] > of[early] else "fall"))
    if chart.printed:
        one = rng.choice(chart.columns)
        asked.append((f"What is the value for {one}?", number(of[one])))
        asked.append((f"What is the difference between {a} and {b}?", number(abs(of[a] - of[b]))))
        mark = rng.choice(chart.columns)
        above = sum(value > of[mark] for value in of.values())
        asked.append((f"How many {plural(noun)} have a value above {number(of[mark])}?", str(above)))
        asked.append((f"What is the sum of {a} and {b}?", number(of[a] + of[b])))
    return rng.sample(asked, len(asked))


# --- Drawing -------------------------------------------------------------------------------------


def ticks(values: list[Decimal], from_zero: bool) -> list[Decimal]:
    """Round numbers from below the lowest value to above the highest one."""
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, Decimal(0)), max(high, Decimal(0))
    span = (high - low) or Decimal(1)
    step = Decimal(1).scaleb((span / 5).adjusted())
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= span / 5)
    marks = [step * (low // step - (1 if low % step < 0 else 0))]
    while marks[-1] < high:
        marks.append(marks[-1] + step)
    if len(marks) == 1:
        marks.append(marks[0] + step)
    return marks


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words that fit; a word that is wider than a line has one of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def fits(chart: Chart, font: ImageFont.FreeTypeFont, slot: int) -> bool:
    """Whether the names of the columns stand side by side."""
    return all(font.getlength(name) <= slot - 4 for name in chart.columns)


def picture(
    chart: Chart, small: ImageFont.FreeTypeFont, head: ImageFont.FreeTypeFont, rng: random.Random
) -> tuple[Image.Image, Decimal]:
    """The drawing, and the height of its axis in units of the values. `head` is the font of the title."""
    width, height = rng.choice(SIZES)
    colours, line_height = rng.sample(COLOURS, len(COLOURS)), int(small.size) + 4
    image = Image.new("RGB", (width, height), rng.choice(PAPERS))
    draw = ImageDraw.Draw(image)
    y = 6
    for line in wrapped(chart.title, head, width - 16):
        draw.text((8, y), line, "black", head)
        y += line_height + 2
    if len(chart.rows) > 1:
        x = 8
        for (name, _), colour in zip(chart.rows.items(), colours):
            step = 14 + int(small.getlength(name)) + 10
            if x > 8 and x + step > width:
                x, y = 8, y + line_height
            draw.rectangle((x, y + 3, x + 8, y + 11), colour)
            draw.text((x + 12, y), name, "black", small)
            x += step
        y += line_height
    marks = ticks(chart.values, chart.form == "bars")
    axis = marks[-1] - marks[0]
    margin = 10 + max(int(small.getlength(number(mark))) for mark in marks)
    level = chart.form == "line" or fits(chart, small, (width - margin - 10) // len(chart.columns))
    if level:
        box = (margin, y + line_height, width - 10, height - line_height - 8)
        upright(draw, chart, box, marks, small, colours)
    else:
        widest = max(int(small.getlength(name)) for name in chart.columns)
        if widest > width // 2 or len(chart.columns) * len(chart.rows) * 12 > height - y - 2 * line_height:
            raise ValueError("the names are too long or too many for a chart of this size")
        lying(
            draw,
            chart,
            (widest + 12, y + 4, width - 16 - int(small.getlength(number(marks[-1]))), height - line_height - 8),
            marks,
            small,
            colours,
        )
    return image, axis


def upright(draw, chart: Chart, box, marks: list[Decimal], font, colours: list[str]) -> None:
    """Bars or lines that go up; names below. Names of a line that do not fit are left out, every second or more."""
    left, top, right, bottom = box
    at = lambda value: bottom - float((value - marks[0]) / (marks[-1] - marks[0])) * (bottom - top)  # noqa: E731
    for mark in marks:
        draw.line((left, at(mark), right, at(mark)), "#cccccc")
        draw.text((left - 4 - font.getlength(number(mark)), at(mark) - 7), number(mark), "black", font)
    slot = (right - left) / len(chart.columns)
    base = at(max(marks[0], min(Decimal(0), marks[-1])))
    every = next(
        n
        for n in range(1, len(chart.columns) + 1)
        if all(font.getlength(name) <= n * slot - 4 for name in chart.columns) or n == len(chart.columns)
    )
    for index, name in enumerate(chart.columns):
        if index % every == 0:
            draw.text((left + (index + 0.5) * slot - font.getlength(name) / 2, bottom + 4), name, "black", font)
    for place, ((_, row), colour) in enumerate(zip(chart.rows.items(), colours)):
        spots = [(left + (index + 0.5) * slot, at(value)) for index, value in enumerate(row)]
        if chart.form == "line":
            draw.line(spots, colour, 2)
            for x, y in spots:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        else:
            bar = 0.7 * slot / len(chart.rows)
            for x, y in spots:
                start = x - 0.35 * slot + place * bar
                draw.rectangle((start, min(y, base), start + bar - 1, max(y, base)), colour)
        if chart.printed:
            for (x, y), value in zip(spots, row):
                draw.text((x - font.getlength(number(value)) / 2, y - 16), number(value), "black", font)


def lying(draw, chart: Chart, box, marks: list[Decimal], font, colours: list[str]) -> None:
    """Bars that go to the right; names beside them."""
    left, top, right, bottom = box
    at = lambda value: left + float((value - marks[0]) / (marks[-1] - marks[0])) * (right - left)  # noqa: E731
    for mark in marks if font.getlength(number(marks[-1])) * len(marks) < right - left else marks[:: len(marks) - 1]:
        draw.line((at(mark), top, at(mark), bottom), "#cccccc")
        draw.text((at(mark) - font.getlength(number(mark)) / 2, bottom + 4), number(mark), "black", font)
    slot = (bottom - top) / len(chart.columns)
    base = at(max(marks[0], min(Decimal(0), marks[-1])))
    for index, name in enumerate(chart.columns):
        draw.text((left - 6 - font.getlength(name), top + (index + 0.5) * slot - 8), name, "black", font)
        bar = 0.7 * slot / len(chart.rows)
        for place, ((_, row), colour) in enumerate(zip(chart.rows.items(), colours)):
            start = top + (index + 0.15) * slot + place * bar
            draw.rectangle((min(at(row[index]), base), start, max(at(row[index]), base), start + bar - 1), colour)
            if chart.printed:
                draw.text((max(at(row[index]), base) + 3, top + (index + 0.5) * slot - 8), number(row[index]), "black", font)


# --- Samples -------------------------------------------------------------------------------------


def charts(folders: dict[str, Path], seed: str, side: str) -> Iterator[Sample]:
    """Charts of one side's subjects, no two with the same caption, for as long as new ones are found."""
    rng = random.Random(f"{seed}/chart/{side}")
    able = [(table, sides[side]) for table, sides in divided(list(tables(folders))) if sides[side]]
    weights = [len(subjects) ** 0.5 for _, subjects in able]
    seen, failed = set(), 0
    while failed < 2000:
        table, subjects = rng.choices(able, weights)[0]
        failed += 1
        chart = draw_chart(table, subjects, rng)
        text = chart and caption(chart)
        if chart is None or text in seen or len(set(chart.values)) < 2:
            continue
        font, size = (
            str(sources.font(folders, rng.choice(["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif"]))),
            rng.choice([11, 12, 13]),
        )
        small, head = (ImageFont.truetype(font, of, layout_engine=ImageFont.Layout.BASIC) for of in (size, size + 2))
        try:
            image, axis = picture(chart, small, head, rng)
        except ValueError:
            continue
        seen.add(text)
        failed = 0
        turns = [(rng.choice(ASK_CAPTION), text), *questions(chart, axis, rng)[:3]]
        buffer = io.BytesIO()
        image.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        named = [name for name in chart.rows if name] or chart.columns
        facts = tuple(sorted(f"{table.file}/{name}" for name in named))
        licence = f"BSD-3-Clause AND {table.licence} AND Bitstream-Vera"
        yield Sample(
            text,
            turns,
            ("png", buffer.getvalue()),
            licence,
            f"vega-datasets 3.2.1, {table.file}; fonts-dejavu-core 2.37",
            facts,
            side,
        )
