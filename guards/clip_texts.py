"""Reads texts with the text tower of a CLIP in a transformers folder, as ComfyUI's CLIP of Stable Diffusion 1 does."""

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..transformers_folder import check_loaded, config_of, weights_sha256
from .prompt_guard import ReadText

_TOKENS_PER_PART = 77


class ClipTexts:
    """A CLIP's text tower; nothing is downloaded and no pickle is opened.

    Args:
        folder: with the whole CLIP or its text tower alone, and its tokenizer.

    Raises:
        InputError: the folder holds neither, or weights or the tokenizer are missing.
    """

    def __init__(self, folder: Path, device: str):
        import transformers

        classes: dict[str, Any] = {"clip": transformers.CLIPModel, "clip_text_model": transformers.CLIPTextModel}
        kind = config_of(folder).model_type
        if kind not in classes:
            raise InputError(f"{folder}: holds a {kind} model, not a CLIP with texts; give a folder with a CLIP")
        model = check_loaded(classes[kind], folder)
        self._tower = (model.text_model if kind == "clip" else model).to(device)
        self._device = device
        self.version = f"clip {weights_sha256(folder)[:16]}"
        try:
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: no tokenizer in the folder; add vocab.json and merges.txt") from error

    @torch.inference_mode()
    def read(self, text: str) -> ReadText:
        """Return the states of a text; one of more than 75 tokens is read in parts, and summed up by the first."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        length = _TOKENS_PER_PART - 2
        parts = [ids[start : start + length] for start in range(0, max(len(ids), 1), length)]
        rows = [[begin, *part, *[end] * (_TOKENS_PER_PART - 1 - len(part))] for part in parts]
        states = self._tower(input_ids=torch.tensor(rows, device=self._device)).last_hidden_state.float().cpu()
        return ReadText(states.flatten(0, 1), states[0, len(parts[0]) + 1])
