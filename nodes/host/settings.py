"""The user's settings of the pack, from ComfyUI's settings dialog (registered in web/settings.js)."""

import json
from pathlib import Path

import folder_paths

_BLUR = "SafetyExperts.BlurUnsafe"


def blurs_unsafe() -> bool:
    """Say whether unsafe pictures are to be shown blurred: always, unless the user turned it off.

    A node does not know who queued it, so with several users (`--multi-user`) they stay blurred.
    """
    folder = folder_paths.get_public_user_directory("default")
    try:
        settings = json.loads((Path(folder or "") / "comfy.settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(settings, dict) or settings.get(_BLUR) is not False
