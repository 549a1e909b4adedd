"""Looking at a training while it runs and after it: its files beside the expert, and the routes. Knows no ComfyUI."""
