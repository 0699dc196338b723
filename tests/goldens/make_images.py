"""Makes the goldens of sail-data's image path with Pillow: `python make_images.py` in this folder.

`images/` has small images of every format and mode. `index.json` names what is made of each of them:
- `tiles`: the pixels of all tiles and the thumbnail, one below the other, as Pillow and numpy make them by the
  rule of InternVL and SAIL-VL (28 pixels a tile, at most 6 and a thumbnail, bicubic),
- `whole`: the image at any resolution (units of 14 pixels, 4 to 40 of them), by the rule of Qwen2-VL,
- `rgb`: the decoded pixels.

Pillow 13 or later: it chooses which direction a resize does first, earlier ones always start horizontally.
"""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageOps, ImageSequence

HERE = Path(__file__).parent / "images"
DEMO = Path(__file__).parents[2] / "data" / "demo"
PX, MAX_TILES = 28, 6
UNIT, MIN_TOKENS, MAX_TOKENS = 14, 4, 40
WHITE = [255, 255, 255]
index = []


def photo(width, height, seed=0):
    """Like a photograph: gradients, soft blobs, hard edges, fine texture and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 200 / width, y * 220 / height, (x + y) * 180 / (width + height)], -1)
    for _ in range(6):
        cx, cy, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, max(5, min(width, height) / 3))
        rgb += rng.uniform(-120, 120, 3) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))[..., None]
    rgb[(x > width * 2 // 3) & (y > height // 2)] = [240, 20, 30]
    rgb[y == height // 3] = [0, 255, 0]
    rgb += 25 * np.sin(x * 1.9)[..., None] * (y < height // 4)[..., None]
    rgb += rng.normal(0, 7, rgb.shape)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def text_page(width, height):
    """Black on white, bilevel."""
    page = Image.new("1", (width, height), 1)
    draw = ImageDraw.Draw(page)
    for row in range(6, height - 14, 13):
        draw.text((5, row), f"line {row} of a fax, 0123456789", fill=0)
    draw.line((0, 0, width, height), fill=0)
    return page


def tiles_of(rgb):
    width, height = rgb.size
    grids = [(i, j) for i in range(1, MAX_TILES + 1) for j in range(1, MAX_TILES + 1) if i * j <= MAX_TILES]
    best, distance = (1, 1), math.inf
    for i, j in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        away = abs(width / height - i / j)
        if away < distance or (away == distance and width * height > 0.5 * PX * PX * i * j):
            best, distance = (i, j), away
    columns, rows = best
    resized = rgb.resize((PX * columns, PX * rows), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((PX * x, PX * y, PX * (x + 1), PX * (y + 1))) for y in range(rows) for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(rgb.resize((PX, PX), Image.Resampling.BICUBIC))
    return Image.fromarray(np.concatenate([np.asarray(tile) for tile in tiles]))


def whole_of(rgb):
    width, height = rgb.size
    rows, columns = max(UNIT, round(height / UNIT) * UNIT), max(UNIT, round(width / UNIT) * UNIT)
    most, least = MAX_TOKENS * UNIT**2, MIN_TOKENS * UNIT**2
    if rows * columns > most:
        beta = math.sqrt(height * width / most)
        rows, columns = (max(UNIT, math.floor(side / beta / UNIT) * UNIT) for side in (height, width))
    elif rows * columns < least:
        beta = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(side * beta / UNIT) * UNIT for side in (height, width))
    return rgb.resize((columns, rows), Image.Resampling.BICUBIC)


MAKERS = {"tiles": tiles_of, "whole": whole_of, "rgb": lambda rgb: rgb}


def upright(image, turn):
    return ImageOps.exif_transpose(image) if turn else image


def expect(file, rgb, frame=0, turn=True, over=None, makes=("tiles",)):
    for make in makes:
        name = f"{file}.{frame}.{make}{'' if turn else '.stored'}{'' if over is None else '.over'}.png"
        MAKERS[make](rgb).save(HERE / name, optimize=True)
        index.append({"file": file, "frame": frame, "turn": turn, "over": over, "make": make, "expected": name})


def by_pillow(file, turn=True, over=None, makes=("tiles",), frames=(0,)):
    """What Pillow sees in a file."""
    image = Image.open(HERE / file)
    for frame in frames:
        image.seek(frame)
        picture = upright(image, turn)
        if over is not None:
            rgba = picture.convert("RGBA")
            rgb = Image.new("RGB", rgba.size, tuple(over))
            rgb.paste(rgba, mask=rgba.getchannel("A"))
        else:
            rgb = picture.convert("RGB")
        expect(file, rgb, frame, turn, over, makes)


def save(file, image, **options):
    image.save(HERE / file, **options)


def make_jpegs():
    both = ("tiles", "rgb")
    for name, size in [("444", (90, 67)), ("422", (101, 50)), ("420", (83, 75)), ("411", (75, 90))]:
        sampling = ":".join(name)
        save(f"photo-{name}.jpg", photo(*size), quality=85, subsampling=sampling)
        by_pillow(f"photo-{name}.jpg", makes=both)
    save("progressive.jpg", photo(97, 61, 1), quality=70, progressive=True)
    save("coarse.jpg", photo(131, 87, 2), quality=12)
    save("gray.jpg", photo(70, 51, 3).convert("L"), quality=80)
    save("cmyk.jpg", photo(64, 57, 4).convert("CMYK"), quality=80)
    save("restarts.jpg", photo(80, 61, 5), quality=80, restart_marker_blocks=3)
    for name in ("progressive", "coarse", "gray", "cmyk", "restarts"):
        by_pillow(f"{name}.jpg", makes=both)
    save("tall.jpg", photo(47, 301, 6), quality=90)
    save("wide.jpg", photo(400, 33, 7), quality=90)
    save("large.jpg", photo(520, 390, 8), quality=60)
    for name in ("tall", "wide", "large"):
        by_pillow(f"{name}.jpg", makes=("tiles", "whole"))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = f"exif-{orientation}.jpg"
        save(file, photo(43, 25, 9), quality=85, exif=exif)
        by_pillow(file)
    by_pillow("exif-6.jpg", turn=False)


def make_pngs():
    rng = np.random.default_rng(1)
    picture = photo(72, 40, 10)
    alpha = Image.fromarray(rng.integers(0, 256, (40, 72), dtype=np.uint8))
    rgba = picture.copy()
    rgba.putalpha(alpha)
    save("rgba.png", rgba)
    save("gray-alpha.png", Image.merge("LA", [picture.convert("L"), alpha]))
    save("palette.png", picture.quantize(16), transparency=3)
    save("bilevel.png", text_page(90, 66))
    exif = Image.Exif()
    exif[0x0112] = 8
    save("turned.png", photo(50, 30, 11), exif=exif)
    for name in ("rgba", "gray-alpha", "palette"):
        by_pillow(f"{name}.png")
        by_pillow(f"{name}.png", over=WHITE)
    for name in ("bilevel", "turned"):
        by_pillow(f"{name}.png")
    # Pillow clips 16-bit gray at 255; scaling to 8 bits is the definition here.
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    save("gray16.png", Image.fromarray(deep))
    expect("gray16.png", Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB"))
    save("photo.bmp", photo(30, 41, 12))
    by_pillow("photo.bmp")


def make_animations():
    frames = [photo(66, 50, 13).convert("RGBA")]
    for step in range(1, 4):
        frame = frames[-1].copy()
        frame.paste((250, 10 * step, 90, 255), (8 * step, 5, 8 * step + 14, 30))
        frames.append(frame)
    rest = {"save_all": True, "append_images": frames[1:]}
    save("lossless.webp", frames[0], lossless=True)
    save("lossy.webp", photo(66, 50, 14), quality=80)
    save("animated.webp", frames[0], lossless=True, duration=50, **rest)
    save("animated.gif", frames[0], duration=50, **rest)
    clear = photo(40, 40, 15).convert("RGBA")
    clear.paste((0, 0, 0, 0), (10, 10, 30, 30))
    save("clear.gif", clear)
    for file in ("lossless.webp", "lossy.webp", "clear.gif"):
        by_pillow(file)
    by_pillow("lossy.webp", makes=("rgb",))
    by_pillow("clear.gif", over=WHITE)
    by_pillow("animated.webp", frames=(0, 1, 3))
    by_pillow("animated.gif", frames=(0, 1, 3))
    assert len(list(ImageSequence.Iterator(Image.open(HERE / "animated.gif")))) == 4


def make_tiffs():
    page = text_page(170, 121)
    save("fax-g3.tif", page, compression="group3")
    save("fax-g4.tif", page, compression="group4")
    save("fax-g4-reversed.tif", page, compression="group4", tiffinfo={266: 2})
    save("fax-g4-white.tif", page, compression="group4", tiffinfo={262: 0})
    save("bilevel.tif", page, compression="tiff_lzw")
    pages = [photo(60, 45, 16), photo(45, 70, 17), photo(33, 33, 18)]
    save("pages.tif", pages[0], compression="tiff_lzw", save_all=True, append_images=pages[1:])
    save("lzw.tif", photo(50, 40, 19), compression="tiff_lzw")
    save("deflate.tif", photo(50, 40, 20).convert("L"), compression="tiff_adobe_deflate")
    save("jpeg.tif", photo(90, 60, 21), compression="jpeg", quality=80)
    save("raw-cmyk.tif", photo(40, 50, 22).convert("CMYK"))
    save("turned.tif", photo(50, 30, 23), tiffinfo={274: 6})
    names = ("fax-g3", "fax-g4", "fax-g4-reversed", "fax-g4-white", "bilevel", "lzw", "deflate", "jpeg", "raw-cmyk")
    for name in (*names, "turned"):
        by_pillow(f"{name}.tif")
    by_pillow("pages.tif", frames=(0, 1, 2))


def take_from_demo():
    taken = {"jpg": 0, "png": 0, "webp": 0}
    for shard in sorted(DEMO.glob("*-train-*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                kind = member.name.rsplit(".", 1)[-1]
                if taken.get(kind, 9) < 3 and 800 < member.size < 6000:
                    data = archive.extractfile(member).read()
                    if kind == "webp" and b"VP8L" not in data:
                        continue
                    file = f"demo-{taken[kind]}.{kind}"
                    (HERE / file).write_bytes(data)
                    taken[kind] += 1
                    Image.open(io.BytesIO(data)).verify()
                    by_pillow(file, makes=("tiles", "whole"))


def main():
    assert int(PIL.__version__.split(".")[0]) >= 13, PIL.__version__
    HERE.mkdir(exist_ok=True)
    for old in HERE.iterdir():
        old.unlink()
    make_jpegs()
    make_pngs()
    make_animations()
    make_tiffs()
    take_from_demo()
    (HERE / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
