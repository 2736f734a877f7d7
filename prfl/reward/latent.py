"""A reward that reads noisy latents through the first blocks of the frozen video transformer.

    scores = head(features(x, sigma, condition))

The reward shares the policy's backbone, with the policy's adapter switched off, so there is one copy of the weights.
The backbone is never saved or trained by the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone import Backbone, LoraSpec
from prfl.backbone.adapters import load_state, lora_shapes, state_of
from prfl.backbone.experts import check_read, networks_read
from prfl.backbone.network import joined
from prfl.backbone.weights import without_weights
from prfl.reward.checkpoint import RewardCard, SavedReward, Shape, check_fit, shapes_of, write_reward
from prfl.reward.checkpoint_schema import StoredLatent
from prfl.reward.head import RewardHead
from prfl.reward.inputs import Prompts, Sigmas, check_backbone, prepare
from prfl.reward.model_card import reward_card
from prfl.reward.pipeline import KeepBest
from prfl.reward.scores import Normalisation, Scores
from prfl.reward.scores import Shape as Aggregate
from prfl.utils.errors import error_location
from prfl.utils.files import atomic_write

KIND = StoredLatent.kind


@dataclass(frozen=True)
class RewardAdapter:
    """A LoRA of the reward, on the blocks that it reads.  The policy's adapter is another one."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    name: str = "reward"
    dropout: float = 0.0
    seed: int = 0

    def spec(self, blocks: Sequence[int], networks: Sequence[str] | None = None) -> LoraSpec:
        """Return the LoRA's layers for a head that reads after ``blocks``: all blocks up to the last of them.

        networks: those that the head reads; None is all.
        """
        run = tuple(range(max(blocks) + 1))
        return LoraSpec(self.rank, self.alpha, self.targets, self.dropout, run, self.seed, networks)


class LatentReward(ModelHubMixin, library_name="prfl"):
    """``reward(latents, sigma, condition)`` gives {dimension: (b,)}, differentiable in the latents; ``score`` is the
    same without gradient.

    A score is the head's logit, minus the mean logit of held-out clean videos, divided by their standard deviation: 0
    is the average held-out video, +1 is one standard deviation better.  Compare only samples of one prompt at one noise
    level: noise pulls all scores towards the prompt's mean.  A reward that was saved without held-out samples has mean
    0 and deviation 1, so its scores are the logits.

    blocks: 0-based indices of the transformer blocks after which hidden states are read, in the head's order; the
    forward pass stops after the last of them.  adapter: a LoRA that is added here; None keeps the blocks frozen.

    ``push_to_hub("owner/name")`` is huggingface_hub's own (ModelHubMixin).

    Under checkpointing the backward pass computes blocks again.  If the reward has an adapter, put
    ``with reward.selected():`` around forward *and* backward; otherwise the backbone raises.  Without an adapter this
    is needed only inside another adapter's context.
    """

    space = "latent"
    noise_aware = True
    differentiable = True

    def __init__(
        self,
        head: RewardHead,
        backbone: Backbone,
        blocks: Sequence[int],
        adapter: RewardAdapter | None = None,
        normalisation: Normalisation | None = None,
        card: RewardCard | None = None,
    ) -> None:
        check_backbone(backbone)
        backbone.facts.width_after(blocks)  # the blocks exist
        self.head = head.to(backbone.facts.device)
        self.backbone = backbone
        self.blocks = tuple(blocks)
        self.adapter = adapter
        self.trains = True  # until frozen
        self.normalisation = normalisation or Normalisation.none(head.dimensions)
        self.card = card or RewardCard()

        if adapter is not None:
            backbone.add_adapter(adapter.name, adapter.spec(blocks, networks_read(backbone.facts)))

    @property
    def dimensions(self) -> tuple[str, ...]:
        return self.head.dimensions

    def selected(self, dropout: Int[Tensor, " b"] | None = None) -> AbstractContextManager:
        """Select the reward's adapter, or the base, while the context lasts; see the class docstring.

        dropout: in training, a seed for each sample.
        """
        return self.backbone.adapter(None if self.adapter is None else self.adapter.name, dropout)

    def __repr__(self) -> str:
        facts, count = self.backbone.facts, len(self.blocks)
        adapter = f"with an own adapter of rank {self.adapter.rank}" if self.adapter else "frozen, without an adapter"
        rows = {
            "scores": ", ".join(self.dimensions),
            "unit": self.normalisation.unit,
            "reads": f"noisy latents behind block{'s' * (count > 1)} {', '.join(map(str, self.blocks))} "
            f"of 0 to {facts.num_blocks - 1}, {adapter}",
            "model": f"{facts.model_id} (family {facts.family}) on {facts.device}",
            "trained on": self.card.clips,
        }
        return "LatentReward\n" + "\n".join(f"  {name:<10}  {text}" for name, text in rows.items())

    @torch.no_grad()
    def score(self, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, prompts: Prompts) -> Scores:
        """Score latents without gradient: {dimension: (b,)}; what a score means is in the class docstring.

        latents: normalised, as ``backbone.encode`` gives them.  sigma: their noise level, from 0 (clean) to 1 (noise).
        prompts: what they were made from.  One sigma or prompt stands for all samples.
        Raises PrflError for a sigma outside of 0 to 1, latents of another model, and numbers of samples that differ.
        """
        return self(latents, sigma, prompts)

    def keep_best(
        self, count: int = 1, at: float = 0.75, weights: Mapping[str, float] | None = None, aggregate: Aggregate = "sum"
    ) -> KeepBest:
        """Make a ``callback_on_step_end`` for a diffusers pipeline: from the share ``at`` of its steps the best
        ``count`` samples of each prompt go on.  weights, aggregate: as of ``scores.total``.  See pipeline.py."""
        return KeepBest(self, count, at, weights, aggregate)

    def __call__(self, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, condition: Prompts) -> Scores:
        """Score latents: logits normalised by the stored mean and deviation.  Inputs and errors as of ``score``."""
        return self.normalisation.apply(self.logits(latents, sigma, condition))

    def logits(self, latents: Float[Tensor, "*n c t h w"], sigma: Sigmas, condition: Prompts) -> Scores:
        """Compute raw logits; sigmoid gives the probability of a good label when trained with cross-entropy."""
        latents, sigma, condition = prepare(self.backbone, latents, sigma, condition)
        check_read(self.backbone.facts, sigma)
        # A frozen backbone under latents that need no gradient needs no graph: head training is then a forward pass.
        graph = torch.is_grad_enabled() and (latents.requires_grad or (self.adapter is not None and self.trains))
        with self.selected(), torch.set_grad_enabled(graph):
            features = self.backbone.features(latents, sigma, condition, list(self.blocks))
        logits = self.head(features, sigma)  # (b, dimensions)
        return dict(zip(self.dimensions, logits.unbind(1), strict=True))

    def calibrate(self, logits: Scores) -> None:
        """Set the stored mean and deviation from validation logits, at the sigmas where the reward will be used."""
        self.normalisation = Normalisation.of(logits)

    def parameters(self) -> dict[str, nn.Parameter]:
        """List what reward training updates: the parameters of the head and of its adapter, by name."""
        parameters = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        if self.adapter is not None:
            adapter = self.backbone.parameters(self.adapter.name)
            parameters |= {f"adapter.{name}": parameter for name, parameter in adapter.items()}
        return parameters

    def freeze(self) -> LatentReward:
        """Keep no gradient for the head or its adapter, as scoring a policy needs; latents still receive theirs."""
        self.trains = False
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
        return self

    def state(self) -> dict[str, Tensor]:
        """Collect the tensors of the head and of its adapter; never of the backbone."""
        tensors = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.adapter is not None:
            adapter = state_of(self.backbone.parameters(self.adapter.name))
            tensors |= {f"adapter.{name}": tensor for name, tensor in adapter.items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what ``state`` returned."""
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "adapter": {}}
        for name, tensor in tensors.items():
            part, _, parameter = name.partition(".")
            parts[part][parameter] = tensor

        self.head.load_state_dict(parts["head"])
        if self.adapter is not None:
            load_state(self.backbone.parameters(self.adapter.name), self.adapter.name, parts["adapter"])

    def saved_config(self) -> dict[str, Any]:
        """Return the content of config.json but for its header: format, version and hashes."""
        return {
            "backbone": dict(self.backbone.facts.identity),
            "blocks": list(self.blocks),
            "head": self.head.settings,
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "normalisation": asdict(self.normalisation),
            "card": asdict(self.card),
        }

    def save_pretrained(  # type: ignore[override] # the mixin's own removes the old config before it writes
        self, folder: str | Path, *, config: None = None, model_card_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``config.json``, ``reward.safetensors`` (head and own adapter only) and the card, README.md."""
        write_reward(folder, KIND, self.saved_config(), self.state())
        with atomic_write(Path(folder) / "README.md") as path:
            self.generate_model_card(**(model_card_kwargs or {})).save(path)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Write the card: base model, blocks, training range and accuracy by sigma bin."""
        return reward_card({"format": f"prfl-{KIND}", **self.saved_config()}, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save and upload to ``owner/name``; options as ModelHubMixin's.  Returns the commit's address."""
        return super().push_to_hub(repo_id, **{"model_card_kwargs": {"name": repo_id}, **options})

    @staticmethod
    def from_pretrained(  # type: ignore[override] # the mixin's own reads no pieces that a backbone must be given for
        folder_or_hub: str | Path, backbone: Backbone, revision: str | None = None, adapter_name: str | None = None
    ) -> LatentReward:
        """Load a saved reward, frozen, for ``backbone``.

        adapter_name: another name for its adapter, when two rewards share a backbone.
        Raises PrflError naming every way in which the backbone is not the one that the reward was trained on.
        """
        check_backbone(backbone)
        saved = SavedReward.find(folder_or_hub, StoredLatent, revision)
        config, where = saved.config, str(folder_or_hub)
        check_fit(config.backbone, backbone.facts.identity, where)

        adapter = None if config.adapter is None else RewardAdapter(**config.adapter.model_dump())
        with error_location(where):
            tensors = saved.weights(described_shapes(config, backbone))
            if adapter is not None and adapter_name is not None:
                adapter = replace(adapter, name=adapter_name)
            head = RewardHead(**config.head.model_dump())
            reward = LatentReward(head, backbone, config.blocks, adapter, config.normalisation, config.card)
        reward.load_state(tensors)
        return reward.freeze()


def described_shapes(config: StoredLatent, backbone: Backbone) -> dict[str, Shape]:
    """List the names and shapes of the tensors of a reward with this config, without allocating any of them."""
    with without_weights():
        head = RewardHead(**config.head.model_dump())
    shapes = {f"head.{name}": shape for name, shape in shapes_of(head).items()}
    if config.adapter is None:
        return shapes

    spec = RewardAdapter(**config.adapter.model_dump()).spec(config.blocks, networks_read(backbone.facts))
    lists = backbone.facts.blocks
    chosen = spec.networks or tuple(lists)
    of_each = {key: lora_shapes(backbone.networks[key], spec, lists[key]) for key in chosen}
    adapter = joined(of_each, next(iter(lists), None))
    return shapes | {f"adapter.{name}": shape for name, shape in adapter.items()}
