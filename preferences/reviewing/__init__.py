"""Looking at a dataset's pairs in the browser: the routes, what they refuse, and small pictures. Knows no ComfyUI."""
