"""CogVideoX on a tiny random pipeline: against diffusers' own pipeline and VAE, and plain autograd in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec, load_architecture, load_backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.cogvideox.model import CogVideoXBackbone
from prfl.backbone.cogvideox.vae import frame_groups
from prfl.backbone.families import FAMILIES
from prfl.backbone.frames import pixel_frames
from prfl.backbone.kernels import cheaper_calls, use_kernels
from prfl.backbone.network import add_copy
from prfl.data.conditions import remember
from prfl.export.lora import write_shared_file
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.objective.sft import Sft
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.reward.pixel import PixelNetwork, PixelReward, pooled_prompt
from prfl.reward.scorer import LatentScorer, PixelScorer, Scorer
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import Guidance, guided_network
from prfl.rollout.solvers import SOLVERS, euler
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from tests.cogvideox import SHAPE, TOKENS, save_tiny_cogvideox
from tests.objective.parts import PROMPTS, stir
from tests.objective.test_sft import dataset
from tests.tiny import TEXT_WIDTH

POSITIONS = {"added": {}, "rotary": {"use_rotary_positional_embeddings": True}}
TARGETS = ("to_q", "to_v", "ff.net.2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As CogVideoX-2b has its positions, and as -5b."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_cogvideox(root / f"cog-{name}", **changes) for name, changes in POSITIONS.items()}


@pytest.fixture
def model(folders: dict[str, Path]) -> CogVideoXBackbone:
    return load_backbone(folders["rotary"])


def noise(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- the pipeline's chain


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_chain_is_the_pipelines_own(folders: dict[str, Path], positions: str) -> None:
    """Without guidance and with it, from its prompts to its latents and pixels."""
    model = load_backbone(folders[positions])
    pipe = CogVideoXPipeline.from_pretrained(folders[positions])
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=16, width=16, num_frames=9, num_inference_steps=5, max_sequence_length=TOKENS)
    for scale in (1.0, 3.0):
        start = noise().transpose(1, 2)
        theirs = pipe(PROMPTS[0], **how, guidance_scale=scale, latents=start.clone(), output_type="latent").frames
        condition, empty = model.condition([PROMPTS[0]]), model.condition([""])
        network = guided_network(model.velocity, condition, empty, scale=scale, gradient="both")
        schedule = SOLVERS["euler"](model.sigmas(5, SHAPE))
        ours = rollout(network, model.start(noise(), condition), schedule).at(5)
        assert (ours - theirs.transpose(1, 2)).abs().max() < 1e-5 * theirs.abs().max()
    pixels = pipe.decode_latents(theirs)
    assert (model.decode(theirs.transpose(1, 2)) - pixels).abs().max() < 1e-5


def test_a_sample_does_not_depend_on_its_batch(model: CogVideoXBackbone) -> None:
    latents, sigma, condition = noise(3), torch.tensor([0.2, 0.9, 1.0]), model.condition(PROMPTS)
    together = model.velocity(latents, sigma, condition)
    for row in range(3):
        alone = model.velocity(latents[row : row + 1], sigma[row], condition[[row]])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert model.velocity(latents.bfloat16(), sigma, condition).dtype == torch.bfloat16


def test_a_shift_gives_a_flows_sigmas(model: CogVideoXBackbone) -> None:
    own, shifted = model.sigmas(10, SHAPE), model.sigmas(10, SHAPE, shift=model.facts.shift)
    assert own[0] == shifted[0] == 1 and own[-1] == shifted[-1] == 0 and bool((own.diff() < 0).all())
    assert float((own - shifted).abs()[:6].max()) < 0.01, "the family's own shift is like its table above its middle"
    assert torch.equal(shifted, chain_sigmas(10, model.facts.shift))
    with pytest.raises(PrflError, match="2000 steps, and the model has 1000 timesteps"):
        model.sigmas(2000, SHAPE)


def test_prompts_are_encoded_with_their_padding(model: CogVideoXBackbone, folders: dict[str, Path]) -> None:
    pipe = CogVideoXPipeline.from_pretrained(folders["rotary"], transformer=None, vae=None)
    theirs, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    condition = model.condition(PROMPTS)
    torch.testing.assert_close(condition.tensors["prompt_embeds"], theirs)
    assert theirs.shape[1] == TOKENS
    assert condition.tensors["lengths"].tolist() == [6, 4, 7]
    real = [theirs[row, :length].mean(0) for row, length in enumerate([6, 4, 7])]
    torch.testing.assert_close(pooled_prompt(condition), torch.stack(real))
    remember(model, PROMPTS)
    torch.testing.assert_close(model.condition(PROMPTS).tensors["prompt_embeds"], theirs)
    assert model.text.tokens(["a " * 20]) == [(3,) * (TOKENS - 1) + (1,)]


# ------------------------------------------------------------------------------------------------- the VAE


def test_groups_of_frames() -> None:
    assert frame_groups(1, 2) == [(0, 1)] and frame_groups(3, 2) == [(0, 3)]
    assert frame_groups(7, 2) == [(0, 3), (3, 5), (5, 7)] and frame_groups(4, 2) == [(0, 2), (2, 4)]


def test_encoding_is_diffusers_own(model: CogVideoXBackbone) -> None:
    pixels = torch.rand(1, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.vae.encode(pixels).latent_dist.mode() * 0.7
    assert torch.equal(model.encode(pixels), expected) and expected.shape == (1, 4, 5, 4, 4)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("shown", [[1], [3], [0, 4], [4], None], ids=str)
def test_decoding_the_frames_that_are_shown(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shown: list[int] | None, checkpointing: str
) -> None:
    """Pixels and gradient are those of the whole video; no group behind them is decoded, nor a graph kept before."""
    model = load_backbone(folders["added"], torch.float64)
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    latents = torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = list(range(7)) if shown is None else shown
    frames = pixel_frames(chosen, 4)

    whole = latents.clone().requires_grad_()
    expected = model.vae.decode(whole / 0.7).sample[:, :, frames]
    (gradient,) = torch.autograd.grad(expected.sin().sum(), whole)
    groups: list[tuple[int, bool]] = []
    decode = model.vae.decoder.forward

    def counted(part: Tensor, **more: object) -> object:
        groups.append((part.shape[2], torch.is_grad_enabled()))
        return decode(part, **more)

    monkeypatch.setattr(model.vae.decoder, "forward", counted)
    leaf = latents.clone().requires_grad_()
    pixels = model.decode(leaf, shown)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad(pixels.sin().sum(), leaf)
    torch.testing.assert_close(ours[:, :, chosen], gradient[:, :, chosen], rtol=0, atol=1e-12)
    others = [frame for frame in range(7) if frame not in chosen]
    assert not ours[:, :, others].any() and ours.abs().max() > 0

    reached = [(first, end) for first, end in frame_groups(7, 2) if first <= chosen[-1]]
    assert groups == [(end - first, end > chosen[0]) for first, end in reached]


def test_sizes(model: CogVideoXBackbone) -> None:
    assert model.latent_shape(9, 16, 24) == (4, 3, 4, 6) and model.latent_shape(1, 8, 8) == (4, 1, 2, 2)
    for frames in (5, 8, 13):
        with pytest.raises(PrflError, match="1 frame and then groups of 8"):
            model.latent_shape(frames, 16, 16)
    with pytest.raises(PrflError, match="multiple of 8.*\n?.*take 8 or 16"):
        model.latent_shape(9, 12, 16)
    with pytest.raises(PrflError, match="4 latent frames: the VAE decodes 1 and then pairs"):
        model.decode(torch.zeros(1, 4, 4, 4, 4))


# ------------------------------------------------------------------------------------------------- features


def test_features_are_the_videos_tokens_and_end_early(model: CogVideoXBackbone) -> None:
    latents, sigma, condition = noise(2), torch.tensor([0.3, 0.8]), model.condition(PROMPTS[:2])
    whole: list[Tensor] = []
    for block in model.network.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: whole.append(output[0]))
    model.velocity(latents, sigma, condition)
    expected, whole[:] = whole[:], []
    states = model.features(latents, sigma, condition, [1, 0])
    assert len(whole) == 2 and torch.equal(states[0], expected[1]) and torch.equal(states[1], expected[0])
    assert states[0].shape == (2, 12, 32)
    with pytest.raises(PrflError, match="0 to 2"):
        model.features(latents, sigma, condition, [3])


def test_features_are_checkpointed_as_they_are_told(model: CogVideoXBackbone) -> None:
    model.running.checkpointing, model.running.feature_modes = "full", ("none", "full", "full")
    ran: list[int] = []
    for index, block in enumerate(model.network.transformer_blocks):
        block.attn1.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    leaf = noise().requires_grad_()
    (state,) = model.features(leaf, torch.tensor(0.5), model.condition(PROMPTS[:1]), [1])
    state.sum().backward()
    assert ran == [0, 1, 1], "of the features' blocks the second is computed again"
    ran.clear()
    model.velocity(leaf, torch.tensor(0.5), model.condition(PROMPTS[:1])).sum().backward()
    assert sorted(ran) == [0, 0, 1, 1, 2, 2]


# ------------------------------------------------------------------------------------------------- gradients


def trained(folder: Path, checkpointing: str = "none", copy: bool = False) -> Backbone:
    model = load_backbone(folder, torch.float64)
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    if copy:
        add_copy(model, "policy")
        model.networks["policy/transformer"].double()
    else:
        model.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=TARGETS))
    stir(model, "policy", seed=3)
    return model


def latent_scorer(model: Backbone) -> Scorer:
    torch.manual_seed(0)
    head = RewardHead(32, ["motion"], blocks=1, inner=16, heads=2, hidden=16).double()
    reward = LatentReward(head, model, [1], adapter=RewardAdapter(rank=2, alpha=4.0, targets=TARGETS))
    stir(model, "reward", seed=4)
    return LatentScorer(reward.freeze())


def pixel_scorer(model: Backbone) -> Scorer:
    torch.manual_seed(1)
    network = PixelNetwork(TEXT_WIDTH, ["motion"], size=16, hidden=8, inner=16).double()
    return PixelScorer(PixelReward(network).freeze(), model, seed=0, frames="one")


CHAIN = 3
# (method of a chain, scorer, checkpointing, solver, a trained copy of all weights)
PATHS: dict[str, tuple[Callable, Callable, str, str, bool]] = {
    "prfl": (lambda chain: Prfl(chain, 1), latent_scorer, "none", "euler", False),
    "prfl, checkpointed": (lambda chain: Prfl(chain, 0), latent_scorer, "full", "euler", False),
    "prfl, all weights": (lambda chain: Prfl(chain, 0), latent_scorer, "full", "euler", True),
    "vader": (lambda chain: Vader(chain, 0, 1), pixel_scorer, "attention", "euler", False),
    "whole chain": (lambda chain: Vader(chain, 0, CHAIN), latent_scorer, "full", "euler", False),
    "whole chain, unipc": (lambda chain: Vader(chain, 0, CHAIN), latent_scorer, "none", "unipc", False),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_is_plain_autograds(folders: dict[str, Path], path: str) -> None:
    method, scorer, checkpointing, solver, copy = PATHS[path]
    model = trained(folders["rotary"], checkpointing, copy)
    schedule = SOLVERS[solver](model.sigmas(CHAIN, SHAPE))
    loss = RewardLoss({"motion": 1.0}, shape="linear", scale=1.0)
    objective = RewardGradient(
        model, method(schedule), scorer(model), loss, PROMPTS, SHAPE, distance_every=0, guidance=Guidance(2.0, "both")
    )
    objective.draw = doubled(objective.draw)  # type: ignore[method-assign]
    objective.accumulate(0, [0, 1])
    ours = {name: parameter.grad for name, parameter in objective.parameters().items()}

    # The same in one joint graph.
    step_plan = objective.method.plan(0)
    ((node, _),) = step_plan.seeds.items()
    first = min(step_plan.plan.evaluations)
    _, condition, x = objective.draw(0, [0, 1])
    network = guided_network(model.velocity, condition, model.condition(["", ""]), scale=2.0, gradient="both")
    outputs: list[Tensor] = []
    model.running.checkpointing = "none"
    with model.adapter("policy"):
        for i in range(node):
            with torch.set_grad_enabled(i >= first):
                outputs.append(network(x, schedule.sigmas[i]))
                x = schedule.a[i] * x + sum(weight * outputs[k] for k, weight in schedule.b[i].items())
    with objective.scorer.selected():
        scores = objective.scorer(x, schedule.sigmas[node].expand(2), condition, 0)
    names, leaves = zip(*objective.parameters().items(), strict=True)
    joint = torch.autograd.grad(-scores["motion"].mean(), leaves, allow_unused=True)
    size = max(float(gradient.abs().max()) for gradient in joint if gradient is not None)
    assert size > 1e-6
    for name, gradient in zip(names, joint, strict=True):
        if gradient is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9 * size, msg=name)


def doubled(draw: Callable) -> Callable:
    def in_double(step: int, indices: list[int]):
        prompts, condition, start = draw(step, indices)
        return prompts, condition, start.double()

    return in_double


def test_sft_is_flow_matching(folders: dict[str, Path]) -> None:
    model = trained(folders["added"], "full")
    objective = Sft(model, dataset(model), seed=0, prompt_dropout=0.0, shift=model.facts.shift)
    loss = objective.accumulate(3, [6, 7])["loss"]
    ours = {name: parameter.grad for name, parameter in objective.parameters().items()}
    batch, leaves = objective.draw(3, [6, 7]), objective.parameters()
    sigma = batch.sigma[:, None, None, None, None]
    with model.adapter("policy"):
        velocity = model.velocity((1 - sigma) * batch.clean + sigma * batch.noise, batch.sigma, batch.condition)
        expected = (velocity - (batch.noise - batch.clean)).pow(2).mean()
        joint = torch.autograd.grad(expected, list(leaves.values()))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in zip(leaves, joint, strict=True):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------------------- files and refusals


def test_diffusers_loads_an_exported_lora(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_backbone(folders["rotary"])
    model.add_adapter("policy", LoraSpec(rank=2, alpha=3.0, targets=TARGETS))
    stir(model, "policy", seed=3)
    state = {name: parameter.detach() for name, parameter in model.parameters("policy").items()}
    write_shared_file(tmp_path / "lora.safetensors", FAMILIES["cogvideox"].lora, state, rank=2, alpha=3.0)
    pipe = CogVideoXPipeline.from_pretrained(folders["rotary"], text_encoder=None)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    condition, other = model.condition(PROMPTS[:1]), load_backbone(folders["rotary"])
    other.computing["transformer"] = pipe.transformer
    with torch.no_grad(), model.adapter("policy"):
        ours = model.velocity(noise(), torch.tensor(0.7), condition)
        theirs = other.velocity(noise(), torch.tensor(0.7), condition)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - model.velocity(noise(), torch.tensor(0.7), condition)).abs().max() > 1e-2, "the LoRA does something"


def test_the_architecture_ships() -> None:
    """1.69 billion parameters in the transformer, 4.76 in the encoder."""
    model = load_architecture("THUDM/CogVideoX-2b", torch.bfloat16)
    assert sum(p.numel() for p in model.networks["transformer"].parameters()) == 1_693_783_872
    assert sum(p.numel() for p in model.text.encoder().parameters()) == 4_762_310_656
    assert model.latent_shape(49, 480, 720) == (16, 13, 60, 90) and model.facts.text_tokens == 226
    assert model.facts.tokens((16, 13, 60, 90)) == 17_550


def edited(folder: Path, target: Path, part: str, **changes: object) -> Path:
    path = Path(shutil.copytree(folder, target)) / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_what_is_refused(model: CogVideoXBackbone, folders: dict[str, Path], tmp_path: Path) -> None:
    scheduler = edited(folders["added"], tmp_path / "a", "scheduler/scheduler_config.json", timestep_spacing="leading")
    with pytest.raises(PrflError, match="the scheduler's timestep_spacing is 'leading'"):
        load_backbone(scheduler)
    image = edited(folders["added"], tmp_path / "b", "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
    with pytest.raises(PrflError, match="CogVideoXImageToVideoPipeline is not supported.*\n?.*WanPipeline, CogVideoX"):
        load_backbone(image)
    with pytest.raises(PrflError, match="CogVideoX 1.5"):
        load_architecture(edited(folders["added"], tmp_path / "c", "transformer/config.json", patch_size_t=2))
    with pytest.raises(PrflError, match="prfl_kernels has nothing for a cogvideox model"):
        use_kernels(model, ["lora_linear"])
    with pytest.raises(PrflError, match="no cheaper calls"):
        cheaper_calls(model, Cheaper(cache=0.1))


def test_the_vae_keeps_its_dtype(folders: dict[str, Path]) -> None:
    model = load_backbone(folders["added"], torch.bfloat16)
    assert isinstance(model.networks["vae"], AutoencoderKLCogVideoX) and model.facts.vae_dtype == torch.float32
    latents = noise().bfloat16()
    assert model.decode(latents).dtype == torch.float32
    exact = load_backbone(folders["added"]).velocity(noise(), torch.tensor(0.5), (condition := model.condition(["a"])))
    rounded = model.velocity(noise(), torch.tensor(0.5), condition)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert euler(model.sigmas(2, SHAPE)).steps == 2
