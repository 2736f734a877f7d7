"""The two-phase step under UniPC and the stochastic step, against joint-graph loops that know no schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from prfl.config import load_config
from prfl.factory.evaluation import sampling_settings
from prfl.factory.rollout import build_schedule
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import node_number
from prfl.rollout.solvers import euler, flow_sde, unipc
from prfl.utils import rng
from tests.objective.parts import SHAPE, assert_same_gradients, latent_objective, take_gradients, with_policy
from tests.slow import slow_unless

STEPS, ETA = 5, 0.7
SIGMAS = chain_sigmas(STEPS, 3.0)
INDICES = [4, 7]  # global sample indices, as of a later part of a batch


def unipc_loop():
    """A step of diffusers' scheduler, which keeps its own history; it must be called for every step in order."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=SIGMAS[:-1].numpy())
    return lambda i, x, v, step: scheduler.step(v, scheduler.timesteps[i], x).prev_sample


def sde_loop():
    def advance(i, x, v, step):
        t, after = SIGMAS[i].float(), SIGMAS[i + 1].float()
        if after == 0:
            return x - t * v
        std = ETA * torch.sqrt(t / (1 - (after if i == 0 else t)))
        noise = rng.normal(SHAPE, 0, f"noise/{i}", step, INDICES)
        drift = v + std**2 / (2 * t) * (x + (1 - t) * v)
        return x + drift * (after - t) + std * torch.sqrt(t - after) * noise

    return advance


CHAINS = {"unipc": (unipc(SIGMAS), unipc_loop), "flow_sde": (flow_sde(SIGMAS, ETA), sde_loop)}
METHODS = {
    "prfl": lambda chain: Prfl(chain, seed=0),
    "clean": lambda chain: Prfl(chain, seed=0, handoff="clean"),
    "vader": lambda chain: Vader(chain, 0, last_steps=3),
}


def joint_gradients(objective, make_loop, step):
    """Every step in one graph; what is not trained is run without autograd, and the reward's gradient goes through."""
    step_plan, backbone = objective.method.plan(step), objective.backbone
    _, condition, x = objective.draw(step, INDICES)
    advance, trained = make_loop(), step_plan.plan.trains
    node = node_number(step_plan.node, STEPS)
    for i in range(min(node, max(trained) + 1)):
        with torch.set_grad_enabled(i in trained), backbone.adapter("policy"):
            v = backbone.velocity(x, SIGMAS[i].float(), condition)
        x = x - SIGMAS[i].float() * v if node > STEPS and i in trained else advance(i, x, v, step)
    sigma = torch.tensor(step_plan.sigma(step_plan.node), dtype=torch.float32).expand(len(x))
    per_sample, _ = objective.loss(objective.scorer.reward(x, sigma, condition))
    per_sample.mean().backward()
    return take_gradients(objective)


@pytest.mark.parametrize("checkpointing", slow_unless("full".__eq__, ["none", "full"]))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chain", CHAINS)
def test_equals_the_joint_graph(tiny_backbone, chain, method, checkpointing):
    schedule, make_loop = CHAINS[chain]
    objective = latent_objective(with_policy(tiny_backbone), METHODS[method](schedule))
    drawn = set()
    for step in range(3):
        expected = joint_gradients(objective, make_loop, step)
        tiny_backbone.running.checkpointing = checkpointing
        drawn.add(objective.accumulate(step, INDICES)["node"])
        tiny_backbone.running.checkpointing = "none"
        assert_same_gradients(take_gradients(objective), expected)
    assert len(drawn) > 1 or method == "vader"


def test_noise_is_a_function_of_seed_step_and_sample(tiny_backbone):
    """Parts of a batch, a resumed run and a description of a step see the noise that the whole batch saw."""
    objective = latent_objective(with_policy(tiny_backbone), Vader(CHAINS["flow_sde"][0], 0, last_steps=1))
    whole = objective.describe(3, [4, 7])[0][f"scored/{STEPS}"]
    assert torch.equal(objective.describe(3, [4, 7])[0][f"scored/{STEPS}"], whole)
    torch.testing.assert_close(objective.describe(3, [7])[0][f"scored/{STEPS}"], whole[1:], rtol=1e-4, atol=1e-5)
    noises = objective.noises(3, [4, 7])
    assert torch.equal(noises[2][1], objective.noises(3, [7])[2][0])
    others = [objective.noises(4, [7])[2][0], noises[1][1], noises[2][0], objective.draw(3, [7])[2][0]]
    assert all((noises[2][1] - other).abs().max() > 0.1 for other in others)
    objective.method = Vader(euler(SIGMAS), 0, last_steps=1)
    assert (objective.describe(3, [4, 7])[0][f"scored/{STEPS}"] - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("overrides", "chain", "samples"),
    [
        ([], euler(SIGMAS), "euler"),
        (["rollout.solver=unipc"], unipc(SIGMAS), "unipc"),
        (["rollout.solver=flow_sde", "rollout.eta=0.3"], flow_sde(SIGMAS, 0.3), "euler"),
    ],
)
def test_the_config_names_the_chain_and_what_samples_are_drawn_with(tiny_backbone, tmp_path, overrides, chain, samples):
    (tmp_path / "x.yaml").write_text("""\
version: 1
run: runs/x
seed: 0
backbone: {model: absent, adapter: {rank: 2, alpha: 2}}
data: {prompts: {train: absent}, cache: cache, frames: 9, height: 16, width: 16, fps: 8}
reward: {space: latent, path: absent}
rollout: {steps: 5, shift: 3.0}
objective: {name: prfl}
training: {steps: 1, batch: 1, learning_rate: 1e-4}
evaluation: {every: 0}
""")
    config = load_config(tmp_path / "x.yaml", overrides)
    built = build_schedule(config, tiny_backbone)
    assert (built.a, built.b, built.c) == (chain.a, chain.b, chain.c)
    assert sampling_settings(config).solver == samples
