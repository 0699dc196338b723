"""Makes the goldens of sail-data's preprocessor with transformers: `python make_preprocess.py` in this folder.

`preprocess/images/` has small pictures of several sizes and formats. Every other folder in it is one processor:
- `preprocessor_config.json`, with the keys of published folders of that family and small sizes,
- `IMAGE.png`, the grey levels (before rescaling and normalising) that the Pillow backend makes of an image,
  (`photo.png` is what Pillow decodes from `photo.jpg`, so both have one golden),
- `levels.f32`, little-endian fp32 `[3, 16, 16]`: what it makes of the levels 0 to 255 without resize and crop.
`defaults.json` is what each processor class says of itself when the file names nothing but the class.

Pillow 13 or later: it chooses which direction a resize does first, earlier ones always start horizontally.
"""

import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

HERE = Path(__file__).parent / "preprocess"
IMAGES = HERE / "images"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SWITCHES = {"do_normalize": True, "do_rescale": True, "do_resize": True}
NULLS = dict.fromkeys(("crop_size", "data_format", "device", "do_center_crop", "input_data_format", "return_tensors"))

KINDS = {
    "dinov2": {
        "image_processor_type": "BitImageProcessor", **SWITCHES, **IMAGENET, "resample": 3, "do_convert_rgb": True,
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 37},
        "rescale_factor": 0.00392156862745098,
    },
    "aimv2": {
        "image_processor_type": "CLIPImageProcessor", **SWITCHES, **CLIP, "resample": 3, "do_convert_rgb": True,
        "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28},
        "rescale_factor": 0.00392156862745098,
    },
    # Files from before image processors: whole numbers as sizes, the class as a feature extractor.
    "internvit": {
        "feature_extractor_type": "CLIPFeatureExtractor", "do_normalize": True, "do_resize": True, **IMAGENET,
        "resample": 3, "do_center_crop": True, "crop_size": 32, "size": 32,
    },
    "vit": {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_resize": True, **HALF,
        "resample": 2, "size": 24,
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor", **SWITCHES, **HALF, "resample": 3,
        "processor_class": "SiglipProcessor", "rescale_factor": 0.00392156862745098,
        "size": {"height": 30, "width": 30},
    },
    "siglip2": {
        "image_processor_type": "SiglipImageProcessorFast", **NULLS, **SWITCHES, **HALF, "resample": 2,
        "default_to_square": True, "do_convert_rgb": None, "rescale_factor": 0.00392156862745098, "size": 26,
    },
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessorFast", **NULLS, **SWITCHES, **IMAGENET, "resample": 3,
        "crop_to_patches": False, "default_to_square": True, "max_patches": 12, "min_patches": 1,
        "do_convert_rgb": True, "rescale_factor": 0.00392156862745098, "size": {"height": 36, "width": 36},
    },
    # Not published by anybody, for the rest of the rules: shortest edge without a crop, odd padding, every filter.
    "uncropped": {
        "image_processor_type": "SiglipImageProcessor", "image_mean": 0.5, "image_std": [0.25, 0.5, 1.0],
        "size": 19, "rescale_factor": 0.00784313725490196,
    },
    "padded": {
        "image_processor_type": "BitImageProcessorFast", "do_resize": False, "do_normalize": False,
        "crop_size": {"height": 52, "width": 45},
    },
    "lanczos": {
        "image_processor_type": "ViTImageProcessorFast", "resample": 1, "size": [31, 44], "do_rescale": False,
        "image_mean": [127.5, 120.0, 110.0], "image_std": [64.0, 60.0, 58.5], "do_center_crop": True,
        "crop_size": {"height": 32, "width": 41},
    },
}  # fmt: skip
DEFAULTS = [BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil, GotOcr2ImageProcessorPil]


def picture(rng, width, height):
    """Smooth colours with an edge, a line and some noise, so that every kind of error shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    rgb[(x > width // 2) & (y > height // 3)] = [240, 20, 30]
    rgb[y == height // 2] = [0, 255, 0]
    rgb += rng.normal(0, 8, rgb.shape)
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def make_images():
    rng = np.random.default_rng(0)
    IMAGES.mkdir(parents=True, exist_ok=True)
    picture(rng, 61, 47).save(IMAGES / "odd.png")
    picture(rng, 33, 90).save(IMAGES / "portrait.png")
    picture(rng, 12, 7).save(IMAGES / "tiny.png")
    picture(rng, 50, 37).quantize(32).save(IMAGES / "palette.png", transparency=3)
    rgba = picture(rng, 40, 53)
    rgba.putalpha(Image.fromarray(rng.integers(0, 256, (53, 40), dtype=np.uint8)))
    rgba.save(IMAGES / "rgba.png")
    picture(rng, 59, 41).convert("L").save(IMAGES / "gray.png")
    picture(rng, 131, 87).save(IMAGES / "photo.jpg", quality=90)
    Image.open(IMAGES / "photo.jpg").save(IMAGES / "photo.png", optimize=True)


def process(processor, image, **options):
    """fp32 `[3, height, width]`. Every image becomes RGB here, which ViTImageProcessor leaves to its caller."""
    values = processor(image.convert("RGB"), return_tensors="np", **options)["pixel_values"]
    return np.asarray(values, dtype=np.float32)[0]


def make_kind(name, config):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    assert processor.backend == "pil", processor
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    levels = process(processor, Image.fromarray(ramp), do_resize=False, do_center_crop=False)
    levels.astype("<f4").tofile(folder / "levels.f32")
    for path in sorted(IMAGES.iterdir()):
        values = process(processor, Image.open(path))
        planes = [np.searchsorted(table.ravel(), plane) for table, plane in zip(levels, values)]
        for table, plane, level in zip(levels, values, planes):
            assert (table.ravel()[level] == plane).all(), "the processor works on bytes up to here"
        Image.fromarray(np.stack(planes, -1).astype(np.uint8)).save(folder / f"{path.stem}.png", optimize=True)


assert int(PIL.__version__.split(".")[0]) >= 13, PIL.__version__
make_images()
for name, config in KINDS.items():
    make_kind(name, config)
defaults = {kind().to_dict()["image_processor_type"]: kind().to_dict() for kind in DEFAULTS}
(HERE / "defaults.json").write_text(json.dumps(defaults, indent=2, default=dict, sort_keys=True) + "\n")
