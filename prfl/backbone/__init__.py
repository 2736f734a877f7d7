"""One adapter per diffusers model family: network, features, text condition, VAE and LoRA adapters of a video model."""

from prfl.backbone.condition import Condition
from prfl.backbone.wan.architecture import load_architecture
from prfl.backbone.wan.loading import load_backbone
from prfl.backbone.wan.model import WanBackbone

Backbone = WanBackbone  # becomes a protocol

__all__ = ["Backbone", "Condition", "WanBackbone", "load_architecture", "load_backbone"]
