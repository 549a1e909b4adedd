"""How each example workflow is laid out: groups named after the steps, what stands in them, the notes beside them."""

from dataclasses import dataclass, field

# One colour a step, the same in every workflow: (group, title of its nodes, body of its nodes).
COLOURS = {
    "model": ("#3f5f8f", "#223355", "#2c3f63"),
    "prompts": ("#3f789e", "#1f3d4d", "#2a4f63"),
    "draw": ("#6f5aa0", "#33264f", "#423362"),
    "judge": ("#a1843c", "#4d3d17", "#5f4d22"),
    "review": ("#b06634", "#552f14", "#683d1f"),
    "train": ("#a14848", "#4d1f1f", "#632b2b"),
    "compare": ("#3c8f8a", "#173f3d", "#21524f"),
    "report": ("#4f7fa8", "#1c3850", "#284a66"),
    "apply": ("#4f9a5f", "#1d4526", "#295832"),
}


@dataclass(frozen=True)
class Group:
    """One step: `columns` hold the numbers of its nodes, from left to right and from top to bottom."""

    title: str
    step: str
    columns: tuple[tuple[int, ...], ...]
    note: str


@dataclass(frozen=True)
class Layout:
    """Groups above and below the channel in which the long wires run; `sliders` and `shown` make it an app too."""

    above: tuple[Group, ...]
    below: tuple[Group, ...] = ()
    sliders: tuple[tuple[int, str], ...] = ()
    shown: tuple[int, ...] = ()
    models: dict[int, tuple[dict[str, str], ...]] = field(default_factory=dict)


_HUB = "https://huggingface.co"
_CLIP = {
    "name": "clip-vit-large-patch14.safetensors",
    "url": f"{_HUB}/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
}
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": f"{_HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "url": f"{_HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
}
_Z = f"{_HUB}/Comfy-Org/z_image/resolve/main/split_files"
Z_IMAGE = (
    {
        "name": "z_image_bf16.safetensors",
        "url": f"{_Z}/diffusion_models/z_image_bf16.safetensors",
        "directory": "diffusion_models",
    },
    {
        "name": "qwen_3_4b.safetensors",
        "url": f"{_Z}/text_encoders/qwen_3_4b.safetensors",
        "directory": "text_encoders",
    },
    {"name": "ae.safetensors", "url": f"{_Z}/vae/ae.safetensors", "directory": "vae"},
)
_Z_LOADERS = {number: (model,) for number, model in zip((1, 30, 31), Z_IMAGE, strict=True)}
_JUDGES = {6: ({**_CLIP, "directory": "clip_vision"},), 7: ({**_CLIP, "directory": "text_encoders"},)}

_TOY = (
    "It runs as it is on the toy checkpoint, which `safety-experts demo --checkpoint "
    "<ComfyUI>/models/checkpoints/safety_experts_toy.safetensors` writes."
)


_PAIRS = Group(
    "2 Prompt pairs: three words",
    "prompts",
    ((2,), (4,)),
    "**Type three words**, what your model shall draw no more, in place of *thorns, spikes, cracks*, and "
    "things it can be seen on. Each pair is an unsafe prompt and the same prompt without the word.\n\n"
    "Have Ollama or another language model? Link **Write Prompt Pairs** to *prompt_pairs* instead.",
)
_TOY_PAIRS = Group(
    "2 Prompt pairs: three words",
    "prompts",
    ((2,),),
    "Three words: *thorns, stripes, a ring*. Each pair is an unsafe prompt and the same prompt without the word. The "
    "toy also knows *a zigzag, dots, a frame* and *a cross*: change a word here **and** in group 8.",
)
_JUDGE = Group(
    "4 Judge",
    "judge",
    ((6, 7), (8,), (9,)),
    "CLIP compares each picture with two sentences: **write yours** in *concepts*, `unsafe | safe`. One "
    "file has both sides of this CLIP: put it into `models/clip_vision` and `models/text_encoders`. "
    "Other judges: the list in **Safety Judge**.",
)
_TOY_JUDGE = Group(
    "4 Judge",
    "judge",
    ((8,), (9,)),
    "*toy-oracle* sees the marks of the toy world without a model. For your own model choose another judge: "
    "*clip-concepts* takes two sentences, `unsafe | safe`.",
)


def _one_click(
    loaders: tuple[int, ...], model_note: str, models: dict, pairs: Group = _PAIRS, judge: Group = _JUDGE
) -> Layout:
    return Layout(
        above=(
            Group("1 Your model", "model", (loaders,), model_note),
            pairs,
            Group(
                "3 Draw both sides",
                "draw",
                ((5,),),
                "Your own model draws both prompts of a pair from one seed. Use the size, steps and cfg that you "
                "always use. Stopped, it goes on where it was.",
            ),
            judge,
            Group(
                "5 Review",
                "review",
                ((10,),),
                "Select **Review** and press its play button: everything up to here runs and the page opens. Look at "
                "what the judge doubts (keys: accept, flip, drop). Then press **Run**: nothing is drawn twice.",
            ),
        ),
        below=(
            Group(
                "6 Train",
                "train",
                ((11,),),
                "*auto* takes the recipe for your model's family. Cancel keeps the expert as it is; *resume* goes on. "
                "The file lies in `output/loras`.",
            ),
            Group(
                "7 Compare strengths",
                "compare",
                ((12, 13, 14),),
                "The same expert at three strengths. Below 1 it is gentler, above 1 stronger, and both cost something: "
                "the report says what.",
            ),
            Group(
                "8 Report",
                "report",
                ((3, 15), (16, 17), (18,)),
                "Prompts it was **not** trained on, the same noise for each model. *quick* is 50 unsafe and 100 safe "
                "prompts; for a claim take *standard*. The pictures and the summary are about the last model; the "
                "report, behind *Open report*, about all.",
            ),
            Group(
                "9 Apply",
                "apply",
                ((20, 21, 22), (23,), (24,), (25,)),
                "Your model with the expert on it. Later load the file instead: workflow *5 Use every day*.",
            ),
        ),
        models=models,
    )


def _daily(loaders: tuple[int, ...], model_note: str, models: dict) -> Layout:
    return Layout(
        above=(
            Group("1 Your model", "model", (loaders,), model_note),
            Group(
                "2 Expert and strengths",
                "apply",
                ((2,), (3,)),
                "Choose the expert: a file in `models/loras` or `output/loras`. 0 is off, 1 as trained. A slider "
                "without effect belongs to a category that the expert does not have.",
            ),
            Group("3 Prompt", "prompts", ((4, 5, 6),), "As in any workflow."),
            Group("4 Picture", "draw", ((7,), (8,), (9,)), "Steps and cfg as you always use."),
        ),
        sliders=(
            (4, "text"), (3, "hate"), (3, "harassment"), (3, "violence"), (3, "self_harm"), (3, "sexual"),
            (3, "shocking"), (3, "illegal_activity"), (3, "other"),
        ),
        shown=(9,),
        models=models,
    )  # fmt: skip


_TOY_NOTE = (
    "**Press Run**: some minutes on a CPU. The toy draws coloured shapes, and marks on them stand in for what is "
    f"unsafe. {_TOY}"
)
_SD15_NOTE = "**Choose your checkpoint** of the SD 1.5 family. Nothing else here depends on which one."
_SDXL_NOTE = "**Choose your checkpoint**: SDXL, Illustrious, Pony, NoobAI."
_Z_NOTE = (
    "Separate files: here Z-Image. **Any family that ComfyUI can load** works: change the loaders, and the size, "
    "sampler and cfg beside them. Distilled models: train on the base (docs/families.md)."
)

LAYOUTS = {
    "0_make_my_model_safer": _one_click((1,), _SD15_NOTE, {1: (SD15,)} | _JUDGES),
    "0_make_my_model_safer_sdxl": _one_click((1,), _SDXL_NOTE, {1: (SDXL,)} | _JUDGES),
    "0_make_my_model_safer_z_image": _one_click((1, 30, 31), _Z_NOTE, _Z_LOADERS | _JUDGES),
    "0_make_my_model_safer_toy": _one_click((1,), _TOY_NOTE, {}, _TOY_PAIRS, _TOY_JUDGE),
    "1_build_preference_dataset": Layout(
        above=(
            Group("1 Model", "model", ((1,),), f"Choose your model. {_TOY}"),
            Group("2 Prompt pairs", "prompts", ((2,),), "Words and templates make the pairs; a file or lines do too."),
            Group(
                "3 Draw",
                "draw",
                ((3,),),
                "Both sides from one seed, with the sampler that you always use. *Open review page* shows them.",
            ),
        ),
        below=(
            Group(
                "4 Or record from any graph",
                "draw",
                ((4, 5, 6, 7), (8, 9), (10, 11)),
                "Two pictures that this graph draws anyway, unsafe and safe, from the same seed.",
            ),
            Group("5 Record", "review", ((14,),), "Adds the two to a dataset. What it has already is kept."),
        ),
    ),
    "2_train_expert": Layout(
        above=(
            Group("1 Dataset", "review", ((1,),), "The dataset that workflow 1 drew, or one you imported."),
            Group(
                "2 Train",
                "train",
                ((3,),),
                f"One category makes one expert, with its own strength. Recipe *auto* for real models. {_TOY}",
            ),
            Group("3 What came out", "report", ((4, 5),), "The loss of every step, and the file's name."),
        ),
    ),
    "3_merge_and_apply": Layout(
        above=(
            Group("1 Experts", "train", ((2, 3),), "Files that workflow 2 trained, in `output/loras`."),
            Group(
                "2 Merge", "compare", ((4,), (5,)), "Eighteen methods; *linear* adds. Each category keeps its slider."
            ),
            Group("3 Apply", "apply", ((6,),), "0 is off, 1 as trained, for each category."),
        ),
        below=(
            Group("4 Model", "model", ((1,),), f"The model that the experts were trained on. {_TOY}"),
            Group("5 Prompt", "prompts", ((7, 8, 9),), "An unsafe prompt, to see what changes."),
            Group(
                "6 Before and after, same seed",
                "report",
                ((10, 11), (12, 13), (14, 15)),
                "The unsafe side stays blurred until you press *Show*.",
            ),
        ),
    ),
    "4_train_on_the_model": Layout(
        above=(
            Group("1 Model", "model", ((1, 2, 3),), _Z_NOTE),
            Group("2 Prompt pairs", "prompts", ((4,),), "Words and templates make the pairs; a file or lines do too."),
            Group("3 Draw", "draw", ((5,),), "With the size, sampler and cfg that the model needs."),
            Group("4 Train", "train", ((6,),), "On the MODEL itself, so on any family; LoRAs on it stay on it."),
        ),
        below=(
            Group("5 Apply", "apply", ((7,),), "The expert is an ordinary LoRA: stock loaders take it."),
            Group("6 Prompt", "prompts", ((8, 9, 10),), "An unsafe prompt, to see what changes."),
            Group(
                "7 Picture",
                "report",
                ((11,), (12,), (13,)),
                "The same prompt and seed without group 5 show the difference.",
            ),
        ),
        models={number: (model,) for number, model in zip((1, 2, 3), Z_IMAGE, strict=True)},
    ),
    "5_use_every_day": _daily((1,), _SD15_NOTE, {1: (SD15,)}),
    "5_use_every_day_sdxl": _daily((1,), _SDXL_NOTE, {1: (SDXL,)}),
    "5_use_every_day_z_image": _daily((1, 30, 31), _Z_NOTE, _Z_LOADERS),
    "6_safe_generation": Layout(
        above=(
            Group("1 Your model", "model", ((1,),), _SD15_NOTE),
            Group(
                "2 Check the prompt",
                "prompts",
                ((2,), (3,)),
                "**Type your prompt** here. *file* is what **Train Prompt Guard** made of prompt pairs on this text "
                "encoder. *report* leaves the prompt as it is and opens the expert for what it asks for; *block*, "
                "*replace*, *soften* and *rewrite* change it.",
            ),
            Group(
                "3 Expert and guard",
                "apply",
                ((4,), (5,), (6, 7)),
                "The expert acts where the check says so: other prompts are drawn as by the model alone. **Pair "
                "Guard** covers categories without an expert: write `category: unsafe text | safe text`, one a line.",
            ),
        ),
        below=(
            Group(
                "4 Draw",
                "draw",
                ((8, 9), (10,), (11,), (12, 16)),
                "Size, steps and cfg as you always use them. The guard needs two predictions more in the first third "
                "of the steps, for each of its lines.",
            ),
            Group(
                "5 Look at the picture",
                "judge",
                ((13,), (14,), (15,)),
                "*file* is what **Train Verifier** made of your own pictures with this CLIP. *safe* of **Verify "
                "Images** is a value to branch on; nothing is hidden or deleted.",
            ),
        ),
        models={1: (SD15,), 13: ({**_CLIP, "directory": "clip_vision"},)},
    ),
}
