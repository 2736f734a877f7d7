"""Makes the folders that ``qwen_score`` reads of the published VideoAlign and HPSv3, once.

Only tensors are read, and no code is run.  What is written: Qwen2-VL as safetensors with any LoRA merged, the head, the
tokenizer with the special tokens, and ``reading.json``: the text that the reward is asked with, its dimensions, their
means and deviations, the size and number of frames.  The text is the authors' own, a constant in their source file.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2VLModel

from prfl.backbone.weights import without_weights
from prfl.reward import hpsv3, videoalign
from prfl.reward.public import load_error
from prfl.reward.published import published_tensors
from prfl.reward.qwen_score import HEAD, PROMPT, READING, Reading
from prfl.reward.tokens import load_tokenizer
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_folder
from prfl.utils.reading import absent, text_of

EXAMPLE = "Qwen/Qwen2-VL-2B-Instruct"
VIDEO_FIX = "give the folder of KwaiVGI/VideoReward: model_config.json, and checkpoint-*/model.pth"
PICTURE_FIX = "give HPSv3.safetensors of MizzenAI/HPSv3"
TEXTS = {  # the constants that are put together, and where they are published
    "videoalign": (("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",), "prompt_template.py of github.com/KwaiVGI/VideoAlign"),
    "hpsv3": (
        ("INSTRUCTION", "prompt_with_special_token"), "hpsv3/dataset/data_collator_qwen.py of github.com/MizzenAI/HPSv3"
    ),
}  # fmt: skip


def convert_videoalign(checkpoint: Path, base: str, template: Path, out: Path) -> None:
    """Convert the folder of VideoAlign's checkpoint.

    base: the Qwen2-VL-2B that it is trained from, for its config and tokenizer.  template: the authors' file with the
    text.  Raises PrflError where a file is missing, or is not what it should be.
    """
    settings = _settings(checkpoint / "model_config.json")
    data, lora, norm = (settings.get(name) or {} for name in ("data_config", "peft_lora_config", "inference_config"))
    asked = (data.get("prompt_template_type"), data.get("sample_type", "uniform"), data.get("num_frames"))
    if asked != ("detailed_special", "uniform", None):
        what = f"is asked in another way than the published VideoAlign: {asked}"
        raise PrflError(what, where=str(checkpoint / "model_config.json"), fix=VIDEO_FIX)
    weights = max(checkpoint.glob("checkpoint-*/model.pth"), default=None, key=lambda path: path.stat().st_mtime)
    if weights is None:
        raise absent(checkpoint / "checkpoint-*" / "model.pth", VIDEO_FIX)

    names = videoalign.DIMENSIONS
    reading = {
        "tokens": videoalign.TOKENS, "dimensions": names, "pictures": videoalign.PICTURES,
        "mean": tuple(float(norm.get(f"{name}_mean", 0.0)) for name in names),
        "std": tuple(float(norm.get(f"{name}_std", 1.0)) for name in names),
        "most_pixels": int(data["max_frame_pixels"]), "fewest_pixels": videoalign.FEWEST_PIXELS,
        "fps": float(data["fps"]),
    }  # fmt: skip
    tensors = published_tensors(weights, "a VideoAlign", VIDEO_FIX)
    rank = lora.get("lora_r", 1)
    scale = lora.get("lora_alpha", 1) / (math.sqrt(rank) if lora.get("use_rslora") else rank)
    _write(merged(tensors, scale), reading, "video", base, text_in(template, "videoalign"), out, str(weights))


def convert_hpsv3(checkpoint: Path, base: str, template: Path, out: Path) -> None:
    """Convert HPSv3's file.  base: the Qwen2-VL-7B that it is trained from.  Raises PrflError."""
    reading = {
        "tokens": hpsv3.TOKENS, "dimensions": hpsv3.DIMENSIONS, "pictures": hpsv3.PICTURES, "mean": (0.0,),
        "std": (1.0,), "most_pixels": hpsv3.PIXELS, "fewest_pixels": hpsv3.PIXELS,
    }  # fmt: skip
    tensors = published_tensors(checkpoint, "an HPSv3", PICTURE_FIX)
    _write(merged(tensors, 1.0), reading, "image", base, text_in(template, "hpsv3"), out, str(checkpoint))


def _settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(text_of(path, VIDEO_FIX))
    except ValueError as error:
        raise PrflError(f"is not JSON: {error}", where=str(path), fix=VIDEO_FIX) from error


def text_in(path: Path, kind: str) -> str:
    """Read the text that a reward is asked with out of its authors' source, of which nothing is run."""
    wanted, source = TEXTS[kind]
    fix = f"give {source}"
    try:
        statements = ast.parse(text_of(path, fix)).body
    except (SyntaxError, ValueError) as error:
        raise PrflError(f"is no python source: {error}", where=str(path), fix=fix) from error
    texts = {
        target.id: str(statement.value.value)
        for statement in statements
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    if lacking := [name for name in wanted if name not in texts]:
        raise PrflError(f"has no text {' and '.join(lacking)}", where=str(path), fix=fix)
    return "".join(texts[name] for name in wanted).format(text_prompt=PROMPT)


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge a LoRA of peft's names into its matrices, W + scale B A, and drop peft's wrappings of the names."""
    plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    result = {}
    for name, value in plain.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if f"{stem}.lora_A.default.weight" in plain:
            a, b = (plain[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")
            value = (value.float() + scale * b @ a).to(value.dtype)
        result[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = value
    return result


def renamed(name: str) -> str:
    """The name of a tensor in transformers' Qwen2VLModel; older versions had the text side without a name."""
    if name.startswith(("model.visual.", "model.language_model.")):
        return name.removeprefix("model.")
    return re.sub(r"^model\.", "language_model.", name)


def base_config(base: str) -> Any:
    """Read the config of the Qwen2-VL that a reward is trained from: a folder or hub id.  Raises PrflError."""
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        kind = f"Qwen2-VL, as {EXAMPLE}"
        raise load_error(base, error, "config", kind, f"give the folder or hub id of a {kind}") from error


def _write(
    tensors: Mapping[str, Tensor], reading: dict[str, Any], kind: str, base: str, text: str, out: Path, where: str
) -> None:
    head = {name.removeprefix("rm_head."): value.float() for name, value in tensors.items() if "rm_head." in name}
    state = {renamed(name): value for name, value in tensors.items() if not name.startswith(("rm_head.", "lm_head."))}
    tokenizer = load_tokenizer(base, None, EXAMPLE)
    tokenizer.add_tokens(list(reading["tokens"]), special_tokens=True)
    config = base_config(base)
    fix = f"give the Qwen2-VL that it is trained from, not {base}"
    rows = len(state.get("language_model.embed_tokens.weight", ()))
    if rows != len(tokenizer):
        what = f"has {rows} words, and the base's tokenizer with the special ones {len(tokenizer)}"
        raise PrflError(what, where=where, fix=fix)

    config.text_config.vocab_size = rows
    with without_weights():
        network = Qwen2VLModel(config)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise PrflError(f"does not fit {base}: {' '.join(str(error).split())[:300]}", where=where, fix=fix) from error

    content = [{"type": kind, kind: ""}, {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    written = Reading(text=chat, **reading)
    with atomic_folder(out) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(head, folder / HEAD)
        (folder / READING).write_text(json.dumps(asdict(written), indent=1) + "\n", encoding="utf-8")
