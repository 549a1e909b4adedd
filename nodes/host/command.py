"""What a command that started this ComfyUI for itself (headless/) tells its nodes, which no workflow could name."""

import json
import os
import signal
import sys
import threading
from pathlib import Path

# Names a JSON file of name -> path, read anew at each question: one ComfyUI serves several workflows of a command.
FILE_VARIABLE = "SAFETY_EXPERTS_COMMAND"
PARENT_VARIABLE = "SAFETY_EXPERTS_ENDS_WITH_STDIN"  # demo/comfyui.py


def told_by_command(name: str) -> Path | None:
    """Return the path that the command gives as `name`: its "dataset", "evaluation" or "training_events"."""
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return None
    given = json.loads(Path(file).read_text(encoding="utf-8")).get(name)
    return Path(given) if given else None


def end_with_the_command() -> None:
    """End this process when the one that started it is gone, however it went: its end of our stdin closes then."""
    if os.environ.get(PARENT_VARIABLE) != "1" or sys.stdin is None:
        return

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="safety experts: waits for the command's end", daemon=True).start()
