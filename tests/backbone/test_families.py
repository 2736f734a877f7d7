"""Every family, on tiny random pipelines: against diffusers' own pipeline, and
against plain autograd in float64.  What is a family's alone is tested beside: test_cogvideox.py, test_modelscope.py,
test_wan_image.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image
from torch import Tensor, nn

from prfl.backbone import Backbone, LoraSpec, backbone_from_pipeline
from prfl.backbone.condition import unconditional, with_unconditional
from prfl.backbone.families import FAMILIES
from prfl.backbone.flow_form import ended
from prfl.backbone.network import add_copy, base_blocks
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import pad_to
from prfl.data.conditions import remember
from prfl.export.card import load_line
from prfl.export.lora import write_lora_files
from prfl.factory.reward import load_reward
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.objective.sft import Sft
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.reward.pixel import PixelNetwork, PixelReward, pooled_prompt
from prfl.reward.scorer import LatentScorer, PixelScorer, Scorer
from prfl.rollout.guidance import Guidance, guided_network
from prfl.rollout.solvers import SOLVERS
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from tests import cogvideox, modelscope, svd, wan_experts, wan_image
from tests.backbone.table import MEASURED
from tests.models import copied_from
from tests.objective.parts import PROMPTS, stir
from tests.objective.test_sft import dataset
from tests.slow import slow_unless
from tests.tiny import TEXT_WIDTH, save_tiny_pipeline


@dataclass(frozen=True)
class Case:
    """A tiny model of a family.

    save: writes its folder.  more: what its pipeline's call is given.  frames_first: its pipeline's latents are
    (b, t, c, h, w).  from_image: whether it takes a first frame.  reads_text: whether it reads prompts.
    own_sigmas: its pipeline's sigmas are not the model's, by design.  tokens: of a text.  targets: layers with a LoRA.
    block, width: what a head reads.
    """

    family: str
    save: Callable[[Path], Path]
    pipeline: Any
    shape: tuple[int, ...]
    frames: int
    tokens: int
    targets: tuple[str, ...]
    block: int
    more: dict[str, Any]
    frames_first: bool = False
    from_image: bool = False
    own_sigmas: bool = False
    reads_text: bool = True

    def asks(self, folder: Path) -> list[str]:
        """PROMPTS, with first frames (beside the model's folder) where it takes some."""
        return [*wan_image.first_frames(folder.parent / "pictures", PROMPTS)] if self.from_image else PROMPTS

    def turned(self, latents: Tensor) -> Tensor:
        """Latents as its pipeline has them, and back."""
        return latents.transpose(1, 2) if self.frames_first else latents

    def noise(self, batch: int = 1, seed: int = 0) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed))


def cog(**changes: Any) -> Case:
    return Case(
        "cogvideox", lambda folder: cogvideox.save_tiny_cogvideox(folder, **changes), CogVideoXPipeline,
        cogvideox.SHAPE, 9, cogvideox.TOKENS, ("to_q", "to_v", "ff.net.2"), 1,
        {"max_sequence_length": cogvideox.TOKENS}, frames_first=True,
    )  # fmt: skip


CASES = {
    "cogvideox, positions added": cog(),
    "cogvideox": cog(use_rotary_positional_embeddings=True),
    "modelscope": Case(
        "modelscope", modelscope.save_tiny_modelscope, TextToVideoSDPipeline, modelscope.SHAPE, 3, modelscope.TOKENS,
        ("to_q", "to_v", "ff.net.2"), 2, {},
    ),
    "svd": Case(
        "svd", svd.save_tiny_svd, StableVideoDiffusionPipeline, svd.SHAPE, 3, 1, ("to_q", "to_v", "ff.net.2"), 2, {},
        frames_first=True, from_image=True, reads_text=False,
    ),
    "wan": Case(
        "wan", save_tiny_pipeline, WanPipeline, wan_image.SHAPE, 9, 512, ("to_q", "to_v", "ffn.net.2"), 1,
        {"max_sequence_length": 512}, own_sigmas=True,
    ),
    "wan_experts": Case(
        "wan_experts", wan_experts.save_tiny_experts, WanPipeline, wan_image.SHAPE, 9, 512,
        ("to_q", "to_v", "ffn.net.2"), 1, {"max_sequence_length": 512}, own_sigmas=True,
    ),
    "wan_image": Case(
        "wan_image", wan_image.save_tiny_wan_image, WanImageToVideoPipeline, wan_image.SHAPE, 9, 512,
        ("to_q", "add_k_proj", "add_v_proj", "ffn.net.2"), 1, {"max_sequence_length": 512}, from_image=True,
        own_sigmas=True,
    ),
    "wan_image_experts": Case(
        "wan_image_experts", wan_experts.save_tiny_image_experts, WanImageToVideoPipeline, wan_image.SHAPE, 9, 512,
        ("to_q", "to_v", "ffn.net.2"), 1, {"max_sequence_length": 512}, from_image=True, own_sigmas=True,
    ),
    "wan_pinned_frame": Case(
        "wan_pinned_frame", wan_image.save_tiny_pinned_frame, WanImageToVideoPipeline, wan_image.SHAPE, 9, 512,
        ("to_q", "to_v", "ffn.net.2"), 1, {"max_sequence_length": 512}, from_image=True, own_sigmas=True,
    ),
}  # fmt: skip


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, str, float], None]:
    """``measured(family, column, value)``: a cell of the table of families (``python -m tests.backbone``)."""
    return lambda family, column, value: record_property(MEASURED, (family, column, value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder of a case, written once."""
    folders: dict[int, Path] = {}

    def folder_of(case: Case) -> Path:
        if id(case) not in folders:
            folders[id(case)] = case.save(tmp_path_factory.mktemp("models") / f"tiny-{case.family}")
        return folders[id(case)]

    return folder_of


# Most tests are Wan's anyway, and the other is made of two that are here: here they are for the table.
ELSEWHERE = [pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "wan_image_experts")]

SECOND_UNET = pytest.param("svd", marks=pytest.mark.slow)  # but for its chain, and test_svd.py


@pytest.fixture(
    params=["cogvideox", "modelscope", SECOND_UNET, "wan_experts", "wan_image", "wan_pinned_frame", *ELSEWHERE]
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def folder(case: Case, saved: Callable[[Case], Path]) -> Path:
    return saved(case)


@pytest.fixture
def asks(case: Case, folder: Path) -> list[str]:
    return case.asks(folder)


@pytest.fixture
def model(folder: Path) -> Backbone:
    return copied_from(folder)


# ------------------------------------------------------------------------------------------------- the pipeline's chain


@pytest.mark.parametrize("name", slow_unless("wan".__ne__, CASES))
def test_the_chain_is_the_pipelines_own(name: str, saved: Callable[[Case], Path], measured: Callable) -> None:
    """Without guidance and with it, from its prompts to its latents and pixels."""
    case = CASES[name]
    model = copied_from(saved(case))
    pipe = case.pipeline.from_pretrained(saved(case))
    pipe.set_progress_bar_config(disable=True)
    how = dict(height=16, width=16, num_frames=case.frames, num_inference_steps=5, **case.more)
    if case.reads_text:
        how["prompt"] = PROMPTS[0]
    ask = case.asks(saved(case))[0]
    if case.from_image:
        how["image"] = Image.open(ask.image)
    for scale in (1.0, 3.0):
        given = case.turned(case.noise()).clone()
        guided = {"guidance_scale": scale}
        if not case.reads_text:  # its guidance may differ by frame; its picture is noised first
            guided = {"min_guidance_scale": scale, "max_guidance_scale": scale, "fps": 8, "generator": seeded()}
        theirs = pipe(**how, **guided, latents=given, output_type="latent").frames
        condition, empty = model.condition([ask]), model.condition(unconditional([ask]))
        network = guided_network(model.velocity, condition, empty, scale=scale, gradient="both")
        schedule = SOLVERS["euler"](pipe.scheduler.sigmas if case.own_sigmas else model.sigmas(5, case.shape))
        first = model.start(case.noise(), condition, float(schedule.sigmas[0]))
        ours = ended(model.facts, rollout(network, first, schedule).at(5), float(schedule.sigmas[-1]))
        error = float((ours - case.turned(theirs)).abs().max() / theirs.abs().max())
        measured(case.family, f"chain, guidance {scale:g}", error)
        assert error < 1e-5
    if case.family.startswith("wan"):  # its pipeline decodes, clamps and brings to [0, 1] in one
        given = case.turned(case.noise()).clone()
        pixels = pipe(**how, guidance_scale=scale, latents=given, output_type="pt").frames.transpose(1, 2)
        ours = model.decode(theirs).clamp(-1, 1) / 2 + 0.5
    else:
        count = () if case.reads_text else (case.frames,)
        pixels, ours = pipe.decode_latents(theirs, *count), model.decode(case.turned(theirs))
    error = float((ours - pixels).abs().max())
    measured(case.family, "pixels", error)
    assert error < 1e-5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_sample_does_not_depend_on_its_batch(case: Case, model: Backbone, asks: list[str]) -> None:
    latents, sigma, condition = case.noise(3), torch.tensor([0.2, 0.9, 1.0]), model.condition(asks)
    together = model.velocity(latents, sigma, condition)
    for row in range(3):
        alone = model.velocity(latents[row : row + 1], sigma[row], condition[[row]])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    assert model.velocity(latents.bfloat16(), sigma, condition).dtype == torch.bfloat16


def test_prompts_are_encoded_with_their_padding(case: Case, model: Backbone, folder: Path, asks: list[str]) -> None:
    if not case.reads_text:
        pytest.skip("it reads no text: test_svd.py has what it makes of a picture")
    pipe = case.pipeline.from_pretrained(folder, **{name: None for name in (*model.facts.blocks, "vae")})
    where = {} if case.more else {"device": "cpu", "num_images_per_prompt": 1}
    theirs, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, **case.more, **where)
    condition = model.condition(asks)
    embeds = condition.tensors["prompt_embeds"]
    torch.testing.assert_close(pad_to(embeds, case.tokens), theirs)
    assert theirs.shape[1] == case.tokens
    assert condition.tensors["lengths"].tolist() == [6, 4, 7]
    real = [theirs[row, :length].mean(0) for row, length in enumerate([6, 4, 7])]
    torch.testing.assert_close(pooled_prompt(condition), torch.stack(real))
    remember(model, asks)
    torch.testing.assert_close(model.condition(asks).tensors["prompt_embeds"], embeds)
    assert model.text.tokens(["a " * 600]) == [(3,) * (case.tokens - 1) + (1,)]


def test_a_pipeline_in_training_mode_computes_without_dropout(
    case: Case, model: Backbone, folder: Path, asks: list[str]
) -> None:
    pipe = case.pipeline.from_pretrained(folder)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for network in networks:
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5  # the tiny models' own is 0
    other, latents, sigma = backbone_from_pipeline(pipe), case.noise(), torch.tensor(0.6)
    conditions = [each.condition(asks[:1]) for each in (model, other)]
    for name, tensor in conditions[0].tensors.items():
        torch.testing.assert_close(conditions[1].tensors[name], tensor, msg=name)
    ours, theirs = (each.velocity(latents, sigma, conditions[0]) for each in (model, other))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not any(network.training for network in networks)


# ------------------------------------------------------------------------------------------------- features


def test_features_are_the_videos_tokens_and_end_early(
    case: Case, model: Backbone, asks: list[str], measured: Callable
) -> None:
    latents, sigma, condition = case.noise(2), torch.tensor([0.3, 0.8]), model.condition(asks[:2])
    whole: list[Tensor] = []
    for block in base_blocks(model):
        block.register_forward_hook(
            lambda module, inputs, output: whole.append(output[0] if isinstance(output, tuple) else output)
        )
    model.velocity(latents, sigma, condition)
    expected, whole[:] = whole[:], []
    states = model.features(latents, sigma, condition, [case.block, 0])
    assert len(whole) == case.block + 1 and len(expected) == model.facts.num_blocks
    for state, block in zip(states, (case.block, 0), strict=True):
        assert state.shape[0] == 2 and state.shape[2] == model.facts.widths[block]
        # Every value of the block is there, and the first sample's are the first sample's.
        values, whole_values = state[0].flatten().sort()[0], expected[block].chunk(2)[0].flatten().sort()[0]
        measured(case.family, "features", float((values - whole_values).abs().max()))
        assert torch.equal(values, whole_values)
    with pytest.raises(PrflError, match=f"0 to {model.facts.num_blocks - 1}"):
        model.features(latents, sigma, condition, [model.facts.num_blocks])


def test_features_are_checkpointed_as_they_are_told(case: Case, model: Backbone, asks: list[str]) -> None:
    model.running.checkpointing, model.running.feature_modes = "full", ("none", *["full"] * 9)
    ran: list[int] = []
    for index, block in enumerate(base_blocks(model)):
        linear = next(module for module in block.modules() if isinstance(module, nn.Linear))
        index %= model.facts.num_blocks  # of whichever network runs
        linear.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    leaf = case.noise().requires_grad_()
    (state,) = model.features(leaf, torch.tensor(0.5), model.condition(asks[:1]), [1])
    state.sum().backward()
    assert ran == [0, 1, 1], "of the features' blocks the second is computed again"
    ran.clear()
    model.velocity(leaf, torch.tensor(0.5), model.condition(asks[:1])).sum().backward()
    assert sorted(ran) == [block for block in range(model.facts.num_blocks) for _ in range(2)]


# ------------------------------------------------------------------------------------------------- gradients


def trained(case: Case, folder: Path, checkpointing: str = "none", copy: bool = False) -> Backbone:
    model = copied_from(folder, torch.float64, with_unconditional(case.asks(folder)))
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    if copy:
        add_copy(model, "policy")
        for name in model.facts.blocks:
            model.networks[f"policy/{name}"].double()
    else:
        model.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=case.targets))
    stir(model, "policy", seed=3)
    return model


def latent_scorer(case: Case, model: Backbone) -> Scorer:
    torch.manual_seed(0)
    head = RewardHead(model.facts.widths[case.block], ["motion"], blocks=1, inner=16, heads=2, hidden=16).double()
    reward = LatentReward(head, model, [case.block], adapter=RewardAdapter(rank=2, alpha=4.0, targets=("to_q", "to_v")))
    stir(model, "reward", seed=4)
    return LatentScorer(reward.freeze())


def pixel_scorer(case: Case, model: Backbone) -> Scorer:
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
    "last two steps": (lambda chain: Vader(chain, 0, 2), latent_scorer, "none", "euler", False),
    "whole chain": (lambda chain: Vader(chain, 0, CHAIN), latent_scorer, "full", "euler", False),
    "whole chain, unipc": (lambda chain: Vader(chain, 0, CHAIN), latent_scorer, "none", "unipc", False),
}


# Every path on the first family; on the other those that differ from each other most, and the rest where time is.
QUICK = ("prfl, checkpointed", "vader", "whole chain, unipc")
ALSO_QUICK = [("modelscope", "last two steps")]  # a chain whose steps are not of a flow


def is_quick(family: str, path: str) -> bool:
    return (path in QUICK and family not in ("svd", "wan", "wan_image_experts")) or (family, path) in ALSO_QUICK


EVERY_PATH = [
    *[("cogvideox", path) for path in PATHS],
    *[
        pytest.param(family, path, marks=() if is_quick(family, path) else pytest.mark.slow)
        for family in ("modelscope", "svd", "wan_experts", "wan_image", "wan_image_experts", "wan_pinned_frame", "wan")
        for path in PATHS
    ],
]


@pytest.mark.parametrize(("case", "path"), EVERY_PATH, indirect=["case"])
def test_the_gradient_is_plain_autograds(case: Case, folder: Path, path: str, measured: Callable) -> None:
    method, scorer, checkpointing, solver, copy = PATHS[path]
    model = trained(case, folder, checkpointing, copy)
    schedule = SOLVERS[solver](model.sigmas(CHAIN, case.shape))
    loss = RewardLoss({"motion": 1.0}, shape="linear", scale=1.0)
    objective = RewardGradient(
        model, method(schedule), scorer(case, model), loss, case.asks(folder), case.shape, distance_every=0,
        guidance=Guidance(2.0, "both"),
    )  # fmt: skip
    objective.draw = doubled(objective.draw)  # type: ignore[method-assign]
    objective.accumulate(0, [0, 1])
    ours = {name: parameter.grad for name, parameter in objective.parameters().items()}

    # The same in one joint graph.
    step_plan = objective.method.plan(0)
    ((node, _),) = step_plan.seeds.items()
    first = min(step_plan.plan.evaluations)
    _, condition, x = objective.draw(0, [0, 1])
    network = guided_network(
        model.velocity, condition, model.condition(unconditional(condition.asks)), scale=2.0, gradient="both"
    )
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
    errors = {}
    for name, gradient in zip(names, joint, strict=True):
        if gradient is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            errors[name] = float((ours[name] - gradient).abs().max()) / size
    measured(case.family, "gradients", max(errors.values()))
    assert max(errors.values()) < 1e-9, errors


def doubled(draw: Callable) -> Callable:
    def in_double(step: int, indices: list[int]):
        prompts, condition, start = draw(step, indices)
        return prompts, condition, start.double()

    return in_double


@pytest.mark.slow
def test_fifteen_steps_of_prfl_lower_the_loss(case: Case, folder: Path) -> None:
    """Of the latents at all nodes of a chain from noise that no step has seen; all weights are trained."""
    model = copied_from(folder)
    add_copy(model, "policy")
    scorer = latent_scorer(case, model)
    scorer.reward.head.float()
    schedule = SOLVERS["euler"](model.sigmas(CHAIN, case.shape))
    loss = RewardLoss({"motion": 1.0}, shape="linear", scale=1.0)
    method = Prfl(schedule, 0)
    objective = RewardGradient(model, method, scorer, loss, case.asks(folder), case.shape, distance_every=0)
    optimizer = torch.optim.Adam(objective.parameters().values(), lr=6e-3)

    @torch.no_grad()
    def loss_on_the_chain() -> float:
        _, condition, noise = objective.draw(10**6, [0, 1])
        with model.adapter("policy"):
            chain = rollout(lambda x, sigma: model.velocity(x, sigma, condition), noise, schedule)
            latents = [chain.at(node) for node in range(1, CHAIN + 1)]
        with scorer.selected():
            scores = [scorer(x, schedule.sigmas[i].expand(2), condition, 0) for i, x in enumerate(latents, start=1)]
        return -sum(float(each["motion"].mean()) for each in scores) / CHAIN

    before = loss_on_the_chain()
    for step in range(15):
        objective.accumulate(step, [2 * step, 2 * step + 1])
        optimizer.step()
        optimizer.zero_grad()

    assert loss_on_the_chain() < before - 0.01


def test_sft_is_flow_matching(case: Case, folder: Path) -> None:
    model = trained(case, folder, "full")
    objective = Sft(model, dataset(model, asks=case.asks(folder)), seed=0, prompt_dropout=0.0, shift=model.facts.shift)
    loss = objective.accumulate(3, [6, 7])["loss"]
    ours = {name: parameter.grad for name, parameter in objective.parameters().items()}
    batch, leaves = objective.draw(3, [6, 7]), objective.parameters()
    sigma = batch.sigma[:, None, None, None, None]
    with model.adapter("policy"):
        velocity = model.velocity((1 - sigma) * batch.clean + sigma * batch.noise, batch.sigma, batch.condition)
        expected = (velocity - (batch.noise - batch.clean)).pow(2).mean()
        joint = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in zip(leaves, joint, strict=True):
        assert (ours[name] is None) == (gradient is None), name  # None: of a network that these sigmas do not ask
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------------------- files


def test_diffusers_loads_an_exported_lora(
    case: Case, model: Backbone, folder: Path, tmp_path: Path, asks: list[str], measured: Callable
) -> None:
    model.add_adapter("policy", LoraSpec(rank=2, alpha=3.0, targets=case.targets))
    stir(model, "policy", seed=3)
    state = {name: parameter.detach() for name, parameter in model.parameters("policy").items()}
    form = FAMILIES[case.family].lora
    files = write_lora_files(tmp_path, "lora", form, state, list(model.facts.blocks), rank=2, alpha=3.0)
    pipe = case.pipeline.from_pretrained(folder, text_encoder=None)
    lines = [form.before, *(load_line(form, str(tmp_path), file.name) for file in files)]
    exec("\n".join(lines), {"pipeline": pipe})  # as the file's card says
    condition, other = model.condition(asks[:1]), copied_from(folder)
    for name in other.computing:
        other.computing[name] = getattr(pipe, name)
    if isinstance(other, WanBackbone):  # whose text is folded: its processors on the pipeline's network
        other = backbone_from_pipeline(pipe)
    latents, sigma = case.noise(), torch.tensor(0.7)
    with torch.no_grad(), model.adapter("policy"):
        ours, theirs = (each.velocity(latents, sigma, condition) for each in (model, other))
    error = float((ours - theirs).abs().max())
    measured(case.family, "LoRA in diffusers", error)
    assert error < 1e-5
    assert (ours - model.velocity(latents, sigma, condition)).abs().max() > 1e-2, "the LoRA does something"


def test_a_head_refuses_another_family(
    case: Case, model: Backbone, saved: Callable, tmp_path: Path, asks: list[str], measured: Callable
) -> None:
    """And gives, saved and loaded again, the same scores."""
    head = RewardHead(model.facts.width_after([case.block]), ["motion"], inner=16, heads=2, hidden=16)
    reward, latents, prompt = LatentReward(head, model, [case.block]).freeze(), case.noise(), [asks[0]]
    reward.save_pretrained(tmp_path / "reward")
    again = load_reward(tmp_path / "reward", model)
    before, after = (each.score(latents, 0.5, prompt)["motion"] for each in (reward, again))
    measured(case.family, "head, loaded again", float((after - before).abs().max()))
    assert torch.equal(after, before) and float(before.abs().max()) > 0
    other = "cogvideox" if case.family == "modelscope" else "modelscope"
    with pytest.raises(PrflError, match="num_blocks|width: "):
        load_reward(tmp_path / "reward", copied_from(saved(CASES[other])))
