#!/usr/bin/env python3
"""The data of a stage as an ordinary PyTorch script reads it: webdataset in a DataLoader's workers.

    .venv/bin/python tests/reference/data.py REPORT [--workers 2] [--json FILE]

REPORT is what `bench_data --json` wrote: sources, tokenizer and images are those of its `spec`, which must be
conversations of chatml with one tile an image, read for some epochs. Each worker decodes and resizes with Pillow,
normalises with torchvision, tokenises with `tokenizers` and puts samples into packs as they come, so that only
whole packs travel between processes. Samples and tokens must be those of `bench_data`.
"""

import argparse
import glob
import io
import json
import random
import time
from pathlib import Path

import torch
import webdataset as wds
import yaml
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import transforms

PICTURES = ("jpg", "png", "webp")
IGNORE = -100


class Packs(IterableDataset):
    """Packs of a worker's share of the shards: `ids` and `targets` `[t]`, `images` `[n, 3, h, w]`, and `lengths`."""

    def __init__(self, tokenizer: str, spec: dict, shards: list[str]):
        self.tokenizer, self.spec, self.shards = tokenizer, spec, shards

    def __iter__(self):
        image = self.spec["image"]
        self.normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(image["mean"], image["std"])])
        self.encoder = Tokenizer.from_file(self.tokenizer)
        # Shards are dealt to the workers here, one at a time, so that each has nearly as many.
        worker = get_worker_info()
        own = self.shards[worker.id :: worker.num_workers]
        samples = wds.WebDataset(own, shardshuffle=False, workersplitter=None, empty_check=False)
        samples = samples.shuffle(self.spec["shuffle_buffer"], rng=random.Random(worker.id))
        pack, length = [], 0
        for sample in samples:
            item = self.item(sample)
            if length + len(item["ids"]) > self.spec["tokens_per_pack"]:
                yield collate(pack)
                pack, length = [], 0
            pack.append(item)
            length += len(item["ids"])
        if pack:
            yield collate(pack)

    def item(self, sample: dict) -> dict:
        conversation = json.loads(sample["json"])["conversations"]
        pixels = [self.pixels(sample[suffix]) for suffix in PICTURES if suffix in sample]
        tokens, names = self.spec["image"]["tokens_per_tile"], self.spec["text"]["image_tokens"]
        picture = names["start"] + names["context"] * tokens + names["end"]
        parts = []
        for turn in conversation:
            if turn["from"] == "human":
                parts.append((f"<|im_start|>user\n{turn['value'].replace('<image>', picture)}<|im_end|>\n", False))
            else:
                parts += [("<|im_start|>assistant\n", False), (f"{turn['value']}<|im_end|>", True), ("\n", False)]
        ids, targets = [], []
        encoded = self.encoder.encode_batch([text for text, _ in parts], add_special_tokens=False)
        for part, (_, is_answer) in zip(encoded, parts, strict=True):
            ids += part.ids
            targets += part.ids if is_answer else [IGNORE] * len(part.ids)
        return {"ids": torch.tensor(ids), "targets": torch.tensor(targets), "pixels": pixels}

    def pixels(self, encoded: bytes) -> torch.Tensor:
        px = self.spec["image"]["tile_px"]
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        return self.normalise(image.resize((px, px), Image.Resampling.BICUBIC))


def collate(items: list[dict]) -> dict:
    pixels = [tile for item in items for tile in item["pixels"]]
    return {
        "ids": torch.cat([item["ids"] for item in items]),
        "targets": torch.cat([item["targets"] for item in items]),
        "images": torch.stack(pixels) if pixels else torch.empty(0),
        "lengths": [len(item["ids"]) for item in items],
    }


def shards_of(spec: dict) -> list[str]:
    """All shards of all epochs, the order drawn anew in each."""
    image, text, length = spec["image"], spec["text"], spec["length"]
    plain = text["template"] == "chatml" and text["system"] is None and image["any_resolution"] is None
    if not plain or image["tiling"]["max"] != 1 or set(length) != {"epochs"}:
        raise SystemExit("error: only chatml with one tile an image, for some epochs, is written here")
    shards = sorted(shard for source in spec["sources"] for pattern in source["shards"] for shard in glob.glob(pattern))
    rng = random.Random(spec["seed"])
    return [shard for _ in range(length["epochs"]) for shard in rng.sample(shards, len(shards))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what `bench_data --json` wrote")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare packs")
    parser.add_argument("--json", type=Path, help="writes the result for machines")
    args = parser.parse_args()

    named = yaml.safe_load(json.loads(args.report.read_text())["spec"])
    packs = Packs(named["tokenizer"], named["data"], shards_of(named["data"]))
    report = {"seconds": [], "samples": [], "tokens": []}
    begun = time.perf_counter()
    for pack in DataLoader(packs, batch_size=None, num_workers=args.workers):
        now = time.perf_counter()
        report["seconds"].append(now - begun)
        report["samples"].append(len(pack["lengths"]))
        report["tokens"].append(len(pack["ids"]))
        begun = now
    samples, seconds = sum(report["samples"]), sum(report["seconds"])
    print(f"{samples} samples in {seconds:.3f} s, {samples / seconds:.1f} samples/s")
    if args.json:
        args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
