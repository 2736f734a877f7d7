"""A policy that starts from a LoRA file: in each trainer's names the same update; what does not match is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from prfl.backbone import LoraSpec, load_backbone
from prfl.backbone.families import FAMILIES
from prfl.backbone.wan.lora_names import original_name
from prfl.config.schema import Config
from prfl.estimate.missing_inputs import missing_inputs
from prfl.export.lora import write_shared_file
from prfl.factory import provenance
from prfl.factory.adapter_start import start_adapter
from prfl.factory.backbone import POLICY
from prfl.factory.resume_identity import input_contents
from prfl.utils.errors import PrflError
from tests.factory.small_config import small_config
from tests.models import copied_backbone
from tests.objective.parts import stir
from tests.slow import slow_unless

RANK, ALPHA, TARGETS = 2, 3.0, ["to_q", "to_out.0", "ffn.net.2"]


@pytest.fixture
def state(tiny_pipeline_folder: Path) -> dict[str, Tensor]:
    """The adapter that somebody trained, with an alpha that is not its rank."""
    model = load_backbone(tiny_pipeline_folder)
    model.add_adapter(POLICY, LoraSpec(rank=RANK, alpha=ALPHA, targets=TARGETS))
    stir(model, POLICY, seed=3)
    return {name: parameter.detach().clone() for name, parameter in model.parameters(POLICY).items()}


def velocity(model) -> Tensor:
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.adapter(POLICY):
        return model.velocity(latents, torch.tensor(0.7), model.condition(["a red circle"]))


def by_layer(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    layers = dict.fromkeys(name.rpartition(".lora_")[0] for name in state)
    return {layer: (state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]) for layer in layers}


def diffusers(path: Path, state: dict[str, Tensor]) -> None:
    metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    WanPipeline.save_lora_weights(
        path.parent, transformer_lora_layers=state, weight_name=path.name, transformer_lora_adapter_metadata=metadata
    )


def comfyui(path: Path, state: dict[str, Tensor]) -> None:
    write_shared_file(path, FAMILIES["wan"].lora, state, rank=RANK, alpha=ALPHA)


def down_and_up(path: Path, state: dict[str, Tensor], prefix: str, separator: str) -> None:
    """Write the keys that kohya's trainers do, each layer with its alpha."""
    tensors = {}
    for layer, (a, b) in by_layer(state).items():
        name = prefix + original_name(layer).replace(".", separator)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, path)


def kohya(path: Path, state: dict[str, Tensor]) -> None:
    down_and_up(path, state, "diffusion_model.", ".")


def musubi(path: Path, state: dict[str, Tensor]) -> None:
    down_and_up(path, state, "lora_unet_", "_")


def without_alpha(path: Path, state: dict[str, Tensor]) -> None:
    """Scaled by 1, as programs read such a file: B has the factor."""
    scaled = {name: tensor * (ALPHA / RANK if ".lora_B." in name else 1) for name, tensor in state.items()}
    save_file({f"transformer.{name}": tensor for name, tensor in scaled.items()}, path)


def own(path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, path, metadata=provenance.metadata({"rank": RANK, "alpha": ALPHA}))


FORMS = {form.__name__: form for form in (diffusers, comfyui, kohya, musubi, without_alpha, own)}


@pytest.fixture
def config_of(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Config]:
    def make(init: Path | None, **adapter) -> Config:
        keys = {"rank": RANK, "alpha": 1.0, "targets": TARGETS, "init": None if init is None else str(init), **adapter}
        return small_config(tmp_path, tiny_pipeline_folder, adapter=keys)

    return make


def started(config: Config):
    model = copied_backbone(config)
    start_adapter(config, model)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", slow_unless(ALPHA.__eq__, [1.0, ALPHA]))
def test_the_update_is_the_files(
    form: str, alpha: float, state: dict[str, Tensor], config_of: Callable, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    expected = load_backbone(tiny_pipeline_folder)
    expected.add_adapter(POLICY, LoraSpec(rank=RANK, alpha=ALPHA, targets=TARGETS))
    for name, parameter in expected.parameters(POLICY).items():
        parameter.data.copy_(state[name])
    FORMS[form](tmp_path / "lora.safetensors", state)
    model = started(config_of(tmp_path / "lora.safetensors", alpha=alpha))
    torch.testing.assert_close(velocity(model), velocity(expected), rtol=0, atol=1e-6)
    assert (velocity(model) - velocity(started(config_of(None)))).abs().max() > 1e-2
    assert all(parameter.requires_grad for parameter in model.parameters(POLICY).values())


@pytest.mark.parametrize("form", ["comfyui", "musubi"])
def test_diffusers_reads_the_same_update_from_it(
    form: str, state: dict[str, Tensor], config_of: Callable, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    """Its converter of musubi's names wants every layer of a block."""
    model = load_backbone(tiny_pipeline_folder)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(POLICY, LoraSpec(rank=RANK, alpha=ALPHA, targets=targets))
    stir(model, POLICY, seed=3)
    whole = {name: parameter.detach().clone() for name, parameter in model.parameters(POLICY).items()}
    FORMS[form](tmp_path / "lora.safetensors", whole)
    pipe = WanPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    ours = started(config_of(tmp_path / "lora.safetensors", targets=targets))
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    text, _ = pipe.encode_prompt("a red circle", do_classifier_free_guidance=False, max_sequence_length=512)
    with torch.no_grad():
        (theirs,) = pipe.transformer(latents, torch.tensor([700.0]), text, return_dict=False)
    torch.testing.assert_close(velocity(ours), theirs, rtol=0, atol=1e-5)


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "adapter", "message"),
    [
        (lambda s: renamed(s, "blocks.", "layers."), {}, r"none of the file's 15 layers.*layers\.0\.attn1\.to_q"),
        (lambda s: s, {"targets": ["to_q"]}, r"9 of the file's 15 layers are none of the adapter's: .*to_out\.0"),
        (lambda s: s, {"blocks": [0]}, r"10 of the file's 15 layers are none of the adapter's: .*blocks\.1\."),
        (lambda s: s, {"targets": [*TARGETS, "to_k"]}, r"6 of the adapter's 21 layers are not in the file: .*to_k"),
        (lambda s: s, {"rank": 4}, r"has rank 2, and the adapter 4\n.*adapter\.rank: 2"),
        (lambda s: {n: t[..., :1] if "lora_A" in n else t for n, t in s.items()}, {}, "give a LoRA of this model"),
        (lambda s: {**s, "blocks.0.attn1.to_q.diff_b": torch.zeros(1)}, {}, r"no part of a plain LoRA: .*diff_b"),
        (lambda s: {n: t for n, t in s.items() if n != "blocks.0.ffn.net.2.lora_B.weight"}, {}, "lack a matrix"),
        (lambda s: {n: t * float("nan") for n, t in s.items()}, {}, "not finite"),
        (lambda s: {**s, **renamed(s, "blocks.", "transformer.blocks.")}, {}, "a layer twice"),
    ],
)  # fmt: skip
def test_a_lora_that_matches_only_in_part_is_an_error_with_its_keys(
    change: Callable, adapter: dict, message: str, state: dict[str, Tensor], config_of: Callable, tmp_path: Path
) -> None:
    copies = {name: tensor.clone().contiguous() for name, tensor in change(state).items()}
    save_file(copies, tmp_path / "lora.safetensors")
    config = config_of(tmp_path / "lora.safetensors", **adapter)
    with pytest.raises(PrflError, match=message) as caught:
        started(config)
    assert "backbone.adapter.init" in caught.value.where


def test_files_that_are_none(config_of: Callable, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PrflError, match="no safetensors file"):
        started(config_of(tmp_path / "broken.safetensors"))
    absent = config_of(tmp_path / "absent.safetensors")
    with pytest.raises(PrflError, match="no such file"):
        started(absent)
    assert any(line.startswith("backbone.adapter.init: there is no file") for line in missing_inputs(absent))


def test_a_scale_that_is_not_alpha_by_rank(state: dict[str, Tensor], config_of: Callable, tmp_path: Path) -> None:
    metadata = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, weight_name="l.safetensors", transformer_lora_adapter_metadata=metadata
    )
    with pytest.raises(PrflError, match="use_rslora"):
        started(config_of(tmp_path / "l.safetensors"))


def test_a_resumed_run_notices_another_file(state: dict[str, Tensor], config_of: Callable, tmp_path: Path) -> None:
    path, key = tmp_path / "lora.safetensors", "backbone.adapter.init (content)"
    save_file(state, path)
    config = config_of(path).model_copy(update={"reward": None})
    model = started(config)
    before = input_contents(config, model, None)[key]
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert input_contents(config, model, None)[key] != before
    assert key not in input_contents(config_of(None).model_copy(update={"reward": None}), model, None)
