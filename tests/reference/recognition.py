"""Asks scikit-learn what `sail-train eval --tasks` has asked: `python recognition.py OUT/TASK --k 20 --hidden 2048`.

Reads the features that the task has left and the answers of its probes. The nearest neighbours must give the same
answers, but for near ties; a perceptron of two layers starts from other random weights, so only its accuracy is printed
beside. Needs the virtual environment of `tests/goldens/make_metrics.py` and safetensors.
"""

import argparse
import json
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


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--k", type=int, default=20)
parser.add_argument("--temperature", type=float, default=0.07)
parser.add_argument("--hidden", type=int, default=2048)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch", type=int, default=256)
args = parser.parse_args()

warnings.filterwarnings("ignore", category=UserWarning)
x, classes = features(args.folder, "train")
knn = KNeighborsClassifier(
    min(args.k, len(x)), weights=lambda d: np.exp((1 - d**2 / 2) / args.temperature), algorithm="brute"
).fit(unit(x), classes)
mean, std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
mlps = [
    MLPClassifier(
        (args.hidden,), alpha=0.0, batch_size=min(args.batch, len(x)), max_iter=args.epochs, tol=0.0, random_state=seed
    ).fit((x - mean) / std, classes)
    for seed in range(5)
]
worst = 1.0
for test in json.loads((args.folder / "result.json").read_text())["tests"]:
    x, classes = features(args.folder, test["name"])
    lines = [json.loads(line) for line in (args.folder / f"{test['name']}.jsonl").read_text().splitlines()]
    print(f"{test['name']}: {len(x)} images")
    if "knn" in test["top1"]:
        answers = knn.predict(unit(x))
        same = float(np.mean(answers == [line["knn"] for line in lines]))
        worst = min(worst, same)
        print(f"  knn   {test['top1']['knn']:.4f}, scikit-learn {np.mean(answers == classes):.4f}; same answer {same:.4f}")
    if "mlp" in test["top1"]:
        scores = [mlp.score((x - mean) / std, classes) for mlp in mlps]
        print(f"  mlp   {test['top1']['mlp']:.4f}, scikit-learn {np.mean(scores):.4f} (std {np.std(scores):.4f} of seeds)")
if worst < 0.999:
    raise SystemExit("the nearest neighbours give other answers than scikit-learn's")
