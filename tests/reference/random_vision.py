"""Writes N vision models of transformers per family, each of a random configuration drawn with SEED, and what
they give, as folders FAMILY-I of OUT_DIR like those of goldens/make_vision.py, and one more inside a larger
model's files as FAMILY-inside; tests/tests/parity_vision.rs runs it and compares.

    python tests/reference/random_vision.py N SEED OUT_DIR
    python tests/reference/random_vision.py check OUT_DIR

`check` loads the folder `exported` of each, which must hold the same tensors under the names that
transformers' class has, none missing and none unexpected.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    logging,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "goldens"))
from make_vision import vision  # noqa: E402


def common(rng):
    heads = rng.randint(1, 4)
    patch, side = rng.choice([2, 3, 4, 5, 7]), rng.randint(2, 5)
    return {
        "hidden_size": heads * rng.randint(5, 13),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": side * patch + rng.choice([0, 0, rng.randrange(patch)]),
        "attn_implementation": "eager",
    }


def eps(rng):
    return rng.choice([1e-6, 1e-5, 1e-4])


def flag(rng):
    return rng.random() < 0.5


def gelu(rng):
    return rng.choice(["gelu", "gelu_pytorch_tanh"])


def aimv2(rng):
    fields = common(rng)
    native = flag(rng)
    while native and fields["hidden_size"] % 4 != 0:
        fields["hidden_size"] += fields["num_attention_heads"]
    fields |= {"intermediate_size": rng.randint(5, 70), "qkv_bias": flag(rng), "mlp_bias": flag(rng)}
    return Aimv2VisionConfig(**fields, is_native=native, use_head=False, rms_norm_eps=eps(rng))


def dinov2(rng):
    fields = common(rng) | {"mlp_ratio": rng.randint(1, 4), "qkv_bias": flag(rng), "hidden_act": gelu(rng)}
    return Dinov2Config(**fields, use_mask_token=flag(rng), layer_norm_eps=eps(rng))


def internvit(rng):
    fields = common(rng) | {"intermediate_size": rng.randint(5, 70), "hidden_act": gelu(rng)}
    fields |= {"norm_type": rng.choice(["layer_norm", "rms_norm"]), "layer_norm_eps": eps(rng)}
    fields |= {"attention_bias": flag(rng), "use_qk_norm": flag(rng), "use_mask_token": flag(rng)}
    fields |= {"use_absolute_position_embeddings": flag(rng), "use_mean_pooling": flag(rng)}
    return InternVLVisionConfig(**fields)


def siglip(rng):
    fields = common(rng) | {"intermediate_size": rng.randint(5, 70), "hidden_act": gelu(rng)}
    return SiglipVisionConfig(**fields, layer_norm_eps=eps(rng), vision_use_head=False)


def larger(config):
    """A model that holds one of this configuration, and that part of it."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision_config = config.to_dict()
    match config.model_type:
        case "aimv2_vision_model":
            model = Aimv2Model(Aimv2Config(text_config=text, vision_config=vision_config))
            return model, model.vision_model
        case "dinov2":
            model = Dinov2ForImageClassification(config)
            return model, model.dinov2
        case "internvl_vision":
            text |= {"model_type": "qwen2", "num_key_value_heads": 1}
            whole = InternVLConfig(text_config=text, vision_config=vision_config, image_token_id=3)
            model = InternVLForConditionalGeneration(whole)
            return model, model.model.vision_tower
        case "siglip_vision_model":
            del vision_config["vision_use_head"]
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision_config))
            return model, model.vision_model


def write(count, seed, out):
    for family in (aimv2, dinov2, internvit, siglip):
        for i in [*range(count), "inside"]:
            rng = random.Random(f"{seed} {family.__name__} {i}")
            config = family(rng)
            patch, image = config.patch_size, config.image_size
            (patch, image) = (patch[0], image[0]) if isinstance(patch, (list, tuple)) else (patch, image)
            # At least two patches: of one alone, queries and keys have no gradient.
            sizes = [(image, image), (rng.randint(1, 6) * patch, rng.randint(2, 6) * patch)]
            sizes += [(rng.randint(2, 6) * patch, rng.randint(1, 6) * patch)]
            generator = torch.Generator().manual_seed(rng.getrandbits(40))
            folder, model = out / f"{family.__name__}-{i}", AutoModel.from_config(config)
            vision(folder, model, sizes, generator)
            if i == "inside":
                whole, part = larger(config)
                assert not part.load_state_dict(model.state_dict(), strict=False).unexpected_keys
                whole.save_pretrained(folder)


def check(out):
    folders = sorted(path.parent for path in out.glob("*/exported"))
    assert folders, f"nothing in {out}"
    for folder in folders:
        expected = AutoModel.from_pretrained(folder)
        found, info = AutoModel.from_pretrained(folder / "exported", output_loading_info=True)
        assert type(found) is type(expected), (folder, type(found))
        assert not any(info.values()), (folder, info)
        expected, found = expected.state_dict(), found.state_dict()
        assert list(expected) == list(found), folder
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), (folder, name)
    print(f"{len(folders)} exports are those of transformers")


def main():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if sys.argv[1] == "check":
        check(Path(sys.argv[2]))
    else:
        count, seed, out = sys.argv[1:]
        write(int(count), seed, Path(out))


if __name__ == "__main__":
    main()
