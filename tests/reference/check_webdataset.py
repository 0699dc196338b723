"""Checks the shards of `sail-data` against Python's `webdataset`, in both directions: shards written by
`ShardWriter` pass `sail-data check`, and shards written by `sail-data pack` give `WebDataset` the same keys
and bytes. The index of a shard is compared with the offsets that `tarfile` finds.

    python tests/reference/check_webdataset.py [SAIL_DATA]      (packages: requirements-reference.txt)
"""

import io
import json
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import webdataset as wds
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLES = 25


def image_bytes(number: int, style: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((20 + number, 30)).convert("RGB").save(buffer, style)
    return buffer.getvalue()


def conversation(number: int, images: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "<image>\n" * images + f"Question {number}?"},
        {"from": "gpt", "value": f"Answer {number}: é 漢字."},
    ]


def check_ours_reads_theirs(sail_data: str, folder: Path) -> None:
    """`ShardWriter` -> `sail-data check`, `index` and `inspect`."""
    with wds.ShardWriter(str(folder / "theirs-%06d.tar"), maxcount=10, verbose=0) as writer:
        for number in range(SAMPLES):
            sample = {"__key__": f"dir/sample{number:04d}", "json": {"id": number, "conversations": conversation(number, number % 3)}}
            names = [f"img{image + 1}.png" for image in range(number % 3)]
            sample |= {name: image_bytes(number, "PNG") for name in names}
            sample["json"]["image"] = names
            writer.write(sample)
    shards = str(folder / "theirs-*.tar")
    report = run(sail_data, "check", shards)
    assert report == f"{SAMPLES} samples with {sum(n % 3 for n in range(SAMPLES))} images in 3 shards: 0 bad; text was not tokenised\n", report
    run(sail_data, "index", shards)
    for path in sorted(folder.glob("theirs-*.tar")):
        index = (path.parent / f"{path.name}.idx").read_bytes()
        offsets = list(struct.unpack(f"<{len(index) // 8}Q", index))
        assert offsets == offsets_of(path), path
    shown = run(sail_data, "inspect", shards, "--nth", "17")
    assert "sample dir/sample0017" in shown and "Answer 17: é 漢字." in shown, shown


def offsets_of(path: Path) -> list[int]:
    """First header of every sample, then the end mark, as `tarfile` counts."""
    offsets, key = [], None
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg() and member.name.split(".")[0] != key:
                key = member.name.split(".")[0]
                offsets.append(member.offset)
        return [*offsets, tar.offset]


def check_theirs_reads_ours(sail_data: str, folder: Path) -> None:
    """`sail-data pack` -> `WebDataset`: keys, annotations and the bytes of images."""
    expected, annotations = {}, []
    for number in range(SAMPLES):
        images = {f"pictures/{number}-{image}.jpg": image_bytes(number, "JPEG") for image in range(number % 3)}
        for name, content in images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        annotation = {"id": f"a/b.{number}", "extra": [1, None], "conversations": conversation(number, len(images))}
        if images:
            annotation["image"] = list(images)
        annotations.append(annotation)
        suffixes = ["jpg"] if len(images) == 1 else [f"img{image + 1}.jpg" for image in range(len(images))]
        expected[f"a_b_{number}"] = (annotation, dict(zip(suffixes, images.values())))
    (folder / "ours.json").write_text(json.dumps(annotations, ensure_ascii=False), encoding="utf-8")
    run(sail_data, "pack", str(folder / "ours.json"), "--out", str(folder / "ours"), "--samples-per-shard", "10", "--license", "CC0-1.0")
    found = {}
    for sample in wds.WebDataset(str(folder / "ours/shard-{000000..000002}.tar"), shardshuffle=False):
        members = {name: content for name, content in sample.items() if not name.startswith("__")}
        found[sample["__key__"]] = (json.loads(members.pop("json")), members)
    assert list(found) == list(expected), list(found)
    for key, (annotation, images) in expected.items():
        written, members = found[key]
        assert members == images, key
        names = [f"{key}.{suffix}" for suffix in images]
        assert written == annotation | ({"image": names} if names else {}) | {"license": "CC0-1.0"}, written


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def main() -> None:
    sail_data = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "target/release/sail-data")
    for check in (check_ours_reads_theirs, check_theirs_reads_ours):
        with tempfile.TemporaryDirectory() as folder:
            check(sail_data, Path(folder))
        print(f"{check.__name__}: ok")


if __name__ == "__main__":
    main()
