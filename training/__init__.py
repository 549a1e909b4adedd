"""Objectives, cache, LoRA, trainer, recipes: the DPO maths. Knows nothing of ComfyUI."""
