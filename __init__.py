"""Safety Experts: train, merge, apply and measure LoRA safety experts in ComfyUI.

ComfyUI loads this folder by path and calls `comfy_entrypoint`; tests, the command line and other programs import it
as `safety_experts`. Nothing is imported here at import time, so the library rooms never pull ComfyUI in
and ComfyUI's start stays fast.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the pack's `ComfyExtension` (ComfyUI nodes.py, load_custom_node)."""
    import logging

    try:
        from .nodes import SafetyExpertsExtension
    except Exception:
        # The host reduces an exception raised here to one line, so keep the traceback in the log.
        logging.getLogger(__name__).exception("Safety Experts could not load its nodes")
        raise
    return SafetyExpertsExtension()
