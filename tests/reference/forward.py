#!/usr/bin/env python3
"""Times transformers on the work of `bench_forward`: a vision transformer's forward pass, and greedy generation.

    .venv/bin/python tests/reference/forward.py vit DIR [--device cpu|cuda] [--repeats 3] [--json FILE]
    .venv/bin/python tests/reference/forward.py generate --llm FOLDER --prompt 1,2,3 --new-tokens 64

`DIR` is what `bench_forward vit --dump DIR` wrote; features that differ from those there end the comparison.
On the CPU everything is fp32, on CUDA bf16.
"""

import argparse
import json
import time
from pathlib import Path

import memory
import torch
from safetensors.torch import load_file
from transformers import Aimv2VisionConfig, Aimv2VisionModel, AutoModelForCausalLM

# Largest difference of a feature, as a share of the largest one: of fp32, and of bf16.
LIMITS = {"cpu": 1e-4, "cuda": 1e-1}


def vit(args):
    """The call to time, how many patches it computes, and its result as a list."""
    config = Aimv2VisionConfig(**json.loads((args.dump / "config.json").read_text()))
    with torch.device("meta"):
        model = Aimv2VisionModel._from_config(config, attn_implementation="sdpa")
    weights = {name: tensor.clone() for name, tensor in load_file(args.dump / "weights.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    side = config.image_size // config.patch_size
    # An index that no file has.
    assert not unexpected and missing in ([], ["embeddings.position_ids"]), (missing, unexpected)
    model.embeddings.register_buffer("position_ids", torch.arange(side**2)[None], persistent=False)
    model.to(args.device, args.dtype).eval()
    seen = {name: x.to(args.device, args.dtype) for name, x in load_file(args.dump / "features.safetensors").items()}

    def forward():
        return model(pixel_values=seen["pixels"]).last_hidden_state

    error = ((forward() - seen["features"]).abs().max() / seen["features"].abs().max()).item()
    # Written so that what is not a number fails.
    if not error <= LIMITS[args.device]:
        raise SystemExit(f"error: features differ by {error:.1e} of the largest one")
    return forward, len(seen["pixels"]) * side**2


def generate(args):
    model = AutoModelForCausalLM.from_pretrained(args.llm, dtype=args.dtype, attn_implementation="sdpa")
    model.to(args.device).eval()
    # Nothing ends it early.
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([[int(token) for token in args.prompt.split(",")]], device=args.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": args.new_tokens}
    return lambda: model.generate(prompt, **options)[0, prompt.shape[1] :], args.new_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = parser.add_subparsers(dest="work", required=True)
    of_vit = works.add_parser("vit")
    of_vit.add_argument("dump", type=Path)
    of_llm = works.add_parser("generate")
    of_llm.add_argument("--llm", type=Path, required=True)
    of_llm.add_argument("--prompt", required=True)
    of_llm.add_argument("--new-tokens", type=int, default=64)
    for work in (of_vit, of_llm):
        work.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        work.add_argument("--repeats", type=int, default=3)
        work.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    device = torch.device(args.device)

    def settled():
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        call, tokens = {"vit": vit, "generate": generate}[args.work](args)
        memory.forget_peak(device)
        report = {"before_bytes": memory.taken_bytes(device), "seconds": [], "processor_seconds": [], "tokens": tokens}
        result = call()
        settled()
        for _ in range(args.repeats):
            begun, processor = time.perf_counter(), time.process_time()
            call()
            settled()
            report["seconds"].append(time.perf_counter() - begun)
            report["processor_seconds"].append(time.process_time() - processor)
            print(f"{report['seconds'][-1]:.3f} s, {tokens / report['seconds'][-1]:.1f} tokens/s", flush=True)
    report["ids"] = result.tolist() if args.work == "generate" else []
    report["peak_bytes"] = memory.peak_bytes(device)
    print(f"peak memory {report['peak_bytes'] / 1e6:.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
