"""Guards at inference: what acts beside experts while a model draws. Knows no ComfyUI."""
