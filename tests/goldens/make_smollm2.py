#!/usr/bin/env python3
"""Writes smollm2_greedy.json: what transformers generates greedily from weights/smollm2-135m-instruct.

For each chat prompt: the token ids that the model's own chat template gives, and the 40 ids that
follow, by argmax in fp32 with a KV cache. Generation does not stop at the end-of-turn token: the
ids after it are compared as well. `min_margin` is the least difference between the two highest
logits over the 40 steps: an implementation that differs by rounding picks the same ids while its
error stays below it. Prompts whose margin is under MARGIN_FLOOR are refused for that reason.

    .venv/bin/python scripts/fetch_demo_weights.py
    .venv/bin/python tests/goldens/make_smollm2.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent.parent / "weights" / "smollm2-135m-instruct"
NEW_TOKENS = 40
MARGIN_FLOOR = 0.02
PROMPTS = [
    "What is the capital of France?",
    "What colour is the sky?",
    "Count from one to ten.",
    "Name three animals that live in the sea.",
    "List the days of the week.",
]


@torch.no_grad()
def greedy(model, prompt_ids: list[int]) -> tuple[list[int], float]:
    """The next NEW_TOKENS ids by argmax, and the least margin between the two highest logits."""
    ids_bt, cache, generated, margins = torch.tensor([prompt_ids]), None, [], []
    for _ in range(NEW_TOKENS):
        output = model(ids_bt, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        top = output.logits[0, -1].topk(2)
        generated.append(top.indices[0].item())
        margins.append((top.values[0] - top.values[1]).item())
        ids_bt = top.indices[None, :1]
    return generated, min(margins)


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    cases = []
    for question in PROMPTS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        generated_ids, margin = greedy(model, prompt_ids)
        if margin < MARGIN_FLOOR:
            raise SystemExit(f"error: {question!r} has a margin of {margin:.2e}; choose another prompt")
        cases.append({
            "question": question,
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "generated_ids": generated_ids,
            "generated": tokenizer.decode(generated_ids),
            "min_margin": round(margin, 5),
        })
    golden = {
        "weights": json.loads((WEIGHTS / "stamp.json").read_text())["member_sha256"],
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "dtype": "float32",
        "new_tokens": NEW_TOKENS,
        "stops_at_end_of_turn": False,
        "end_of_turn_id": tokenizer.eos_token_id,
        "cases": cases,
    }
    path = HERE / "smollm2_greedy.json"
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for case in cases:
        print(f"{case['min_margin']:.4f}  {case['generated']!r}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
