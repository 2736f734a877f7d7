"""The model card (README.md) of an exported run: how to load it, what it was trained for, and the run's own figures."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from prfl.backbone.families import FAMILIES
from prfl.backbone.family import LoraFile
from prfl.config.schema import Config
from prfl.config.section import is_hub_id
from prfl.config.sections.backbone import BackboneConfig
from prfl.config.sections.experts import loras_of, text_of
from prfl.estimate.protection import NOT_PROTECTED
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import Row, load_rows
from prfl.factory import provenance
from prfl.factory.reward import reward_path
from prfl.reward.checkpoint import read_config
from prfl.reward.model_card import accuracy_text, table
from prfl.utils.errors import PrflError
from prfl.utils.files import whole_json
from prfl.utils.text import of_experts


def policy_card(
    config: Config, run: Path, name: str, contents: Sequence[str], repo: str, made_by: Mapping[str, Any]
) -> ModelCard:
    """Make the card of a policy.

    contents: the files of the LoRA and the networks' folders that are beside the card.  repo: what to load it from.
    made_by: what made the policy (``prfl.factory.provenance``).
    """
    family = FAMILIES[provenance.family(made_by)]
    hub, loras = is_hub_id(config.backbone.model), [part for part in contents if part.endswith(".safetensors")]
    base = config.backbone.model if hub else Path(config.backbone.model).name  # a path is nobody's business
    tags = ["prfl", family.task, "reward-gradient", *(["lora"] if loras else [])]
    data = ModelCardData(
        library_name="diffusers", pipeline_tag=family.task, base_model=base if hub else None, tags=tags
    )

    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"`{base}` trained with prfl by {config.objective.card_text}.",
        *changed_base(config.backbone),
        "## Use",
    ]
    if loras:
        facts = {"pipeline": family.pipeline, "before": family.lora.before}
        lines = [load_line(family.lora, repo, lora) for lora in loras]
        parts.append(USE_LORA.format(**facts, base=base, loads="\n".join(lines)))
        parts += [family.lora.use.format(file=loras[0])] if family.lora.use else []
    if networks := [part for part in contents if part not in loras]:
        loads = [f'{part} = {family.network}.from_pretrained("{repo}", subfolder="{part}")' for part in networks]
        arguments = ", ".join(f"{part}={part}" for part in networks)
        facts = {"pipeline": family.pipeline, "network": family.network, "base": base}
        parts.append(USE_NETWORKS.format(**facts, loads="\n".join(loads), networks=arguments))

    parts += ["## Figures", figures(run, made_by), "## Training", table(("", ""), settings(config, made_by))]
    if config.follows_reward:
        parts += ["## The reward", reward_text(config)]
    parts += ["## Files", files_text(contents)]
    return ModelCard("\n\n".join(parts) + "\n")


def load_line(form: LoraFile, repo: str, file: str) -> str:
    """The call by which diffusers loads a file."""
    told = [each.told for each in form.of_networks.values() if file.endswith(f"_{each.ending}.safetensors")]
    arguments = ", ".join([f'"{repo}"', f'weight_name="{file}"', *filter(None, told)])
    return form.load.format(arguments=arguments)


def changed_base(backbone: BackboneConfig) -> list[str]:
    """Say what the policy's base has that the model of this name has not: a reader must load it first."""
    changes = [f"the {name} is that of `{file.name}`" for name, file in backbone.weights.named().items()]
    for expert, file in loras_of(backbone.base_lora).items():
        weights = f"the weights of its {expert}-noise expert" if expert else "its weights"
        changes.append(f"the LoRA `{file.name}` is in {weights}, at strength 1")
    return [f"Its base is not the model alone: {'; '.join(changes)}. Load that first."] if changes else []


def files_text(contents: Sequence[str]) -> str:
    """Say what was written, and what a hash of it is worth to a reader."""
    listed = ", ".join(f"`{name}`" for name in contents)
    limits = "; ".join(NOT_PROTECTED[name] for name in ("weights", "downloads"))
    return (
        f"{listed}: their metadata (of a folder `prfl.json`) name the run, the step and the base model, with a hash of "
        f"the weights. Safetensors and JSON alone: no code, no pickle. Not protected: {limits}."
    )


USE_LORA = """\
In diffusers:

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{base}"){before}
{loads}
```"""

USE_NETWORKS = """\
Whole weights, without an adapter:

```python
from diffusers import {pipeline}, {network}

{loads}
pipeline = {pipeline}.from_pretrained("{base}", {networks})
```"""


def figures(run: Path, made_by: Mapping[str, Any]) -> str:
    """Tabulate samples/final/results.json: base beside policy, from the same noise, on held-out prompts."""
    path = run / "samples" / "final" / "results.json"
    results = whole_json(path, "outcomes")
    if results is None:
        return "None: the run drew no samples of test prompts (`evaluation.final_samples`)."
    measured = results.get("policy", {})
    if any(made_by.get(key, value) != value for key, value in measured.items()):
        return f"None of these weights: those at hand are of step {measured.get('step')} (`prfl eval` measures them)."

    # A column for the first of them, two for each other: its figures, and the paired difference.
    outcomes: dict[str, Any] = results["outcomes"]
    first, *others = outcomes
    head = ["score", first]
    for name in others:
        head += [name, f"{name} − {first}"]
    rows = []
    for key, fields in outcomes[first]["summary"].items():
        cells = [key, _interval(fields)]
        for name in others:
            cells += [_interval(outcomes[name][part].get(key)) for part in ("summary", "difference")]
        rows.append(cells)

    how = outcomes[first]["settings"]
    note = (
        f"{results['samples']} samples of {results['prompts']} test prompts, {how['frames']} frames of "
        f"{how['width']} x {how['height']}, {how['steps']} {how.get('solver', 'euler')} steps, "
        f"guidance scale {of_experts(how['guidance_scale'])}, "
        f"seed {how['seed']}; means with 95 % intervals over prompts. Differences are paired: the same noise."
    )
    if any(key.startswith("reward/") for key in outcomes[first]["summary"]):
        note += " `reward/...` is what was trained on."
    return f"{table(head, rows)}\n\n{note}"


def settings(config: Config, made_by: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what a reader needs to judge the run.  No paths: they say more about the machine than about the model."""
    training, adapter = config.training, config.backbone.adapter
    step, end = made_by.get("step", training.steps), made_by.get("end", training.steps)
    rollout = config.rollout
    extra = ", ".join(f"{key} {getattr(rollout, key):g}" for key in rollout.solver_facts.keys)
    solver = f"{rollout.solver} ({extra})" if extra else rollout.solver
    rows = [
        ("objective", config.objective.name),
        ("steps", str(step) if step == end else f"{step}, the best round of {end}"),
        ("batch", str(training.batch)),
        (
            "learning rate",
            f"{text_of(training.learning_rate)}, {training.schedule}, {training.warmup} steps of warm-up",
        ),
        ("clip", f"{config.data.frames} frames of {config.data.width} x {config.data.height}, {config.data.fps:g} fps"),
        ("chain", f"{solver}, {rollout.steps} steps"),
        ("seed", str(config.seed)),
        ("data type", config.backbone.dtype),
    ]

    if config.backbone.train == "full":
        return [*rows, ("trained", "all weights")]
    assert adapter is not None
    targets = ", ".join(adapter.targets)
    if adapter.blocks != "all":
        targets += f" of the blocks {adapter.blocks}" if isinstance(adapter.blocks, list) else " of the last half"
    return [*rows, ("adapter", f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {targets}")]


def reward_text(config: Config) -> str:
    """Describe the reward, and how well it ranks by noise level, as its card says."""
    reward = config.reward
    assert reward is not None
    if reward.public:
        return f"{reward.title()}; {reward.shape}, target {reward.target:g}."
    weights = "all dimensions"
    if reward.weights is not None:
        weights = ", ".join(f"{name} x {weight:g}" for name, weight in reward.weights.items())
    text = f"{reward.title()} ({weights}; {reward.aggregate}, {reward.shape})."
    try:
        cards = [read_config(reward_path(path)).get("card", {}) for path in reward.paths]
    except PrflError as error:  # it was moved since, or the hub is out of reach: no reason to refuse the policy
        print(f"the card says nothing of how well the reward ranks: {error}", file=sys.stderr)
        return f"{text} How well it ranks is not recorded here."
    return "\n\n".join([text, *(accuracy_text(card.get("accuracy", {})) for card in cards)])


def measured_text(path: Path, weights: str) -> str:
    """Format a reward_eval.json as tables: accuracy with intervals by sigma bin, and AUC where there are labels.

    weights: ``reward_hash`` of the reward; rows of others, which ``prfl eval --head`` measured, are left out.
    """
    if not path.is_file():
        return ""
    facts, rows = load_rows(path)
    hashes = facts.get("rewards", {})
    bins = [row for row in rows if row.level.kind == "bin" and hashes.get(row.scorer, weights) == weights]
    scorers = list(dict.fromkeys(row.scorer for row in bins))
    text = "## With intervals"
    for scorer in scorers:
        rows_of_scorer = [_measured(row) for row in bins if row.scorer == scorer]
        head = ("dimension", "sigma", "pairwise accuracy", "AUC", "pairs")
        text += (f"\n\n### {scorer}" if len(scorers) > 1 else "") + "\n\n" + table(head, rows_of_scorer)
    return text + "\n\n95 % intervals over prompts." if bins else ""


def _measured(row: Row) -> tuple[str, ...]:
    auc = "–" if row.auc is None else _interval(vars(row.auc))
    return row.dimension, row.level.label, _interval(vars(row.accuracy)), auc, str(row.pairs)


def _interval(fields: Mapping[str, float] | None) -> str:
    if fields is None:
        return "–"
    interval = Interval(**fields)
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
