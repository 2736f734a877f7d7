"""Memory at Wan's real shapes: what a block saves for its backward pass, by counting, and the peak of one PRFL step, as
``prfl train --dry-run`` predicts it, beside the targets.

    python bench/predicted_memory.py [--out bench/results/memory.json]

Nothing is downloaded or allocated: the step runs on ``meta`` with the shapes of the real model.  GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

from bench import studies
from bench.harness import study_tables
from prfl.backbone import LoraSpec, load_architecture
from prfl.backbone.condition import stand_in
from prfl.backbone.kernels import use_kernels
from prfl.backbone.wan.kernels import SWAPPED
from prfl.config import load_config
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.memory import predict_memory
from prfl.estimate.phases import fewer_blocks
from prfl.factory.backbone import build_architecture

ALONE = "rollout.gradients_per_rollout=1"  # as shipped, a rollout that serves four steps is kept: 0.3 to 0.8 GB more
P480 = ("data.frames=81", "data.height=480", "data.width=832", ALONE)
P720 = ("data.frames=81", "data.height=720", "data.width=1280", ALONE)
FULL, OFFLOAD = "backbone.checkpointing=full", "backbone.offload=true"
KERNELS = "backbone.kernels=triton"
SMALL, LARGE, FROM_IMAGE = "configs/wan2.1-1.3b", "configs/wan2.1-14b", "configs/wan2.1-i2v-14b"
CASES = {  # name: config, overrides, target in GB
    "1.3B 480p": (f"{SMALL}/prfl.yaml", (*P480, FULL), 12),
    "14B 480p": (f"{LARGE}/prfl.yaml", (*P480, FULL), 56),
    "14B 480p, offload": (f"{LARGE}/prfl.yaml", (*P480, FULL, OFFLOAD), None),
    "14B 720p": (f"{LARGE}/prfl.yaml", (*P720, FULL), 90),
    "14B 720p, offload": (f"{LARGE}/prfl.yaml", (*P720, FULL, OFFLOAD), 58),
    "14B 480p, attention kept": (f"{LARGE}/prfl.yaml", (*P480, "backbone.checkpointing=attention"), None),
    "14B 480p, kernels": (f"{LARGE}/prfl.yaml", (*P480, FULL, KERNELS), 48),
    "14B 720p, kernels": (f"{LARGE}/prfl.yaml", (*P720, FULL, KERNELS), 74),
    "14B 720p, offload, kernels": (f"{LARGE}/prfl.yaml", (*P720, FULL, OFFLOAD, KERNELS), 48),
    "I2V 14B 480p": (f"{FROM_IMAGE}/prfl.yaml", (*P480, FULL), None),
    "I2V 14B 720p": (f"{FROM_IMAGE}/prfl.yaml", (*P720, FULL), None),
    "I2V 14B 720p, offload": (f"{FROM_IMAGE}/prfl.yaml", (*P720, FULL, OFFLOAD), None),
    "1.3B 480p, full chain": (f"{SMALL}/full_chain.yaml", (*P480, FULL), None),
    "14B 480p, full chain": (f"{LARGE}/full_chain.yaml", (*P480, FULL), None),
    "14B 720p, full chain": (f"{LARGE}/full_chain.yaml", (*P720, FULL), None),
}


def predicted(config_file: str, overrides: tuple[str, ...], target: float | None) -> dict:
    config = load_config(config_file, ["backbone.device=cuda", *overrides])
    memory = predict_memory(config, build_architecture(config))
    return {
        "config": config_file, "overrides": list(overrides), "peak GB": memory.peak / 1e9, "target GB": target,
        "assumed": memory.assumed, "always alive": {part.name: part.bytes for part in memory.fixed},
        "phases": {part.name: {"bytes": part.bytes, "saved for backward": part.saved} for part in memory.phases},
    }  # fmt: skip


RANK = 32
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
NOBODYS = "diffusers + peft, bf16 adapters"
BLOCKS = {  # name: the operations of prfl_kernels in it
    "diffusers + peft as it comes (fp32 adapters)": None,
    NOBODYS: None,
    "prfl without kernels": (),
    **{f"prfl, {name}": (name,) for name in SWAPPED},
    "prfl, all kernels": SWAPPED,
}


def block_bytes(model: str, device: str) -> dict[str, float]:
    """Count what autograd keeps of one block of a 480p video, in hidden states (bf16 tensors of tokens x width).

    It is that of a further block, so that what all blocks share is not in it.
    """
    by_network = {}
    for name, operations in BLOCKS.items():
        backbone = load_architecture(model, torch.bfloat16)
        network = backbone.networks["transformer"]
        if operations is None:
            network.add_adapter(LoraConfig(r=RANK, target_modules=list(TARGETS)), "policy")
            if name == NOBODYS:
                network.to(torch.bfloat16)
            else:  # peft keeps the adapters of a bf16 network in float32
                for parameter in (p for n, p in network.named_parameters() if ".lora_" in n):
                    parameter.data = parameter.data.float()
        else:
            with torch.device("meta"):
                backbone.add_adapter("policy", LoraSpec(rank=RANK, alpha=RANK, targets=TARGETS))
            use_kernels(backbone, operations)
        weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        latents = torch.empty(1, *backbone.latent_shape(81, 480, 832), device="meta", dtype=torch.bfloat16)
        facts = backbone.facts
        condition = stand_in(
            facts.condition, 1, facts.text_tokens, latents.shape[1:], partial(torch.empty, device="meta")
        )
        saved = []
        for blocks in (1, 2):
            storages: dict[int, torch.Tensor] = {}

            def pack(tensor: torch.Tensor, storages: dict = storages) -> torch.Tensor:
                storages[tensor.untyped_storage()._cdata] = tensor
                return tensor

            with fused_on_meta(device), backbone.adapter("policy"), fewer_blocks(backbone, blocks):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    backbone.features(latents.requires_grad_(), torch.tensor(0.5), condition, [blocks - 1])
            saved.append(sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in weights))
        tokens = latents[0, 0].numel() // 4
        by_network[name] = (saved[1] - saved[0]) / (tokens * facts.widths[0] * 2)
    return by_network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    cases = {name: predicted(*case) for name, case in CASES.items()}
    models = {name: f"Wan-AI/Wan2.1-T2V-{name}-Diffusers" for name in ("1.3B", "14B")}
    blocks = {
        f"{name}, {device}": block_bytes(model, device) for name, model in models.items() for device in ("cpu", "cuda")
    }
    how = "counted and predicted on meta tensors at real shapes; nothing was timed, and no GPU was used"
    result = {"how": how, "saved hidden states of a block": blocks, "cases": cases}
    out = parser.parse_args().out
    studies.write(out, result, weights=studies.COUNTED)
    print(study_tables.of_files("saved", out), study_tables.of_files("peaks", out), sep="\n")


if __name__ == "__main__":
    main()
