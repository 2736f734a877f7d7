"""VideoAlign and HPSv3: converted from files in their authors' layout, and scored as their authors' code does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2VLModel

from prfl import cli
from prfl.reward.hpsv3 import load_hpsv3
from prfl.reward.qwen_look import QwenLook
from prfl.reward.videoalign import load_videoalign
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.reward.test_aesthetic import smooth
from tests.reward.tiny_rewards import prompts, qwen_words, seeded, tiny_hpsv3_head, tiny_qwen, tiny_videoalign

TEMPLATE = '''
import nothing_that_is_here
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
rate {text_prompt} <|VQ_reward|> a <|MQ_reward|> cat <|TA_reward|> END
"""
INSTRUCTION = "a {text_prompt} "
prompt_with_special_token = " rate <|Reward|> END"
'''
SETTINGS: dict[str, Any] = {
    "data_config": {
        "max_frame_pixels": 3136, "fps": 2.0, "prompt_template_type": "detailed_special", "sample_type": "uniform",
        "num_frames": None,
    },
    "peft_lora_config": {"lora_r": 2, "lora_alpha": 6},
    "inference_config": {f"{name}_{part}": 0.5 for name in ("VQ", "MQ", "TA") for part in ("mean", "std")},
}  # fmt: skip


def base_folder(folder: Path, words: int) -> Path:
    """A Qwen2-VL as a user downloads it: config and tokenizer are all that is read."""
    tiny_qwen(words).config.save_pretrained(folder)
    qwen_words().save_pretrained(folder)
    return folder


def old_names(network: Qwen2VLModel) -> dict[str, torch.Tensor]:
    """The tensors as transformers named them when VideoAlign was trained, within peft's wrapping."""
    return {
        f"base_model.model.{name.replace('language_model.', 'model.')}": value
        for name, value in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def videoreward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published folder: a LoRA beside a frozen matrix, the head among the modules that are saved."""
    root = tmp_path_factory.mktemp("VideoReward")
    network, generator = tiny_qwen(16), torch.Generator().manual_seed(0)
    tensors = old_names(network)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{stem}.base_layer.weight"] = tensors.pop(f"{stem}.weight")
    tensors[f"{stem}.base_layer.bias"] = tensors.pop(f"{stem}.bias")
    tensors[f"{stem}.lora_A.default.weight"] = torch.randn(2, 32, generator=generator) * 0.3
    tensors[f"{stem}.lora_B.default.weight"] = torch.randn(32, 2, generator=generator) * 0.3
    tensors["base_model.model.lm_head.weight"] = torch.zeros(16, 32)
    tensors["base_model.model.rm_head.original_module.weight"] = torch.zeros(1, 32)
    tensors["base_model.model.rm_head.modules_to_save.default.weight"] = torch.randn(1, 32, generator=generator)
    (root / "checkpoint-3").mkdir()
    torch.save(tensors, root / "checkpoint-3/model.pth")
    (root / "model_config.json").write_text(json.dumps(SETTINGS))
    (root / "prompt_template.py").write_text(TEMPLATE)
    base_folder(root / "base", 16)
    converted = ["videoalign", root, "--template", root / "prompt_template.py", "--base", root / "base"]
    assert cli.main(["convert", *map(str, converted), "--out", str(root / "converted")]) == 0
    return root


def by_scattering(network: Qwen2VLModel, words: Any, text: str, frames: torch.Tensor, pad: int) -> torch.Tensor:
    """The authors' way: the pictures' tokens are scattered into the text, positions are those of text."""
    values, grid = QwenLook.of(network.config, 3136).seen(frames)
    tokens = network.visual(values, grid_thw=grid).pooler_output
    ids: list[int] = []
    for word in words(text, add_special_tokens=False).input_ids:
        ids += [pad] * len(tokens) if word == pad else [word]
    embeds = network.language_model.embed_tokens(torch.tensor([ids]))
    embeds = embeds.masked_scatter((torch.tensor([ids]) == pad)[..., None].expand_as(embeds), tokens)
    states = network.language_model(inputs_embeds=embeds, attention_mask=torch.ones(1, len(ids))).last_hidden_state
    return states[0, [place for place, word in enumerate(ids) if word > 12]]


@torch.no_grad()
def test_converted_videoalign_scores_as_the_published_one(videoreward: Path) -> None:
    """Merged LoRA, frames of two a second, text around the pictures, three tokens, one head, mean and deviation."""
    pixels, texts = smooth(2, 9, 60, 100), ["a dog runs", "a cat"]
    size = VideoSize(9, 60, 100, fps=3)
    reward = load_videoalign(str(videoreward / "converted"), dtype="float32", video=size)
    scores = reward(pixels, prompts(*texts))

    published = torch.load(videoreward / "checkpoint-3/model.pth", weights_only=True)
    network, stem = tiny_qwen(16), "base_model.model.model.layers.0.self_attn.q_proj.lora"
    lora = 3 * published[f"{stem}_B.default.weight"] @ published[f"{stem}_A.default.weight"]
    network.language_model.layers[0].self_attn.q_proj.weight.add_(lora)
    words = qwen_words("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
    for video, text in enumerate(texts):
        chat = f"<start> <|vision_start|> <|video_pad|> <|vision_end|> rate {text} <|VQ_reward|> a <|MQ_reward|> cat "
        frames = pixels[video : video + 1, :, [0, 2, 3, 5, 6, 8]]  # 9 frames at 3 a second are 3 s, so 6 frames
        states = by_scattering(network, words, f"{chat}<|TA_reward|> END <end>", frames, pad=9)
        expected = (states @ published["base_model.model.rm_head.modules_to_save.default.weight"].T)[:, 0] * 2 - 1
        own = torch.stack([scores[name][video] for name in ("VQ", "MQ", "TA")])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert load_videoalign(str(videoreward / "converted")).network.dtype == torch.bfloat16


@torch.no_grad()
def test_converted_hpsv3_scores_as_the_published_one(tmp_path: Path) -> None:
    """The mean of the head's two numbers, frame by frame."""
    network, head = tiny_qwen(14), seeded(tiny_hpsv3_head)
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(tensors, tmp_path / "HPSv3.safetensors")
    (tmp_path / "texts.py").write_text(TEMPLATE)
    base = base_folder(tmp_path / "base", 14)
    converted = ["hpsv3", tmp_path / "HPSv3.safetensors", "--template", tmp_path / "texts.py", "--base", base]
    assert cli.main(["convert", *map(str, converted), "--out", str(tmp_path / "out")]) == 0
    reading = json.loads((tmp_path / "out/reading.json").read_text())
    (tmp_path / "out/reading.json").write_text(json.dumps({**reading, "most_pixels": 3136, "fewest_pixels": 1}))

    pixels = smooth(1, 3, 56, 56)
    score = load_hpsv3(str(tmp_path / "out"), dtype="float32")(pixels, prompts("dog runs"))["hpsv3"]
    text = "<start> <|vision_start|> <|image_pad|> <|vision_end|> a dog runs rate <|Reward|> END <end>"
    words = qwen_words("<|Reward|>")
    each = [head(by_scattering(network, words, text, pixels[:, :, [at]], pad=8))[0, 0] for at in range(3)]
    torch.testing.assert_close(score, torch.stack(each).mean()[None], rtol=1e-4, atol=1e-4)


def test_how_many_frames_videoalign_reads() -> None:
    """An even number, two of a second, at least four where there are so many; 81 frames at 16 a second are ten."""
    reward = tiny_videoalign()
    assert [reward.count(frames) for frames in (2, 3, 5, 9, 81)] == [2, 2, 4, 4, 20]
    reward.fps = 16.0
    assert reward.count(81) == 10
    assert tiny_videoalign(frames=6).count(81) == 6 and tiny_videoalign(frames=6).count(5) == 4
    with pytest.raises(PrflError, match="reads videos, and this is one frame"):
        reward.count(1)


def test_what_cannot_be_converted_is_refused(videoreward: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {"checkpoint": "", "template": "prompt_template.py", "base": "base"}

    def refused(message: str, **changes: Path | str) -> None:
        given: dict[str, Path | str] = {name: videoreward / file for name, file in files.items()}
        given |= {"out": tmp_path / "out"} | changes
        words = [given["checkpoint"], *(f"--{name}={given[name]}" for name in ("template", "base", "out"))]
        assert cli.main(["convert", "videoalign", *map(str, words)]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")

    refused("is there already", out=videoreward)
    refused("there is no such file", checkpoint=tmp_path)
    refused("has no text DETAILED_PROMPT_WITH_SPECIAL_TOKEN", template=Path(__file__))
    refused("has 16 words, and the base's tokenizer with the special ones 17", base=other_base(tmp_path / "other"))
    (tmp_path / "bad.py").write_text("this is no python")
    refused("is no python source", template=tmp_path / "bad.py")
    refused("does not fit", base=other_base(tmp_path / "narrow", hidden_size=16))
    shutil.copytree(videoreward, tmp_path / "asked", ignore=shutil.ignore_patterns("converted"))
    asked = {**SETTINGS, "data_config": {**SETTINGS["data_config"], "prompt_template_type": "simple"}}
    (tmp_path / "asked/model_config.json").write_text(json.dumps(asked))
    refused("is asked in another way than the published VideoAlign", checkpoint=tmp_path / "asked")
    (tmp_path / "asked/model_config.json").write_text("{")
    refused("is not JSON", checkpoint=tmp_path / "asked")
    (tmp_path / "asked/model_config.json").write_text(json.dumps(SETTINGS))
    torch.save(tiny_qwen(16), tmp_path / "asked/checkpoint-3/model.pth")  # a pickled module: it is not run
    refused("cannot be read as a VideoAlign", checkpoint=tmp_path / "asked")
    (tmp_path / "asked/checkpoint-3/model.pth").unlink()
    refused("model.pth: there is no such file", checkpoint=tmp_path / "asked")


def other_base(folder: Path, **sizes: int) -> Path:
    """A base with a word more, or with other sizes of the language model."""
    base_folder(folder, 17)
    if sizes:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= sizes
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    words = qwen_words()
    words.add_tokens(["more"])
    words.save_pretrained(folder)
    return folder


def test_what_is_no_converted_reward_is_refused(videoreward: Path, tmp_path: Path) -> None:
    with pytest.raises(PrflError, match="is no converted reward"):
        load_videoalign(str(tmp_path))
    with pytest.raises(PrflError, match="is another reward than HPSv3"):
        load_hpsv3(str(videoreward / "converted"))
    broken = shutil.copytree(videoreward / "converted", tmp_path / "broken")
    save_file({"x": torch.zeros(1)}, broken / "head.safetensors")
    with pytest.raises(PrflError, match="holds no head"):
        load_videoalign(str(broken))
    with pytest.raises(PrflError, match="is another reward than VideoAlign"):
        load_videoalign(with_reading(videoreward, tmp_path / "still", fps=None))
    with pytest.raises(PrflError, match="has 0 places for {prompt}, and must have one"):
        load_videoalign(with_reading(videoreward, tmp_path / "unasked", text="rate <|video_pad|>"))
    with pytest.raises(PrflError, match="reading.json: most_pixels: Input should be a valid integer"):
        load_videoalign(with_reading(videoreward, tmp_path / "many", most_pixels="many"))
    with pytest.raises(PrflError, match="it does not say as much of each dimension"):
        load_videoalign(with_reading(videoreward, tmp_path / "short", mean=[0.0]))
    other = with_reading(videoreward, tmp_path / "wordless")
    qwen_words().save_pretrained(other)
    with pytest.raises(PrflError, match=r"its tokenizer does not know <\|video_pad\|> and <\|VQ_reward\|>"):
        load_videoalign(other)
    with pytest.raises(PrflError, match="a prompt names a token of the reward's own"):
        tiny_videoalign()(smooth(1, 4), prompts("a <|VQ_reward|> dog"))


def with_reading(videoreward: Path, folder: Path, **changes: Any) -> str:
    """A copy of the converted reward whose reading.json says something else."""
    shutil.copytree(videoreward / "converted", folder)
    reading = json.loads((folder / "reading.json").read_text())
    (folder / "reading.json").write_text(json.dumps({**reading, **changes}))
    return str(folder)
