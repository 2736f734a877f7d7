"""Configs: keys, values and combinations that are refused."""

from __future__ import annotations

from pathlib import Path

from tests.faults.planting import fault


@fault("a misspelt key", "sft.yaml: training.stepz: unknown key", "Did you mean 'steps'")
def _(bench):
    text = Path("sft.yaml").read_text().replace("  steps: 2", "  stepz: 2")
    Path("sft.yaml").write_text(text)
    return bench.cli("train", "sft.yaml")


@fault("a key of another method", "objective.handoff", "it belongs to name: prfl")
def _(bench):
    return bench.cli("train", "sft.yaml", "objective.handoff=clean")


@fault("a list of rewards", "reward.scores: unknown key", "weights: {hps: 15.0, MQ: 2.0}")
def _(bench):
    return bench.cli("train", "vader.yaml", "reward={space: pixel, scores: [{name: hps, weight: 15}]}")


@fault("a key that nobody reads in this combination", "reward.head.queries", "pooling mean does not read it")
def _(bench):
    return bench.cli("train", "reward.yaml", "reward.head.pooling=mean", "reward.head.queries=3")


@fault("samples asked for where no video is drawn", "evaluation.final_samples", "does not read it")
def _(bench):
    return bench.cli("train", "reward.yaml", "evaluation.final_samples=4")


@fault("kernels that do not exist", "backbone.kernels", "cannot run", "To mend it: kernels: auto")
def _(bench):
    return bench.cli("train", "sft.yaml", "backbone.kernels=triton")


@fault("a yaml bomb", "bomb.yaml:1: anchors and aliases are not read")
def _(bench):
    Path("bomb.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    return bench.cli("train", "bomb.yaml")


@fault("a yaml key given twice", "sft.yaml:", "the key 'seed' is given twice")
def _(bench):
    Path("sft.yaml").write_text(Path("sft.yaml").read_text() + "seed: 1\n")
    return bench.cli("train", "sft.yaml")


@fault("a decay outside its range", "training.betas[0]", "less than 1, got 2.0")
def _(bench):
    return bench.cli("train", "sft.yaml", "training.betas=[2.0,3.0]")


@fault("a seed that torch does not take", "command line: seed: should be less than")
def _(bench):
    return bench.cli("train", "sft.yaml", "seed=99999999999999999999999")


@fault("a schema where no file can be", "cannot be written")
def _(bench):
    return bench.cli("schema", "manifest.jsonl/schema.json")


@fault(
    "an aesthetic score without its MLP",
    "reward.aesthetic.mlp: there is no such file: nowhere.pth",
    "To mend it: download",
)
def _(bench):
    return bench.cli(
        "train", "vader.yaml", "reward={space: pixel, target: 10.0, shape: hinge, aesthetic: {mlp: nowhere.pth}}"
    )


@fault("a watch over too few prompts", "data.prompts.validation", "stop_on_hacking compares 4 prompts")
def _(bench):
    return bench.cli("train", "prfl.yaml", "evaluation.stop_on_hacking=true", "evaluation.every=1")


@fault(
    "held-out prompts among the training rows", "manifest.jsonl", "rows for training have a prompt of data.prompts.test"
)
def _(bench):
    Path("test.txt").write_text(Path("train.txt").read_text())
    Path("train.txt").write_text("another prompt\n")
    return bench.cli("train", "sft.yaml")


@fault("a yaml tag that names code", "tag.yaml:1: the tag", "is not read")
def _(bench):
    Path("tag.yaml").write_text("run: !!python/object/apply:os.system ['touch pwned']\n")
    return bench.cli("train", "tag.yaml")


@fault("a size that the model cannot take", "sft.yaml: data: 6 frames", "take 5 or 9")
def _(bench):
    return bench.cli("train", "sft.yaml", "data.frames=6")
