"""A node's progress bar, live pictures, and the user's cancel."""

import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image

PICTURE_SIZE_PX = 768
PICTURE_INTERVAL_SECONDS = 1.0


class Progress:
    """A node's progress bar, with an optional live picture; every call stops the node when the user cancelled."""

    def __init__(self, total: int = 1):
        self._bar = comfy.utils.ProgressBar(total)
        self._next_picture_seconds = 0.0

    def advance(self, count: int) -> None:
        self.show(self._bar.current + count)

    def show(self, value: int, total: int | None = None, draw: Callable[[], Image.Image] | None = None) -> None:
        """Show `value` of `total`; `draw` makes the picture and is called once a second, and at the end."""
        stop_if_cancelled()  # the bar itself asks only every half percent
        preview = None
        if draw and (time.monotonic() >= self._next_picture_seconds or value == (total or self._bar.total)):
            self._next_picture_seconds = time.monotonic() + PICTURE_INTERVAL_SECONDS
            preview = ("JPEG", draw(), PICTURE_SIZE_PX)
        self._bar.update_absolute(value, total, preview)

    def picture(self, draw: Callable[[], Image.Image]) -> None:
        self.show(self._bar.current, draw=draw)


class PatientProgress(Progress):
    """Progress for work that has something to save: it remembers a cancel instead of raising it at once."""

    def __init__(self, total: int = 1):
        super().__init__(total)
        self._interrupt: comfy.model_management.InterruptProcessingException | None = None

    def show(self, value: int, total: int | None = None, draw: Callable[[], Image.Image] | None = None) -> None:
        try:
            super().show(value, total, draw)
        except comfy.model_management.InterruptProcessingException as interrupt:  # raising it has cleared the flag
            self._interrupt = interrupt

    def is_cancelled(self) -> bool:
        return self._interrupt is not None or comfy.model_management.processing_interrupted()

    def raise_cancel(self) -> None:
        """Now that everything is saved, raise the cancel there was."""
        if self._interrupt is not None:
            raise self._interrupt
        stop_if_cancelled()


def stop_if_cancelled() -> None:
    """Raise ComfyUI's InterruptProcessingException when the user cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()
