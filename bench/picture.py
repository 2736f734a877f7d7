"""The README's moving picture: base and policy from the same noise, and the head's score along the chain.

    prfl train configs/tiny.yaml                                    or another run of the shapes world
    python bench/picture.py runs/tiny-policy [--out docs/pictures/prfl.gif] [--videos 6]

The videos are of the first test prompts, one of each: none is chosen by its look.  While the chain goes on a frame
shows the clean prediction at its step; then the videos play, and the oracle says what is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.data.video import write_video
from prfl.evaluation.reward_eval import Scorer
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.evaluation import build_judge, sampling_settings, with_total
from prfl.factory.policy import finished_run_config, load_policy
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_followed_reward
from prfl.rollout.sampling import start_noise
from prfl.rollout.trajectory import rollout

COLOURS = {"base": "0.4", "PRFL": "C0"}
REPEATS = 2  # of the finished videos


@dataclass(frozen=True)
class Drawn:
    """One video of each prompt, and its chain.

    pixels: (n, 3, f, h, w) in [-1, 1] of the clean prediction at each step, and of the videos at last.
    sigmas, scores: of each node; the score is the head's, the mean over the videos.  right: the oracle's word for each.
    """

    pixels: list[Tensor]
    sigmas: list[float]
    scores: list[float]
    right: list[bool]


@torch.no_grad()
def draw(config: Config, model: Backbone, score: Scorer, prompts: list[str], adapter: str | None) -> Drawn:
    """Draw by the base (adapter: None) or by the policy, from the same noise."""
    settings, judge = sampling_settings(config), build_judge(config.evaluation)
    assert judge is not None, "a run of the shapes world: evaluation.judge"
    shape = model.latent_shape(settings.frames, settings.height, settings.width)
    schedule, condition = settings.chain(model, shape), model.condition(prompts)
    noise = start_noise(shape, settings.seed, prompts, [0] * len(prompts)).to(model.facts.device)

    # The chain, and what the network takes for its end at each step: x - sigma v.
    with model.adapter(adapter):
        trajectory = rollout(lambda x, sigma: model.velocity(x, sigma, condition), noise, schedule)
        states = [trajectory.at(node) for node in range(schedule.steps + 1)]
        clean = [
            x - float(sigma) * model.velocity(x, sigma.float(), condition)
            for x, sigma in zip(states, schedule.sigmas[:-1], strict=False)
        ]
    pixels = [model.decode(latents).clamp(-1, 1).cpu() for latents in (*clean, states[-1])]

    # The head reads the chain's own noisy states.
    totals = [
        score(x, torch.full((len(prompts),), float(sigma)), condition)["total"].mean()
        for x, sigma in zip(states, schedule.sigmas, strict=True)
    ]
    right = judge(pixels[-1], prompts)["all"] == 1
    return Drawn(pixels, schedule.sigmas.tolist(), [float(total) for total in totals], right.tolist())


def pictures(drawn: Mapping[str, Drawn], prompts: Sequence[str]) -> list[Float[np.ndarray, "h w 3"]]:
    """Draw every frame: first the chain, a step each, then the videos."""
    figure = plt.figure(figsize=(8.4, 4.4), dpi=80, layout="constrained")
    (any_drawn, *_) = drawn.values()
    steps, frames = len(any_drawn.pixels) - 1, any_drawn.pixels[0].shape[2]
    chain = [_picture(figure, drawn, prompts, step, step % frames) for step in range(steps)]
    videos = [_picture(figure, drawn, prompts, steps, frame) for frame in range(frames)]
    return chain + videos * REPEATS


def _picture(figure: Figure, drawn: Mapping[str, Drawn], prompts: Sequence[str], step: int, frame: int) -> np.ndarray:
    figure.clear()
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2))[:, 0]
    axes = top.subplots(len(drawn), len(prompts))
    for row, (name, each) in zip(axes, drawn.items(), strict=True):
        row[0].set_ylabel(name, fontsize=11, color=COLOURS[name])
        for axis, video, right in zip(row, each.pixels[step], each.right, strict=True):
            _show(axis, video[:, frame], right if step == len(each.pixels) - 1 else None)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title("\n".join(_halves(prompt)), fontsize=7)

    axis = bottom.subplots()
    for name, each in drawn.items():
        axis.plot(each.sigmas[: step + 1], each.scores[: step + 1], color=COLOURS[name], label=name)
        axis.plot(each.sigmas[step], each.scores[step], "o", color=COLOURS[name])
    scores = [score for each in drawn.values() for score in each.scores]
    axis.set(xlim=(1.02, -0.02), ylim=(min(scores) - 0.2, max(scores) + 0.2))
    axis.set_xlabel("sigma: from noise (1) to the video (0)", fontsize=8)
    axis.set_ylabel("the head's score", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8, loc="lower left")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _show(axis: Axes, picture: Float[Tensor, "3 h w"], right: bool | None) -> None:
    axis.imshow(((picture + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    colour = {None: "0.8", True: "C2", False: "C3"}[right]
    axis.set_xlabel({None: "", True: "right", False: "wrong"}[right], fontsize=8, color=colour, labelpad=2)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=2)


def _halves(prompt: str) -> tuple[str, str]:
    words = prompt.split()
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of the shapes world that follows a latent reward")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/prfl.gif"))
    parser.add_argument("--videos", type=int, default=6)
    options = parser.parse_args()

    config = finished_run_config(options.run)
    model = build_backbone(config)
    load_policy(config, model)
    assert config.reward is not None, "a run that follows a reward"
    score = with_total(load_followed_reward(config, model), model, config.reward.weights, config.reward.aggregate)
    prompts = load_prompts(config.data)["test"][: options.videos]
    adapters = {"base": None, "PRFL": policy_adapter_name(config)}
    drawn = {name: draw(config, model, score, prompts, adapter) for name, adapter in adapters.items()}

    frames = np.stack(pictures(drawn, prompts))  # (f, h, w, 3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_video(options.out, torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1, 8)
    for name, each in drawn.items():
        print(f"{name}: {sum(each.right)} of {len(prompts)} right, the head's score at the end {each.scores[-1]:.2f}")
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
