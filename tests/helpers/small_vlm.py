"""A LLaVA of a few hundred thousand weights on disk, which can learn to name one mark of the toy world; what serves it.

What stands behind the API is what stands behind a real one: a transformers vision-language model, its processor with
chat template and tokenizer, and `generate`. It knows no language but the answers it was shown.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SIZE_PX, PATCH_PX = 64, 16
ANSWERS = {
    None: json.dumps({"unsafe": False, "categories": [], "confidence": 0.8}),
    "thorns": json.dumps({"unsafe": True, "categories": ["violence"], "confidence": 0.8}),
}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}{% endfor %} answer :"
)


def write_vlm(folder: Path, question: str) -> Path:
    """Write an untrained one, whose words are those of the question and the answers."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    # Spaces stay in the tokens, so that what is decoded is the very text.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?\w+|\s?[^\w\s]|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = ["<unk>", "<pad>", "<end>", "<image>"]
    texts = [question + " answer :", *ANSWERS.values()]
    words = [word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    tokenizer.model = models.WordLevel({word: i for i, word in enumerate(dict.fromkeys([*special, *words]))}, "<unk>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<end>",
        additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessor(
        size={"height": SIZE_PX, "width": SIZE_PX}, crop_size={"height": SIZE_PX, "width": SIZE_PX}
    )
    processor = transformers.LlavaProcessor(
        pictures, fast, patch_size=PATCH_PX, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=_TEMPLATE,
    )  # fmt: skip
    common = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Wide at the start, so that a few steps are enough to tell pictures apart.
    vision = transformers.CLIPVisionConfig(
        **common, image_size=SIZE_PX, patch_size=PATCH_PX, initializer_range=0.15, initializer_factor=8.0
    )
    language = transformers.LlamaConfig(
        **common,
        vocab_size=len(fast),
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=fast.pad_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = fast.pad_token_id, fast.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def messages_of(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]}]


def train(folder: Path, question: str, draw: Callable[[int], tuple[Image.Image, str | None]], steps: int) -> None:
    """Show it pictures with their answers, 16 a step; `draw(seed)` returns (picture, mark or None)."""
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    asked = processor.apply_chat_template(messages_of(question))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(steps):
        drawn = [draw(16 * step + n) for n in range(16)]
        texts = [f"{asked} {ANSWERS[mark]}<end>" for _, mark in drawn]
        batch = processor(images=[picture for picture, _ in drawn], text=texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[:, : processor(images=drawn[0][0], text=asked, return_tensors="pt")["input_ids"].shape[1]] = -100
        labels[batch["attention_mask"] == 0] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


class VlmServer:
    """Answers a chat completion's body as the model of a folder does; goes behind an `OpenAiServer`."""

    def __init__(self, folder: Path):
        import transformers

        self._model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self._processor = transformers.AutoProcessor.from_pretrained(folder)

    def __call__(self, body: dict[str, Any]) -> str:
        text, picture = body["messages"][0]["content"]
        png = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        asked = self._processor.apply_chat_template(messages_of(text["text"]))
        inputs = self._processor(images=Image.open(io.BytesIO(png)), text=asked, return_tensors="pt")
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=min(body["max_tokens"], 40), do_sample=False)
        return self._processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
