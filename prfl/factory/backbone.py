"""The model of a config: the frozen backbone with what is trained on it, and the chain that it is sampled by."""

from __future__ import annotations

from pathlib import Path

import torch

from prfl.backbone import Backbone, LoraSpec, load_architecture, load_backbone
from prfl.backbone.attention import INT8, VARIABLE, choose_attention, why_not
from prfl.backbone.families import check_files
from prfl.backbone.first_frame import FirstFrameTold, TakesTold
from prfl.backbone.hooked import HookedBackbone
from prfl.backbone.kernels import CallsCheaper, use_kernels
from prfl.backbone.network import add_copy, all_predictors, train_all
from prfl.backbone.weights import without_weights
from prfl.config.schema import Config
from prfl.config.sections.backbone import BackboneConfig, KernelsConfig, PolicyAdapterConfig
from prfl.config.sections.rollout import CheaperConfig
from prfl.factory.by_name import build_by_name
from prfl.factory.experts import check_experts, lora_of_config, one_resident, trained_networks
from prfl.toy import clips as shapes
from prfl.toy.recipe import RECIPES, untrained_folder
from prfl.utils import processes
from prfl.utils.errors import PrflError, error_location
from prfl_kernels import Choice, choose_backend

POLICY = "policy"  # the name of the adapter that is aligned


def choose_device(config: BackboneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PrflError("no GPU is usable here", where="backbone.device", fix="device: auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


COMPILED_FORMS = 64
OPERATIONS = tuple(KernelsConfig.model_fields)  # that a config can choose the kernels of
FLOAT8_CAPABILITY = (8, 9)  # of GPUs that multiply float8


def device_kind(config: Config) -> str:
    """cpu or cuda: what the config asks for, here or elsewhere; ``auto`` is what is here."""
    chosen = config.backbone.device
    return chosen if chosen != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def build_backbone(config: Config) -> Backbone:
    """The frozen model, with the policy's adapter (not active) or, for full fine-tuning, with trainable weights."""
    settings = config.backbone
    loaded = load_backbone(
        model_source(config),
        getattr(torch, settings.dtype),
        choose_device(settings),
        settings.revision,
        settings.pipeline,
        settings.weights.named(),
        lora_of_config(settings.base_lora),
        one_resident(config),
    )
    model = prepare_backbone(config, loaded)
    if settings.compile:
        if isinstance(model, HookedBackbone):  # a hook that ends the call, within what is compiled
            what = f"the blocks of a {model.facts.family} model are not compiled"
            raise PrflError(what, where="backbone.compile", fix="compile: false")
        # A block's code is compiled anew with and without gradient, for the base and each set of adapters, for every
        # batch and length of text; past torch's limit of 8 it would run as it is, at the speed of no compiling.
        torch._dynamo.config.recompile_limit = COMPILED_FORMS
        for network in all_predictors(model):
            network.compile_repeated_blocks()
    return model


def model_source(config: Config) -> str | Path:
    """The folder or hub id behind ``backbone.model``; an untrained model is made there, the first time."""
    settings = config.backbone
    if settings.model in RECIPES:
        with processes.main_first():
            return untrained_folder(config.data.cache / settings.model, RECIPES[settings.model])
    return shapes_or(settings.model)


def shapes_or(model: str | Path) -> str | Path:
    """A folder or hub id as it is; of 'shapes' the model's folder inside the package."""
    return shapes.model_folder() if str(model) == "shapes" else model


def build_architecture(config: Config) -> Backbone:
    """Build ``build_backbone``'s model on the ``meta`` device: no weights and no memory."""
    settings = config.backbone
    source = shapes.model_folder() if settings.model in ("shapes", *RECIPES) else settings.model
    model = load_architecture(source, getattr(torch, settings.dtype), settings.revision, settings.pipeline)
    check_files(model, settings.weights.named())
    with without_weights():
        return prepare_backbone(config, model)


def prepare_backbone(config: Config, model: Backbone) -> Backbone:
    settings = config.backbone
    keep_as_asked(config, model)
    check_experts(config, model.facts)
    tell_first_frame(settings, model)
    trained = trained_networks(config, model.facts)
    if settings.adapter:
        lora = settings.adapter
        with error_location("backbone.adapter.targets"):
            spec = LoraSpec(
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora.targets,
                dropout=lora.dropout,
                blocks=adapted_blocks(lora, model.facts.num_blocks),
                seed=config.seed,
                networks=trained,
            )
            model.add_adapter(POLICY, spec)
    if settings.train == "full" and policy_adapter_name(config):
        add_copy(model, POLICY, trained)
    elif settings.train == "full":
        train_all(model, trained)
    check_cheaper(config, model)
    chosen = attention_choice(config, model).backend
    if model.facts.device.type == "meta" and chosen != "triton":
        chosen = "sdpa"  # the others keep what it keeps, and take no meta tensors
    ours = [name for name, choice in choose_kernels(config, model).items() if choice.backend == "triton"]
    use_kernels(model, ours, chosen)
    return model


def keep_as_asked(config: Config, model: Backbone) -> None:
    """Have the model keep for its backward pass what the config says, and where it says."""
    settings = config.backbone
    # auto begins with full: what there is room for is found out by the forecast (prfl/estimate/fill.py).
    model.running.checkpointing = "full" if settings.checkpointing == "auto" else settings.checkpointing
    model.running.offload = settings.offload


def tell_first_frame(settings: BackboneConfig, model: Backbone) -> None:
    """Say what the network is told beside a picture.  Raises PrflError where a config asks it of any other model."""
    told = build_by_name(FirstFrameTold, settings.first_frame)
    if isinstance(model, TakesTold):
        model.tell(told)
    elif told != FirstFrameTold():
        what = f"a {model.facts.family} model is not told of its first frame"
        raise PrflError(what, where="backbone.first_frame", fix="leave it out")


def adapted_blocks(adapter: PolicyAdapterConfig, count: int) -> list[int] | None:
    """The blocks of ``count`` that get an update; None is all of them, and what lies outside the blocks.

    Raises PrflError for none at all and for blocks that do not exist.
    """
    if adapter.blocks == "all":
        return None
    chosen = list(range(count // 2, count)) if adapter.blocks == "last_half" else sorted(set(adapter.blocks))
    if not chosen or not set(chosen) <= set(range(count)):
        what = f"{chosen} are not among the model's {count} blocks"
        raise PrflError(what, where="backbone.adapter.blocks", fix=f"all, last_half, or some of 0 to {count - 1}")
    return chosen


def choose_kernels(config: Config, model: Backbone) -> dict[str, Choice]:
    """What runs each operation of the transformer that prfl_kernels has for the model's family.

    Raises PrflError where an explicit choice cannot run.
    """
    settings, dtype, facts = config.backbone, getattr(torch, config.backbone.dtype), model.facts
    each = settings.kernels
    requests = {name: getattr(each, name) if isinstance(each, KernelsConfig) else each for name in OPERATIONS}
    asked = {name: request for name, request in requests.items() if name in facts.kernels}
    if absent := [name for name in requests.keys() - asked.keys() if requests[name] == "triton"]:
        what = f"prfl_kernels has no {' and no '.join(sorted(absent))} for a {facts.family} model"
        raise PrflError(what, where="backbone.kernels", fix="kernels: auto")
    if settings.train == "full":  # the kernels are for a frozen base
        wrong = [name for name, request in asked.items() if request == "triton"]
        if wrong:
            raise PrflError(
                f"the kernel of {wrong[0]} is for a frozen base with an adapter, and backbone.train is full",
                where="backbone.kernels",
                fix="kernels: auto",
            )
        return dict.fromkeys(asked, Choice("torch", "all weights are trained"))
    try:
        return {name: choose_backend(name, request, device_kind(config), dtype) for name, request in asked.items()}
    except ValueError as error:
        raise PrflError(str(error), where="backbone.kernels", fix="kernels: auto") from error


def attention_choice(config: Config, model: Backbone) -> Choice:
    """Choose the softmax attention.  Raises PrflError if an explicit choice cannot run."""
    kind, settings, facts = device_kind(config), config.backbone, model.facts
    if settings.attention not in ("auto", *facts.attention):
        what = f"a {facts.family} model has no attention by {settings.attention}"
        raise PrflError(what, where="backbone.attention", fix=f"attention: auto, or {' or '.join(facts.attention)}")
    if kind == "cuda" and not torch.cuda.is_available():  # a dry run for another machine: nothing can be tried
        return Choice("sdpa" if settings.attention == "auto" else settings.attention, "not tried: there is no GPU here")
    try:
        chosen = choose_attention(settings.attention, kind, getattr(torch, settings.dtype), facts.head_size)
    except ValueError as error:
        raise PrflError(str(error), where="backbone.attention", fix="attention: auto, or sdpa") from error
    if chosen.backend in facts.attention:
        return chosen
    if chosen.reason.startswith("automatic"):
        return Choice("sdpa", f"automatic: a {facts.family} model has no other")
    what = f"a {facts.family} model has no attention by {chosen.backend} ({chosen.reason})"
    raise PrflError(what, where=VARIABLE, fix=f"take {' or '.join(facts.attention)}")


def check_cheaper(config: Config, model: Backbone) -> None:
    """Raises PrflError for a family that has no cheaper calls, and where a GPU that is here cannot compute them.

    A CPU rounds alike, and is not faster by it.
    """
    cheaper, head_size = config.rollout.cheaper, model.facts.head_size
    if cheaper != CheaperConfig() and not isinstance(model, CallsCheaper):
        what = f"a {model.facts.family} model has no cheaper calls"
        raise PrflError(what, where="rollout.cheaper", fix="leave rollout.cheaper out")
    if device_kind(config) != "cuda" or not torch.cuda.is_available():
        return
    if cheaper.products == "float8" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        what = f"{torch.cuda.get_device_name()} has no float8 products; they need compute capability 8.9"
        raise PrflError(what, where="rollout.cheaper.products", fix="products: exact")
    if cheaper.attention == "int8":
        dtype = getattr(torch, config.backbone.dtype)
        if obstacle := why_not(INT8, torch.device("cuda"), dtype, head_size):
            what, fix = f"attention in 8 bits cannot run here: {obstacle}", "install sageattention 2.1.1 or newer"
            raise PrflError(what, where="rollout.cheaper.attention", fix=f"{fix}, or attention: exact")


def policy_adapter_name(config: Config) -> str | None:
    """The adapter that is trained, or the copy of all weights: a reward reads the frozen base beside it.

    None where all weights are trained in place, because nothing needs the base: full fine-tuning by SFT.
    """
    return None if config.backbone.train == "full" and not config.follows_reward else POLICY
