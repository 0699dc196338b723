#!/usr/bin/env python3
"""Checks an exported ViT folder with transformers against what `sail-train embed` computed.

    .venv/bin/python scripts/check_export.py runs/demo/export --image photo.png --embedding photo.safetensors

Loads DIR with AutoModel and AutoImageProcessor in fp32 and compares
- transformers' `last_hidden_state` on our `pixel_values` with our `last_hidden_state`, and
- the pixels that the export's image processor makes of the image with our last tile (the only one
  without tiling, the thumbnail of the whole image with it); both have rounded to 8 bits once, so they
  may differ by two grey levels.
Prints one line of figures. Exit status 1 when a difference is above its limit, or nothing can be compared.
"""

import argparse
import os
import sys
from pathlib import Path

STATE_LIMIT = 1e-4
PIXEL_LIMIT_LEVELS = 2  # of 255, before normalisation


class CheckError(Exception):
    """Why the two cannot be compared."""


def load_embedding(path: Path):
    """(pixel_values [n, 3, px, px], last_hidden_state [n, tokens, hidden]) of a file by `sail-train embed`."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = ("pixel_values", "last_hidden_state")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise CheckError(f"{path} lacks {missing}, it holds {sorted(tensors)}")
    return tuple(tensors[name].float() for name in names)


def max_difference(ours, theirs, what: str) -> float:
    if ours.shape != theirs.shape:
        raise CheckError(f"{what}: ours is {list(ours.shape)}, transformers' is {list(theirs.shape)}")
    difference = (ours - theirs).abs().max().item()
    if difference != difference:
        raise CheckError(f"{what}: NaN in ours or in transformers'")
    return difference


def compare(folder: Path, image_path: Path, embedding: Path) -> bool:
    """Prints the figures; returns whether both are within their limits."""
    import torch
    from PIL import Image
    from transformers import AutoModel
    # The same class as transformers.AutoImageProcessor, which transformers 5 hides when torchvision
    # is not installed although the Pillow backend of image processors does not need it.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    pixels_nchw, state_btd = load_embedding(embedding)
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}
    if wrong:
        raise CheckError(f"{folder} does not fit {type(model).__name__}: {wrong}")
    with torch.no_grad():
        theirs_btd = model.eval()(pixels_nchw).last_hidden_state
    state_difference = max_difference(state_btd, theirs_btd, "last_hidden_state")

    # Pillow is what our resizing follows; torchvision's is up to 6 grey levels away on line art.
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    with Image.open(image_path) as image:
        processed_nchw = processor(image, return_tensors="pt")["pixel_values"]
    pixel_difference = max_difference(pixels_nchw[-1:], processed_nchw, "pixel_values")
    pixel_limit = PIXEL_LIMIT_LEVELS / 255 / min(processor.image_std)

    good = state_difference <= STATE_LIMIT and pixel_difference <= pixel_limit
    print(
        f"{'ok' if good else 'FAILED'}: {type(model).__name__} last_hidden_state {list(state_btd.shape)} "
        f"max abs difference {state_difference:.2e} (limit {STATE_LIMIT:.0e}); {type(processor).__name__} "
        f"pixel_values {list(pixels_nchw.shape)} max abs difference {pixel_difference:.2e} (limit {pixel_limit:.2e})"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the exported ViT: config.json, model.safetensors, preprocessor_config.json")
    parser.add_argument("--image", type=Path, required=True, help="the image that was embedded")
    parser.add_argument("--embedding", type=Path, required=True, help="what `sail-train embed` wrote for it")
    args = parser.parse_args()
    for path in (args.folder / "config.json", args.folder / "preprocessor_config.json", args.image, args.embedding):
        if not path.is_file():
            print(f"error: {path} does not exist", file=sys.stderr)
            return 1
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return 0 if compare(args.folder, args.image, args.embedding) else 1
    except (CheckError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}\n\nhint: ./scripts/setup.sh --reference, then use .venv/bin/python", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
