"""The prediction against what torch's allocator sees on families that are not Wan: network, features, decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from prfl.backbone import Ask, Backbone
from prfl.backbone.network import base_blocks
from prfl.backbone.wan.family import ARCHITECTURES
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate import phases
from prfl.estimate.live_tensors import LiveBytes, fused_on_meta
from prfl.estimate.parts import Shapes
from prfl.factory.backbone import POLICY, build_architecture, build_backbone, keep_as_asked
from prfl.reward.frames import decode_frames
from prfl.utils.video_size import VideoSize
from tests.backbone.table import MEASURED
from tests.cogvideox import save_tiny_cogvideox
from tests.modelscope import save_tiny_modelscope
from tests.slow import slow_unless
from tests.svd import save_tiny_svd
from tests.tiny import save_tiny_pipeline
from tests.wan_experts import save_tiny_experts, save_tiny_image_experts
from tests.wan_image import first_frames, save_tiny_pinned_frame, save_tiny_wan_image

SIZES = {
    "wan": (9, 64, 64),
    "cogvideox": (9, 64, 64),
    "modelscope": (9, 64, 64),
    "wan_experts": (9, 64, 64),
    "wan_image": (9, 128, 128),
    "wan_image_experts": (9, 128, 128),
    "wan_pinned_frame": (9, 64, 64),
    "svd": (9, 64, 64),
}
PROMPTS = ["a circle", "a"]
FAMILIES = {
    "wan": lambda folder: save_tiny_pipeline(folder, num_layers=5),
    "cogvideox": lambda folder: save_tiny_cogvideox(folder, num_layers=5, use_rotary_positional_embeddings=True),
    "modelscope": save_tiny_modelscope,
    "wan_experts": lambda folder: save_tiny_experts(folder, num_layers=5),
    "wan_image": lambda folder: save_tiny_wan_image(folder, num_layers=5),
    "wan_image_experts": lambda folder: save_tiny_image_experts(folder, num_layers=5),
    "wan_pinned_frame": lambda folder: save_tiny_pinned_frame(folder, num_layers=5),
    "svd": save_tiny_svd,
}


def asked(folder: Path, family: str) -> list[Ask]:
    return first_frames(folder / "pictures", PROMPTS, VideoSize(*SIZES[family], 8))


ELSEWHERE = ("svd", "wan", "wan_experts", "wan_image_experts")


@pytest.fixture(scope="module", params=slow_unless(lambda name: name not in ELSEWHERE, FAMILIES))
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """make("a.b=value", ...): PRFL on a random model of five blocks, unless changed."""
    folder = tmp_path_factory.mktemp(request.param)
    model = FAMILIES[request.param](folder / "five")
    images = request.param in ("svd", "wan_image", "wan_image_experts", "wan_pinned_frame")
    rows = [
        {"prompt": str(ask), **({"image": str(ask.image)} if images else {})} for ask in asked(folder, request.param)
    ]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    frames, height, width = SIZES[request.param]
    handoff = "clean" if request.param.endswith("_experts") else "next"  # of two, one is read, at low noise
    config = {
        "version": 1, "run": str(folder / "run"), "seed": 0,
        "backbone": {"model": str(model), "device": "cpu", "adapter": {"rank": 2, "alpha": 2}},
        "data": {
            "prompts": {"train": str(folder / "prompts.jsonl")}, "cache": str(folder), "frames": frames,
            "height": height, "width": width, "fps": 8,
        },
        "reward": {"space": "latent", "path": str(folder / "absent")}, "rollout": {"steps": 6},
        "objective": {"name": "prfl", "handoff": handoff}, "training": {"steps": 5, "batch": 2, "learning_rate": 1e-4},
        "evaluation": {"every": 0},
    }  # fmt: skip
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return lambda *overrides: load_config(Path(path), overrides)


@pytest.fixture(scope="module")
def built(make: Callable[..., Config]) -> tuple[Backbone, Backbone]:
    """A family's model, and the same without weights; what they keep for the backward pass each test says."""
    return build_backbone(make()), build_architecture(make())


def allocated(run: Callable[[], object]) -> Tensor:
    """Bytes that the allocator has given out, after each of its changes while ``run`` lasts and its result is there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    assert profile.profiler is not None
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return torch.tensor(changes).cumsum(0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_networks_peak(
    make: Callable[..., Config], built: tuple[Backbone, Backbone], checkpointing: str, record_property: Callable
) -> None:
    config, (model, empty) = make(f"backbone.checkpointing={checkpointing}"), built
    for each in built:
        keep_as_asked(config, each)
        for parameter in each.parameters(POLICY).values():
            parameter.grad = torch.zeros_like(parameter)
    latents = torch.randn(2, *model.latent_shape(*SIZES[model.facts.family]))
    asks = asked(config.data.cache, model.facts.family) if "image" in model.facts.takes else PROMPTS
    condition = model.condition(asks)
    model.velocity(latents, torch.tensor(0.5), condition)
    with model.adapter(POLICY):
        trained = list(model.parameters(POLICY).values())

        def forward_and_backward() -> None:
            velocity = model.velocity(latents, torch.tensor(0.5), condition)
            velocity.backward(torch.zeros_like(velocity), inputs=trained)

        seen = int(allocated(forward_and_backward).max())
    with fused_on_meta("cpu"):
        predicted = phases.network_call(config, empty, Shapes(empty, config), 2, gradient=True).bytes
    column = "predicted / seen" + (", checkpointed" if checkpointing == "full" else "")
    record_property(MEASURED, (model.facts.family, column, predicted / seen))
    assert predicted == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("checkpointing", slow_unless("none".__eq__, ["none", "full"]))
def test_what_the_decoder_keeps(
    make: Callable[..., Config], built: tuple[Backbone, Backbone], checkpointing: str
) -> None:
    """Of one group of frames, or one frame, and of all: the one's is smaller.  (No workspaces of convolutions.)"""
    model, empty = built
    for each in built:
        keep_as_asked(make(f"backbone.checkpointing={checkpointing}"), each)
    sizes = {}
    shape = model.latent_shape(17, 64, 64)
    for shown in ([4], list(range(shape[1]))):
        leaf = torch.randn(1, *shape).requires_grad_()
        seen = int(allocated(lambda leaf=leaf, shown=shown: decode_frames(model, leaf, shown))[-1])
        meta = torch.empty_like(leaf, device="meta").requires_grad_()
        with fused_on_meta("cpu"), LiveBytes() as counted:
            pixels = decode_frames(empty, meta, shown)
        assert counted.live == pytest.approx(seen, rel=0.1) and pixels[0].is_meta
        sizes[len(shown)] = seen
    assert sizes[1] < 0.7 * sizes[shape[1]]


# The published sizes of Wan 2.2 TI2V-5B, in place of those of Wan 2.1 1.3B.
TI2V_5B = {
    "model_index.json": {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True},
    "transformer/config.json": {
        "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
    },
    "vae/config.json": {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
        "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
    },
}  # fmt: skip
PICTURES = [f"data.prompts.{name}=configs/prompts/{file}.jsonl" for name, file in
            (("train", "first_frames"), ("validation", "first_frames_validation"))]  # fmt: skip
REAL = {
    "wan": ("wan2.1-1.3b", []),
    "wan_experts": ("wan2.2-a14b", ["backbone.experts=null"]),
    "wan_image_experts": ("wan2.2-i2v-a14b", ["backbone.experts=null"]),
    "wan_image": ("wan2.1-i2v-14b", []),
    "wan_pinned_frame": ("wan2.1-1.3b", ["data.frames=121", "data.height=704", "data.width=1280", *PICTURES]),
    "cogvideox": ("cogvideox-2b", []),
    "modelscope": ("modelscope-1.7b", []),
    "svd": ("svd-xt", []),
}
"""By family, a config of real sizes, and what is changed in it."""
SAVED = {"none": "", "attention": ", attention kept", "full": ", checkpointed"}


def ti2v_5b(folder: Path) -> Path:
    shutil.copytree(ARCHITECTURES / "wan2.1-1.3b", folder)
    for name, changes in TI2V_5B.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", REAL)
def test_what_a_block_saves_at_the_real_size(family: str, tmp_path: Path, record_property: Callable) -> None:
    """In bfloat16, of one video: a hidden state where it is checkpointed, one more where attention is kept."""
    name, changes = REAL[family]
    if family == "wan_pinned_frame":
        changes = [*changes, f"backbone.model={ti2v_5b(tmp_path / 'ti2v-5b')}"]
    how = ["backbone.offload=false", "backbone.kernels=torch", "backbone.device=cpu", "reward.path=absent", *changes]
    config = load_config(f"configs/{name}/prfl.yaml", how)
    model, saved = build_architecture(config), {}
    assert model.facts.family == family
    shapes = Shapes(model, config)
    for mode, column in SAVED.items():
        model.running.checkpointing = mode  # type: ignore[assignment]
        with fused_on_meta("cpu"):
            call = phases.network_call(config, model, shapes, 1, gradient=True, saved_alone=True)
        saved[mode] = call.saved * len(model.facts.blocks) / len(base_blocks(model))
        record_property(MEASURED, (family, f"MB saved a block{column}", saved[mode] / 1e6))
    assert saved["none"] > 6 * saved["full"]
    if not model.facts.strides:  # a UNet's blocks are of several sizes
        state = 2 * model.facts.tokens(shapes.latent) * model.facts.widths[0]
        # A part of what lies outside the blocks is in it: of the most weight where each token has a time of its own.
        assert state < saved["full"] < 1.3 * state
        assert 2 * state < saved["attention"] < 2.3 * state
    assert saved["full"] < saved["attention"] < saved["none"]
