"""PickScore, and what is preferred to the base model's picture: `--scorer pickscore=docs/scorers/pickscore.py`.

The variable PICKSCORE names a transformers folder of yuvalkirstain/PickScore_v1 with its tokenizer (or of any CLIP).
`score` is exp(logit_scale) · cosine; `preferred` the softmax of the two pictures' scores: above .5 is a win. Nothing is
downloaded.
"""

import os

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

folder = os.environ["PICKSCORE"]
model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
side = model.config.vision_config.image_size
processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@torch.inference_mode()
def score(images, prompts, base_images):
    rows = []
    for image, prompt, base in zip(images, prompts, base_images, strict=True):
        pictures = [image] if base is None else [image, base]
        tokens = tokenizer([prompt], padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=pictures, return_tensors="pt")
        found = model(**tokens, **pixels).logits_per_image[:, 0]  # exp(logit_scale) · cosine
        row = {"score": float(found[0])}
        if base is not None:
            row["preferred"] = float(found.softmax(0)[0])
        rows.append(row)
    return rows
