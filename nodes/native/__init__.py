"""Training on the MODEL in the graph: ComfyUI's own model behind the library's Policy, of any family it can load."""
