"""Hard stops: a run that cannot be right ends at once and says what, where and how to mend it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.condition import stand_in
from prfl.config.sections.experts import RateOfEach, text_of
from prfl.objective import Objective
from prfl.training.failed_batch import dump_batch
from prfl.training.optimizer import gradients
from prfl.utils import rng
from prfl.utils.errors import GuardError, PrflError


def check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    """Raise PrflError unless every parameter of the objective takes a gradient."""
    fixed = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if len(fixed) == len(parameters):
        raise GuardError(
            f"nothing is trainable: of the objective's {len(parameters)} parameters none takes a gradient",
            where="objective",
            fix="add an adapter whose targets match modules of the network, or train a head",
        )
    if fixed:
        raise GuardError(
            f"{len(fixed)} of the objective's {len(parameters)} parameters take no gradient, the first is {fixed[0]}",
            where="objective",
            fix="let parameters() give what is trained, and only that",
        )


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise PrflError unless the optimizer holds the objective's very parameters, all of them and nothing else.

    Over copies of them a run looks well and trains nothing.
    """
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in stepped]
    strangers = len(stepped - {id(parameter) for parameter in parameters.values()})
    if missing or strangers:
        first = f", {missing[0]} is not among them" if missing else ""
        raise GuardError(
            f"the optimizer holds {len(parameters) - len(missing)} of the objective's {len(parameters)} parameters, "
            f"and {strangers} that are not the objective's{first}",
            where="training",
            fix="let the optimizer, the objective and the network share the same tensors, and no copies of them",
        )


def check_same_parameters(objective: dict[str, nn.Parameter], regulariser: dict[str, nn.Parameter]) -> None:
    """Raise PrflError where the regulariser trains what the objective does not."""
    strangers = [name for name, p in regulariser.items() if name not in objective or objective[name] is not p]
    if strangers:
        raise GuardError(
            f"the regulariser trains parameters that the objective does not: {strangers[0]} and "
            f"{len(strangers) - 1} more",
            where="training.regulariser",
            fix="give both the same adapter of the same backbone",
        )


def check_same_on_ranks(parameters: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Raise PrflError unless every process holds the same weights bit for bit: else each trains a model of its own.

    Call it on every process: each gathers all digests and so raises the same PrflError, and none waits for another.
    """
    if accelerator.num_processes == 1:
        return
    ranks: list[dict[str, str]] = gather_object([{name: digest(value) for name, value in parameters.items()}])
    for rank, other in enumerate(ranks):
        differ = [name for name in {**ranks[0], **other} if ranks[0].get(name) != other.get(name)]
        if differ:
            raise GuardError(
                f"the processes do not train the same weights: {differ[0]} and {len(differ) - 1} more differ between "
                f"process 0 and process {rank}",
                where="training",
                fix="start every process with the same config, seed and package versions, and resume all of them from "
                "the same checkpoint",
            )


def digest(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's shape, dtype and bytes."""
    values = tensor.detach().to("cpu").contiguous()
    sha256 = hashlib.sha256(f"{tuple(values.shape)}{values.dtype}".encode())
    sha256.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def check_gradient_arrived(parameters: dict[str, nn.Parameter], what: str, metrics: Mapping[str, float]) -> None:
    """Raise PrflError where the very first backward pass gave no parameter a gradient.

    A LoRA's A matrix may have a zero gradient there, because its B is zero; a gradient in any parameter suffices.
    metrics: of that step; a loss of exactly 0 beside a reward is a hinge that pulls at no sample.
    """
    if not any(bool(grad.count_nonzero()) for grad in gradients(list(parameters.values()))):
        if metrics.get("loss") == 0 and "reward" in metrics:
            mean = f"every sample of the first step scores at least reward.target, {metrics['reward']:.3g} in the mean"
            raise GuardError(
                f"no gradient reached any of the {len(parameters)} trained parameters of {what}: {mean}",
                where="objective",
                fix="a reward that was trained on few videos calls others far better than they are: train it on more; "
                "else reward.target above that, or reward.shape=linear, which has no hinge target",
            )
        raise GuardError(
            f"no gradient reached any of the {len(parameters)} trained parameters of {what} in the first step",
            where="objective",
            fix="check that the adapter is the one the rollout runs under, that the reward is differentiable, and "
            "that a hinge target is not already met by every sample",
        )


def base_and_policy(backbone: Backbone, adapter: str) -> tuple[Tensor, Tensor]:
    """Compute the velocities of the base and of the policy at a few random tokens, always the same ones.

    Of two networks that take turns both are asked.
    """
    facts = backbone.facts
    state = (facts.latent_channels, *(2 * size for size in facts.patch))
    latents = rng.normal(state, 0, "start", 0, [0]).to(facts.device)
    condition = stand_in(facts.condition, 1, 4, state, lambda shape: rng.normal(shape[1:], 0, "start/text", 0, [0]))
    sigma = torch.tensor([0.5] if facts.boundary is None else [1.0, facts.boundary / 2], device=facts.device)
    condition = condition.to(facts.device)[[0] * len(sigma)]
    latents = latents.expand(len(sigma), *state)
    with torch.no_grad():
        base = backbone.velocity(latents, sigma, condition)
        with backbone.adapter(adapter):
            return base, backbone.velocity(latents, sigma, condition)


def check_starts_as_base(backbone: Backbone, adapter: str) -> None:
    """Raise PrflError when a new adapter changes the model: its velocity at a few random tokens must be the same.

    It is compared bit for bit: an initialisation that is not zero or an adapter in the wrong place shows.  Raises
    PrflError, too, when the base's own velocity is not finite.
    """
    base, policy = base_and_policy(backbone, adapter)
    if not base.isfinite().all():
        fix = "load it in float32 (backbone.dtype), or download it again"
        raise GuardError("the model's output is not finite before the first step", where="backbone.model", fix=fix)
    if not torch.equal(base, policy):
        far = float((policy - base).abs().max() / base.abs().max())
        raise GuardError(
            f"the new adapter '{adapter}' changes the model before the first step (by {far:.2g} of its output)",
            where="backbone.adapter",
            fix="its B matrices must start at zero: check the versions of peft and diffusers with the README's, and "
            "report it with environment.json",
        )


def check_differs_from_base(backbone: Backbone, adapter: str, step: int, rate: float | RateOfEach) -> None:
    """Raise PrflError where a trained policy still gives what its base gives, whatever its weights are."""
    base, policy = base_and_policy(backbone, adapter)
    if torch.equal(base, policy):
        raise GuardError(
            f"after step {step} the policy's output is still its base's, bit for bit: nothing was learned",
            where="backbone.adapter",
            fix=f"raise training.learning_rate ({text_of(rate)}) or backbone.adapter.alpha, and check that its targets "
            "are layers which the model runs",
        )


def check_finite_weights(parameters: Mapping[str, Tensor], step: int) -> None:
    """Raise PrflError for weights that are not finite, before a checkpoint of them replaces an older one."""
    bad = [name for name, value in parameters.items() if not bool(value.isfinite().all())]
    if bad:
        raise GuardError(
            f"{bad[0]} and {len(bad) - 1} more weights are not finite after step {step}; they are not saved",
            where="training.learning_rate",
            fix="lower it, and resume from the last checkpoint",
        )


def check_finite(
    objective: Objective, run: Path, step: int, indices: Sequence[int], numbers: dict[str, float], rank: int = 0
) -> None:
    """Stop before the optimizer's step when latents, a reward, the loss or the gradient are not finite.

    The batch is kept for study (failed_batch.py).  Raises PrflError.
    """
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if not bad:
        return
    try:
        folder, outcome = dump_batch(objective, run, step, indices, numbers, rank), "the batch is in that folder"
    except PrflError as error:
        folder, outcome = run, f"the batch could not be kept ({error.what})"

    cause = next((name for name in ("latents/max", "reward", "loss") if name in bad), next(iter(bad)))
    others = f" (and so are {', '.join(sorted(bad.keys() - {cause}))})" if len(bad) > 1 else ""
    raise GuardError(
        f"{cause} is {bad[cause]} in step {step}{others}; the optimizer has not stepped on it",
        where=str(folder),
        fix=f"{outcome}; {remedy(cause, step)}",
    )


def remedy(cause: str, step: int) -> str:
    """Say what to do about a number that is not finite.

    In the first step nothing is trained yet, so there it is not the learning rate.
    """
    if step:
        return "lower the learning rate or max_grad_norm, or use float32, and resume from the last checkpoint"
    of_cause = {
        "latents/max": "the model itself gives it: load it in float32 (backbone.dtype), or download it again",
        "reward": "the reward itself gives it: train it again, or name another",
    }
    return of_cause.get(cause, "look at the clips of that batch, and compute in float32 (backbone.dtype)")
