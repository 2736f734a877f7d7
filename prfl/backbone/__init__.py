"""Video models of any family behind one protocol: velocity, features, conditions, VAE and adapters."""

from prfl.backbone.base import Backbone, Facts, LoraSpec
from prfl.backbone.condition import Ask, Condition
from prfl.backbone.families import backbone_from_pipeline, load_architecture, load_backbone

__all__ = [
    "Ask",
    "Backbone",
    "Condition",
    "Facts",
    "LoraSpec",
    "backbone_from_pipeline",
    "load_architecture",
    "load_backbone",
]
