"""Public rewards on tiny random networks, and their files as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VJEPA2Config,
    VJEPA2Model,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from prfl.backbone.condition import Ask, Condition
from prfl.reward import hpsv3, image_reward, mps, videoalign
from prfl.reward.aesthetic import AestheticMlp
from prfl.reward.hpsv3 import Hpsv3
from prfl.reward.image_reward import ImageReward
from prfl.reward.mps import MpsReward
from prfl.reward.qwen_score import Reading, Words, head_of
from prfl.reward.text_match import TextMatch
from prfl.reward.videoalign import VideoAlign
from prfl.reward.watched import ActionReward, CoherenceReward, ObjectReward
from tests.reward.test_aesthetic import SIZE, tiny_clip, tiny_mlp

LAYERS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32
}  # fmt: skip
WORDS = ("<start>", "a", "dog", "cat", "runs", "<end>")  # a CLIP's last word marks the end


def prompts(*texts: str) -> Condition:
    return Condition({}, tuple(Ask(text) for text in texts))


def tiny_words() -> PreTrainedTokenizerFast:
    vocabulary = {word: number + 44 for number, word in enumerate(WORDS)} | {"<unk>": 2, "color": 3, "shape": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 44), ("<end>", 49)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>")


def save_tiny_clip(folder: Path) -> Path:
    clip = tiny_clip()
    clip.config.text_config.eos_token_id = 49
    clip.save_pretrained(folder)
    tiny_words().save_pretrained(folder)
    return folder


def save_tiny_rewards(folder: Path) -> dict[str, dict[str, Any]]:
    """Write every public reward but the aesthetic one, and return their sections of a config."""
    clip = str(save_tiny_clip(folder / "clip"))
    for name, network in (("yolos", tiny_yolos()), ("videomae", tiny_videomae()), ("vjepa", tiny_vjepa())):
        network.save_pretrained(folder / name)
    save_file(open_clip_names(tiny_clip()), folder / "hps.safetensors")
    save_file(image_reward_names(*tiny_image_reward()), folder / "imagereward.safetensors")
    save_file(mps_names(*tiny_mps()), folder / "mps.safetensors")
    Path("own_light.py").write_text("def light(pixels, _, factor):\n    return factor * pixels.mean((1, 2, 3, 4))\n")
    return {
        "clip": {"model": clip},
        "pickscore": {"model": clip},
        "hps": {"weights": str(folder / "hps.safetensors"), "tokenizer": clip},
        "imagereward": {"weights": str(folder / "imagereward.safetensors"), "tokenizer": clip},
        "mps": {"weights": str(folder / "mps.safetensors"), "tokenizer": clip, "aspect": "quality"},
        "videoalign": {"model": save_converted(tiny_videoalign(), folder / "videoalign"), "frames": 4},
        "hpsv3": {"model": save_converted(tiny_hpsv3(), folder / "hpsv3")},
        "object": {"model": str(folder / "yolos"), "present": ["dog"], "absent": ["car"]},
        "action": {"model": str(folder / "videomae"), "label": "sleeping"},
        "coherence": {"model": str(folder / "vjepa"), "frames": 8},
        "callable": {"function": "own_light:light", "options": {"factor": 2.0}},
    }


def save_converted(reward: VideoAlign | Hpsv3, folder: Path) -> str:
    """Write a reward as ``prfl convert`` does."""
    reward.network.save_pretrained(folder)
    qwen_words(*reward.reading.tokens).save_pretrained(folder)
    save_file(reward.head.state_dict(), folder / "head.safetensors")
    (folder / "reading.json").write_text(json.dumps(asdict(reward.reading)))
    return str(folder)


def seeded(make: Callable[[], torch.nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


def tiny_yolos() -> YolosForObjectDetection:
    config = YolosConfig(**LAYERS, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3)
    config.id2label = {0: "cat", 1: "Dog", 2: "car"}
    return seeded(lambda: YolosForObjectDetection(config))


def tiny_videomae() -> VideoMAEForVideoClassification:
    config = VideoMAEConfig(**LAYERS, image_size=16, patch_size=4, num_frames=4, tubelet_size=2, num_labels=3)
    config.id2label = {0: "running", 1: "playing guitar", 2: "sleeping"}
    return seeded(lambda: VideoMAEForVideoClassification(config))


def tiny_vjepa() -> VJEPA2Model:
    config = VJEPA2Config(
        crop_size=16, patch_size=4, frames_per_clip=8, tubelet_size=2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2,
        pred_num_mask_tokens=2, pred_mlp_ratio=2,
    )  # fmt: skip
    return seeded(lambda: VJEPA2Model(config))


def tiny_image_reward() -> tuple[BlipVisionModel, BlipTextModel, AestheticMlp]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
        text = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
        vision, words, _ = image_reward.build({**sizes, "patch_size": 14, "image_size": SIZE}, text)
    livelier(vision.embeddings.patch_embedding, 30)  # a random one hardly looks at the picture
    livelier(vision.encoder, 3)
    livelier(words, 4)
    vision.embeddings.position_embedding.data.mul_(0.1)
    for layer in words.encoder.layer:
        livelier(layer.crossattention, 6)
    return vision.eval(), words.eval(), tiny_mlp(width=64)


def tiny_mps() -> tuple[CLIPModel, torch.nn.ModuleList]:
    """A CLIP and two pairs of layers; 128 channels are two heads."""
    layers = {**LAYERS, "hidden_size": 128, "hidden_act": "gelu"}
    config = CLIPConfig(
        text_config={**layers, "vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49},
        vision_config={**layers, "image_size": SIZE, "patch_size": 14}, projection_dim=128,
    )  # fmt: skip
    clip, cross = seeded(lambda: torch.nn.ModuleList(mps.build(config, layers=2)))
    livelier(clip.vision_model, 3)
    livelier(clip.text_model.embeddings.token_embedding, 50)  # so that different words are not alike
    return clip, cross


@torch.no_grad()
def livelier(network: torch.nn.Module, factor: float) -> None:
    """Scale the matrices of a random network, which else hardly looks at what it reads."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)


CHAT = (
    "{% for m in messages %}<start> {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<|vision_start|> <|{{ c['type'] }}_pad|> <|vision_end|> {% endif %}{% endfor %}<end>{% endfor %}"
)
QWEN_WORDS = (*WORDS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>", "rate", "END")


def qwen_words(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a Qwen2-VL, with a chat template, and these special tokens behind the others."""
    vocabulary = {word: number for number, word in enumerate(QWEN_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=CHAT)
    words.add_tokens([*QWEN_WORDS[6:10], *special], special_tokens=True)
    return words


def tiny_qwen(words: int) -> Qwen2VLModel:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": words, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
            "eos_token_id": 5, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        vision_start_token_id=6, vision_end_token_id=7, image_token_id=8, video_token_id=9,
    )  # fmt: skip
    network = seeded(lambda: Qwen2VLModel(config))
    livelier(network, 6)
    return network


def tiny_videoalign(frames: int | None = None) -> VideoAlign:
    """Frames of 100 to 400 pixels, patches of 4 x 4."""
    reading = Reading(
        "<start> <|video_pad|> rate {prompt} <|VQ_reward|> a <|MQ_reward|> <|TA_reward|> END", videoalign.PICTURES,
        videoalign.TOKENS, videoalign.DIMENSIONS, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 400, 100, fps=2.0,
    )  # fmt: skip
    words = Words.of(reading, qwen_words(*videoalign.TOKENS), "tiny")
    head = seeded(lambda: torch.nn.Linear(32, 1, bias=False))
    return VideoAlign(tiny_qwen(16), head, words, reading, fps=8.0, frames=frames)


def tiny_hpsv3() -> Hpsv3:
    reading = Reading(
        "<start> <|image_pad|> {prompt} rate <|Reward|> END", hpsv3.PICTURES, hpsv3.TOKENS, hpsv3.DIMENSIONS, (0.0,),
        (1.0,), 256, 256,
    )  # fmt: skip
    words = Words.of(reading, qwen_words(*hpsv3.TOKENS), "tiny")
    return Hpsv3(tiny_qwen(14), seeded(tiny_hpsv3_head), words, reading)


def tiny_hpsv3_head() -> torch.nn.Module:
    sizes = {f"{number}.weight": torch.zeros(shape) for number, shape in ((0, (8, 32)), (3, (4, 8)), (5, (2, 4)))}
    return head_of(sizes)


def all_rewards() -> dict[str, Callable[[], Any]]:
    """Every reward in float64, by its name."""

    def tokenise(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(
            tiny_words()(texts, padding="max_length", max_length=8, return_tensors="pt", return_token_type_ids=False)
        )

    def in_double(reward: Any) -> Any:
        for network in reward.networks:
            network.double()
        return reward

    return {
        "clip": lambda: TextMatch("clip", tiny_clip().double(), tokenise, "crop", 100.0),
        "pickscore": lambda: TextMatch("pickscore", tiny_clip().double(), tokenise, "crop", None),
        "hps": lambda: TextMatch("hps", tiny_clip().double(), tokenise, "pad", 1.0),
        "imagereward": lambda: ImageReward(*(part.double() for part in tiny_image_reward()), tokenise),
        "mps": lambda: MpsReward(*(part.double() for part in tiny_mps()), tokenise),
        "videoalign": lambda: in_double(tiny_videoalign(frames=4)),
        "hpsv3": lambda: in_double(tiny_hpsv3()),
        "object": lambda: ObjectReward(tiny_yolos().double(), ["dog"], ["car"]),
        "action": lambda: ActionReward(tiny_videomae().double(), "Playing guitar"),
        "coherence": lambda: CoherenceReward(tiny_vjepa().double(), frames=8),
    }


SAME_NAMES = (
    ("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)  # fmt: skip


def open_clip_names(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """The tensors of a CLIP as open_clip names and packs them."""
    state, tensors = clip.state_dict(), {}
    for side, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            source, target = f"{side}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                packed = [state[f"{source}self_attn.{which}_proj.{kind}"] for which in "qkv"]
                tensors[f"{target}attn.in_proj_{kind}"] = torch.cat(packed)
                for theirs, ours in SAME_NAMES:
                    tensors[f"{target}{theirs}.{kind}"] = state[f"{source}{ours}.{kind}"]
    vision, text = "vision_model.", "text_model."
    tensors |= {
        "visual.conv1.weight": state[f"{vision}embeddings.patch_embedding.weight"],
        "visual.class_embedding": state[f"{vision}embeddings.class_embedding"],
        "visual.positional_embedding": state[f"{vision}embeddings.position_embedding.weight"],
        "token_embedding.weight": state[f"{text}embeddings.token_embedding.weight"],
        "positional_embedding": state[f"{text}embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"].reshape(1),
    }
    for kind in ("weight", "bias"):
        tensors |= {
            f"visual.ln_pre.{kind}": state[f"{vision}pre_layrnorm.{kind}"],
            f"visual.ln_post.{kind}": state[f"{vision}post_layernorm.{kind}"],
            f"ln_final.{kind}": state[f"{text}final_layer_norm.{kind}"],
        }
    return tensors


def image_reward_names(vision: BlipVisionModel, text: BlipTextModel, mlp: AestheticMlp) -> dict[str, torch.Tensor]:
    """The tensors of an ImageReward under the names of its published file."""
    tensors = {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items()}
    tensors |= {f"mlp.{name}": value for name, value in mlp.state_dict().items()}
    theirs = {ours: name for name, ours in image_reward.LAYER.items()}
    whole = {ours: name for name, ours in image_reward.VISION.items()}
    for name, value in vision.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("encoder.layers."):
            _, _, number, part = stem.split(".", 3)
            new = f"blocks.{number}.{theirs[part]}.{kind}"
        else:
            new = whole.get(name) or f"{whole[stem]}.{kind}"
        tensors[f"blip.visual_encoder.{new}"] = value
    return tensors | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}


def mps_names(clip: CLIPModel, cross: torch.nn.ModuleList) -> dict[str, torch.Tensor]:
    """The tensors of an MPS under the names of its port."""
    tensors = {f"model.{name}": value for name, value in clip.state_dict().items()}
    for name, value in cross.state_dict().items():
        layer, which, rest = name.split(".", 2)
        tensors[f"cross_model.layers.{layer}.{which}.fn.{rest}"] = value
        tensors[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = torch.zeros(32)
    return tensors
