"""Expert files (keys, alpha, metadata), merge methods and per-category application. Knows nothing of ComfyUI."""
