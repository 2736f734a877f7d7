"""Weights in one file, in the original names as ComfyUI has them: bit for bit, or an error with its keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prfl.backbone import load_backbone
from prfl.backbone.network import fingerprints
from prfl.backbone.single_file import load_single_file
from prfl.utils.errors import PrflError
from tests.tiny import save_tiny_pipeline
from tests.wan_experts import save_tiny_experts
from tests.wan_image import save_tiny_wan_image

# diffusers' names of Wan's transformer, as patterns, and what the original repository has in their place.
ORIGINAL = {
    r"attn1\.norm_([qk])": r"self_attn.norm_\1", r"attn2\.norm_added_k": "cross_attn.norm_k_img",
    r"attn2\.norm_([qk])": r"cross_attn.norm_\1", r"attn2\.add_([kv])_proj": r"cross_attn.\1_img",
    r"attn1\.to_out\.0": "self_attn.o", r"attn1\.to_([qkv])": r"self_attn.\1", r"attn2\.to_out\.0": "cross_attn.o",
    r"attn2\.to_([qkv])": r"cross_attn.\1", r"ffn\.net\.0\.proj": "ffn.0", r"ffn\.net\.2": "ffn.2",
    r"(blocks\.\d+)\.norm2": r"\1.norm3", r"(blocks\.\d+)\.scale_shift_table": r"\1.modulation",
    r"^scale_shift_table": "head.modulation", r"^proj_out": "head.head",
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
}  # fmt: skip
# The same of its VAE.
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
VAE = {
    r"mid_block\.resnets\.([01])\.(norm1|conv1|norm2|conv2)": lambda m: f"middle.{2 * int(m[1])}.{RESIDUAL[m[2]]}",
    r"mid_block\.attentions\.0": "middle.1", "norm_out": "head.0", "conv_out": "head.2", "conv_in": "conv1",
    r"down_blocks\.(\d+)\.(norm1|conv1|norm2|conv2)": lambda m: f"downsamples.{m[1]}.{RESIDUAL[m[2]]}",
    r"down_blocks\.(\d+)\.conv_shortcut": r"downsamples.\1.shortcut", r"down_blocks\.(\d+)": r"downsamples.\1",
    r"up_blocks\.(\d)\.resnets\.(\d)\.(norm1|conv1|norm2|conv2)":
        lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}.{RESIDUAL[m[3]]}",
    r"up_blocks\.(\d)\.resnets\.(\d)\.conv_shortcut":
        lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}.shortcut",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda m: f"upsamples.{4 * int(m[1]) + 3}",
    r"^quant_conv": "conv1", r"^post_quant_conv": "conv2",
}  # fmt: skip


def renamed(state: dict[str, Tensor], rules: dict) -> dict[str, Tensor]:
    names = {}
    for name in state:
        names[name] = name
        for pattern, original in rules.items():
            names[name] = re.sub(pattern, original, names[name])
    return {names[name]: tensor.contiguous() for name, tensor in state.items()}


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in network.state_dict().items()}


EXPERTS = ("transformer", "transformer_2")
SAVERS = {"wan": save_tiny_pipeline, "wan_image": save_tiny_wan_image}


@pytest.fixture(scope="module", params=SAVERS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one family."""
    folder = tmp_path_factory.mktemp("models")
    return tuple(SAVERS[request.param](folder / f"model-{seed}", seed) for seed in (0, 1))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_in_the_original_names(folders: tuple[Path, Path], tmp_path: Path, prefix: str) -> None:
    here, there = folders
    state = state_of(load_backbone(there).networks["transformer"])
    names = renamed(state, ORIGINAL)
    assert not any("attn1" in name or "attn2" in name or "condition_embedder" in name for name in names)
    save_file({f"{prefix}{name}": tensor for name, tensor in names.items()}, tmp_path / "wan.safetensors")
    model = load_backbone(here, files={"transformer": tmp_path / "wan.safetensors"})
    read = model.networks["transformer"].state_dict()
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    assert not any(tensor.is_meta for tensor in (*read.values(), *model.networks["transformer"].buffers()))

    # The whole model is the other one but for its VAE, and says so.
    expected, plain = load_backbone(there).facts.identity, load_backbone(here).facts.identity
    assert model.facts.identity["transformer_fingerprint"] == expected["transformer_fingerprint"]
    assert model.facts.identity["vae_fingerprint"] == plain["vae_fingerprint"]
    half = load_backbone(here, torch.bfloat16, files={"transformer": tmp_path / "wan.safetensors"})
    whole = load_backbone(there, torch.bfloat16).networks["transformer"].state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in half.networks["transformer"].state_dict().items())


def test_diffusers_own_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a transformer and a VAE, together."""
    here, there = folders
    other = load_backbone(there)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("transformer", "vae")}
    for name, file in files.items():
        save_file(state_of(other.networks[name]), file)
    model = load_backbone(here, files=files)
    assert model.facts.identity["vae_fingerprint"] == other.facts.identity["vae_fingerprint"]
    assert model.facts.identity["transformer_fingerprint"] == other.facts.identity["transformer_fingerprint"]


def test_a_vae_in_the_original_names(tmp_path: Path) -> None:
    """Of the four levels that Wan 2.1's has: diffusers translates no others."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    names = renamed(vae.state_dict(), VAE)
    assert {"conv1.weight", "encoder.middle.1.to_qkv.weight", "decoder.upsamples.4.shortcut.weight"} <= names.keys()
    assert not any("block" in name or "resnets" in name for name in names)
    save_file(names, tmp_path / "wan_2.1_vae.safetensors")
    read = load_single_file(AutoencoderKLWan, dict(vae.config), tmp_path / "wan_2.1_vae.safetensors").state_dict()
    assert read.keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if "ffn.0" not in n}, r"the file lacks .*blocks\.0\.ffn\.net\.0\.proj"),
        (lambda s: {n: t for n, t in s.items() if "blocks.2" not in n}, r"lacks blocks\.2\..* and \d+ more"),
        (lambda s: {**s, "scaled_fp8": torch.zeros(1)}, "the model has not, scaled_fp8"),
        (lambda s: {n: torch.zeros(3) if n == "head.head.bias" else t for n, t in s.items()}, "proj_out.bias is"),
        (lambda s: {f"encoder.{n}": t for n, t in s.items()}, "lacks"),
        (lambda s: {n: t * float("nan") for n, t in s.items()}, "not finite"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole_or_of_another_model(
    tiny_pipeline_folder: Path, tmp_path: Path, change: Callable, message: str
) -> None:
    state = renamed(state_of(load_backbone(tiny_pipeline_folder).networks["transformer"]), ORIGINAL)
    path = tmp_path / "wan.safetensors"
    save_file(change(state), path)
    with pytest.raises(PrflError, match=message) as caught:
        load_backbone(tiny_pipeline_folder, files={"transformer": path})
    assert str(path) in caught.value.where


def test_files_that_cannot_be_read_and_networks_that_are_none(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pickled.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PrflError, match="is damaged"):
        load_backbone(tiny_pipeline_folder, files={"transformer": tmp_path / "pickled.safetensors"})
    with pytest.raises(PrflError, match="no such file"):
        load_backbone(tiny_pipeline_folder, files={"transformer": tmp_path / "absent.safetensors"})
    whole = tiny_pipeline_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert load_file(whole)
    with pytest.raises(PrflError, match="the model has no unet: its networks are transformer, vae"):
        load_backbone(tiny_pipeline_folder, files={"unet": whole})


def test_each_of_two_networks_has_its_own_file(tmp_path: Path) -> None:
    """And one LoRA is not merged into the first of them alone."""
    here, there = (save_tiny_experts(tmp_path / f"model-{seed}", seed) for seed in (0, 1))
    file = there / "transformer_2" / "diffusion_pytorch_model.safetensors"
    model, plain = load_backbone(here, files={"transformer_2": file}), load_backbone(here)
    for name, tensor in load_file(file).items():
        assert torch.equal(model.networks["transformer_2"].state_dict()[name], tensor)
    ours, plains = fingerprints(model), fingerprints(plain)
    assert [ours[name] == plains[name] for name in EXPERTS] == [True, False]
    with pytest.raises(PrflError, match="has two networks, .* and this is one file"):
        load_backbone(here, base_lora=tmp_path / "absent.safetensors")
