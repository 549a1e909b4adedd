"""What changed, with numbers and pictures. Knows nothing of ComfyUI."""
