"""What leaves a run folder: one LoRA file for diffusers and ComfyUI, merged weights, a model card, the hub."""

from prfl.export.run import export_run as export_run
