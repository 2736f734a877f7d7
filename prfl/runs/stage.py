"""A stage of training, from its config to its report."""

from __future__ import annotations

from functools import partial
from itertools import groupby

from accelerate import Accelerator

from prfl.backbone import Backbone
from prfl.backbone.network import base_networks, park_vae, reach
from prfl.config import dump_resolved, identity
from prfl.config.schema import Config
from prfl.estimate.fill import fill_card
from prfl.estimate.suggestions import out_of_memory
from prfl.factory.adapter_start import start_adapter
from prfl.factory.backbone import POLICY, attention_choice, build_backbone, choose_kernels, policy_adapter_name
from prfl.factory.data import build_dataset, fill_cache
from prfl.factory.prompts import check_prompts, check_sets, load_prompts
from prfl.factory.resume_identity import input_contents
from prfl.factory.reward import check_followed_reward
from prfl.runs.outcomes import show_report
from prfl.runs.stage_run import StageRun
from prfl.runs.train_policy import train_policy
from prfl.runs.train_reward import train_reward
from prfl.training.distributed import make_accelerator
from prfl.training.guards import check_differs_from_base, check_starts_as_base
from prfl.training.learning import Watched
from prfl.training.run_folder import RunFolder
from prfl.utils import processes
from prfl.utils.console import console, progress
from prfl.utils.lock import folder_lock


def train(config: Config, *, resume: str = "auto") -> None:
    """Run one stage."""
    check_sets(config, load_prompts(config.data))
    with processes.peer_errors(), out_of_memory(config):
        train_stage(config, resume)


def train_stage(config: Config, resume: str) -> None:
    check_followed_reward(config)
    folder = RunFolder(config.run, dump_resolved(config))
    accelerator = make_accelerator(folder, config.backbone.device, config.training.trackers, config.training.timeout)
    with folder_lock(config.run):
        train_in(folder, config, accelerator, resume)


def train_in(folder: RunFolder, config: Config, accelerator: Accelerator, resume: str) -> None:
    if not processes.is_main():
        console.quiet = True
    console.say(f"{config.objective.name}: {config.run}", style="bold")
    model = prepared_model(config)

    # The clips of the data, through the VAE once.
    manifest = fill_cache(config, model, progress("generated clips")) if config.reads_clips else None
    clips = build_dataset(config, model, manifest, "train") if manifest else None
    park_vae(model)

    facts = identity(config) | input_contents(config, model, clips)
    stage = StageRun(config, model, folder, accelerator, resume, facts, watched(config, model), clips)
    if config.trains_reward:
        assert manifest is not None
        model.text.free()  # a policy's stage encodes its prompts first
        validation, test = (build_dataset(config, model, manifest, split) for split in ("validation", "test"))
        result = train_reward(stage, validation, test)
    else:
        result = train_policy(stage)
    show_report(folder.path)
    if result.stopped:
        raise KeyboardInterrupt


def prepared_model(config: Config) -> Backbone:
    """Build the model of a config and check it; prints what was chosen for it."""
    console.say(f"loading {config.backbone.model}")
    model = build_backbone(config)

    # Which kernels and which attention run.
    chosen = {**choose_kernels(config, model), "attention": attention_choice(config, model)}
    for choice, operations in groupby(chosen.items(), lambda item: item[1]):
        names = ", ".join(name for name, _ in operations)
        console.say(f"{names}: {choice.backend} ({choice.reason})")

    # Whether the prompts and the adapter are as they should be.
    check_prompts(config, model)
    if config.backbone.adapter:
        if config.backbone.adapter.init is None:
            check_starts_as_base(model, POLICY)
        start_adapter(config, model)
        layers, blocks = reach(model, POLICY)
        console.say(f"adapter on {layers} layers of {blocks} blocks")
    if config.backbone.checkpointing == "auto":
        console.say(f"checkpointing: {fill_card(config, model)}")
    return model


def watched(config: Config, model: Backbone) -> Watched:
    """Return what the trainer checks beside the parameters it trains: all weights, and the policy against its base."""
    networks = base_networks(model)
    weights = {f"{part}.{name}": p for part, network in networks.items() for name, p in network.named_parameters()}
    adapter = None if config.trains_reward else policy_adapter_name(config)
    if adapter is None:
        return Watched(weights)
    return Watched(weights, partial(check_differs_from_base, model, adapter, rate=config.training.learning_rate))
