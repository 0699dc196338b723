"""Makes the goldens of sail-train's metrics with reference implementations: `python make_metrics.py` in this folder.

They need a virtual environment of their own, outside of that of the project:

    pip install numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 POT==0.9.7.post1 jiwer==4.0.0 anls==0.0.2
    pip install --no-deps pycocoevalcap==1.2 salesforce-lavis==1.0.2

`metrics/` gets
- `answers.json`: random answers with random truths, all equal in one of ten, with VQA accuracy (the challenge's
  `vqaEval.py` as LAVIS ships it), ANLS (`anls`), errors in characters of the first truth (`jiwer`) and CIDEr-D
  (`pycocoevalcap`) of tokens given,
- `normalised.json`: answers as `vqaEval.py` compares them, every contraction of it among them,
- `neighbours.json`: classes by the nearest neighbours (scikit-learn),
- `clouds.json`: principal components (scikit-learn) and distances of clouds (SciPy, POT),
- `affinity.json`: what `sail-train eval` makes of visual tokens and embeddings (scikit-learn, SciPy),
- `probe.json`: a perceptron of two layers before and after some epochs (scikit-learn).
"""

import importlib.util
import json
import sysconfig
from pathlib import Path

import jiwer
import numpy as np
import ot
from anls import anls_score
from pycocoevalcap.cider.cider_scorer import CiderScorer
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).parent / "metrics"
rng = np.random.default_rng(7)


def vqa_eval():
    """The class of LAVIS, by its file alone: the package imports half of the field."""
    path = Path(sysconfig.get_paths()["purelib"]) / "lavis/common/vqa_tools/vqa_eval.py"
    spec = importlib.util.spec_from_file_location("vqa_eval", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


class Questions:
    def __init__(self, qa):
        self.qa = qa

    def getQuesIds(self):
        return list(self.qa)


def vqa_accuracy(answer, truths):
    answers = [{"answer": truth, "answer_id": i} for i, truth in enumerate(truths)]
    truth = Questions({0: {"answers": answers, "question_type": "any", "answer_type": "any"}})
    # `n` is how many digits its means are rounded to.
    evaluation = vqa_eval()(truth, Questions({0: {"answer": answer}}), n=12)
    evaluation.updateProgress = lambda progress: None
    evaluation.evaluate()
    return evaluation.accuracy["overall"] / 100


def pick(items, low, high):
    return [str(item) for item in rng.choice(items, rng.integers(low, high + 1))]


# Without `ß`: `anls` counts the letters of the text in capitals, which has two for it.
WORDS = "a the red blue cat dog on two 2 none dont Yes no. 1,000 3.5 well-known it's (left) grün 猫 sits mat ?".split()


def mutated(text):
    """A slip of the pen."""
    letters = list(text)
    for _ in range(rng.integers(0, 4)):
        at = int(rng.integers(0, len(letters) + 1))
        match rng.integers(0, 3):
            case 0:
                letters.insert(at, str(rng.choice(list("abcü ."))))
            case 1 if at < len(letters):
                del letters[at]
            case _ if at < len(letters):
                letters[at] = str(rng.choice(list("xyz")))
    return "".join(letters)


def answers():
    samples = []
    # Its own generator: all that is drawn from the other one stays as it is.
    of_equal = np.random.default_rng(8)
    for i in range(240):
        common = " ".join(pick(WORDS, 1, 4))
        agree = rng.uniform(0.1, 0.6)
        truths = [common if rng.random() < agree else " ".join(pick(WORDS, 1, 4)) for _ in range(10)]
        answer = [common, mutated(common), mutated(truths[0]), " ".join(pick(WORDS, 0, 5))][rng.integers(0, 4)]
        if i % 10 == 4:
            # `vqaEval.py` leaves truths as they are written where all are equal.
            text = " ".join(of_equal.choice(WORDS, of_equal.integers(1, 3)))
            truths = [text] * 10
            answer = [text, f"{text.capitalize()}."][of_equal.integers(0, 2)]
        words = jiwer.process_characters(truths[0].strip(), answer.strip())
        errors = words.substitutions + words.deletions + words.insertions
        caption = pick(WORDS, 0, 9)
        references = [caption[: rng.integers(0, 9)] + pick(WORDS, 1, 6) for _ in range(rng.integers(1, 6))]
        samples.append(
            {
                "answer": answer,
                "truths": truths,
                "vqa": vqa_accuracy(answer, truths),
                "anls": anls_score(prediction=answer, gold_labels=truths, threshold=0.5),
                "errors": errors,
                "length": words.hits + words.substitutions + words.deletions,
                "tokens": caption,
                "references": references,
            }
        )
    scorer = CiderScorer()
    for sample in samples:
        scorer += (" ".join(sample["tokens"]), [" ".join(words) for words in sample["references"]])
    _, scores = scorer.compute_score()
    return [sample | {"cider": float(score)} for sample, score in zip(samples, scores, strict=True)]


def normalised():
    evaluation = vqa_eval()(Questions({}), Questions({}))
    words = [word for pair in evaluation.contractions.items() for word in pair]
    texts = words + [" ".join(pick(WORDS + words, 1, 5)) for _ in range(100)]
    texts += [mutated(text) + str(rng.choice(["", ".", "?", " !", "-", "\n", "\t x"])) for text in texts[-100:]]
    made = []
    for text in texts:
        answer = text.replace("\n", " ").replace("\t", " ").strip()
        answer = evaluation.processDigitArticle(evaluation.processPunctuation(answer))
        made.append({"answer": text, "normalised": answer})
    return made


def neighbours():
    k, temperature, classes = 7, 0.07, 4
    centres = rng.normal(size=(classes, 12))
    labels = rng.integers(0, classes, 120)
    train = centres[labels] + 2.0 * rng.normal(size=(120, 12))
    queries = centres[rng.integers(0, classes, 80)] + 2.0 * rng.normal(size=(80, 12))

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def found(weights):
        # Of points of length 1 the cosine is 1 - d² / 2.
        model = KNeighborsClassifier(n_neighbors=k, weights=weights, algorithm="brute")
        return model.fit(unit(train), labels).predict(unit(queries)).tolist()

    return {
        "train": train.tolist(),
        "classes": labels.tolist(),
        "queries": queries.tolist(),
        "uniform": found("uniform"),
        "weighted": found(lambda distances: np.exp((1 - distances**2 / 2) / temperature)),
        "k": k,
        "temperature": temperature,
    }


def clouds():
    points = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 9)) + rng.normal(size=9)
    pca = PCA(2, svd_solver="full").fit(points)
    a, b, same_size = rng.normal(size=(90, 2)), rng.normal(size=(140, 2)) * 2 + 1, rng.normal(size=(90, 2)) + 0.5
    distances = cdist(a, same_size)
    return {
        "points": points.tolist(),
        "explained": pca.explained_variance_ratio_.tolist(),
        "projected": pca.transform(points).tolist(),
        "a": a.tolist(),
        "b": b.tolist(),
        "same_size": same_size.tolist(),
        "nearest": float(cdist(a, b).min(1).mean()),
        "mean": float(cdist(a, b).mean()),
        "wasserstein": float(distances[linear_sum_assignment(distances)].mean()),
        "pot": float(ot.emd2(np.full(90, 1 / 90), np.full(90, 1 / 90), distances)),
    }


def affinity():
    words = rng.normal(size=(130, 8)) @ rng.normal(size=(8, 8))
    pick_visual, pick_words = rng.permutation(60), rng.permutation(130)[:60]
    pairs = 40

    def side(width, shared):
        visual = 3 * rng.normal(size=(60, width)) @ rng.normal(size=(width, width)) + 1
        if shared:
            both = PCA(2, svd_solver="full").fit(np.concatenate([visual[pick_visual], words[pick_words]]))
            fitted = [both, both]
            explained = both.explained_variance_ratio_.tolist()
        else:
            fitted = [PCA(2, svd_solver="full").fit(x) for x in (visual[pick_visual], words[pick_words])]
            explained = [share for pca in fitted for share in pca.explained_variance_ratio_.tolist()]
        visual_2, words_2 = fitted[0].transform(visual), fitted[1].transform(words)
        distances = cdist(visual_2, words_2)
        paired = cdist(visual_2[pick_visual[:pairs]], words_2[pick_words[:pairs]])
        found = {
            "nearest": float(distances.min(1).mean()),
            "wasserstein": float(paired[linear_sum_assignment(paired)].mean()),
            "mean": float(distances.mean()),
        }
        return [visual.tolist(), found, explained]

    return {
        "words": words.tolist(),
        "pick_visual": pick_visual.tolist(),
        "pick_words": pick_words.tolist(),
        "pairs": pairs,
        "sides": {"shared": side(8, True), "own": side(11, False)},
    }


class Recording(MLPClassifier):
    """Keeps what it begins with."""

    def _init_coef(self, fan_in, fan_out, dtype):
        weight, bias = super()._init_coef(fan_in, fan_out, dtype)
        self.__dict__.setdefault("first", []).append((weight.copy(), bias.copy()))
        return weight, bias


def probe():
    epochs, batch, lr = 6, 16, 0.01
    labels = rng.integers(0, 3, 70)
    features = rng.normal(size=(3, 5))[labels] + rng.normal(size=(70, 5))
    model = Recording((9,), alpha=0.0, batch_size=batch, learning_rate_init=lr, max_iter=epochs, shuffle=False, tol=0.0)
    model.set_params(n_iter_no_change=1000, random_state=3).fit(features, labels)
    (hidden, hidden_bias), (head, head_bias) = model.first
    return {
        "features": features.tolist(),
        "classes": labels.tolist(),
        "hidden": hidden.tolist(),
        "hidden_bias": hidden_bias.tolist(),
        "head": head.tolist(),
        "head_bias": head_bias.tolist(),
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "probabilities": model.predict_proba(features).tolist(),
        "loss": float(model.loss_),
    }


HERE.mkdir(exist_ok=True)
for name, made in [
    ("answers", answers()),
    ("normalised", normalised()),
    ("neighbours", neighbours()),
    ("clouds", clouds()),
    ("affinity", affinity()),
    ("probe", probe()),
]:
    text = json.dumps(made, ensure_ascii=False)
    if isinstance(made, list):
        text = "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in made) + "\n]"
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
