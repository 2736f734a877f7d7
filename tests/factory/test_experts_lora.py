"""LoRA files of two experts, one of each: trained on, or kept frozen in the base; what is of no expert is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec, load_backbone
from prfl.backbone.families import FAMILIES
from prfl.backbone.network import split
from prfl.config.schema import Config
from prfl.estimate.missing_inputs import missing_inputs
from prfl.export.card import changed_base
from prfl.export.lora import write_lora_files
from prfl.factory.backbone import POLICY, build_architecture, build_backbone
from prfl.factory.resume_identity import input_contents
from prfl.utils.errors import PrflError
from tests.factory.small_config import small_config
from tests.factory.test_adapter_start import ALPHA, FORMS, RANK, TARGETS, started
from tests.objective.parts import PROMPTS, stir
from tests.slow import slow_unless
from tests.wan_experts import save_tiny_experts
from tests.wan_image import SHAPE

EXPERTS = {"high": "transformer", "low": "transformer_2"}
SIGMA = torch.tensor([0.95, 0.3])  # one of each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_experts(tmp_path_factory.mktemp("experts") / "tiny-a14b")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Backbone:
    """The policy that somebody trained, with an alpha that is not its rank."""
    model = load_backbone(folder)
    model.add_adapter(POLICY, LoraSpec(rank=RANK, alpha=ALPHA, targets=TARGETS))
    stir(model, POLICY, seed=3)
    return model


@pytest.fixture(scope="module")
def states(trained: Backbone) -> dict[str, dict[str, Tensor]]:
    """Its weights, by the expert."""
    weights = {name: parameter.detach().clone() for name, parameter in trained.parameters(POLICY).items()}
    of_networks = split(weights, list(EXPERTS.values()))
    return {expert: of_networks[network] for expert, network in EXPERTS.items()}


@pytest.fixture
def config_of(tmp_path: Path, folder: Path) -> Callable[..., Config]:
    def make(init: object = None, model: Path = folder, adapter: dict | None = None, **backbone) -> Config:
        keys = {"rank": RANK, "alpha": 1.0, "targets": TARGETS, "init": init, **(adapter or {})}
        return small_config(tmp_path, model, objective="full_chain", adapter=keys, **backbone)

    return make


@pytest.fixture
def files(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> dict[str, str]:
    for expert, state in states.items():
        FORMS["musubi"](tmp_path / f"{expert}.safetensors", state)
    return {expert: str(tmp_path / f"{expert}.safetensors") for expert in EXPERTS}


def velocity(model: Backbone, adapter: str | None = POLICY) -> Tensor:
    """Of two samples, the first by the high-noise expert."""
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.adapter(adapter):
        return model.velocity(latents, SIGMA, model.condition(PROMPTS[:2]))


def check_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", slow_unless("musubi".__eq__, list(FORMS)))
def test_each_expert_starts_from_its_file(
    form: str, states: dict, trained: Backbone, config_of: Callable, tmp_path: Path
) -> None:
    for expert, state in states.items():
        FORMS[form](tmp_path / f"{expert}.safetensors", state)
    both = {expert: str(tmp_path / f"{expert}.safetensors") for expert in EXPERTS}
    expected, base = velocity(trained), velocity(trained, None)
    assert all((expected - base).abs().amax((1, 2, 3, 4)) > 1e-2)
    model = started(config_of(both))
    check_same(velocity(model), expected)
    assert all(parameter.requires_grad for parameter in model.parameters(POLICY).values())
    low = velocity(started(config_of({"low": both["low"]})))
    check_same(low, torch.stack([base[0], expected[1]]))


def test_a_runs_two_files_are_gone_on_with(trained: Backbone, config_of: Callable, tmp_path: Path) -> None:
    form, state = FAMILIES["wan_experts"].lora, {n: p.detach() for n, p in trained.parameters(POLICY).items()}
    paths = write_lora_files(tmp_path, "chain", form, state, list(trained.facts.blocks), rank=RANK, alpha=ALPHA)
    assert [path.stem for path in paths] == ["chain_high_noise", "chain_low_noise"]
    check_same(velocity(started(config_of({"high": str(paths[0]), "low": str(paths[1])}))), velocity(trained))
    one = started(config_of({"low": str(paths[1])}, experts={"train": ["low"]}))
    assert torch.equal(velocity(one)[0], velocity(trained, None)[0])
    check_same(velocity(one)[1], velocity(trained)[1])


@pytest.mark.parametrize("resident", ["both", "one"])
def test_the_base_is_the_model_with_both(
    resident: str, files: dict[str, str], trained: Backbone, config_of: Callable
) -> None:
    turns = {"experts": {"resident": resident}, "checkpointing": "full"}
    model, plain = build_backbone(config_of(base_lora=files, **turns)), build_backbone(config_of())
    check_same(velocity(model, None), velocity(trained))
    check_same(velocity(model), velocity(trained))  # a new adapter changes nothing yet
    for network in EXPERTS.values():
        assert model.facts.identity[f"{network}_fingerprint"] != plain.facts.identity[f"{network}_fingerprint"]
        frozen = [p for name, p in model.networks[network].named_parameters() if ".lora_" not in name]
        assert not any(parameter.requires_grad for parameter in frozen)


def test_one_expert_of_the_base_has_a_file(files: dict[str, str], trained: Backbone, config_of: Callable) -> None:
    config = config_of(base_lora={"high": files["high"]})
    model, base = build_backbone(config), velocity(trained, None)
    check_same(velocity(model, None), torch.stack([velocity(trained)[0], base[1]]))
    assert torch.equal(velocity(model, None)[1], base[1])
    assert changed_base(config.backbone) == [
        "Its base is not the model alone: the LoRA `high.safetensors` is in the weights of its high-noise expert, at "
        "strength 1. Load that first."
    ]


def test_who_notices_the_files(files: dict[str, str], config_of: Callable, tmp_path: Path) -> None:
    """A run that is resumed with another, and the dry run where one is absent."""
    config = config_of(files).model_copy(update={"reward": None})
    model = started(config)
    before = input_contents(config, model, None)
    tensors = {
        "blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24),
        "blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 2),
    }
    save_file(tensors, files["low"])
    after = input_contents(config, model, None)
    changed = [key for key in before if before[key] != after[key]]
    assert changed == ["backbone.adapter.init.low (content)"] and "backbone.adapter.init.high (content)" in before
    lines = missing_inputs(config_of({"low": "absent.safetensors"}, base_lora={"high": "nowhere.safetensors"}))
    assert [line.partition(";")[0] for line in lines if "safetensors" in line] == [
        "backbone.base_lora.high: there is no file nowhere.safetensors",
        "backbone.adapter.init.low: there is no file absent.safetensors",
    ]  # fmt: skip


ONE = "this is one file\n.*{high: FILE, low: FILE}.*prfl export"
OTHER = r"15 of the file's 30 layers are none of the adapter's: transformer_2\..*\n.*other expert: `prfl export`"


@pytest.mark.parametrize("build", [build_backbone, build_architecture])
@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        ({"init": "low"}, "backbone.adapter.init", ONE),
        ({"base_lora": "low"}, "backbone.base_lora", ONE),
        ({"init": {"low": "low"}, "experts": {"train": ["high"]}}, "backbone.adapter.init.low",
         "the high-noise expert alone is trained.*\n.*or keep the file frozen in the base: backbone.base_lora.low"),
    ],
)  # fmt: skip
def test_what_is_of_no_expert_is_refused_in_the_dry_run_too(
    build: Callable, keys: dict, where: str, message: str, files: dict[str, str], config_of: Callable
) -> None:
    named = {key: files.get(value, value) if isinstance(value, str) else value for key, value in keys.items()}
    with pytest.raises(PrflError, match=message) as caught:
        build(config_of(**named))
    assert caught.value.where == where


@pytest.mark.parametrize("build", [build_backbone, build_architecture])
@pytest.mark.parametrize("key", ["init", "base_lora"])
def test_a_model_of_one_network_has_no_experts(
    build: Callable, key: str, files: dict[str, str], config_of: Callable, tiny_pipeline_folder: Path
) -> None:
    with pytest.raises(PrflError, match="one network, and no experts for high and low noise\n.*give one file"):
        build(config_of(**{key: files}, model=tiny_pipeline_folder))


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_file_that_matches_only_in_part_is_an_error_with_its_keys(
    expert: str, states: dict, files: dict[str, str], trained: Backbone, config_of: Callable
) -> None:
    strange = renamed(states[expert], "blocks.1.", "blocks.7.")
    save_file(strange, files[expert])
    with pytest.raises(PrflError, match=r"5 of the file's 15 layers are none of the adapter's: blocks\.7\.") as caught:
        started(config_of(files))
    assert caught.value.where == f"backbone.adapter.init.{expert}"
    with pytest.raises(PrflError, match=r"5 of the file's 15 layers are none of the model's.*: blocks\.7\.") as caught:
        build_backbone(config_of(base_lora=files))
    assert caught.value.where == f"backbone.base_lora.{expert}"

    whole = {name: parameter.detach().clone() for name, parameter in trained.parameters(POLICY).items()}
    save_file(whole, files["high"])  # a run's policy.safetensors, of both
    with pytest.raises(PrflError, match=OTHER):
        started(config_of({"high": files["high"]}))


def test_a_config_that_names_no_file_or_no_expert(config_of: Callable) -> None:
    with pytest.raises(PrflError, match="adapter.init: it names no file; give high, low or both"):
        config_of({})
    with pytest.raises(PrflError, match="adapter.init.hgh: unknown key. Did you mean 'high'?"):
        config_of({"hgh": "x.safetensors"})
    with pytest.raises(PrflError, match="there is no expert 'transformer'\n.*high and low"):
        load_backbone(config_of().backbone.model, base_lora={"transformer": Path("x.safetensors")})


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("x_low_noise", True),
        ("x-LOW-v2", True),
        ("wan_lownoise", True),
        ("slow_lowlight", False),
        ("x_high_noise", False),
    ],
)
def test_files_that_are_exchanged_by_their_names_are_warned_of(
    name: str, warned: bool, config_of: Callable, capsys: pytest.CaptureFixture
) -> None:
    """Both experts have the same layers: nothing else would show it."""
    model = build_architecture(config_of({"high": f"{name}.safetensors"}))
    assert model.facts.boundary == 0.875
    text = "".join(capsys.readouterr()).replace("\n", " ")
    assert ("of the low-noise expert" in text and "backbone.adapter.init.high" in text) == warned
