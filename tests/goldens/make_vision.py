"""Writes beside this file small random vision models of transformers and what they give, the projector of
the InternVL code, and the names of published sizes' tensors, for tests/tests/parity_vision.rs and sizes.rs.

    python tests/goldens/make_vision.py        (packages: requirements-reference.txt)

Each vision model's folder holds config.json and model.safetensors as `save_pretrained` writes them, and
golden.safetensors with, for case i (one size of images each; sizes other than the configured one need
the position table resampled, which this script adds to AIMv2):
    pixels.i [n, 3, height, width]          last_hidden_state.i [n, tokens, hidden]
    weight.i                                as last_hidden_state.i; the loss is sum(weight * output)
    grad.i.pixels, grad.i.NAME              gradients of the loss; a parameter without one is absent
projector/ holds model.safetensors with the parameters, and golden.safetensors with
    features [n, patches, hidden]   output [n, tokens, width]   weight   grad.features   grad.NAME
Everything is fp32. vision_keys.txt holds, for each model, its config.json on one line and one line
`COUNT NAME SHAPE` for each name, `*` in the place of a block's number.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

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


def last_hidden_state(model, pixels):
    """The model at any size of images, its positions resampled where they are a table."""
    config = model.config
    if config.model_type == "siglip_vision_model":
        return model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    if config.model_type == "aimv2_vision_model" and not config.is_native:
        height, width = (side // config.patch_size for side in pixels.shape[2:])
        resample_positions(model.embeddings.position_embedding, height, width)
    return model(pixel_values=pixels).last_hidden_state


def vision(folder, model, sizes, generator):
    model.eval()
    randomise(model, generator)
    tensors = {}
    for i, (height, width) in enumerate(sizes):
        pixels = torch.randn(2, 3, height, width, generator=generator, requires_grad=True)
        output = last_hidden_state(model, pixels)
        weight, gradients = weighted_gradients(model, output, generator)
        tensors |= {f"pixels.{i}": pixels.detach(), f"last_hidden_state.{i}": output.detach()}
        tensors |= {f"weight.{i}": weight, f"grad.{i}.pixels": pixels.grad}
        tensors |= {f"grad.{i}.{key}": grad for key, grad in gradients.items()}
    fresh(folder)
    model.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")


def keys(configs):
    lines = []
    for config in configs:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        names = Counter()
        for name, tensor in model.state_dict().items():
            names[f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {list(tensor.shape)}"] += 1
        lines.append(json.dumps(config.to_diff_dict()))
        lines += [f"{count} {name}" for name, count in sorted(names.items())]
    (HERE / "vision_keys.txt").write_text("\n".join(lines) + "\n")


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
    folder = HERE / "projector"
    fresh(folder)
    save_file(dict(mlp1.state_dict()), folder / "model.safetensors", {"format": "pt"})
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "golden.safetensors")


def fresh(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    common = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": PATCH}
    common |= {"image_size": 4 * PATCH, "attn_implementation": "eager"}
    aimv2 = Aimv2VisionConfig(**common, intermediate_size=40, use_head=False, qkv_bias=True, mlp_bias=True)
    dinov2 = Dinov2Config(**common, mlp_ratio=2)
    vision(HERE / "aimv2", Aimv2VisionModel(aimv2), [(16, 16), (12, 24)], generator)
    vision(HERE / "dinov2", Dinov2Model(dinov2), [(16, 16), (20, 32), (12, 8)], generator)
    projector(generator)

    native = Aimv2VisionConfig(**common, intermediate_size=40, use_head=False, is_native=True)
    vision(HERE / "aimv2_native", Aimv2VisionModel(native), [(16, 16), (8, 20)], generator)
    # Two pixels more than four patches.
    siglip = SiglipVisionConfig(**common | {"image_size": 18}, intermediate_size=40, vision_use_head=False)
    vision(HERE / "siglip", SiglipVisionModel(siglip), [(18, 18), (12, 24)], generator)
    large = InternVLVisionConfig(
        **common, intermediate_size=40, attention_bias=True, use_qk_norm=True, norm_type="rms_norm"
    )
    vision(HERE / "internvit", InternVLVisionModel(large), [(16, 16), (12, 24)], generator)
    small = InternVLVisionConfig(
        **common | {"num_hidden_layers": 1}, intermediate_size=40, use_mask_token=True, use_mean_pooling=False
    )
    vision(HERE / "internvit_norm", InternVLVisionModel(small), [(16, 16)], generator)

    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    huge = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "image_size": 448}
    keys([
        Aimv2VisionConfig(**huge, use_head=False),
        Dinov2Config(),
        InternVLVisionConfig(attention_bias=True),
        SiglipVisionConfig(**so400m, image_size=384, patch_size=14, vision_use_head=False),
    ])


if __name__ == "__main__":
    main()
