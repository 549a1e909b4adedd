"""A language model of transformers in a folder on this machine, for writing prompts without a server."""

from pathlib import Path
from typing import Any

import torch

from ..endpoint import Request
from ..errors import InputError
from ..transformers_folder import check_loaded, config_of


class LocalModel:
    """A causal language model; local files and safetensors only. It cannot be held to a schema, so answers are checked.

    Raises:
        InputError: the folder holds no such model, or no tokenizer.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        config_of(folder)
        self._model = check_loaded(AutoModelForCausalLM, folder).to(device)
        if device.startswith("cuda"):
            self._model = self._model.to(torch.bfloat16)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever the file does
            raise InputError(f"{folder}: no tokenizer in the folder; give the whole model") from error
        self._device, self._name = device, folder.resolve().name

    @property
    def name(self) -> str:
        return self._name

    @torch.inference_mode()
    def complete(self, request: Request) -> str:
        """Return the model's answer; the same seed gives the same one on the same machine."""
        if self._tokenizer.chat_template:
            prompt = self._tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "\n\n".join(message["content"] for message in request.messages) + "\n\n"
        tokens = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=not self._tokenizer.chat_template)
        tokens = {key: tokens[key].to(self._device) for key in ("input_ids", "attention_mask")}
        is_random = request.temperature > 0
        sampling = {"do_sample": True, "temperature": request.temperature} if is_random else {"do_sample": False}
        devices = [self._device] if self._device.startswith("cuda") else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(request.seed)
            found = self._model.generate(**tokens, max_new_tokens=request.max_tokens, **sampling)
        return self._tokenizer.decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
