"""Model folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.faults.planting import fault, lying
from tests.reward.test_aesthetic import tiny_clip
from tests.reward.tiny_rewards import open_clip_names
from tests.wan_experts import save_tiny_experts


@fault("a model that is not there", "nowhere: there is no such folder", "a diffusers pipeline folder or a hub id")
def _(bench):
    bench.patch.setenv("HF_HUB_OFFLINE", "1")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=./nowhere")


@fault("a safetensors file with a lying header", "model: cannot load the transformer")
def _(bench):
    lying(bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


def drop_one(path: Path, part: str) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in tensors if part in name)]
    save_file(tensors, path, metadata={"format": "pt"})


@fault("a model that lacks a weight", "model/transformer", "the file lacks blocks.0.attn1.to_q.weight", "again, whole")
def _(bench):
    drop_one(bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors", "attn1.to_q.weight")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


@fault("a checkpoint in one file that lacks a weight", "the file lacks blocks.0.attn1.to_q.weight", "this very model")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    drop_one(path, "attn1.to_q.weight")
    return bench.cli("train", "sft.yaml", "run=runs/new", f"backbone.weights.transformer={path}")


@fault("a checkpoint of a network that the model has not", "backbone.weights.unet", "networks are transformer, vae")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    return bench.cli("train", "sft.yaml", "run=runs/new", f"backbone.weights.unet={path}")


@fault("a LoRA of another model in the base", "backbone.base_lora", "1 of the file's 1 layers", "of this model")
def _(bench):
    layer = {
        "blocks.9.attn1.to_q.lora_A.weight": torch.ones(1, 24),
        "blocks.9.attn1.to_q.lora_B.weight": torch.ones(24, 1),
    }
    save_file(layer, "lora.safetensors")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.base_lora=lora.safetensors")


@fault("LoRA files of two experts for a model of one network", "backbone.base_lora", "no experts", "give one file")
def _(bench):
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.base_lora={high: high.safetensors}")


@fault("one LoRA file for two experts", "backbone.base_lora", "this is one file", "{high: FILE, low: FILE}")
def _(bench):
    model = save_tiny_experts(Path("tiny-a14b"))
    return bench.cli("train", "sft.yaml", "run=runs/new", f"backbone.model={model}", "backbone.base_lora=x.safetensors")


@fault("a model that is told nothing of its first frame", "backbone.first_frame", "a wan model", "leave it out")
def _(bench):
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.first_frame={motion_bucket_id: 60}")


@fault("a text encoder that lacks a weight", "model/text_encoder", "the file lacks", "again, whole")
def _(bench):
    drop_one(bench.copied_model() / "text_encoder/model.safetensors", "SelfAttention.q")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model", "data.cache=cache/new")


@fault("a model in pickles", "model: cannot load the transformer", "no weights as safetensors in model/transformer")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


@fault(
    "a model that brings its own code",
    "cannot load the text encoder or tokenizer",
    "code of its own",
)
def _(bench):
    folder = bench.copied_model() / "tokenizer"
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('pwned').touch()\nclass Evil: pass\n")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model", "data.cache=cache/new")


HPS = "reward={space: pixel, shape: linear, hps: {weights: hps.pt, tokenizer: nobody/nothing}}"


@fault("weights of a public reward that are cut short", "hps.pt: cannot be read as a CLIP", "HPS_v2.1_compressed.pt")
def _(bench):
    Path("hps.pt").write_bytes(b"\x80\x02]q\x00(")
    return bench.cli("train", "vader.yaml", HPS)


@fault(
    "a public reward's tokenizer that is on no hub", "nobody/nothing: no folder here", "the hub id (owner/name) of a"
)
def _(bench):
    bench.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save(open_clip_names(tiny_clip()), "hps.pt")
    return bench.cli("train", "vader.yaml", HPS)
