"""Writes the folders of CASES beside this file: small random language models of transformers, and what
they give, for tests/tests/parity_llm.rs.

    python tests/goldens/make_llm.py        (packages: requirements-reference.txt)

Each folder holds config.json and model.safetensors as `save_pretrained` writes them, and
golden.safetensors with, for sequence i of three:
    ids.i, targets.i [t] int64 (-100: no loss there), weights.i [t] fp32, logits.i [t, vocab] fp32
and over all three:
    loss [] fp32            sum over rows of weight * cross-entropy
    grad.NAME               its gradient for every parameter
    greedy [12] int64       greedy continuation of ids.0
and with experts, over the rows of all three:
    balance [] fp32         `load_balancing_loss_func`
    balance_grad.NAME       its gradient for every router and for the embeddings
    visits [e] int64        how often each expert was chosen, summed over layers
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

LENGTHS = (5, 13, 8)
NEW_TOKENS = 12
# A smaller gap between the two best logits, or between a chosen expert and the next, could be decided by
# rounding.
MIN_MARGIN = 1e-3

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SMALL = COMMON | {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40}
DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}

CASES = {
    "llama": (LlamaConfig, COMMON, {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, DEFAULT),
    "qwen3": (Qwen3Config, COMMON, {"head_dim": 16, "tie_word_embeddings": False}, DEFAULT),
    "llama_linear": (LlamaConfig, SMALL, {"head_dim": 8, "num_key_value_heads": 1}, LINEAR),
    "llama_llama3": (LlamaConfig, SMALL, {"head_dim": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}, LLAMA3),
    "qwen2": (Qwen2Config, SMALL, {"tie_word_embeddings": True, "use_sliding_window": False}, DEFAULT),
    "qwen2_yarn": (Qwen2Config, SMALL, {"num_attention_heads": 3, "num_key_value_heads": 1}, YARN_MSCALE),
    "qwen3_yarn": (Qwen3Config, SMALL, {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}, YARN),
    "qwen3_moe": (
        Qwen3MoeConfig,
        SMALL,
        {
            "head_dim": 10,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        DEFAULT,
    ),
    "qwen3_moe_sparse_step": (
        Qwen3MoeConfig,
        SMALL,
        {
            "head_dim": 8,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 10,
            "decoder_sparse_step": 2,
            "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.02,
        },
        DEFAULT,
    ),
}
# The expert that no row visits.
UNUSED_EXPERT = 3


class NearTie(Exception):
    """Rounding could decide between two tokens or experts."""


def randomise(model, generator):
    """Weights far from their initialisation, so that a norm, a scale or a rotation left out shows."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(".bias"):
                param.normal_(0, 0.5, generator=generator)
            elif param.dim() == 1:
                param.uniform_(0.5, 1.5, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                param.normal_(0, 0.5, generator=generator)
            else:
                param.normal_(0, 1.5 * param.shape[-1] ** -0.5, generator=generator)


def leave_out(model, expert):
    """Makes the routers' score for this expert the mean of all scores, which is hardly ever one of the best."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                param[expert] = 0
                param[expert] = param.sum(0) / (len(param) - 1)


def golden(model, generator):
    out = {}
    loss = torch.zeros(())
    router_logits = []
    has_experts = model.config.model_type == "qwen3_moe"
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(0, model.config.vocab_size, (length,), generator=generator)
        targets = torch.full_like(ids, -100)
        start = length // 3
        targets[start:-1] = ids[start + 1 :]
        weights = torch.rand(length, generator=generator) + 0.25
        weights[targets == -100] = 0
        output = model(ids[None], **({"output_router_logits": True} if has_experts else {}))
        logits = output.logits[0]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = loss + (weights * losses).sum()
        out |= {f"ids.{i}": ids, f"targets.{i}": targets, f"weights.{i}": weights}
        out[f"logits.{i}"] = logits.detach()
        if has_experts:
            router_logits.append(output.router_logits)
    named = dict(model.named_parameters())
    if router_logits and router_logits[0]:
        out |= balance(model, [torch.cat(layer) for layer in zip(*router_logits, strict=True)], named)
    loss.backward()
    out["loss"] = loss.detach()
    for name, param in named.items():
        out[f"grad.{name}"] = param.grad
    out["greedy"] = greedy(model, out["ids.0"])
    return out


def balance(model, router_logits, named):
    """The loss for unevenly used experts over all rows, and its gradients."""
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    best = torch.cat(router_logits).softmax(-1).topk(min(top_k + 1, experts))
    if experts > top_k and (best.values[:, top_k - 1] - best.values[:, top_k]).min() < MIN_MARGIN / 10:
        raise NearTie
    loss = load_balancing_loss_func(tuple(router_logits), experts, top_k)
    names = [name for name in named if name.endswith("mlp.gate.weight")] + ["model.embed_tokens.weight"]
    grads = torch.autograd.grad(loss, [named[name] for name in names], retain_graph=True)
    out = {"balance": loss.detach(), "visits": best.indices[:, :top_k].flatten().bincount(minlength=experts)}
    return out | {f"balance_grad.{name}": grad for name, grad in zip(names, grads, strict=True)}


def greedy(model, prompt):
    """Whole forward for each token: no cache takes part in the reference."""
    ids = prompt
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(ids[None]).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < MIN_MARGIN:
                raise NearTie
            ids = torch.cat([ids, best.indices[:1]])
    return ids[len(prompt) :].clone()


def write(config, folder, seed, unused_expert=None):
    """A random model of this configuration with its golden, at the first seed without a near tie and where no
    row visits the unused expert."""
    while True:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
        generator = torch.Generator().manual_seed(seed)
        randomise(model, generator)
        if unused_expert is not None:
            leave_out(model, unused_expert)
        try:
            tensors = golden(model, generator)
            if unused_expert is None or tensors["visits"][unused_expert] == 0:
                break
        except NearTie:
            pass
        seed += 1000
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(tensors, folder / "golden.safetensors")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for seed, (name, (kind, common, own, rope)) in enumerate(CASES.items(), start=1):
        config = kind(**common | own, rope_parameters=dict(rope))
        unused = UNUSED_EXPERT if name == "qwen3_moe" else None
        write(config, Path(__file__).parent / name, seed, unused)


if __name__ == "__main__":
    main()
