#!/usr/bin/env python3
"""Answers a question about images with an exported multimodal model, through transformers.

    .venv/bin/python scripts/check_mllm_export.py runs/demo/export/mllm --image photo.png
    .venv/bin/python scripts/check_mllm_export.py DIR --image a.png b.png --prompt 'What is this?' --expect ids.json

Loads DIR in fp32, in the `sail` layout with `AutoModel` and `trust_remote_code`, which runs the Python code in
DIR, or as `InternVLForConditionalGeneration`, and refuses it when a weight is missing or left over. Cuts each image into tiles as DIR's config.json and
preprocessor_config.json say, answers greedily and prints a JSON line {"image", "ids", "text"} for each;
`ids` end with that of the end of the turn where the answer ended.

--expect FILE is a JSON list of {"image", "ids"}, one for each image and in their order. Exit status 1 when an
answer differs from it or DIR cannot be used.

Pixels are those of crates/sail-data/src/image.rs but for rare modes: Pillow cuts 16-bit colour to 8 bits
where the trainer rounds, and has its own conversion from CMYK.
"""

import argparse
import json
import os
import sys
from pathlib import Path


class CheckError(Exception):
    """Why the folder cannot be used, or how its answers differ."""


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckError(f"{path}: {error}") from error


def choose_grid(width: int, height: int, config: dict) -> tuple[int, int]:
    """(columns, rows) of tiles: the aspect ratio nearest to the image's, as crates/sail-data/src/tiling.rs."""
    if not config["dynamic_image_size"] or config["max_dynamic_patch"] <= 1:
        return 1, 1
    least, most = config["min_dynamic_patch"], config["max_dynamic_patch"]
    layouts = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= least]
    best, best_distance = (1, 1), float("inf")
    for i, j in sorted(layouts, key=lambda layout: (layout[0] * layout[1], layout[0])):
        distance = abs(width / height - i / j)
        large = width * height > 0.5 * config["force_image_size"] ** 2 * i * j
        if distance < best_distance or (distance == best_distance and large):
            best, best_distance = (i, j), distance
    return best


def load_rgb(path: Path):
    """8-bit RGB: palettes looked up, grey repeated, 16-bit grey scaled, alpha dropped and not composited."""
    import numpy as np
    from PIL import Image

    image = Image.open(path)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image, dtype=np.float64) * 255 / 65535).astype(np.uint8))
    return image.convert("RGB")


def load_tiles(image, config: dict, preprocessor: dict):
    """An RGB image as normalised tiles [n, 3, px, px], row by row, the thumbnail last."""
    import numpy as np
    import torch
    from PIL import Image

    px = config["force_image_size"]
    columns, rows = choose_grid(*image.size, config)
    resized = image.resize((px * columns, px * rows), Image.Resampling.BICUBIC)
    corners = [(px * column, px * row) for row in range(rows) for column in range(columns)]
    tiles = [resized.crop((left, top, left + px, top + px)) for left, top in corners]
    if config["use_thumbnail"] and len(tiles) > 1:
        tiles.append(image.resize((px, px), Image.Resampling.BICUBIC))
    mean, std = (np.array(preprocessor[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    pixels_nhwc = (np.stack([np.asarray(tile) for tile in tiles]).astype(np.float32) / np.float32(255) - mean) / std
    return torch.from_numpy(pixels_nhwc).permute(0, 3, 1, 2).contiguous()


def check_preprocessor(preprocessor: dict, config: dict, folder: Path) -> None:
    """Refuses a preprocessor_config.json that says something else than `load_tiles` does."""
    px = config["force_image_size"]
    known = {
        "size": {"height": px, "width": px}, "resample": 3, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False,
    }
    for key in ("image_mean", "image_std"):
        if len(preprocessor.get(key, [])) != 3:
            raise CheckError(f"{folder}/preprocessor_config.json: `{key}` must be three numbers")
    for key, value in known.items():
        if preprocessor.get(key) != value:
            raise CheckError(f"{folder}/preprocessor_config.json: `{key}` is {preprocessor.get(key)}, not {value}")


def tile_settings(config: dict, preprocessor: dict) -> dict:
    """What the `sail` layout's config.json says of tiles, of either layout."""
    if config["model_type"] != "internvl":
        return config
    side = config["vision_config"]["image_size"]
    return {
        "force_image_size": side if isinstance(side, int) else side[0],
        "dynamic_image_size": preprocessor["crop_to_patches"],
        "min_dynamic_patch": preprocessor["min_patches"],
        "max_dynamic_patch": preprocessor["max_patches"],
        "use_thumbnail": True,
    }


def load_model(folder: Path, internvl: bool):
    import torch
    from transformers import AutoModel, AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"trust_remote_code": True, "local_files_only": True}
    kind = InternVLForConditionalGeneration if internvl else AutoModel
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if wrong:
        raise CheckError(f"{folder} does not fit {type(model).__name__}: {wrong}")
    words = AutoProcessor if internvl else AutoTokenizer
    return model.eval(), words.from_pretrained(folder, **options)


def answer(model, tokenizer, image, pixels_nchw, prompt: str, max_new_tokens: int) -> list[int]:
    """The ids that follow the prompt, the likeliest each time."""
    import torch

    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    if model.config.model_type == "internvl":
        # Here `tokenizer` is the processor. Its pixels are those of another resize, its text is what is used.
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(images=[image], text=[text], return_tensors="pt")
        if inputs["pixel_values"].shape != pixels_nchw.shape:
            raise CheckError(f"the processor's tiles are {list(inputs['pixel_values'].shape)}, not {list(pixels_nchw.shape)}")
        ids = inputs["input_ids"]
        whole = model.generate(input_ids=ids, attention_mask=inputs["attention_mask"], pixel_values=pixels_nchw, **options)
        return whole[0, ids.shape[1] :].tolist()
    ids = model.prompt_ids(tokenizer, prompt, pixels_nchw)
    return model.generate(pixels_nchw, torch.tensor([ids]), **options)[0].tolist()


def compare(results: list[dict], expected: list[dict]) -> None:
    """Raises with the first difference."""
    if len(results) != len(expected):
        raise CheckError(f"{len(expected)} answers are expected, {len(results)} images were given")
    for ours, theirs in zip(results, expected, strict=True):
        if Path(ours["image"]).name != Path(theirs["image"]).name:
            raise CheckError(f"an answer about {theirs['image']} is expected where {ours['image']} was given")
        if ours["ids"] == theirs["ids"]:
            continue
        pairs = list(zip(ours["ids"], theirs["ids"]))  # of the shorter's length
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        found, wanted = (side["ids"][place : place + 1] or "the end" for side in (ours, theirs))
        raise CheckError(f"{ours['image']}: token {place} is {found}, {wanted} is expected; {ours['ids']} and {theirs['ids']}")


def run(args) -> None:
    config = read_json(args.folder / "config.json")
    preprocessor = read_json(args.folder / "preprocessor_config.json")
    tiles = tile_settings(config, preprocessor)
    check_preprocessor(preprocessor, tiles, args.folder)
    model, tokenizer = load_model(args.folder, config["model_type"] == "internvl")
    results = []
    for path in args.image:
        image = load_rgb(path)
        ids = answer(model, tokenizer, image, load_tiles(image, tiles, preprocessor), args.prompt, args.tokens)
        results.append({"image": str(path), "ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)})
        print(json.dumps(results[-1], ensure_ascii=False), flush=True)
    if args.expect:
        compare(results, read_json(args.expect))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the exported model, its Python code included")
    parser.add_argument("--image", type=Path, required=True, nargs="+", action="extend", metavar="FILE", help="images, each asked about alone")
    parser.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="the question; <image> is put at its head where it has none (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="at most so many new tokens (default: %(default)s)")
    parser.add_argument("--expect", type=Path, metavar="FILE", help="JSON list of {image, ids} to compare with")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        run(args)
        return 0
    except (CheckError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}\n\nhint: ./scripts/setup.sh --reference, then use .venv/bin/python", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
