"""The peak memory of a run, by part, before it starts.

The network, the decoder and the reward are run forward and backward on ``meta`` at the run's own shapes, and their
tensors are counted (``live_bytes``): dtype, adapter and checkpointing are in the count because they are in the code.
Not in it: cuDNN's workspaces, the CUDA context, the allocator's gaps.  Leave a tenth of the memory for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.network import all_predictors, base_weights, copies
from prfl.backbone.weights import cast
from prfl.config.schema import Config
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.parts import (
    Part,
    Shapes,
    base_bytes,
    module_bytes,
    offloads,
    parks_vae,
    pinned,
    sum_bytes,
    waiting_bytes,
)
from prfl.estimate.phases import all_phases, network_call
from prfl.estimate.rewards import reward_on_meta
from prfl.estimate.stored_latents import earlier_outputs, most_kept, most_latents, stored_rollout
from prfl.factory.backbone import device_kind, keep_as_asked, policy_adapter_name
from prfl.factory.reward import Reward
from prfl.factory.rollout import build_schedule
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """fixed: what is alive all the time.  phases: what each phase of a step adds at its peak, one after another.

    trainable: number of trained parameters.  assumed: in words, what was not known; empty where everything was.
    host: bytes that a GPU run keeps in host memory: what ``backbone.offload`` moves there, and of a rollout that serves
    several steps its latents and a copy of the trained weights that made it, and of two experts the weights.
    """

    fixed: list[Part]
    phases: list[Part]
    trainable: int
    assumed: str = ""
    host: int = 0

    @property
    def largest(self) -> Part:
        return max(self.phases, key=self._with_fixed)

    @property
    def peak(self) -> int:
        return self._with_fixed(self.largest)

    @property
    def training_peak(self) -> int:
        """Return the peak of the steps themselves: without what runs before them, such as the text encoder."""
        return max(self._with_fixed(phase) for phase in self.phases if not phase.alone)

    def _with_fixed(self, phase: Part) -> int:
        return phase.bytes + (0 if phase.alone else sum(part.bytes for part in self.fixed))


def predict_memory(config: Config, model: Backbone) -> Memory:
    """Predict the memory of a run by running its phases on ``meta``.

    model: ``build_architecture(config)``; it gets gradients, so use it for nothing else.
    """
    return RunOnMeta.of(config, model).memory()


@dataclass(frozen=True)
class RunOnMeta:
    """A run as it is measured: its model and its reward, on ``meta``, with gradients of what is trained.

    fixed, assumed: as ``Memory`` has them.  Its memory may be asked for again where ``model.running`` keeps
    something else.
    """

    config: Config
    model: Backbone
    reward: Reward | None
    trained: list[nn.Parameter]
    shapes: Shapes
    fixed: list[Part]
    assumed: str

    @staticmethod
    def of(config: Config, model: Backbone) -> RunOnMeta:
        """model: as for ``predict_memory``."""
        model.running.offload = offloads(config)
        reward, assumed = reward_on_meta(config, model)
        trained = trained_parameters(config, model, reward)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)

        shapes = Shapes(model, config)
        fixed = list(fixed_parts(config, model, reward, trained, shapes))
        fixed += without_autocast(model)
        return RunOnMeta(config, model, reward, trained, shapes, fixed, assumed)

    def changed_to(self, config: Config) -> RunOnMeta:
        """Return the run of a config whose model, adapter and reward are the same, with that model, set as it says."""
        keep_as_asked(config, self.model)
        self.model.running.offload = offloads(config)
        shapes = Shapes(self.model, config)
        fixed = list(fixed_parts(config, self.model, self.reward, self.trained, shapes))
        return replace(self, config=config, shapes=shapes, fixed=fixed)

    def memory(self) -> Memory:
        config, model, trained, shapes = self.config, self.model, self.trained, self.shapes
        gradient_bytes = sum_bytes([p.grad for p in trained if p.grad is not None])
        with fused_on_meta(device_kind(config)):
            phases = list(all_phases(config, model, self.reward, shapes, gradient_bytes))
            host = host_bytes(config, model, shapes, phases) if model.running.offload else 0
        if (steps := config.rollout.gradients_per_rollout) > 1 and device_kind(config) == "cuda":
            waiting = pinned(sum_bytes([shapes.latents(config.training.batch)]))
            stored, _ = stored_rollout(shapes.plans, build_schedule(config, model), steps)
            host += stored * waiting + sum_bytes(trained)  # the weights are not pinned
        host += waiting_bytes(config, model)
        return Memory(self.fixed, phases, sum(parameter.numel() for parameter in trained), self.assumed, host)


def without_autocast(model: Backbone) -> Iterator[Part]:
    """Cast weights that are wider than what is computed in, since ``meta`` knows no autocast.

    The copies that autocast makes of them, one of each until a call ends, are yielded as a part of their own.
    """
    dtype = model.facts.dtype
    for network in all_predictors(model):
        if dtype != torch.float32 and any(tensor.requires_grad for tensor in base_weights(network)):
            yield Part(
                f"the weights in {str(dtype).removeprefix('torch.')}, by autocast", module_bytes(cast(network, dtype))
            )


def host_bytes(config: Config, model: Backbone, shapes: Shapes, phases: Sequence[Part]) -> int:
    """Return the host memory of one network call's checkpointed blocks and of the rollout's latents, in bytes.

    phases: as ``all_phases`` measured them.
    """
    part = config.training.batch // config.training.accumulation

    # What is not saved on the device with offload is on the host.
    measured = next((phase for phase in phases if phase.role == "gradient"), None)
    call = partial(network_call, config, model, shapes, part, gradient=True, saved_alone=True)
    with_store = (measured or call()).saved
    model.running.offload = False
    without = call().saved
    model.running.offload = True

    facts = model.facts  # of a hidden state the blocks keep one or two
    hidden = part * facts.tokens(shapes.latent) * facts.widths[0] * facts.dtype.itemsize
    rolled = 0
    if config.follows_reward:  # all but the end of the rollout, which is wanted first
        rolled = most_kept(shapes.plans, build_schedule(config, model)) - 1
    return (without - with_store) // hidden * pinned(hidden) + rolled * pinned(sum_bytes([shapes.latents(part)]))


def trained_parameters(config: Config, model: Backbone, reward: Reward | None) -> list[nn.Parameter]:
    if config.trains_reward:
        assert isinstance(reward, LatentReward | PixelReward)
        return list(reward.parameters().values())
    return list(model.parameters(policy_adapter_name(config)).values())


def fixed_parts(
    config: Config, model: Backbone, reward: Reward | None, trained: list[nn.Parameter], shapes: Shapes
) -> Iterator[Part]:
    """Yield what is alive all the time: weights, gradients, the optimizer's state, latents."""
    copied = copies(model).values()
    name = "frozen base, which reward and distance read" if copied else "transformer weights"
    yield Part(name, base_bytes(config, model))
    if copied:
        yield Part("trained copy of all weights, in float32", sum(map(module_bytes, copied)))
    if not parks_vae(config):
        yield Part("VAE weights", module_bytes(model.networks["vae"]))

    # What is trained.
    size = sum_bytes(trained)
    if config.backbone.train == "lora":
        yield Part("trained weights" if config.trains_reward else "adapter weights", size)
    yield Part("gradients", size)
    yield Part("optimizer (two averages)", ADAM_MOMENTS * size)
    if config.training.ema_decay is not None:
        yield Part("EMA of the weights", size)
    if reward is not None and config.follows_reward:
        yield Part("reward weights", sum_bytes(reward_tensors(reward)))

    # Latents of a part of the batch.
    part = config.training.batch // config.training.accumulation
    count = 4  # clean, noise and noisy, and what is predicted
    if config.follows_reward:
        count = most_latents(shapes.plans, build_schedule(config, model), offloads(config))
    latents = count * sum_bytes([shapes.latents(part)])
    embeddings = [tensor for tensor in shapes.condition(part).tensors.values() if tensor.is_floating_point()]
    yield Part("latents and prompt embeddings", latents + sum_bytes(embeddings))
    if config.follows_reward and (earlier := earlier_outputs(build_schedule(config, model))):
        yield Part("earlier outputs of a multistep solver", earlier * sum_bytes([shapes.latents(part)]))

    # A rollout that several steps use.
    if (steps := config.rollout.gradients_per_rollout) > 1:
        waiting, here = stored_rollout(shapes.plans, build_schedule(config, model), steps)
        of_all = sum_bytes([shapes.latents(config.training.batch)])
        on_cpu = waiting * of_all + size if device_kind(config) == "cpu" else 0
        yield Part("rollout that several steps use, and the weights that made it", here * of_all + on_cpu)


def reward_tensors(reward: Reward) -> list[Tensor]:
    if isinstance(reward, RewardEnsemble):
        return [tensor for member in reward.members for tensor in member.state().values()]
    if isinstance(reward, LatentReward | PixelReward):
        return list(reward.state().values())
    return list(reward.parameters())
