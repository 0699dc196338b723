"""Makes the image goldens of sail-data's tests with Pillow: `python make_goldens.py` in this folder.

Every `NAME.{png,jpg,webp}` has the RGB8 pixels that Pillow sees in it as `NAME.rgb.png`.
Tiles and the rest of the image path: `tests/goldens/make_images.py`.
"""

import struct
import zlib

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)


def picture(width, height):
    """Smooth colours with an edge, a line and some noise, so that every kind of error shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    rgb[(x > width // 2) & (y > height // 3)] = [240, 20, 30]
    rgb[y == height // 2] = [0, 255, 0]
    rgb += rng.normal(0, 12, rgb.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def smooth(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def png16(path, values):
    """16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def save(name, image, **options):
    image.save(name, **options)
    Image.open(name).convert("RGB").save(name.rsplit(".", 1)[0] + ".rgb.png")


# The order of random draws matters to the files below.
picture(61, 47)

rgb = Image.fromarray(picture(23, 17))
alpha = Image.fromarray(rng.integers(0, 256, (17, 23), dtype=np.uint8))
save("gray.png", rgb.convert("L"))
save("gray-alpha.png", Image.merge("LA", [rgb.convert("L"), alpha]))
rgba = rgb.copy()
rgba.putalpha(alpha)
save("rgba.png", rgba)
save("palette.png", rgb.quantize(16))
save("palette-alpha.png", rgb.quantize(16), transparency=3)
save("bilevel.png", rgb.convert("1"))
save("webp-lossless.webp", rgba, lossless=True)

calm = Image.fromarray(smooth(40, 24))
save("baseline.jpg", calm, quality=92, subsampling=0)
save("progressive.jpg", calm, quality=92, progressive=True, subsampling=0)
save("jpeg-gray.jpg", calm.convert("L"), quality=92)
save("cmyk.jpg", calm.convert("CMYK"), quality=92)
save("webp-lossy.webp", calm, quality=90)

# Pillow keeps the high byte of 16-bit RGB and clips 16-bit gray; scaling to 8 bits is the definition here.
deep = rng.integers(0, 65536, (17, 23, 3)).astype(np.uint16)
png16("rgb16.png", deep)
Image.fromarray(np.round(deep / 257).astype(np.uint8)).save("rgb16.rgb.png")
Image.fromarray(deep[:, :, 0]).save("gray16.png")
Image.fromarray(np.repeat(np.round(deep[:, :, :1] / 257).astype(np.uint8), 3, 2)).save("gray16.rgb.png")
