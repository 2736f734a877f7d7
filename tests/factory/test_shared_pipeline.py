"""A reward on a pipeline's own transformer: the pipeline stays as it is, with its LoRAs, and may choose early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

import prfl
from prfl.reward import LatentReward, RewardHead
from prfl.reward.latent import RewardAdapter
from tests.slow import slow_unless

PROMPT = "a red circle moves"
SHAPE = (4, 2, 4, 4)


def drawn(pipe: WanPipeline, count: int = 1, prompts: list[str] | None = None, **options) -> Tensor:
    start = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent", **options}
    return pipe(prompts or [PROMPT] * count, height=16, width=16, num_frames=5, latents=start, **options).frames


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> WanPipeline:
    made = WanPipeline.from_pretrained(tiny_pipeline_folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def folder(tmp_path: Path, tiny_pipeline_folder: Path) -> Path:
    """A reward with an adapter of its own, on other layers than the styles' alone."""
    torch.manual_seed(0)
    head = RewardHead(24, ["light", "calm"], inner=8, hidden=8)
    adapter = RewardAdapter(2, 2.0, ("to_k", "ffn.net.2"))
    reward = LatentReward(head, prfl.load_backbone(tiny_pipeline_folder), [1], adapter=adapter)
    for parameter in reward.parameters().values():
        parameter.data += 0.3 * torch.randn_like(parameter)
    reward.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture
def styles(tmp_path: Path, tiny_pipeline_folder: Path) -> list[Path]:
    """Two LoRA files, on layers of which the reward has some."""
    paths = []
    for number, targets in enumerate((["to_q"], ["to_k", "ffn.net.0.proj"])):
        made = WanPipeline.from_pretrained(tiny_pipeline_folder)
        made.transformer.add_adapter(LoraConfig(r=2, target_modules=targets), "style")
        torch.manual_seed(number)
        for name, parameter in made.transformer.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter)
        layers = get_peft_model_state_dict(made.transformer, adapter_name="style")
        paths.append(tmp_path / f"style-{number}")
        WanPipeline.save_lora_weights(paths[-1], transformer_lora_layers=layers)
    return paths


def load(pipe: WanPipeline, styles: list[Path], weights: list[float]) -> None:
    for number, path in enumerate(styles):
        pipe.load_lora_weights(path, adapter_name=f"style{number}")
    if styles:
        pipe.set_adapters([f"style{number}" for number in range(len(styles))], weights)


@pytest.mark.parametrize(
    "count, first", slow_unless((2, "lora").__eq__, [(0, "lora"), (1, "reward"), (2, "lora"), (2, "reward")])
)
def test_a_pipeline_keeps_its_loras(
    pipe: WanPipeline, folder: Path, styles: list[Path], tiny_pipeline_folder: Path, count: int, first: str
) -> None:
    """Whatever comes first, the pipeline draws what it draws without the reward, and scores know no style."""
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    plain = prfl.load_reward(folder, prfl.load_backbone(tiny_pipeline_folder)).score(latents, 0.7, PROMPT)
    other = WanPipeline.from_pretrained(tiny_pipeline_folder)
    other.set_progress_bar_config(disable=True)
    base = drawn(other)
    load(other, styles[:count], [0.5, 1.5][:count])
    expected = drawn(other)
    assert torch.equal(expected, base) == (count == 0)

    if first == "lora":
        load(pipe, styles[:count], [0.5, 1.5][:count])
        reward = prfl.load_reward(folder, pipe)
    else:
        reward = prfl.load_reward(folder, pipe)
        assert torch.equal(drawn(pipe), base)
        load(pipe, styles[:count], [0.5, 1.5][:count])
    for _ in range(2):
        scores = reward.score(latents, 0.7, PROMPT)
        assert all(torch.equal(scores[name], plain[name]) for name in plain)
        assert torch.equal(drawn(pipe), expected)
        assert pipe.get_active_adapters() == [f"style{number}" for number in range(count)]
    if count == 2:
        pipe.set_adapters("style0", 0.5)
        other.set_adapters("style0", 0.5)
        reward.score(latents, 0.7, PROMPT)
        assert torch.equal(drawn(pipe), drawn(other))
        pipe.disable_lora()
        reward.score(latents, 0.7, PROMPT)
        assert torch.equal(drawn(pipe), base), "LoRAs that were switched off stay so"
        pipe.enable_lora()
        assert torch.equal(drawn(pipe), drawn(other))


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), UniPCMultistepScheduler(**FLOW)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_best_of_each_prompt_go_on_as_they_would_have(
    pipe: WanPipeline, folder: Path, scheduler: object, guidance: float
) -> None:
    pipe.scheduler = scheduler
    reward = prfl.load_reward(folder, pipe)
    prompts = [PROMPT] * 3 + ["a blue square"] * 3
    seen: dict[str, Tensor] = {}

    def watch(pipeline, step, timestep, tensors):
        if step + 1 == 3:
            seen.update(latents=tensors["latents"].clone(), sigma=pipeline.scheduler.sigmas[step + 1])
        return tensors

    whole = drawn(pipe, 6, prompts, guidance_scale=guidance, callback_on_step_end=watch)
    chooser = reward.keep_best(1, at=0.5)
    chosen = drawn(pipe, 6, prompts, guidance_scale=guidance, callback_on_step_end=chooser)
    scores = sum(reward.score(seen["latents"], float(seen["sigma"]), prompts).values())
    torch.testing.assert_close(torch.tensor(chooser.scores), scores)
    assert chooser.kept == [int(scores[:3].argmax()), 3 + int(scores[3:].argmax())]
    torch.testing.assert_close(chosen, whole[chooser.kept], rtol=1e-4, atol=1e-5)


def test_choosing_says_what_it_cannot_do(pipe: WanPipeline, folder: Path) -> None:
    reward = prfl.load_reward(folder, pipe)
    for count, at in ((0, 0.5), (1, 0.0), (1, 1.0)):
        with pytest.raises(prfl.PrflError, match="keep_best"):
            reward.keep_best(count, at=at)
    reward.backbone.facts = replace(reward.backbone.facts, family="cogvideox")
    with pytest.raises(prfl.PrflError, match="CogVideoXPipeline.*\n.*prfl sample"):
        reward.keep_best(1)
    reward.backbone.facts = replace(reward.backbone.facts, family="wan")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction")  # sigmas of another path
    with pytest.raises(prfl.PrflError, match="use_flow_sigmas"):
        drawn(pipe, 2, callback_on_step_end=reward.keep_best(1, at=0.1))
