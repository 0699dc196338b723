"""Asks scikit-learn what `sail-train eval --tasks` has asked: `python recognition.py OUT/TASK [--vit FOLDER]`.

Reads the features that the task has left and the answers of its probes. The nearest neighbours must give the same
answers, but for near ties; a perceptron of two layers starts from other random weights, so only its accuracy is printed
beside, averaged over five of them. With `--vit`, the encoder's folder, features are those that transformers makes of the
same images with its own image processor, and accuracies of both probes must be within one point. Images are looked for
where they were, from the working folder. Needs the virtual environment of `tests/goldens/make_metrics.py` and safetensors,
with `--vit` torch, torchvision, transformers and Pillow as well. `attentive` is not asked.
"""

import argparse
import glob
import io
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier


def features(folder, name):
    pieces = sorted(folder.glob(f"features/{name}-?????.safetensors"))
    x = np.concatenate([load_file(piece)["features"] for piece in pieces]).astype(np.float64)
    labels = [label for piece in pieces for label in json.loads(piece.with_suffix(".json").read_text())]
    return x, np.array([label["class"] for label in labels])


def images_of(where):
    """Images and classes of a set."""
    from PIL import Image

    kinds = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
    if "folder" in where:
        for path in sorted(Path(where["folder"]).glob("*/*")):
            if path.suffix.lower() in kinds:
                yield Image.open(path).convert("RGB"), path.parent.name
        return
    for shard in sorted(path for pattern in where["shards"] for path in glob.glob(pattern)):
        samples = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.suffix.lower() in (*kinds, ".cls"):
                    kind = "class" if path.suffix == ".cls" else "image"
                    samples.setdefault(path.with_suffix(""), {})[kind] = tar.extractfile(member).read()
        for sample in samples.values():
            yield Image.open(io.BytesIO(sample["image"])).convert("RGB"), sample["class"].decode().strip()


def encoded(vit, where):
    """Features as the paper says: the mean of the patches after the last norm, by transformers; and the classes."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    processor, model = AutoImageProcessor.from_pretrained(vit), AutoModel.from_pretrained(vit).eval()
    # Tokens before those of the patches.
    first = {"dinov2": 1, "aimv2_vision_model": 0, "siglip_vision_model": 0}[model.config.model_type]
    x, classes = [], []
    for image, label in images_of(where):
        with torch.inference_mode():
            tokens = model(**processor(image, return_tensors="pt")).last_hidden_state
        x.append(tokens[0, first:].mean(0).numpy())
        classes.append(label)
    if not x:
        raise SystemExit(f"no images in {where}; this script knows no patterns but `*`, `?` and `[...]`")
    return np.stack(x).astype(np.float64), np.array(classes)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--vit", type=Path, help="features by transformers, of this encoder")
args = parser.parse_args()

# The task as it was asked for, with all defaults.
tasks = json.loads((args.folder.parent / "evaluation.json").read_text())["tasks"]
(task,) = [task for task in tasks["recognition"] if task["name"] == args.folder.name]
own_classes = {test["name"]: test["own_classes"] for test in task["tests"]}


def neighbours(x, classes):
    plan = task["knn"]
    weights = lambda d: np.exp(-(d**2) / 2 / plan["temperature"])  # noqa: E731
    return KNeighborsClassifier(min(plan["k"], len(x)), weights=weights, algorithm="brute").fit(unit(x), classes)


warnings.filterwarnings("ignore", category=UserWarning)


def known(name, where):
    return encoded(args.vit, where) if args.vit else features(args.folder, name)


train, train_classes = known("train", task["train"])
mean, std = train.mean(0), np.where(train.std(0) > 0, train.std(0), 1)
mlps = []
if task.get("mlp"):
    plan = task["mlp"]
    options = {"alpha": 0.0, "batch_size": min(plan["batch"], len(train)), "max_iter": plan["epochs"], "tol": 0.0}
    mlps = [MLPClassifier((plan["hidden"],), random_state=seed, **options) for seed in range(5)]
    mlps = [mlp.fit((train - mean) / std, train_classes) for mlp in mlps]
worst, furthest = 1.0, 0.0
for test in json.loads((args.folder / "result.json").read_text())["tests"]:
    (where,) = [asked["images"] for asked in task["tests"] if asked["name"] == test["name"]]
    x, classes = known(test["name"], where)
    lines = [json.loads(line) for line in (args.folder / f"{test['name']}.jsonl").read_text().splitlines()]
    allowed = sorted(set(classes)) if own_classes[test["name"]] else sorted(set(train_classes))
    print(f"{test['name']}: {len(x)} images")
    if args.vit:
        ours, labels = features(args.folder, test["name"])
        assert sorted(labels) == sorted(classes)
        difference = np.abs(ours.mean(0) - x.mean(0)).max() / np.abs(x).max()
        print(f"  features, mean over the set: differ by {difference:.1e} of the largest one")
    if task.get("knn"):
        vote = np.isin(train_classes, allowed)
        answers = neighbours(train[vote], train_classes[vote]).predict(unit(x))
        same = float(np.mean(answers == [line["knn"] for line in lines]))
        if not args.vit:
            worst = min(worst, same)
        furthest = max(furthest, abs(test["top1"]["knn"] - np.mean(answers == classes)))
        print(f"  knn   {test['top1']['knn']:.4f}, scikit-learn {np.mean(answers == classes):.4f}; same answer {same:.4f}")
    if mlps:
        scores = []
        for mlp in mlps:
            likely = mlp.predict_proba((x - mean) / std) * np.isin(mlp.classes_, allowed)
            scores.append(np.mean(mlp.classes_[likely.argmax(-1)] == classes))
        furthest = max(furthest, abs(test["top1"]["mlp"] - np.mean(scores)))
        print(f"  mlp   {test['top1']['mlp']:.4f}, scikit-learn {np.mean(scores):.4f} (std {np.std(scores):.4f} of seeds)")
if worst < 0.999:
    raise SystemExit("the nearest neighbours give other answers than scikit-learn's")
if args.vit and furthest > 0.01:
    raise SystemExit(f"accuracies differ by {100 * furthest:.1f} points")
