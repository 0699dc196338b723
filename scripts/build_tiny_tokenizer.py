#!/usr/bin/env python3
"""Makes configs/tiny/tokenizer.json: a byte-level BPE tokenizer of 2048 tokens for the tiny models.

Trained on the questions and answers of the training shards of data/demo. The special tokens come
first (ids 0-5), then the 256 bytes, then the merges. Training is deterministic, so a second run
writes the same file.

    .venv/bin/python scripts/build_tiny_tokenizer.py
"""

import json
import os
import sys
import tarfile
from pathlib import Path

# Word counts are merged in whatever order the threads end; one thread keeps this out of question.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
ROLES = {"human": "user", "gpt": "assistant"}


def texts(folder: Path) -> list[str]:
    """Every message as the ChatML template writes it, without the special tokens."""
    found = []
    for shard in sorted(folder.glob("*-train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    for turn in json.load(tar.extractfile(member))["conversations"]:
                        found.append(f"{ROLES[turn['from']]}\n{turn['value'].replace('<image>', '')}")
    return found


def main() -> int:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = texts(ROOT / "data" / "demo")
    if not corpus:
        print("error: no training shard in data/demo\n\nhint: run scripts/build_demo_corpus.py", file=sys.stderr)
        return 1
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system\nYou are a helpful assistant.", *corpus], trainer)
    size = tokenizer.get_vocab_size()
    assert size == VOCAB_SIZE, f"{size} tokens: the corpus is too small for {VOCAB_SIZE}"
    for text in corpus:
        decoded = tokenizer.decode(tokenizer.encode(text).ids)
        assert decoded == text, f"{text!r} comes back as {decoded!r}"
    path = ROOT / "configs" / "tiny" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    count = sum(len(tokenizer.encode(text).ids) for text in corpus)
    print(f"wrote {path}: {size} tokens, {len(corpus)} messages of {count / len(corpus):.1f} tokens on average")
    return 0


if __name__ == "__main__":
    sys.exit(main())
