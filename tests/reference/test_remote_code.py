#!/usr/bin/env python3
"""Checks the Python code of exported models (crates/sail-train/remote_code) against transformers.

    .venv/bin/python tests/reference/test_remote_code.py

Writes small random models in the SAIL layout, loads them as a user does, with `AutoModel` and
`trust_remote_code`, and compares with transformers' own models, from whose weights they were written.
Nothing here is trained, and nothing needs the network. Prints a line per check; takes about 20 seconds.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REMOTE_CODE = ROOT / "crates" / "sail-train" / "remote_code"
TOKENIZER = ROOT / "configs" / "tiny" / "tokenizer.json"
SCRATCH = tempfile.TemporaryDirectory()
# Before transformers is imported: loaded code is copied here, and nothing is looked up on the network.
os.environ.update(HF_MODULES_CACHE=f"{SCRATCH.name}/modules", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

IMAGE_TOKENS = {"start": "<img>", "context": "<IMG_CONTEXT>", "end": "</img>"}
STRUCTURE = ["<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]
SAILVIT = {
    "model_type": "sailvit", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_channels": 3, "image_size": 56, "patch_size": 14, "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0, "projection_dropout": 0.0, "qkv_bias": False, "use_bias": False,
}
DINOV2 = {
    "model_type": "dinov2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 42, "patch_size": 14, "mlp_ratio": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 42, "patch_size": 14,
}
LLM = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    # Wide, so that the answers differ and no two scores are nearly the same.
    "initializer_range": 0.3,
}
# Name, vision config, LLM config, downsample_ratio, template, system message, its default, separator.
MODELS = [
    ("sailvit-qwen3", SAILVIT, {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, **LLM}, 0.5, "chatml", "", "", "\n"),
    ("dinov2-llama", DINOV2, {"model_type": "llama", "tie_word_embeddings": True, **LLM}, 1.0, "smollm", "",
     "You are a helpful AI assistant named SmolLM, trained by Hugging Face", "\n"),
    ("sailvit-qwen2", SAILVIT, {"model_type": "qwen2", "tie_word_embeddings": False, **LLM}, 0.25, "univl-chat", "Be brief.", "Be brief.", ""),
    ("siglip-llama", SIGLIP, {"model_type": "llama", "tie_word_embeddings": False, **LLM}, 0.5, "sail", "", "", ""),
]
PX = 56  # of a tile
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def randomise(module):
    """Weights that no initialisation gives, so that a weight left out is seen."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return module.eval()


def aimv2(config):
    """transformers' model of the same architecture as a sailvit config."""
    own = {key: value for key, value in config.items() if key not in ("model_type", "use_bias", "projection_dropout")}
    reference = AutoConfig.for_model("aimv2_vision_model", **own, mlp_bias=config["use_bias"], use_head=False, is_native=False)
    return randomise(AutoModel.from_config(reference))


def to_sail_names(weights):
    """The weights of an `Aimv2VisionModel` in the original layout."""
    fixed = {
        "embeddings.patch_embed.weight": "preprocessor.patchifier.proj.weight",
        "embeddings.patch_embed.bias": "preprocessor.patchifier.proj.bias",
        "embeddings.rms_norm.weight": "preprocessor.patchifier.norm.weight",
        "rms_norm.weight": "trunk.post_trunk_norm.weight",
    }
    parts = {
        "attention.out_proj": "attn.proj", "ffn.gate_proj": "mlp.fc1", "ffn.down_proj": "mlp.fc2",
        "ffn.up_proj": "mlp.fc3", "rms_norm1": "norm_1", "rms_norm2": "norm_2",
    }
    out = {}
    for name, tensor in weights.items():
        if name == "embeddings.position_embedding.weight":
            out["preprocessor.pos_embed"] = tensor[None]
        elif name in fixed:
            out[fixed[name]] = tensor
        else:
            index, rest = name.removeprefix("encoder.layers.").split(".", 1)
            part, kind = rest.rsplit(".", 1)
            if part == "attention.q_proj":
                qkv = [weights[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
                out[f"trunk.blocks.{index}.attn.qkv.{kind}"] = torch.cat(qkv)
            elif part not in ("attention.k_proj", "attention.v_proj"):
                out[f"trunk.blocks.{index}.{parts[part]}.{kind}"] = tensor
    return out


def write_folder(folder, config, tensors):
    """A folder as the exporter writes it."""
    folder.mkdir()
    for source in REMOTE_CODE.glob("*.py"):
        shutil.copy(source, folder)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_mllm(folder, vision_config, llm_config, ratio, template, message, system, separator):
    """Writes a model and returns transformers' parts of it: vision model, projector's weights, LLM."""
    is_sail = vision_config["model_type"] == "sailvit"
    vision = aimv2(vision_config) if is_sail else randomise(AutoModel.from_config(AutoConfig.for_model(**vision_config)))
    llm = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(**llm_config)))
    width = int(1 / ratio) ** 2 * vision_config["hidden_size"]
    d = llm_config["hidden_size"]
    shapes = {"0.weight": [width], "0.bias": [width], "1.weight": [d, width], "1.bias": [d], "3.weight": [d, d], "3.bias": [d]}
    mlp = {name: torch.randn(shape) * (1.0 if len(shape) == 1 else shape[-1] ** -0.5) for name, shape in shapes.items()}
    tensors = {f"mlp1.{name}": tensor for name, tensor in mlp.items()}
    weights = to_sail_names(vision.state_dict()) if is_sail else vision.state_dict()
    if vision_config["model_type"] == "siglip_vision_model":
        # The published name, which transformers 4 has too and 5 takes for its own.
        weights = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in weights.items()}
    tensors |= {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in llm.state_dict().items()}
    assert "language_model.lm_head.weight" in tensors
    vocabulary = Tokenizer.from_file(str(TOKENIZER))
    auto_map = {"AutoConfig": "configuration_sailvl.SAILVLConfig", "AutoModel": "modeling_sailvl.SAILVLModel",
                "AutoModelForCausalLM": "modeling_sailvl.SAILVLModel"}
    write_folder(folder, {
        "architectures": ["SAILVLModel"], "model_type": "sailvl", "auto_map": auto_map, "dtype": "float32",
        "downsample_ratio": ratio, "dynamic_image_size": False, "force_image_size": PX, "max_dynamic_patch": 1,
        "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1, "template": template, "use_thumbnail": True,
        "system_message": message, **{f"image_{part}_token": token for part, token in IMAGE_TOKENS.items()},
        "image_context_token_id": vocabulary.token_to_id(IMAGE_TOKENS["context"]),
        "tie_word_embeddings": llm_config["tie_word_embeddings"], "vision_config": vision_config, "llm_config": llm_config,
    }, tensors)
    shutil.copy(TOKENIZER, folder)
    chat_template = (REMOTE_CODE / "chat_template.jinja").read_text(encoding="utf-8")
    for name, value in [("@SYSTEM@", system), ("@SEPARATOR@", separator), ("@IMAGE@", "<image>")]:
        chat_template = chat_template.replace(name, json.dumps(value))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": STRUCTURE, "model_max_length": llm_config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False, "chat_template": chat_template,
    })
    write_json(folder / "generation_config.json", {
        "do_sample": False, "eos_token_id": [vocabulary.token_to_id("<|im_end|>")],
        "pad_token_id": vocabulary.token_to_id("<|endoftext|>"),
    })
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": PX, "width": PX}, "resample": 3, "do_center_crop": False, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    })
    return vision, mlp, llm


def load(folder, **options):
    """The model and tokenizer as a user loads them; no key may be missing or left over, nothing is warned of."""
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    wrong = {kind: keys for kind, keys in report.items() if keys}
    assert not wrong, f"{folder.name}: {wrong}"
    return model.eval()


def relative(ours, theirs):
    """Largest difference in units of the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check_vit(bias):
    config = {**SAILVIT, "qkv_bias": bias, "use_bias": bias}
    reference = aimv2(config)
    folder = Path(SCRATCH.name) / f"vit-{bias}"
    auto_map = {"AutoConfig": "configuration_sailvit.SAILViTConfig", "AutoModel": "modeling_sailvit.SAILViTModel"}
    write_folder(folder, {"architectures": ["SAILViTModel"], "auto_map": auto_map, "dtype": "float32", **config}, to_sail_names(reference.state_dict()))
    model = load(folder)
    differences = []
    with torch.no_grad():
        # A larger and a smaller grid: transformers does not resample the positions, so it gets a resampled table.
        for px in (PX, 84, 42):
            side = px // 14
            table = reference.embeddings.position_embedding.weight.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
            resampled = {"embeddings.position_embedding.weight": table.permute(0, 2, 3, 1).reshape(side**2, -1)}
            theirs = aimv2({**config, "image_size": px})
            theirs.load_state_dict({**reference.state_dict(), **(resampled if px != PX else {})})
            pixels = torch.randn(3, 3, px, px)
            differences.append(relative(model(pixels).last_hidden_state, theirs(pixels).last_hidden_state))
        # In bf16, where the norms would show another order of casts.
        half, pixels = load(folder, dtype=torch.bfloat16), torch.randn(3, 3, PX, PX)
        coarse = relative(half(pixels).last_hidden_state, reference.bfloat16()(pixels.bfloat16()).last_hidden_state)
    assert max(differences) < 1e-6 and coarse < 1e-6, (differences, coarse)
    raises("do not divide into patches", lambda: model(torch.randn(1, 3, 57, 56)))
    shown = ", ".join(f"{difference:.1e}" for difference in differences)
    print(f"ok: SAILViT, bias {bias}: relative difference at its size, a larger and a smaller one {shown}; in bf16 {coarse:.1e}")


def features_of(vision, mlp, pixels, ratio):
    """Visual tokens, from the published steps of the pixel shuffle."""
    grid = PX // 14
    options = {"interpolate_pos_encoding": True} if vision.config.model_type == "siglip_vision_model" else {}
    x = vision(pixels, **options).last_hidden_state[:, -grid * grid:]
    x = x.reshape(-1, grid, grid, x.shape[-1])
    n, side, _, c = x.shape
    small = int(side * ratio)
    x = x.reshape(n, side, small, int(c / ratio)).permute(0, 2, 1, 3)
    x = x.reshape(n, small, small, int(c / ratio**2)).permute(0, 2, 1, 3)
    x = F.layer_norm(x.flatten(1, 2), [x.shape[-1]], mlp["0.weight"], mlp["0.bias"], 1e-5)
    return F.linear(F.gelu(F.linear(x, mlp["1.weight"], mlp["1.bias"])), mlp["3.weight"], mlp["3.bias"])


def prompt_of(system, separator, turns, blocks):
    """Ids of a conversation, by the tokenizers library and the rules of crates/sail-data/src/text.rs."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in STRUCTURE])
    tokenizer.encode_special_tokens = True
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    start, end, image_start, image_context, image_end = map(tokenizer.token_to_id, STRUCTURE)
    ids, blocks = [], list(blocks)
    if system:
        ids += [start, *plain(f"system\n{system}"), end, *plain(separator)]
    for question, answer in turns:
        ids.append(start)
        for index, piece in enumerate(f"user\n{question}".split("<image>")):
            ids += [image_start, *[image_context] * blocks.pop(0), image_end] if index else []
            ids += plain(piece)
        ids += [end, *plain(separator), start, *plain("assistant\n")]
        ids += [*plain(answer), end, *plain(separator)] if answer is not None else []
    return ids


def embeddings_of(llm, ids, features, context_id):
    """Embeddings with the features put in one by one."""
    embeds = llm.get_input_embeddings()(torch.tensor([ids])).clone()
    rows = [row for row, token in enumerate(ids) if token == context_id]
    assert len(rows) == len(features)
    for row, feature in zip(rows, features):
        embeds[0, row] = feature
    return embeds


def greedy(llm, embeds, count, stops):
    """The likeliest token each time, without a cache."""
    new_ids = []
    while len(new_ids) < count and not (new_ids and new_ids[-1] in stops):
        new_ids.append(llm(inputs_embeds=embeds).logits[0, -1].argmax().item())
        embeds = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([new_ids[-1:]]))], 1)
    return new_ids


def raises(part, call):
    try:
        call()
    except ValueError as error:
        assert part in str(error), error
        return
    raise AssertionError(f"no ValueError: {part}")


@torch.no_grad()
def check_mllm(name, vision_config, llm_config, ratio, template, message, system, separator):
    folder = Path(SCRATCH.name) / name
    vision, mlp, llm = write_mllm(folder, vision_config, llm_config, ratio, template, message, system, separator)
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == llm_config["tie_word_embeddings"]

    pixels = torch.randn(5, 3, PX, PX)
    features = features_of(vision, mlp, pixels, ratio)
    ours = model.extract_feature(pixels)
    difference = relative(ours, features)
    assert difference < 1e-5, difference
    per_tile = model.tokens_per_tile(pixels)
    assert per_tile == features.shape[1] == (PX / 14 * ratio) ** 2

    # Two images of 3 and 2 tiles, one in each question.
    context_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["context"])
    turns = [("<image>\nWhat is <|im_end|> here? 12", "A <image> of a dog."), ("And <image> here?", None)]
    ids = prompt_of(system, separator, turns, [3 * per_tile, 2 * per_tile])
    assert model.prompt_ids(tokenizer, turns[1][0], pixels, turns[:1], [3, 2]) == ids
    embeds = embeddings_of(llm, ids, features.flatten(0, 1), context_id)
    labels = torch.tensor([[-100] * (len(ids) - 5) + ids[-5:]])
    expected = llm(inputs_embeds=embeds, labels=labels)
    output = model(pixel_values=pixels, input_ids=torch.tensor([ids]), labels=labels)
    logits_difference = relative(output.logits, expected.logits)
    assert logits_difference < 1e-5 and abs(output.loss - expected.loss) < 1e-4, (logits_difference, output.loss, expected.loss)

    # A padded batch: the other sequence is text alone.
    short = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    batch = torch.tensor([ids, [0] * (len(ids) - len(short)) + short])
    mask = torch.ones_like(batch)
    mask[1, : -len(short)] = 0
    batched = model(pixel_values=pixels, input_ids=batch, attention_mask=mask).logits
    assert relative(batched[:1], expected.logits) < 1e-5

    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    naive = greedy(llm, embeds, 12, stops)
    assert model.generate(pixels, torch.tensor([ids]), max_new_tokens=12)[0].tolist() == naive
    options = dict(do_sample=False, max_new_tokens=12, top_p=None)
    answer, history = model.chat(
        tokenizer, pixel_values=pixels, num_patches_list=[3, 2], question=turns[1][0], generation_config=options,
        history=turns[:1], return_history=True,
    )
    assert answer == tokenizer.decode(naive, skip_special_tokens=True).strip() and options["max_new_tokens"] == 12
    assert history == [turns[0], (turns[1][0], answer)], history

    # The template of the tokenizer writes the same text, images still as marks.
    messages = [{"role": role, "content": text} for role, text in [("user", "Q \"1\""), ("assistant", "A."), ("user", "R")]]
    messages[2]["content"] = [{"type": "text", "text": "R"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == prompt_of(system, separator, [("Q \"1\"", "A."), ("R", None)], []), text
    text = tokenizer.apply_chat_template([{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    assert text == f"<|im_start|>system\n<|im_end|>{separator}<|im_start|>user\n<image><|im_end|>{separator}", text

    # Where the answer would end, it ends: the third token made the end of the turn.
    ending = {"eos_token_id": naive[2], "max_new_tokens": 12}
    assert model.generate(pixels, torch.tensor([ids]), **ending)[0].tolist() == greedy(llm, embeds, 12, naive[2:3])

    # A chat ends at the tokenizer's own end, and at the end of the turn whatever the tokenizer's is.
    def ask(eos_token):
        other = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, eos_token=eos_token)
        return model.chat(other, pixels, turns[1][0], options, history=turns[:1], num_patches_list=[3, 2])

    cut = tokenizer.decode(naive[: naive.index(naive[2])]).strip()
    assert ask(tokenizer.convert_ids_to_tokens(naive[2])) == cut
    if not tied:
        rows = model.get_output_embeddings().weight
        exchanged = rows[[naive[2], stops[0]]]
        rows[[stops[0], naive[2]]] = exchanged
        assert ask("<|endoftext|>") == cut
        rows[[naive[2], stops[0]]] = exchanged

    # Marks are placed where there is none; text alone; the mistakes.
    chat = lambda question, tiles, **rest: model.chat(tokenizer, tiles, question, options, return_history=True, **rest)
    for marks, counts in [(1, None), (2, [4, 1])]:
        expected_ids = prompt_of(system, separator, [("<image>\n" * marks + "Q", None)], [per_tile * n for n in counts or [5]])
        text = tokenizer.decode(greedy(llm, embeddings_of(llm, expected_ids, features.flatten(0, 1), context_id), 12, stops), skip_special_tokens=True)
        assert chat("Q", pixels, num_patches_list=counts) == (text.strip(), [("<image>\n" * marks + "Q", text.strip())])
    alone = greedy(llm, embeddings_of(llm, prompt_of(system, separator, [("Q", None)], []), [], context_id), 12, stops)
    assert chat("Q", None, num_patches_list=[])[0] == tokenizer.decode(alone, skip_special_tokens=True).strip()
    raises("2 <image> marks, but 1 images", lambda: chat("<image> <image>", pixels))
    raises("1 <image> marks, but 0 images", lambda: chat("<image>", None))
    raises("num_patches_list has 4 tiles, pixel_values 5", lambda: chat("Q", pixels, num_patches_list=[4]))
    raises("do not divide into squares", lambda: model.extract_feature(pixels[..., :-1]))
    for tiles in (pixels[:4], None):
        features_found = 0 if tiles is None else 4 * per_tile
        message = f"{5 * per_tile} image context tokens, but {features_found} visual features"
        raises(message, lambda: model(pixel_values=tiles, input_ids=torch.tensor([ids])))
        raises(message, lambda: model.generate(tiles, torch.tensor([ids])))

    # As VLMEvalKit's `SailVL` loads and calls it.
    half = load(folder, dtype=torch.bfloat16, low_cpu_mem_usage=True, load_in_8bit=False)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config.vision_config.image_size == vision_config["image_size"]
    coarse = relative(half.extract_feature(pixels).float(), features)
    half.chat(tokenizer, pixel_values=pixels[:1].bfloat16(), num_patches_list=[1], question="<image>\nQ", generation_config=options)

    # Saved by transformers and loaded again.
    again = Path(SCRATCH.name) / f"{name}-again"
    model.save_pretrained(again)
    assert load(again).extract_feature(pixels).equal(ours)
    print(
        f"ok: {name}: relative difference of features {difference:.1e} (bf16 {coarse:.1e}), of logits "
        f"{logits_difference:.1e}; {len(ids)} ids, answer {naive}"
    )


def check_script():
    """scripts/check_mllm_export.py: tiling, agreement, and how it says that answers differ."""
    spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check_mllm_export.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tiling = {"dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12, "force_image_size": 448}
    grids = {(800, 400): (2, 1), (1792, 1344): (4, 3), (100, 2470): (1, 12), (448, 448): (1, 1), (634, 634): (2, 2), (633, 633): (1, 1), (2000, 2000): (3, 3)}
    assert {size: script.choose_grid(*size, tiling) for size in grids} == grids

    folder = Path(SCRATCH.name) / MODELS[0][0]
    config = json.loads((folder / "config.json").read_text())
    config |= {"dynamic_image_size": True, "max_dynamic_patch": 4}
    write_json(folder / "config.json", config)
    rgba = np.random.default_rng(0).integers(0, 256, (70, 140, 4), dtype=np.uint8)
    wide, grey = Path(SCRATCH.name) / "wide.png", Path(SCRATCH.name) / "grey.png"
    Image.fromarray(rgba).save(wide)
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 257).save(grey)
    # Two tiles side by side and the thumbnail, from the colours alone.
    rgb = Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    halves = np.split(np.asarray(rgb.resize((2 * PX, PX), Image.Resampling.BICUBIC)), 2, axis=1)
    tiles = np.stack([*halves, np.asarray(rgb.resize((PX, PX), Image.Resampling.BICUBIC))])
    pixels = (torch.tensor(tiles).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    found = script.load_tiles(script.load_rgb(wide), config, {"image_mean": MEAN, "image_std": STD})
    assert found.shape == pixels.shape and (found - pixels).abs().max() < 1e-6
    assert script.load_rgb(grey).tobytes() == Image.fromarray(rgba[..., 0]).convert("RGB").tobytes()

    def run(*arguments):
        """Exit status, answers and error of the script."""
        out, errors = io.StringIO(), io.StringIO()
        sys.argv = ["check_mllm_export.py", str(folder), "--tokens", "5", "--image", str(wide), str(grey), *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = script.main()
        return status, [json.loads(line) for line in out.getvalue().splitlines()], errors.getvalue()

    status, answers, _ = run("--prompt", "Q")
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = model.chat(tokenizer, pixels, "Q", {"max_new_tokens": 5})
    assert status == 0 and [len(answer["ids"]) for answer in answers] == [5, 5] and answers[0]["text"].strip() == text
    expected = Path(SCRATCH.name) / "expected.json"
    write_json(expected, answers)
    assert run("--prompt", "Q", "--expect", str(expected))[0] == 0
    answers[1]["ids"][3] += 1
    write_json(expected, answers)
    status, _, error = run("--prompt", "Q", "--expect", str(expected))
    assert status == 1 and "grey.png: token 3 is" in error, error
    print("ok: check_mllm_export.py: tiles, agreement and difference")


class NoWarnings(logging.Handler):
    """transformers warns of what it repairs."""

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            raise AssertionError(record.getMessage())


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hf_logging.disable_progress_bar()
    hf_logging.get_logger("transformers").addHandler(NoWarnings())
    check_vit(bias=False)
    check_vit(bias=True)
    for model in MODELS:
        check_mllm(*model)
    check_script()


if __name__ == "__main__":
    sys.exit(main())
