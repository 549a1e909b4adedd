"""Prompt pairs, the preference dataset on disk, import and export. Knows nothing of models or ComfyUI."""
