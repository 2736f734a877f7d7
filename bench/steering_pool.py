"""Chains of a generator, drawn once for all rows of bench/study_steering.py that only choose among them.

Without noise on the way a chain is a function of its start, so best of N at any node, by any reward, can be played back
from what was noted of the chains: the method's own code runs on states that are the numbers of the chains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.backbone.condition import as_asks
from prfl.reward.pixel import PixelReward
from prfl.rollout.sampling import decode_all, jobs
from prfl.rollout.solvers import SolverSchedule
from prfl.steering.budget import Method
from prfl.steering.calls import Prices
from prfl.steering.chains import Chains, Steered
from prfl.steering.looks import pixel_look
from prfl.steering.process import Look, Process
from prfl.toy import clips as shapes
from prfl.utils import rng
from prfl.utils.files import atomic_write

CHUNK = 8  # chains of a prompt that are drawn at a time
READ_AT = (0.4, 0.5, 0.7, 0.75, 1.0)  # shares of the steps at which the head reads
AGAIN_AT = (0.3, 0.45, 0.6)  # noise levels at which it reads finished chains once more
CLEAN_AT = (0.5, 0.75)  # whose clean predictions are kept for other rewards; the end is kept as well

Begin = Callable[[list[str], list[int]], Process]
"""(prompts, sample index of each) -> the process of these videos."""


def nodes_of(steps: int, shares: Sequence[float]) -> list[int]:
    return list(dict.fromkeys(round(share * steps) for share in shares))


def draw_chunk(
    path: Path, begin: Begin, backbone: Backbone, prompts: Sequence[str], number: int, together: int
) -> None:
    """Draw chains number * CHUNK and on of every prompt; note what the look reads, and what the oracle says at last.

    together: prompts whose chains are drawn at a time.
    """
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(prompts), together):
        batch = list(prompts[first : first + together])
        with torch.no_grad():
            parts.append(_followed(begin(batch, [number] * len(batch)), backbone, jobs(batch, CHUNK)[0]))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    shaped = {name: column.reshape(len(prompts), CHUNK, *column.shape[1:]) for name, column in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file({name: column.contiguous() for name, column in shaped.items()}, temporary)


def _followed(process: Process, backbone: Backbone, prompts: list[str]) -> dict[str, Tensor]:
    chains, noted = process.start(CHUNK), {}
    for node in nodes_of(process.steps, READ_AT):
        chains = process.look(process.step_to(chains, node))
        if node in nodes_of(process.steps, CLEAN_AT):
            chains, clean = process.clean_prediction(chains)
            noted[f"clean/{node}"] = clean.half().cpu()
    pixels = decode_all(backbone, chains.latents)
    judged = {f"oracle/{name}": values for name, values in shapes.judge(pixels, prompts).items()}
    for number, node in enumerate(node for node, _ in chains.traces[0]):
        noted[f"head/{node}"] = torch.tensor([trace[number][1] for trace in chains.traces])
    noted["again"] = process.read_again(replace(process.looks[0], levels=AGAIN_AT), chains).double().cpu()
    return {**noted, **judged, f"clean/{process.steps}": chains.latents.half().cpu(), "pixels": as_bytes(pixels)}


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as 0 to 255."""
    return ((pixels + 1) * 127.5).round().byte()


@dataclass(frozen=True)
class Pool:
    """The chains of one generator, guidance and seed.

    tables: by reward, (prompts, chains, nodes), nan where nobody has looked.  verdicts: the oracle's by dimension,
    (prompts, chains).  pixels: of the finished videos, 0 to 255.
    """

    prompts: Sequence[str]
    tables: Mapping[str, Tensor]
    verdicts: Mapping[str, Tensor]
    pixels: Tensor

    @property
    def chains(self) -> int:
        return self.pixels.shape[1]


def load_pool(
    paths: Sequence[Path],
    prompts: Sequence[str],
    steps: int,
    seed: int,
    backbone: Backbone,
    pixel: PixelReward | None,
    batch: int,
) -> Pool:
    """Join the chunks that were drawn, with a table for each reward; the pixel reward reads what is kept, once."""
    chunks = [load_file(path) for path in paths]
    shared = set.intersection(*(set(chunk) for chunk in chunks))
    columns = {name: torch.cat([chunk[name] for chunk in chunks], 1) for name in chunks[0] if name in shared}
    verdicts = {name.removeprefix("oracle/"): columns[name] for name in columns if name.startswith("oracle/")}
    shape = columns["pixels"].shape[:2]

    def table(columns_at: Mapping[int, Tensor]) -> Tensor:
        scores = torch.full((*shape, steps + 1), torch.nan)
        for node, column in columns_at.items():
            scores[..., node] = column
        return scores

    dimensions = [verdicts[name] for name in verdicts if name != "all" and not name.startswith("measured/")]
    chance = torch.stack([rng.uniform(seed, f"random/{prompt}", 0, range(shape[1])) for prompt in prompts])
    tables = {
        "head": table({int(name.removeprefix("head/")): columns[name] for name in columns if name.startswith("head/")}),
        "random": table({node: chance for node in range(steps + 1)}),
        "oracle": table({steps: torch.stack(dimensions).mean(0) + verdicts["all"]}),
    }
    if "again" in columns:
        tables["head again"] = table({steps: columns["again"]})
    if pixel is not None:
        parts = [_pixel_scores(path, prompts, backbone, pixel, batch) for path in paths]
        tables["pixel"] = table(
            {node: torch.cat([part[str(node)] for part in parts], 1) for node in map(int, parts[0])}
        )
    return Pool(prompts, tables, verdicts, columns["pixels"])


def _pixel_scores(
    path: Path, prompts: Sequence[str], backbone: Backbone, pixel: PixelReward, batch: int
) -> dict[str, Tensor]:
    """What the pixel reward says of a chunk's clean predictions, by node; kept beside the chunk."""
    out = path.with_suffix(".pixel.safetensors")
    if not out.exists():
        look, chunk = pixel_look(pixel, backbone, aggregate="logsigmoid"), load_file(path)
        condition = backbone.condition(jobs(prompts, CHUNK)[0])
        scores = {}
        for name in (name for name in chunk if name.startswith("clean/")):
            clean = chunk[name].flatten(0, 1).float().to(backbone.facts.device)
            with torch.no_grad():
                read = [
                    look.read(clean[first : first + batch], torch.zeros(()), condition[first : first + batch])
                    for first in range(0, len(clean), batch)
                ]
            scores[name.removeprefix("clean/")] = torch.cat(read).reshape(len(prompts), CHUNK).cpu()
        with atomic_write(out) as temporary:
            save_file({name: column.contiguous() for name, column in scores.items()}, temporary)
    return load_file(out)


@dataclass
class Recorded(Process):
    """Chains that were drawn before: a state is the number of its chain."""

    def read_again(self, look: Look, chains: Chains) -> Tensor:
        sigma = torch.zeros((), dtype=torch.float64)
        return torch.stack([self.read(look, chains.latents, sigma, chains.groups) for _ in look.levels]).mean(0)

    def start(self, count: int) -> Chains:
        groups = tuple(group for group in self.groups for _ in range(count))
        slots = tuple(slot for _ in self.groups for slot in range(count))
        numbers = [float(self.indices[group] * count + slot) for group, slot in zip(groups, slots, strict=True)]
        latents = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1)
        return Chains(latents, 0, groups, slots, origins=slots, traces=((),) * len(groups))


def played_back(
    prompts: Sequence[str],
    table: Tensor,
    method: Method,
    schedule: SolverSchedule,
    price: Look,
    samples: int,
    prices: Prices,
) -> Steered:
    """What the method makes of a pool's chains by the scores in ``table``.  samples: of each prompt.

    price: a look that costs what the reward's does.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}

    def read(numbers: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        node = int((schedule.sigmas - sigma.double()).abs().argmin())
        scores = table[[rows[ask.prompt] for ask in condition.asks], numbers[:, 0].long(), node]
        assert not scores.isnan().any(), f"nobody has looked at node {node}"
        return scores

    every, indices = jobs(prompts, samples)
    process = Recorded(
        network=lambda numbers, sigma, condition: numbers * 0,
        schedule=schedule,
        looks=[replace(price, read=read, clean=False)],
        condition=Condition({}, as_asks(every)),
        indices=indices,
        state=(1,),
        prices=prices,
        batch=len(every) * method.chains,
    )
    return method(process)
