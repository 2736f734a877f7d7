"""Every key of a config does something: two values of it, two outcomes (effects.py), or a written reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl.backbone import Backbone
from prfl.backbone.wan.model import WanBackbone
from prfl.config import load_config
from prfl.config.messages import all_keys, models_in
from prfl.config.schema import Config, StagesConfig
from prfl.config.sections.objective import PreferenceConfig, SftConfig
from prfl.data.manifest import read_manifest
from prfl.factory import clips as clips_factory
from prfl.factory.backbone import POLICY, attention_choice, build_backbone, choose_device, choose_kernels
from prfl.factory.clips import build_manifest
from prfl.factory.data import build_dataset, fill_cache
from prfl.factory.evaluation import build_judge, sampling_settings
from prfl.factory.objective import build_preference, build_regulariser, build_reward_gradient, build_sft
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import build_new_reward, load_followed_reward
from prfl.factory.steering import build_steering
from prfl.reward import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.rollout.sampling import sample
from prfl.runs import callbacks, outcomes
from prfl.runs.callbacks import Validation
from prfl.runs.stage_run import StageRun
from prfl.runs.train_policy import train_policy
from prfl.steering.sampling import steer
from prfl.training.distributed import make_accelerator
from prfl.training.learning import Watched
from prfl.training.loop import Callbacks, TrainResult, fit
from prfl.training.run_folder import RunFolder
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore
from tests.config.effects import EFFECTS, REASONS, REFUSED
from tests.faults.project import make_project
from tests.models import copied
from tests.objective.parts import stir
from tests.tiny import save_tiny_pipeline
from tests.training.test_loop import Line

REPOSITORY = Path(__file__).parents[2]
TAGS = ("name", "space")  # they choose a section: all the other entries are of one


def declared() -> Iterator[str]:
    """``Section.key`` of every key, by the section that declares it; an adapter's with its place in front."""
    for root in (Config, StagesConfig):
        for path, section in all_keys(root):
            key = path.rpartition(".")[2]
            owner = next(base for base in reversed(section.__mro__) if key in base.__dict__.get("__annotations__", {}))
            opens = models_in(section.model_fields[key].annotation)
            if key not in TAGS and (not opens or f"{owner.__name__}.{key}" in EFFECTS):
                place = path.rpartition(".")[0] + "." if owner.__name__ == "AdapterConfig" else ""
                yield f"{place}{owner.__name__}.{key}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Iterator[Path]:
    folder, before = tmp_path_factory.mktemp("effects"), Path.cwd()
    os.chdir(folder)
    make_project(tiny_pipeline_folder)
    save_tiny_pipeline(folder / "other", seed=1)
    rows = Path("manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("fewer.jsonl").write_text("".join(rows[1:3]), encoding="utf-8")
    Path("clips/broken.mp4").write_bytes(b"no video")
    broken = json.dumps({**json.loads(rows[0]), "video": "clips/broken.mp4"}) + "\n"
    Path("broken.jsonl").write_text("".join(rows) + broken, encoding="utf-8")
    Path("more.txt").write_text("a green square\na yellow circle\n", encoding="utf-8")
    shutil.copytree("clips", "same-names/clips")
    names = sorted(path.name for path in Path("clips").glob("?.mp4"))
    for name, other in zip(names, reversed(names), strict=True):
        shutil.copy(f"clips/{name}", f"same-names/clips/{other}")
    for number, path in enumerate(("texts/0", "texts/1", "texts/deep/2")):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"clips/{number}.mp4", f"{path}.mp4")
        Path(f"{path}.txt").write_text(f"a red circle {number}", encoding="utf-8")
    for kind, name in (("latent", "second"), ("pixel", "pixels")):
        shutil.copytree(f"heads/{kind}", f"heads/{name}")
    second = LatentReward.from_pretrained("heads/second", model_of(load_config("prfl.yaml")))
    pixels = PixelReward.from_pretrained("heads/pixels")
    for parameter in (*second.parameters().values(), *pixels.parameters().values()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    second.save_pretrained("heads/second")
    pixels.save_pretrained("heads/pixels")
    yield folder
    os.chdir(before)


MODELS: dict[str, Backbone] = {}


def model_of(config: Config) -> Backbone:
    """The config's model, its policy stirred; built once."""
    kind = repr((config.backbone, config.seed, config.objective.name == "sft"))
    if kind not in MODELS:
        MODELS[kind] = build_backbone(config)
        if config.backbone.adapter:
            stir(MODELS[kind], POLICY, seed=3)
    return MODELS[kind]


def step(config: Config, patch: pytest.MonkeyPatch, steps: int = 2) -> Any:
    """Metrics and gradients of the objective's first steps, and how they were computed."""
    model = model_of(config)
    if isinstance(config.objective, PreferenceConfig):
        model = copied(model)  # the reward may add an adapter
    path = fill_cache(config, model, iter) if config.reads_clips else None
    clips = build_dataset(config, model, path, "train") if path else None
    if isinstance(config.objective, PreferenceConfig):
        reward = build_new_reward(config, model)
        if isinstance(reward, LatentReward) and reward.adapter:
            stir(model, reward.adapter.name, seed=4)
        objectives = [build_preference(config, model, reward, clips)]
    elif isinstance(config.objective, SftConfig):
        objectives = [build_sft(config, model, clips)]
    else:
        objectives = [build_reward_gradient(config, model, load_followed_reward(config, model), clips)]
    regulariser = build_regulariser(config, model, clips)
    counted: Counter[str] = Counter()
    put = HostStore.put
    patch.setattr(HostStore, "put", lambda self, tensor: counted.update(put=1) or put(self, tensor))
    hooks = [block.register_forward_hook(lambda *_: counted.update(blocks=1)) for block in model.transformer.blocks]
    for parameter in objectives[0].parameters().values():
        parameter.grad = None
    numbers = []
    for number in range(steps):
        if regulariser and regulariser.due(number):
            numbers.append(regulariser.objective.accumulate(number, [2 * number, 2 * number + 1]))
        metrics = objectives[0].accumulate(number, [2 * number, 2 * number + 1])
        numbers.append({name: round(value, 9) for name, value in metrics.items() if not name.startswith("seconds")})
    for hook in hooks:
        hook.remove()
    gradients = {n: float(p.grad.double().norm()) for n, p in objectives[0].parameters().items() if p.grad is not None}
    return numbers, gradients, counted, len(getattr(objectives[0], "decoded", {}))


def loop(config: Config, patch: pytest.MonkeyPatch) -> Any:
    """A toy objective in the training loop: its weights, what it was asked, the files and the lines that it leaves."""
    shutil.rmtree(config.run, ignore_errors=True)
    said: list[str] = []
    patch.setattr("prfl.training.logger.Logger.say", lambda self, text: said.append(text.partition("  ")[0]))
    line, run = Line(), RunFolder(config.run)
    line.weight.data += 1.0
    fit(line, config.training, run, accelerator=make_accelerator(run, "cpu", config.training.trackers))
    files = sorted(str(path.relative_to(config.run.parent)) for path in config.run.rglob("*") if path.is_dir())
    averaged = [path.name for path in config.run.rglob("ema.safetensors")]
    return line.weight.tolist(), line.calls, files, averaged, said


def sampled(config: Config, patch: pytest.MonkeyPatch) -> Any:
    model, calls = model_of(config), []
    hook = model.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    drawn = sample(model, ["a red circle", "a blue square"], [0, 0], sampling_settings(config), adapter=POLICY)
    hook.remove()
    return float(drawn.double().norm()), len(calls)


def steered(config: Config, patch: pytest.MonkeyPatch) -> Any:
    """The chains that are kept, and what they cost."""
    shutil.rmtree("steering", ignore_errors=True)
    model = copied(model_of(config))  # a reward may add an adapter
    steering = build_steering(config, model)
    ((_, result),) = steer(
        model, ["a red circle"], [0], steering.method, steering.settings, steering.schedule, steering.looks
    )
    return result.kept.latents.double().flatten(1).norm(dim=1).tolist(), asdict(result.calls), result.kept.traces


def watched(config: Config, patch: pytest.MonkeyPatch) -> Any:
    """What a run draws and measures, and when."""
    seen: list[Any] = []

    def outcome_of(config: Config, model: object, rewards: dict, some: list[str], per_prompt: int, name: str, **_: Any):
        seen.append((name, some, per_prompt, sorted(rewards), build_judge(config.evaluation) is not None))
        raise PrflError("seen", fix="")

    def fit(self: StageRun, objective: object, callbacks: Callbacks, *_: Any) -> TrainResult:
        hooks, finish = callbacks.hooks, callbacks.finish
        assert finish
        seen.append([(hook.every, hook.at_start) for hook in hooks])
        for call in (*(hook.call for hook in hooks), finish):
            measures = isinstance(call, Validation)
            with pytest.raises(PrflError, match="^seen$") if measures else finishing(config, call is finish):
                call(0)
        return TrainResult(1, None, None)

    def finishing(config: Config, last: bool) -> Any:
        draws = last and config.evaluation.final_samples
        return pytest.raises(PrflError, match="^seen$") if draws else no_error()

    patch.setattr(callbacks, "outcome_of", outcome_of)
    patch.setattr(outcomes, "outcome_of", outcome_of)
    patch.setattr(StageRun, "fit", fit)
    run = RunFolder(config.run)
    accelerator = make_accelerator(run, "cpu", [])
    train_policy(StageRun(config, model_of(config), run, accelerator, "auto", {}, Watched({})))
    return seen


class no_error:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def clips(config: Config, patch: pytest.MonkeyPatch) -> Any:
    """The rows and the files that a generator makes."""
    path = build_manifest(config, model_of(config), iter)  # it draws nothing by the model
    rows = read_manifest(path)
    content = [hashlib.sha256(row.video.read_bytes()).hexdigest() for row in rows]
    return [(row.prompt, row.label) for row in rows], content


def asked(config: Config, patch: pytest.MonkeyPatch) -> Any:
    """What a generator asks of those who draw, label and cut (a folder's name differs by keys that nobody reads)."""
    seen: list[Any] = []
    patch.setattr(clips_factory, "sample", lambda *given, **_: seen.append(asdict(given[3])) or torch.zeros(1))
    patch.setattr(clips_factory, "decode_all", lambda model, latents, batch: seen.append(batch) or latents)

    def labelled(folder: Path, known: object, counts: dict, draw: Callable, *others: Any) -> Path:
        seen.extend([counts, others[:2]])
        draw(["a red circle"], [0])
        return folder

    def write_clips(folder: Path, videos: Path, known: object, settings: Any, **_: Any) -> tuple[Path, Path]:
        seen.extend([videos, asdict(settings)])
        return folder, folder

    patch.setattr(clips_factory.shapes, "labelled", labelled)
    patch.setattr("prfl.data.clips.write_clips", write_clips)
    build_manifest(config, model_of(load_config("sft.yaml")), iter)
    return seen


def cached(config: Config, patch: pytest.MonkeyPatch) -> Any:
    sizes: list[int] = []
    encode = WanBackbone.encode
    patch.setattr(WanBackbone, "encode", lambda self, pixels: sizes.append(len(pixels)) or encode(self, pixels))
    fill_cache(config, model_of(config), iter)
    return sizes, sorted(path.name for path in Path.cwd().glob("cache-*"))


COMPUTATIONS: dict[str, Callable[[Config, pytest.MonkeyPatch], Any]] = {
    "first step": lambda config, patch: step(config, patch, 1),
    "step": step, "loop": loop, "sampled": sampled, "steered": steered,
    "watched": watched, "clips": clips, "asked": asked, "cache": cached,
    "prompts": lambda config, patch: load_prompts(config.data),
    "kernels": lambda config, patch: choose_kernels(config, model_of(config)),
    "attention": lambda config, patch: attention_choice(config, model_of(config)),
    "device": lambda config, patch: choose_device(config.backbone),
}  # fmt: skip


@cache
def outcome(computation: str, source: str, overrides: tuple[str, ...]) -> str:
    """In words, so that outcomes of any kind compare; a refusal is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            return repr(COMPUTATIONS[computation](load_config(source, overrides), patch))
        except PrflError as error:
            return f"refused: {error}"


@pytest.mark.parametrize("key", EFFECTS)
def test_two_values_have_two_outcomes(key: str, project: Path) -> None:
    computation, source, shared, *sides = EFFECTS[key]
    shorter = ["first step"] if computation == "step" else []  # most keys show in it, and the second is not needed
    for name in (*shorter, computation):
        first, second = (outcome(name, source, (*shared, *side)) for side in sides)
        if first != second:
            break
    assert first != second, f"{key} does nothing: {first[:500]}"
    refused = [text for text in (first, second) if text.startswith("refused: ")]
    assert len(refused) == (key in REFUSED), refused


def test_every_key_is_here_once() -> None:
    keys = set(declared())
    assert {"backbone.adapter.AdapterConfig.dropout", "PrflConfig.handoff"} <= keys
    assert not EFFECTS.keys() & REASONS.keys()
    assert keys - EFFECTS.keys() - REASONS.keys() == set(), "say in effects.py what these keys do"
    assert (EFFECTS.keys() | REASONS.keys()) - keys == set(), "no key of the schema"


def test_a_test_that_a_reason_names_is_there() -> None:
    for reason in REASONS.values():
        if "::" in reason:
            file, test = reason.split("::")
            assert f"def {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), reason


@pytest.mark.parametrize("start", ["sft.yaml", "reward.yaml"])
def test_a_key_that_does_nothing_is_found(start: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As dropout was: its layers never were in training mode."""
    monkeypatch.setattr("prfl.backbone.dropout.SampleDropout.forward", lambda self, x: x)
    key = "backbone.adapter.dropout" if start == "sft.yaml" else "reward.head.adapter.dropout"
    shared = [] if start == "sft.yaml" else ["reward.head.adapter={rank: 2, alpha: 2}"]
    one, two = (step(load_config(start, [*shared, f"{key}={rate}"]), monkeypatch) for rate in (0.0, 0.4))
    assert one == two
