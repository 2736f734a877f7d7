"""The checks of ``prfl doctor``: what this machine has, and whether a config could run on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import torch
from accelerate.tracking import get_available_trackers
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from torch.utils._python_dispatch import TorchDispatchMode

from prfl.backbone import Backbone
from prfl.backbone.attention import NAMES, attend, choose_attention, why_not
from prfl.backbone.network import all_predictors, base_networks
from prfl.config.places import both_places
from prfl.config.schema import Config
from prfl.estimate.memory import predict_memory
from prfl.estimate.missing_inputs import downloads, missing_inputs
from prfl.estimate.parts import module_bytes
from prfl.estimate.protection import NOT_PROTECTED, PROTECTED
from prfl.estimate.suggestions import advice
from prfl.estimate.units import GIB, gib
from prfl.factory.backbone import OPERATIONS, attention_choice, build_architecture, choose_kernels, device_kind
from prfl.factory.prompts import load_prompts
from prfl.utils.errors import AbsentError, PrflError
from prfl_kernels import choose_backend

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
HUB_SECONDS = 4


@dataclass(frozen=True)
class Check:
    """A line of the doctor's table.

    state: what there is.  problem: why a run could not work with it; empty where it could.
    working: False for what is not there, or does not work, and may not be needed.
    """

    name: str
    state: str
    problem: str = ""
    working: bool = True


def check_machine() -> list[Check]:
    """Check everything that does not depend on a config."""
    return [
        Check("python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        *map(package, PACKAGES),
        device(),
        attention("cuda" if torch.cuda.is_available() else "cpu", torch.float32),
        *attentions(),
        *choices(),
        Check("hub", hub() or f"reachable: {constants.ENDPOINT}", working=not hub()),
        video(),
        Check("protected", PROTECTED),
        *(Check(f"not protected: {name}", text, working=False) for name, text in NOT_PROTECTED.items()),
    ]


def check_config(config: Config, filled: Collection[Path] = (), file: Path | None = None) -> list[Check]:
    """Check whether a run of this config could work here.

    filled: run folders that earlier stages will have filled.  file: of the config, beside which is looked too.
    Raises PrflError where no architecture is to be had.
    """
    kind, dtype = device_kind(config), getattr(torch, config.backbone.dtype)
    if kind == "cuda" and not torch.cuda.is_available():
        device = Check("backbone.device", "cuda", "there is no usable GPU here; take auto or cpu")
    else:
        device = Check("backbone.device", kind)
    runs_on = "cpu" if device.problem else kind
    model = build_architecture(config)
    return [
        device,
        attention(runs_on, dtype, model.facts.head_size),
        *choices(config, model),
        *inputs(config, filled, file),
        *trackers(config),
        disk(config, model),
        memory(config, model, available(runs_on) if not device.problem else None),
    ]


# ------------------------------------------------------------------------------------------------- what is installed


def package(name: str) -> Check:
    try:
        return Check(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        needed = name != "triton" or platform.system() == "Linux"
        return Check(name, "not installed", f"pip install {name}" if needed else "")


def attentions() -> Iterator[Check]:
    """Try every attention and say whether it runs here; it is nothing to worry about that most do not."""
    kind, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    for name in NAMES:
        reason = why_not(name, torch.device(kind), dtype, head_size=128)
        yield Check(f"attention by {name}", f"not here: {reason}" if reason else "runs", working=not reason)


def device() -> Check:
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return Check("device", f"cpu, {cores} cores, {gib(available('cpu'))} of memory free; {no_gpu()}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    free = gib(available("cuda"))
    return Check("device", f"{', '.join(names)}; {free} free; CUDA {torch.version.cuda}; driver {driver()}")


def no_gpu() -> str:
    """Say whether there is a GPU that torch cannot use, and what to install then."""
    if shutil.which("nvidia-smi") is None or driver() == "unknown":
        return "no usable GPU"
    build = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    fix = "install a build for this driver: https://pytorch.org/get-started/locally"
    return f"there is a GPU (driver {driver()}), and torch {torch.__version__} cannot use it: it {build}; {fix}"


def driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=20, check=False)
    return answer.stdout.splitlines()[0] if answer.returncode == 0 and answer.stdout else "unknown"


def available(kind: str) -> int:
    """Return the bytes of free memory, within the control group's limit."""
    if kind == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text(encoding="utf-8").strip().isdigit():
        free = min(free, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return free


# ------------------------------------------------------------------------------------------------- what really runs


class Recorded(TorchDispatchMode):
    """Names of the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def attention(kind: str, dtype: torch.dtype, head_dim: int = 128) -> Check:
    """Attend on the device, as the networks do, and see which operation it came to."""
    query, key, value = torch.randn(3, 1, 256, 2, head_dim, device=kind, dtype=dtype)
    with Recorded() as ran:
        attend("sdpa", query.requires_grad_(), key, value).sum().backward()
    return Check(f"attention ({kind}, {str(dtype).removeprefix('torch.')})", attention_operation(ran.names))


def attention_operation(names: list[str]) -> str:
    fused = [name for name in names if "attention" in name.lower() and "backward" not in name]
    if fused:
        return ", ".join(dict.fromkeys(name.removeprefix("_scaled_dot_product_") for name in fused))
    return "plain softmax, not fused: memory grows with tokens squared"


def choices(config: Config | None = None, model: Backbone | None = None) -> list[Check]:
    """Say what runs each operation and the attention: by this config and its architecture, or on this machine."""
    kind, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        if config is None or model is None:
            chosen = {name: choose_backend(name, None, kind, dtype) for name in OPERATIONS}
            attends = choose_attention("auto", kind, dtype, head_size=128)
        else:
            chosen, attends = choose_kernels(config, model), attention_choice(config, model)
    except (ValueError, PrflError) as error:
        return [Check("kernels", "cannot run", str(error))]
    named = {**{f"kernel {name}": choice for name, choice in chosen.items()}, "attention chosen": attends}
    return [Check(name, f"{choice.backend} ({choice.reason})") for name, choice in named.items()]


@cache
def hub() -> str:
    """Say in words that follow "the hub is" why it cannot be reached; empty when it can."""
    if constants.HF_HUB_OFFLINE:
        return "offline, by HF_HUB_OFFLINE"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS).raise_for_status()
    except Exception:  # whatever a proxy or a resolver raises
        return f"not reachable: no answer from {constants.ENDPOINT} (behind a proxy set HTTPS_PROXY)"
    return ""


def video() -> Check:
    try:
        import av
    except ImportError as error:
        what = f"PyAV cannot be imported ({type(error).__name__})"
        return Check("video", what, "no video can be read or written: pip install --force-reinstall av")
    program = shutil.which("ffmpeg") or "no ffmpeg program (PyAV brings its own library)"
    codec = "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))
    try:
        av.Codec("h264", "r")
        av.Codec("libx264", "w")
    except Exception:  # PyAV's own error for a codec that its build left out
        fix = "pip install --force-reinstall --only-binary av av"
        return Check("video", f"PyAV {av.__version__}, {codec}; {program}", f"its build has no H.264: {fix}")
    return Check("video", f"PyAV {av.__version__}, {codec}, h264; {program}")


# ------------------------------------------------------------------------------------------------- a config


def inputs(config: Config, filled: Collection[Path], file: Path | None = None) -> Iterator[Check]:
    """Check prompt files, the manifest, the reward and the model: here, to be downloaded, or missing."""
    yield read("data.prompts", lambda: f"{sum(map(len, load_prompts(config.data).values()))} prompts", file)
    absent = downloads(config)
    reason = hub() if absent else ""
    for key, name in absent.items():
        fix = "connect, or give a folder that it was downloaded to"
        problem = f"it is not here, and the hub is {reason}; {fix}" if reason else ""
        yield Check(key, f"{name}, to be downloaded", problem)
    for line in missing_inputs(config, filled, file):
        name, _, rest = line.partition(": ")
        if name not in absent:
            yield Check(name, "missing", rest)


def trackers(config: Config) -> Iterator[Check]:
    """Check that the packages of the trackers are installed."""
    installed = [str(name) for name in get_available_trackers()]
    for name in config.training.trackers:
        problem = "" if name in installed else f"pip install {name}, or leave it out"
        yield Check("training.trackers", f"{name}: not installed" if problem else name, problem)


def read(name: str, reader: Callable[[], str], file: Path | None = None) -> Check:
    try:
        return Check(name, reader())
    except PrflError as error:
        if file and isinstance(error, AbsentError) and (both := both_places(file, error)):
            return Check(name, "missing", both.one_line)
        return Check(name, "cannot be read", f"{error.where}: {error.one_line}")


def disk(config: Config, model: Backbone) -> Check:
    """Check the room for the checkpoints, and for the download where there is one."""
    run = config.run.absolute()
    existing = next(folder for folder in (run, *run.parents) if folder.exists())
    trained = [p for network in all_predictors(model) for p in network.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    copies = 3 + (config.training.ema_decay is not None)  # weights and AdamW's two averages
    needed = size * copies * (config.training.keep + 1)  # a new one is written before the oldest goes
    if "backbone.model" in downloads(config):
        needed += sum(map(module_bytes, (*base_networks(model).values(), model.text.encoder())))
    free = shutil.disk_usage(existing).free
    problem = f"checkpoints and downloads need {gib(needed)}" if needed > free else ""
    return Check("disk", f"{gib(free)} free at {existing}; about {gib(needed)} will be written", problem)


def how_to_take_less(config: Config) -> str:
    """Say it at once where there is little to try; of a GPU's many keys the dry run predicts each."""
    if device_kind(config) == "cpu":
        return advice(config)
    return "`prfl train` of it with --dry-run --gpu 24, 48, 80 or 141 says which keys to change"


def memory(config: Config, model: Backbone, free: int | None) -> Check:
    """Compare the predicted peak with what is free, in bytes; None where that is not known."""
    predicted = predict_memory(config, model)
    text = f"{gib(predicted.peak)} predicted at the peak, in '{predicted.largest.name}'"
    if free is None:
        return Check("memory", text)
    short = predicted.peak - free
    problem = f"{short / GIB:.1f} GiB more than is free; {how_to_take_less(config)}" if short > 0 else ""
    if not problem and predicted.host > available("cpu"):
        problem = f"the run keeps {gib(predicted.host)} in host memory, where {gib(available('cpu'))} are free"
    return Check("memory", f"{text}; {gib(free)} free", problem)
