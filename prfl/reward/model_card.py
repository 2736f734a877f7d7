"""The model card (README.md) of a saved reward: what it scores, on which model, and how well at each noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prfl.config.section import is_hub_id
from prfl.reward.checkpoint_schema import BenchmarkScores
from prfl.reward.scores import Normalisation
from prfl.utils.text import markdown_cell

PAPER = "https://arxiv.org/abs/2511.21541"


def reward_card(config: Mapping[str, Any], name: str = "FOLDER") -> ModelCard:
    """Write the card from the content of a saved reward's config.json.  name: what to load it by."""
    card, kind = config["card"], str(config["format"]).removeprefix("prfl-")
    backbone = config.get("backbone") or {}
    model_id = backbone.get("model_id")
    dimensions = list(config["normalisation"]["mean"])

    benchmarks = card.get("benchmarks", {})
    data = ModelCardData(
        library_name="prfl",
        base_model=model_id if is_hub_id(model_id) else None,
        tags=["prfl", kind, "reward-model", "video", "arxiv:2511.21541"],
        datasets=[each["dataset"] for each in benchmarks.values() if each["dataset"]] or None,
        model_name=(kind if name == "FOLDER" else name) if benchmarks else None,
        eval_results=eval_results(benchmarks) or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {kind.capitalize()}: {markdown_cell(', '.join(dimensions))}"]

    if kind == "latent-reward":
        blocks = ("block " if len(config["blocks"]) == 1 else "blocks ") + ", ".join(map(str, config["blocks"]))
        adapter = config["adapter"]
        training = f" with an adapter of rank {adapter['rank']} on them" if adapter else ", frozen"
        parts.append(
            f"Scores the noisy latents of a video model {level_text(backbone)}, without decoding. It reads the hidden "
            f"states after {blocks} (the first is 0) of `{model_id}`{training}, and "
            f"works on that model only. The method is [PRFL]({PAPER}); here is the head, not the video model."
        )
        parts.append(USE.format(model=model_id if is_hub_id(model_id) else f"folder of {model_id}", name=name))
        unit = Normalisation(**config["normalisation"]).unit
        parts.append(f"One unit of a score: {unit}. Compare samples of one prompt at one noise level.")
    else:
        parts.append("Scores the decoded pixels of clean videos. It is not noise-aware.")
        parts.append(f'```python\nimport prfl\n\nreward = prfl.PixelReward.from_pretrained("{name}")\n```')

    parts.append("## What it was trained on\n\n" + table(("", ""), _facts(card, backbone)))
    if card["labels"]:
        parts.append(table(("dimension", "a good label means"), list(card["labels"].items())))
    parts.append("## Accuracy by noise level\n\n" + accuracy_text(card["accuracy"]))
    parts += [benchmark_text(each) for each in benchmarks.values()]
    return ModelCard("\n\n".join(parts) + "\n")


def level_text(backbone: Mapping[str, Any]) -> str:
    """Say at which noise levels it scores."""
    if (boundary := backbone.get("boundary")) is None:
        return "at any noise level"
    return f"at noise levels below {boundary:g}, where the model's low-noise expert predicts, which it reads"


def eval_results(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[EvalResult]:
    """List the accuracies as the hub's ``model-index`` has them."""
    kinds = {"accuracy": "without ties", "accuracy_ties": "with ties, at the best threshold"}
    return [
        EvalResult(
            task_type="preference-prediction",
            task_name="which of two videos people prefer",
            dataset_type=scores["dataset"] or name,
            dataset_name=scores["title"],
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{dimension}, sigma {sigma}, {words}",
            metric_value=value,
        )
        for name, scores in benchmarks.items()
        for kind, words in kinds.items()
        for dimension, by_sigma in scores[kind].items()
        for sigma, value in by_sigma.items()
    ]


def benchmark_text(scores: Mapping[str, Any]) -> str:
    """Write a section with one line a dimension and sigma."""
    rows = [
        (dimension, sigma, f"{value:.2%}", f"{scores['accuracy_ties'][dimension][sigma]:.2%}",
         str(scores["decided"][dimension]), str(scores["ties"][dimension]))
        for dimension, by_sigma in scores["accuracy"].items()
        for sigma, value in by_sigma.items()
    ]  # fmt: skip
    left_out = f", {scores['left_out']} left out for want of readable videos" if scores["left_out"] else ""
    counted = f"{scores['pairs_read']} pairs{left_out}; {BenchmarkScores(**scores).cost}."
    note = f"{counted} With ties: three classes, at the threshold that is best for this set (arXiv 2305.14324). "
    note += "Measured by `prfl eval --benchmark`."
    head = ("dimension", "sigma", "without ties", "with ties", "decided pairs", "ties")
    return f"## {markdown_cell(scores['title'])}\n\n{note}\n\n" + table(head, rows)


USE = """\
```python
import prfl

backbone = prfl.load_backbone("{model}")
reward = prfl.load_reward("{name}", backbone)  # or a diffusers pipeline in place of the backbone
scores = reward.score(latents, sigma=0.7, prompts=prompts)  # {{dimension: (batch,)}}; reward(...) keeps the gradient
```"""


def accuracy_text(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    """Write a table with one line a sigma bin and one column a dimension."""
    if not accuracy:
        return "Not measured: no validation samples were held out."

    bins = list(dict.fromkeys(label for values in accuracy.values() for label in values))
    rows = []
    for label in bins:
        cells = [f"{values[label]:.3f}" if label in values else "–" for values in accuracy.values()]
        rows.append((label, *cells))

    note = "Held-out pairwise accuracy *within a prompt*; 0.5 is chance. Sigma is the noise level: 0 clean, 1 noise."
    return f"{note}\n\n" + table(("sigma", *accuracy), rows)


def _facts(card: Mapping[str, Any], backbone: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what is recorded of the base model and of the training videos, as (name, value)."""
    rows = [("base model", f"`{backbone['model_id']}`")] if backbone else []
    if backbone.get("revision"):
        rows.append(("revision", f"`{backbone['revision']}`"))
    for name in ("frames", "height", "width", "fps"):
        if card[name] is not None:
            low, high = card[name]
            rows.append((name, f"{low:g}" if low == high else f"{low:g} to {high:g}"))
    return rows or [("", "not recorded")]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(markdown_cell, cells)) + " |" for cells in lines)
