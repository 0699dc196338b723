"""Asks scikit-learn what `sail-train eval --tasks` has asked: `python recognition.py OUT/TASK`.

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
train, train_classes = features(args.folder, "train")
mean, std = train.mean(0), np.where(train.std(0) > 0, train.std(0), 1)
mlps = []
if task.get("mlp"):
    plan = task["mlp"]
    options = {"alpha": 0.0, "batch_size": min(plan["batch"], len(train)), "max_iter": plan["epochs"], "tol": 0.0}
    mlps = [MLPClassifier((plan["hidden"],), random_state=seed, **options) for seed in range(5)]
    mlps = [mlp.fit((train - mean) / std, train_classes) for mlp in mlps]
worst = 1.0
for test in json.loads((args.folder / "result.json").read_text())["tests"]:
    x, classes = features(args.folder, test["name"])
    lines = [json.loads(line) for line in (args.folder / f"{test['name']}.jsonl").read_text().splitlines()]
    allowed = sorted(set(classes)) if own_classes[test["name"]] else sorted(set(train_classes))
    print(f"{test['name']}: {len(x)} images")
    if task.get("knn"):
        vote = np.isin(train_classes, allowed)
        answers = neighbours(train[vote], train_classes[vote]).predict(unit(x))
        same = float(np.mean(answers == [line["knn"] for line in lines]))
        worst = min(worst, same)
        print(f"  knn   {test['top1']['knn']:.4f}, scikit-learn {np.mean(answers == classes):.4f}; same answer {same:.4f}")
    if mlps:
        scores = []
        for mlp in mlps:
            likely = mlp.predict_proba((x - mean) / std) * np.isin(mlp.classes_, allowed)
            scores.append(np.mean(mlp.classes_[likely.argmax(-1)] == classes))
        print(f"  mlp   {test['top1']['mlp']:.4f}, scikit-learn {np.mean(scores):.4f} (std {np.std(scores):.4f} of seeds)")
if worst < 0.999:
    raise SystemExit("the nearest neighbours give other answers than scikit-learn's")
