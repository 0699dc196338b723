"""Checks what a run answers to Prometheus, with the parser of its Python client.

    python tests/reference/check_prometheus.py PAGE RUN_DIR      (packages: requirements-reference.txt)
"""

import json
import re
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families


def main() -> None:
    page, run = Path(sys.argv[1]).read_text(), Path(sys.argv[2])
    families = {family.name: family for family in text_string_to_metric_families(page)}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    for family in families.values():
        assert re.fullmatch(r"sail_train_[a-z_]+", family.name) and family.documentation, family
        assert family.type in ("counter", "gauge"), family
        for sample in family.samples:
            # Counters end in `_total`, and nothing else does.
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            assert sample.labels["run"] == "tiny-stage1" and sample.labels["stage"] == "1", sample

    def one(name: str) -> float:
        (sample,) = families[f"sail_train_{name}"].samples
        return sample.value

    # The parser takes `_total` off a family's name.
    steps = int(one("steps"))
    made = train[:steps]
    assert steps >= 3 and one("step") == made[-1]["step"], (steps, one("step"))
    assert one("tokens") == sum(line["tokens"] for line in made)
    assert one("loss") == made[-1]["loss"] and one("grad_norm") == made[-1]["grad_norm"]
    assert abs(one("step_seconds") - sum(line["step_secs"] for line in made)) < 1e-6
    flops = {sample.labels["module"]: sample.value for sample in families["sail_train_flops"].samples}
    assert flops.keys() == {"vision", "projector", "llm"}, flops
    assert flops["llm"] == sum(line["flops"]["llm"] for line in made)
    rates = {sample.labels["module"]: sample.value for sample in families["sail_train_learning_rate"].samples}
    assert rates == {"projector": made[-1]["lr"]["projector"]}, rates
    of_eval = [sample for sample in families["sail_train_eval_loss"].samples if sample.labels["source"] == "caption"]
    losses = {sample.labels["image"]: sample.value for sample in of_eval}
    (evaluation,) = [line for line in lines if line["kind"] == "eval" and line["step"] == one("eval_step")]
    report = evaluation["report"]["sources"]["caption"]
    assert losses["all"] == report["loss"] and losses["shuffled"] == report["images"]["shuffled_image"], losses
    print(f"{len(families)} families after {steps} steps")


main()
