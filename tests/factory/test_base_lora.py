"""A LoRA that is merged into the base: the weights, who notices, and what a card says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prfl.backbone import LoraSpec, load_backbone
from prfl.config.schema import Config
from prfl.estimate.missing_inputs import missing_inputs
from prfl.export.card import changed_base
from prfl.factory.backbone import POLICY, build_architecture, build_backbone
from prfl.factory.resume_identity import input_contents
from prfl.factory.reward import load_reward
from prfl.reward import LatentReward, RewardHead
from prfl.utils.errors import PrflError
from tests.factory.small_config import small_config
from tests.factory.test_adapter_start import ALPHA, FORMS, RANK, TARGETS, velocity
from tests.objective.parts import stir

SPEC = LoraSpec(rank=RANK, alpha=ALPHA, targets=TARGETS)


@pytest.fixture
def state(tiny_pipeline_folder: Path) -> dict[str, Tensor]:
    model = load_backbone(tiny_pipeline_folder)
    model.add_adapter(POLICY, SPEC)
    stir(model, POLICY, seed=3)
    return {name: parameter.detach().clone() for name, parameter in model.parameters(POLICY).items()}


@pytest.fixture
def config_of(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Config]:
    return partial(small_config, tmp_path, tiny_pipeline_folder, adapter={"rank": 2, "alpha": 1.0})


@pytest.mark.parametrize("form", FORMS)
def test_the_base_is_the_model_with_it(
    form: str, state: dict[str, Tensor], config_of: Callable, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    """In each trainer's names; below a new adapter, which changes nothing yet."""
    FORMS[form](tmp_path / "lora.safetensors", state)
    expected = load_backbone(tiny_pipeline_folder)
    expected.add_adapter(POLICY, SPEC)
    for name, parameter in expected.parameters(POLICY).items():
        parameter.data.copy_(state[name])
    model = build_backbone(config_of(base_lora=str(tmp_path / "lora.safetensors")))
    torch.testing.assert_close(velocity(model), velocity(expected), rtol=0, atol=1e-6)
    plain = build_backbone(config_of())
    assert (velocity(model) - velocity(plain)).abs().max() > 1e-2
    assert model.facts.identity["transformer_fingerprint"] != plain.facts.identity["transformer_fingerprint"]
    assert model.facts.identity["vae_fingerprint"] == plain.facts.identity["vae_fingerprint"]
    frozen = [parameter for name, parameter in model.transformer.named_parameters() if ".lora_" not in name]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert not (set(model.parameters(POLICY)) & set(dict(model.transformer.named_parameters()))), "one adapter alone"


def test_a_half_precision_is_rounded_once(state: dict[str, Tensor], tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    FORMS["own"](tmp_path / "lora.safetensors", state)
    merged = load_backbone(tiny_pipeline_folder, torch.bfloat16, base_lora=tmp_path / "lora.safetensors").transformer
    plain = load_backbone(tiny_pipeline_folder, torch.bfloat16).transformer
    layer = "blocks.1.attn1.to_q"
    update = ALPHA / RANK * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    expected = (plain.get_submodule(layer).weight.float() + update).bfloat16()
    assert torch.equal(merged.get_submodule(layer).weight, expected)


def test_who_notices_that_it_is_there(
    state: dict[str, Tensor], config_of: Callable, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    """A head that read the model without it, a run that is resumed with another, the card, the dry run."""
    path = tmp_path / "lora.safetensors"
    save_file(state, path)
    config = config_of(base_lora=str(path))
    model, plain = build_backbone(config), load_backbone(tiny_pipeline_folder)
    head = RewardHead(plain.facts.width_after([1]), ["motion"], inner=16, heads=2, hidden=16)
    LatentReward(head, plain, [1]).freeze().save_pretrained(tmp_path / "reward")
    assert load_reward(tmp_path / "reward", load_backbone(tiny_pipeline_folder))
    with pytest.raises(PrflError, match="transformer_fingerprint"):
        load_reward(tmp_path / "reward", model)

    contents = [
        input_contents(each.model_copy(update={"reward": None}), build_backbone(each), None)
        for each in (config, config_of())
    ]
    key = "backbone.model (transformer)"
    assert contents[0][key] != contents[1][key]
    assert changed_base(config.backbone) == [
        "Its base is not the model alone: the LoRA `lora.safetensors` is in its weights, at strength 1. "
        "Load that first."
    ]
    assert changed_base(config_of().backbone) == []
    absent = config_of(base_lora="absent.safetensors", weights={"vae": "nowhere.safetensors"})
    lines = [line.partition(";")[0] for line in missing_inputs(absent)]
    assert "backbone.base_lora: there is no file absent.safetensors" in lines
    assert "backbone.weights.vae: there is no file nowhere.safetensors" in lines


def test_the_file_of_weights_is_read_by_a_run_and_named_by_its_card(
    config_of: Callable, tmp_path: Path, make_tiny_pipeline: Callable[..., Path]
) -> None:
    there = make_tiny_pipeline(tmp_path / "there", seed=1)
    file = there / "transformer" / "diffusion_pytorch_model.safetensors"
    config = config_of(weights={"transformer": str(file)})
    other, plain = load_backbone(there), build_backbone(config_of())
    assert torch.equal(build_backbone(config).transformer.proj_out.weight, other.transformer.proj_out.weight)
    assert not torch.equal(plain.transformer.proj_out.weight, other.transformer.proj_out.weight)
    assert changed_base(config.backbone)[0].startswith(
        "Its base is not the model alone: the transformer is that of `diffusion_pytorch_model.safetensors`."
    )
    with pytest.raises(PrflError, match="the model has no unet"):
        build_architecture(config_of(weights={"unet": str(file)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n.replace("blocks.1", "blocks.7"): t for n, t in s.items()}, r"5 of the file's 15 .*blocks\.7\."),
        (lambda s: {n: t[..., :1] if "lora_A" in n else t for n, t in s.items()}, r"and the model's \(24, 24\)"),
        (lambda s: {**s, "blocks.0.attn1.to_q.diff_b": torch.zeros(1)}, r"no part of a plain LoRA: .*diff_b"),
        (lambda s: {**s, **{f"transformer.{n}": t for n, t in s.items()}}, "a layer twice"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_an_error_with_its_keys(
    change: Callable, message: str, state: dict[str, Tensor], config_of: Callable, tmp_path: Path
) -> None:
    copies = {name: tensor.clone().contiguous() for name, tensor in change(state).items()}
    save_file(copies, tmp_path / "lora.safetensors")
    with pytest.raises(PrflError, match=message) as caught:
        build_backbone(config_of(base_lora=str(tmp_path / "lora.safetensors")))
    assert "backbone.base_lora" in caught.value.where
