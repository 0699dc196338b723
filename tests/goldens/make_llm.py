"""Writes llama/ and qwen3/ beside this file: small random language models of transformers, and what
they give, for tests/tests/parity_llm.rs.

    python tests/goldens/make_llm.py        (packages: requirements-reference.txt)

Each folder holds config.json and model.safetensors as `save_pretrained` writes them, and
golden.safetensors with, for sequence i of three:
    ids.i, targets.i [t] int64 (-100: no loss there), weights.i [t] fp32, logits.i [t, vocab] fp32
and over all three:
    loss [] fp32            sum over rows of weight * cross-entropy
    grad.NAME               its gradient for every parameter
    greedy [12] int64       greedy continuation of ids.0
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

LENGTHS = (5, 13, 8)
NEW_TOKENS = 12
# A smaller gap between the two best logits could be decided by rounding.
MIN_MARGIN = 1e-3

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def randomise(model, generator):
    """Weights far from their initialisation, so that a norm, a scale or a rotation left out shows."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1:
                param.uniform_(0.5, 1.5, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                param.normal_(0, 0.5, generator=generator)
            else:
                param.normal_(0, 1.5 * param.shape[1] ** -0.5, generator=generator)


def golden(model, generator):
    out = {}
    loss = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        targets = torch.full_like(ids, -100)
        start = length // 3
        targets[start:-1] = ids[start + 1 :]
        weights = torch.rand(length, generator=generator) + 0.25
        weights[targets == -100] = 0
        logits = model(ids[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + (weights * losses).sum()
        out |= {f"ids.{i}": ids, f"targets.{i}": targets, f"weights.{i}": weights}
        out[f"logits.{i}"] = logits.detach()
    loss.backward()
    out["loss"] = loss.detach()
    for name, param in model.named_parameters():
        out[f"grad.{name}"] = param.grad
    out["greedy"] = greedy(model, out["ids.0"])
    return out


def greedy(model, prompt):
    """Whole forward for each token: no cache takes part in the reference."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(ids[None]).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > MIN_MARGIN, "near tie: choose another seed"
            ids = torch.cat([ids, best.indices[:1]])
    return ids[len(prompt) :].clone()


def write(model, seed):
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    folder = Path(__file__).parent / model.config.model_type
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(golden(model, generator), folder / "golden.safetensors")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    llama = LlamaConfig(**COMMON, rope_parameters=rope, rms_norm_eps=1e-5, tie_word_embeddings=True)
    write(LlamaForCausalLM(llama).eval(), seed=1)
    qwen3 = Qwen3Config(**COMMON, head_dim=16, rope_parameters=rope, tie_word_embeddings=False)
    write(Qwen3ForCausalLM(qwen3).eval(), seed=2)


if __name__ == "__main__":
    main()
