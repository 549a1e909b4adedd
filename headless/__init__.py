"""The work of a command done by the user's own ComfyUI, without a window: for families that models/ does not load."""
