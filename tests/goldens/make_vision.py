"""Writes aimv2/, dinov2/ and projector/ beside this file: small random vision models of transformers,
the projector of the InternVL code, and what they give, for tests/tests/parity_vision.rs.

    python tests/goldens/make_vision.py        (packages: requirements-reference.txt)

aimv2/ and dinov2/ hold config.json and model.safetensors as `save_pretrained` writes them, and
golden.safetensors with, for case i (one size of images each; sizes other than the configured one need
the position table resampled, which this script adds to AIMv2):
    pixels.i [n, 3, height, width]          last_hidden_state.i [n, tokens, hidden]
    weight.i                                as last_hidden_state.i; the loss is sum(weight * output)
    grad.i.pixels, grad.i.NAME              gradients of the loss; a parameter without one is absent
projector/ holds model.safetensors with the parameters, and golden.safetensors with
    features [n, patches, hidden]   output [n, tokens, width]   weight   grad.features   grad.NAME
Everything is fp32.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel, Dinov2Config, Dinov2Model

HERE = Path(__file__).parent
PATCH = 4
MERGE = 2


def randomise(model, generator):
    """Weights far from their initialisation, so that a norm, a bias or a scale left out shows."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1 and not name.endswith("bias"):
                param.uniform_(0.5, 1.5, generator=generator)
            elif param.dim() == 1 or "token" in name or "position" in name:
                param.normal_(0, 0.5, generator=generator)
            else:
                fan_in = param[0].numel()
                param.normal_(0, 1.5 * fan_in**-0.5, generator=generator)


def weighted_gradients(model, output, generator):
    weight = torch.randn(output.shape, generator=generator)
    model.zero_grad(set_to_none=True)
    (weight * output).sum().backward()
    return weight, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def resample_positions(table, height, width):
    """Makes AIMv2's table give a row for each patch of another grid, as DINOv2's does."""
    side = int(table.num_embeddings**0.5)

    def forward(_ids):
        grid = table.weight.T.reshape(1, -1, side, side)
        grid = nn.functional.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2)

    table.forward = forward


def vision(name, model, sizes, generator):
    model.eval()
    randomise(model, generator)
    tensors = {}
    for i, (height, width) in enumerate(sizes):
        if name == "aimv2":
            resample_positions(model.embeddings.position_embedding, height // PATCH, width // PATCH)
        pixels = torch.randn(2, 3, height, width, generator=generator, requires_grad=True)
        output = model(pixel_values=pixels).last_hidden_state
        weight, gradients = weighted_gradients(model, output, generator)
        tensors |= {f"pixels.{i}": pixels.detach(), f"last_hidden_state.{i}": output.detach()}
        tensors |= {f"weight.{i}": weight, f"grad.{i}.pixels": pixels.grad}
        tensors |= {f"grad.{i}.{key}": grad for key, grad in gradients.items()}
    folder = fresh(name)
    model.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")


def pixel_shuffle_v2(x, scale_factor):
    """x [n, side, side, channels], as the InternVL code describes `ps_version: v2`."""
    n, width, height, channels = x.shape
    x = x.reshape(n, width, int(height * scale_factor), int(channels / scale_factor))
    x = x.permute(0, 2, 1, 3)
    x = x.reshape(n, int(height * scale_factor), int(width * scale_factor), int(channels / scale_factor**2))
    return x.permute(0, 2, 1, 3)


def projector(generator):
    n, side, channels, width = 2, 4, 12, 20
    merged = channels * MERGE**2
    mlp1 = nn.Sequential(nn.LayerNorm(merged), nn.Linear(merged, width), nn.GELU(), nn.Linear(width, width))
    randomise(mlp1, generator)
    features = torch.randn(n, side * side, channels, generator=generator, requires_grad=True)
    shuffled = pixel_shuffle_v2(features.reshape(n, side, side, channels), 1 / MERGE)
    output = mlp1(shuffled.reshape(n, -1, merged))
    weight, gradients = weighted_gradients(mlp1, output, generator)
    tensors = {"features": features.detach(), "output": output.detach(), "weight": weight}
    tensors |= {"grad.features": features.grad} | {f"grad.{key}": grad for key, grad in gradients.items()}
    folder = fresh("projector")
    save_file(dict(mlp1.state_dict()), folder / "model.safetensors", {"format": "pt"})
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")


def fresh(name):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": PATCH}
    common |= {"image_size": 4 * PATCH, "attn_implementation": "eager"}
    aimv2 = Aimv2VisionConfig(**common, intermediate_size=40, use_head=False, qkv_bias=True, mlp_bias=True)
    dinov2 = Dinov2Config(**common, mlp_ratio=2)
    vision("aimv2", Aimv2VisionModel(aimv2), [(16, 16), (12, 24)], generator)
    vision("dinov2", Dinov2Model(dinov2), [(16, 16), (20, 32), (12, 8)], generator)
    projector(generator)


if __name__ == "__main__":
    main()
