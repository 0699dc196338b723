"""Writes N random configurations of each family of language models into OUT_DIR, each a folder as
tests/goldens/make_llm.py makes them, for the ignored test of tests/tests/parity_llm.rs.

    python tests/reference/random_llm.py N SEED OUT_DIR        (packages: requirements-reference.txt)
"""

import random
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "goldens"))
import make_llm  # noqa: E402

FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


def rope_parameters(rng, longest):
    theta = rng.choice([100.0, 500.0, 10000.0, 1e6])
    factor = rng.choice([1.0, 1.5, 2.0, 4.0, 8.0])
    original = rng.choice([16, 64, longest])
    kind = rng.choice(["default", "linear", "llama3", "yarn"])
    rope = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = factor
    if kind == "llama3":
        low = rng.choice([0.5, 1.0, 2.0])
        rope |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([2.0, 4.0, 5.5])}
        rope["original_max_position_embeddings"] = original
    if kind == "yarn":
        if rng.random() < 0.7:
            rope["original_max_position_embeddings"] = original
        options = {
            "attention_factor": rng.choice([0.8, 1.0, 1.3]),
            "beta_fast": rng.choice([8.0, 32.0, 0.0]),
            "beta_slow": rng.choice([1.0, 2.0]),
            "mscale": rng.choice([0.7, 1.0]),
            "mscale_all_dim": rng.choice([0.0, 0.5, 1.0]),
            "truncate": rng.random() < 0.5,
        }
        rope |= {key: value for key, value in options.items() if rng.random() < 0.4}
    return rope


def configuration(family, rng):
    kv_heads = rng.choice([1, 1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 4])
    hidden = rng.randint(5, 41)
    head_dim = rng.choice([2, 4, 6, 8, 10, 16, 20])
    if family == "llama" or (family == "qwen2" and rng.random() < 0.4):
        hidden = heads * rng.randint(2, 9)
    longest = rng.choice([32, 128, 256])
    keys = {
        "vocab_size": rng.randint(20, 90),
        "hidden_size": hidden,
        "intermediate_size": rng.randint(3, 61),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": longest,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rope_parameters(rng, longest),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family in ("llama", "qwen2") and hidden % (2 * heads) == 0 and rng.random() < 0.5:
        del keys["head_dim"]
    if family == "qwen3_moe":
        # All experts for every row, or one expert with its weight divided by itself, would leave the routers a
        # gradient of zero, which rounding makes anything.
        experts = rng.randint(2, 12)
        top_k = rng.randint(1, min(experts - 1, 4))
        layers = keys["num_hidden_layers"]
        keys |= {
            "num_experts": experts,
            "num_experts_per_tok": top_k,
            "moe_intermediate_size": rng.randint(1, 33),
            "norm_topk_prob": top_k > 1 and rng.random() < 0.5,
            "decoder_sparse_step": rng.choice([1, 1, 2]),
            "mlp_only_layers": [layer for layer in range(layers) if rng.random() < 0.2],
            "router_aux_loss_coef": rng.choice([0.001, 0.1]),
        }
        only = keys["mlp_only_layers"]
        if all(layer in only or (layer + 1) % keys["decoder_sparse_step"] for layer in range(layers)):
            keys |= {"decoder_sparse_step": 1, "mlp_only_layers": []}  # transformers needs one with experts
    return FAMILIES[family](**keys)


def main():
    count, seed, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for family in FAMILIES:
        for i in range(count):
            rng = random.Random(f"{seed} {family} {i}")
            make_llm.write(configuration(family, rng), out / f"{family}-{i:03}", rng.randrange(2**31))


if __name__ == "__main__":
    main()
