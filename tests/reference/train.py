#!/usr/bin/env python3
"""A plain trainer in eager PyTorch that makes the steps `bench_train --dump DIR` has written.

    .venv/bin/python tests/reference/train.py DIR [--collate fixed|padded] [--device cpu|cuda] [--dtype fp32|bf16] [--warmup 2] [--json FILE]

The models are transformers' own, with SDPA attention; the projector is InternVL's `mlp1`; loss, accumulation, clipping
and fused AdamW are those of an ordinary fine-tuning script. What nothing trained comes before runs without a graph.
All batches are collated before the first step, so that no time goes into data. With `--dtype bf16`
weights and moments are bf16, without fp32 masters, which takes less time and memory than `bench_train` with them. For CUDA
batches lie in pinned memory and are copied without waiting. Losses and gradient norms must be those
of `bench_train`, which computes the same on packs.

`fixed` takes packs of sequences of one length as `[B, L]`; `padded` takes the sequences of a step's packs apart, deals
them out to as many micro-batches as there were packs, in their order, and pads each to its longest sequence.
"""

import argparse
import contextlib
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path

import memory
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

IGNORE = -100


@dataclass
class Sequence:
    """One sample of a pack; `labels` are shifted as transformers wants them: a token's own place has its label."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    image_rows: torch.Tensor
    images: torch.Tensor


@dataclass
class Batch:
    """A micro-batch: `[b, l]` each, images `[n, 3, h, w]` or none; no mask where nothing is padded."""

    ids: torch.Tensor
    labels: torch.Tensor
    # None where all targets weigh 1.
    weights: torch.Tensor | None
    mask: torch.Tensor | None
    is_visual: torch.Tensor
    images: torch.Tensor | None


@dataclass
class Step:
    batches: list[Batch]
    # Sum of the weights of all targets, which normalises the step's loss.
    weight: float
    tokens: int
    samples: int


class Vlm(nn.Module):
    """Vision transformer, projector and language model; parameters have the full names of the dump."""

    def __init__(self, shapes: dict):
        super().__init__()
        vision, llm = (dict(shapes[part]) for part in ("vision", "llm"))
        kind, self.merge = shapes["projector"]["kind"], shapes["projector"]["merge"]
        if kind != "pixel_shuffle":
            raise SystemExit(f"error: `{kind}` projectors are not written here")
        vision, llm = (AutoConfig.for_model(config.pop("model_type"), **config) for config in (vision, llm))
        self.vision = AutoModel.from_config(vision, attn_implementation="sdpa")
        self.llm = AutoModelForCausalLM.from_config(llm, attn_implementation="sdpa")
        merged = vision.hidden_size * self.merge**2
        self.projector = nn.Sequential(
            nn.LayerNorm(merged), nn.Linear(merged, llm.hidden_size), nn.GELU(), nn.Linear(llm.hidden_size, llm.hidden_size)
        )
        # Tokens before the patches.
        self.prefix = {"dinov2": 1, "aimv2_vision_model": 0}[vision.model_type]
        self.frozen_front = {"vision": False, "projector": False}

    def freeze_all_but(self, trained: set[str]):
        parameters = dict(self.named_parameters())
        if unknown := trained - parameters.keys():
            raise SystemExit(f"error: this model has no {sorted(unknown)}")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        modules = {name.split(".")[0] for name in trained}
        self.frozen_front = {
            "vision": "vision" not in modules,
            "projector": not modules & {"vision", "projector"},
        }

    def without_graph(self, module: str):
        return torch.no_grad() if self.frozen_front[module] else contextlib.nullcontext()

    def visual_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """`[n, 3, h, w]` -> `[v, d]`."""
        with self.without_graph("vision"):
            x = self.vision(pixel_values=images).last_hidden_state[:, self.prefix :]
        with self.without_graph("projector"):
            n, patches, c = x.shape
            side, merge = int(patches**0.5), self.merge
            x = x.view(n, side // merge, merge, side // merge, merge, c).permute(0, 1, 3, 2, 4, 5)
            return self.projector(x.reshape(-1, merge * merge * c))

    def loss(self, batch: Batch, normaliser: float) -> torch.Tensor:
        embeds = self.llm.get_input_embeddings()(batch.ids)
        if batch.images is not None:
            embeds = embeds.masked_scatter(batch.is_visual[..., None], self.visual_tokens(batch.images))
        inputs = {"inputs_embeds": embeds, "attention_mask": batch.mask, "use_cache": False}
        if batch.weights is None:
            return self.llm(**inputs, labels=batch.labels, num_items_in_batch=normaliser).loss
        # As transformers' `ForCausalLMLoss`, which knows no weights.
        logits = self.llm(**inputs).logits.float()
        labels = nn.functional.pad(batch.labels, (0, 1), value=IGNORE)[:, 1:]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        return (losses * batch.weights.flatten()).sum() / normaliser


def sequences(path: Path) -> list[list[Sequence]]:
    """The sequences of each pack of a step."""
    fields = load_file(path)
    packs = sorted({int(name.split(".")[0]) for name in fields})
    return [pack_sequences({name.split(".")[1]: t for name, t in fields.items() if name.startswith(f"{i}.")}) for i in packs]


def pack_sequences(pack: dict[str, torch.Tensor]) -> list[Sequence]:
    cuts, rows = pack["cu_seqlens"].tolist(), pack.get("image_rows", torch.empty(0, dtype=torch.int64))
    found, image = [], 0
    for (start, end), images in zip(zip(cuts, cuts[1:]), pack["images_per_sequence"].tolist(), strict=True):
        targets = pack["targets"][start:end]
        assert targets[-1] == IGNORE and torch.equal(pack["positions"][start:end], torch.arange(end - start))
        labels = torch.cat([torch.tensor([IGNORE]), targets[:-1]])
        own = rows[(rows >= start) & (rows < end)] - start
        pixels = pack["images"][image : image + images] if images else torch.empty(0)
        image += images
        found.append(Sequence(pack["ids"][start:end], labels, pack["weights"][start:end], own, pixels))
    return found


def collate(sequences: list[Sequence], mode: str) -> Batch:
    lengths = [len(sequence.ids) for sequence in sequences]
    if mode == "fixed" and len(set(lengths)) > 1:
        raise SystemExit(f"error: `fixed` takes sequences of one length, these have {sorted(set(lengths))}")
    shape = (len(sequences), max(lengths))
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    weights, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    is_visual = torch.zeros(shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = lengths[row]
        ids[row, :length], labels[row, :length] = sequence.ids, sequence.labels
        weights[row, :length], mask[row, :length] = sequence.weights, 1
        is_visual[row, sequence.image_rows] = True
    images = [sequence.images for sequence in sequences if len(sequence.images)]
    even = all(bool((sequence.weights[sequence.weights != 0] == 1).all()) for sequence in sequences)
    return Batch(
        ids,
        labels,
        weights=None if even else weights,
        mask=mask if len(set(lengths)) > 1 else None,
        is_visual=is_visual,
        images=torch.cat(images) if images else None,
    )


def read_step(path: Path, mode: str) -> Step:
    packs = sequences(path)
    together = [sequence for pack in packs for sequence in pack]
    if mode == "padded":
        count = -(-len(together) // len(packs))
        packs = [together[start : start + count] for start in range(0, len(together), count)]
    weight = sum(sequence.weights.double().sum().item() for sequence in together)
    tokens = sum(len(sequence.ids) for sequence in together)
    return Step([collate(pack, mode) for pack in packs], weight, tokens, len(together))


def build(folder: Path, rates: dict, device: torch.device, dtype: torch.dtype) -> Vlm:
    """The model with the weights of the dump, each of which is in memory once."""
    with torch.device("meta"):
        model = Vlm(json.loads((folder / "shapes.json").read_text()))
    model.llm.tie_weights()
    expected = dict(model.named_parameters())
    with safe_open(folder / "weights.safetensors", "pt") as weights:
        if set(weights.keys()) != set(expected):
            raise SystemExit(f"error: names differ: {sorted(set(weights.keys()) ^ set(expected))}")
        for name, parameter in expected.items():
            owner, _, field = name.rpartition(".")
            value = weights.get_tensor(name).clone()
            assert value.shape == parameter.shape, name
            setattr(model.get_submodule(owner), field, nn.Parameter(value))
    model.llm.tie_weights()
    rebuild_buffers(model)
    # Rotary frequencies stay in fp32, as transformers has them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to(device)
    model.freeze_all_but(set(rates["parameters"]))
    return model.train()


def rebuild_buffers(model: Vlm):
    """Gives buffers values that no file has: rotary frequencies and position indices."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if hasattr(module, "config") and name in ("inv_freq", "original_inv_freq"):
                fresh = type(module)(module.config)
                module.register_buffer(name, getattr(fresh, name), persistent=False)
            elif name == "position_ids":
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
            else:
                raise SystemExit(f"error: {type(module).__name__}.{name} has no value")


def optimizer_of(model: Vlm, rates: dict) -> torch.optim.AdamW:
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if own := rates["parameters"].get(name):
            groups.setdefault((own["lr"], own["weight_decay"], *own["betas"]), []).append(parameter)
    groups = [
        {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay, "betas": (beta1, beta2)}
        for (lr, decay, beta1, beta2), params in groups.items()
    ]
    return torch.optim.AdamW(groups, eps=rates["eps"], fused=True)


def on_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """Without waiting for what the device computes, where it lies in pinned memory."""
    moved = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {name: x if x is None else x.to(device, non_blocking=True) for name, x in moved.items()}
    moved["images"] = None if moved["images"] is None else moved["images"].to(dtype)
    return Batch(**moved)


def pin(step: Step) -> Step:
    for batch in step.batches:
        for field in fields(batch):
            if (x := getattr(batch, field.name)) is not None:
                setattr(batch, field.name, x.pin_memory())
    return step


def make(model: Vlm, optimizer, step: Step, factor: float, clip_norm: float | None) -> tuple[float, float]:
    """One optimizer step: its loss, and the gradients' norm before clipping."""
    loss_sum = 0.0
    own = next(model.parameters())
    for batch in step.batches:
        loss = model.loss(on_device(batch, own.device, own.dtype), step.weight)
        # A batch of text alone reaches nothing that is trained before the language model.
        if loss.requires_grad:
            loss.backward()
        loss_sum += loss.detach()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, float("inf") if clip_norm is None else clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum.item(), norm.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="what `bench_train --dump` wrote")
    parser.add_argument("--collate", choices=["fixed", "padded"], default="fixed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights, moments and activations")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not to be counted")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--profile", action="store_true", help="says what the last step spends its time on")
    parser.add_argument("--json", type=Path, help="writes the result for machines")
    args = parser.parse_args()

    rates = json.loads((args.dump / "train.json").read_text())
    steps = [read_step(path, args.collate) for path in sorted(args.dump.glob("step-*.safetensors"))]
    assert len(steps) == len(rates["factors"]) > args.warmup
    device = torch.device(args.device)
    if device.type == "cuda":
        # libtorch's own default for convolutions is to round.
        torch.backends.cudnn.allow_tf32 = False
        steps = [pin(step) for step in steps]
    model = build(args.dump, rates, device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    optimizer = optimizer_of(model, rates)
    if args.compile:
        model.vision, model.llm = torch.compile(model.vision), torch.compile(model.llm)

    report = {"warmup": args.warmup}
    memory.forget_peak(device)
    report["before_bytes"] = memory.taken_bytes(device)
    for number, (step, factor) in enumerate(zip(steps, rates["factors"], strict=True), 1):
        profiled = args.profile and number == len(steps)
        with torch.profiler.profile() if profiled else contextlib.nullcontext() as profile:
            begun, processor = time.perf_counter(), time.process_time()
            loss, norm = make(model, optimizer, step, factor, rates["clip_norm"])
            seconds, processor = time.perf_counter() - begun, time.process_time() - processor
        made = {"losses": loss, "grad_norms": norm, "seconds": seconds, "processor_seconds": processor}
        for key, value in made.items():
            report.setdefault(key, []).append(value)
        print(f"step {number}: loss {loss:.6f}, gradient norm {norm:.4f}, {seconds:.3f} s", flush=True)
        if profiled:
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    report["peak_bytes"] = memory.peak_bytes(device)
    report["tokens"], report["samples"] = [step.tokens for step in steps], [step.samples for step in steps]
    report["padded_tokens"] = [sum(batch.ids.numel() for batch in step.batches) for step in steps]
    timed = sum(report["tokens"][args.warmup :]) / sum(report["seconds"][args.warmup :])
    print(f"{timed:.1f} tokens/s, peak memory {report['peak_bytes'] / 1e6:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
