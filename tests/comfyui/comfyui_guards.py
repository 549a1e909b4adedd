"""Run inside a real ComfyUI: latents drawn with a guard, beside latents that something else made in its place.

    python comfyui_guards.py COMFYUI_FOLDER TOY_CHECKPOINT SD3_CHECKPOINT

Prints JSON: case -> [difference from what it stands for, difference from no guard], both as parts of the latents'
size, or for what is refused its message. What it stands for:

- pair: ComfyUI's own weighted mean of conditionings, c with weight 1, n with -k and s with k;
- sld: the lines of diffusers' StableDiffusionPipelineSafe in a guider of its own, in noise predictions;
- an expert in the weights: ComfyUI's LoRA hook on the prompt, so that the other conditionings have none.
"""

import json
import sys
from dataclasses import replace

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import safety_experts.nodes.guarding as guarding  # noqa: E402
import torch  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from comfy_extras.nodes_custom_sampler import Guider_DualCFG, Guider_DualModel  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402
from comfy_extras.nodes_pag import PerturbedAttentionGuidance  # noqa: E402
from comfy_extras.nodes_perpneg import Guider_PerpNeg  # noqa: E402
from safety_experts.errors import InputError  # noqa: E402
from safety_experts.experts.expert import Expert, LoraLayer  # noqa: E402
from safety_experts.experts.info import ExpertInfo  # noqa: E402
from safety_experts.nodes.applied import AppliedExpert, note_applied  # noqa: E402
from safety_experts.nodes.gating import add_gated_layers  # noqa: E402
from safety_experts.nodes.guarding import Guard, GuardConcept, add_guard  # noqa: E402

import nodes  # noqa: E402, F401

K = 0.7
STEPS = 3
PRESET = guarding.SldPreset(warmup=0.3, scale=30.0, threshold=0.01, momentum=0.5, decay=0.7)
found: dict = {}


class Family:
    """A model with random conditionings of its width: c of two prompts, u, n, s."""

    def __init__(self, model, channels: int, width: int, pooled: int | None):
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self.noise = torch.randn(2, channels, 4, 4, generator=generator)

        def condition(batch: int = 1):
            tensor = torch.randn(batch, 77, width, generator=generator)
            options = {"pooled_output": torch.randn(batch, pooled, generator=generator)} if pooled else {}
            return [[tensor, options]]

        self.c, self.u, self.n, self.s, self.n2, self.s2 = (condition(b) for b in (2, 1, 1, 1, 1, 1))

    def draw(self, model, positive=None, *, cfg=3.0, sampler="euler", guider=None, **options):
        if guider is None:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(positive or self.c, self.u)
            guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        sampler = comfy.samplers.sampler_object(sampler)
        latent = torch.zeros_like(self.noise)
        return guider.sample(self.noise, latent, sampler, sigmas, seed=7, disable_pbar=True, **options)

    def guard(self, method="pair", strength=K, concepts=None, **settings):
        if concepts is None:
            concepts = [GuardConcept(("hate",), strength, self.n, self.s if method == "pair" else self.u)]
        defaults = {"preset": PRESET, "threshold": -torch.inf}
        return Guard(method, concepts, **{**defaults, **settings})

    def weighted(self, strength=K, prompt=None, unsafe=None, safe=None):
        """Conditionings whose weighted mean, in ComfyUI, is c - k (n - s)."""

        def weigh(condition, weight):
            return [[tensor, {**options, "strength": weight}] for tensor, options in condition]

        pair = weigh(unsafe or self.n, -strength) + weigh(safe or self.s, strength)
        return [*(prompt or self.c), *pair]


def report(case: str, drawn, expected, plain) -> None:
    size = plain.abs().max()
    found[case] = [float((drawn - expected).abs().max() / size), float((drawn - plain).abs().max() / size)]


class PublishedSld(comfy.samplers.CFGGuider):
    """Safe latent diffusion as published, with ComfyUI's predictions turned into noise predictions."""

    momentum, step = None, 0

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
        conds = [self.conds["negative"], self.conds["positive"], self.conds["unsafe"]]
        sigma = timestep.reshape(-1, 1, 1, 1)
        denoised = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        e_u, e_p, e_s = ((x - d) / sigma for d in denoised)
        momentum = torch.zeros_like(x) if self.momentum is None else self.momentum
        scale = torch.clamp((e_p - e_s).abs() * PRESET.scale, max=1.0)
        scale = torch.where((e_p - e_s) >= PRESET.threshold, torch.zeros_like(scale), scale)
        safety = (e_s - e_u) * scale + PRESET.momentum * momentum
        self.momentum = PRESET.decay * momentum + (1 - PRESET.decay) * safety
        guidance = e_p - e_u
        if self.step >= PRESET.warmup * STEPS:
            guidance = guidance - safety
        self.step += 1
        return x - sigma * (e_u + self.cfg * guidance)


def published_sld(family: Family, model, cfg: float):
    guider = PublishedSld(model)
    guider.inner_set_conds({"positive": family.c, "negative": family.u, "unsafe": family.n})
    guider.set_cfg(cfg)
    return family.draw(model, guider=guider)


def check_formulas(name: str, family: Family, model) -> None:
    for cfg in (1.0, 3.0):
        plain = family.draw(model, cfg=cfg)
        drawn = family.draw(add_guard(model, family.guard()), cfg=cfg)
        report(f"pair {name} cfg {cfg:g}", drawn, family.draw(model, family.weighted(), cfg=cfg), plain)
        drawn = family.draw(add_guard(model, family.guard("sld", 1.0)), cfg=cfg)
        report(f"sld {name} cfg {cfg:g}", drawn, published_sld(family, model, cfg), plain)


def check_sld_without_sigma(family: Family) -> None:
    right = guarding.sld_gradient
    guarding.sld_gradient = lambda c, n, u, sigma, preset: right(c, n, u, torch.ones_like(sigma), preset)
    drawn = family.draw(add_guard(family.model, family.guard("sld", 1.0)))
    guarding.sld_gradient = right
    report("sld without sigma", drawn, published_sld(family, family.model, 3.0), family.draw(family.model))


def check_samplers(family: Family) -> None:
    for sampler in ("heun", "dpm_2", "dpmpp_2m", "uni_pc", "euler_ancestral", "lcm", "ddim"):
        drawn = family.draw(add_guard(family.model, family.guard()), sampler=sampler)
        expected = family.draw(family.model, family.weighted(), sampler=sampler)
        report(f"sampler {sampler}", drawn, expected, family.draw(family.model, sampler=sampler))


def check_guiders(family: Family) -> None:
    model, guarded = family.model, add_guard(family.model, family.guard())

    def both(case: str, draw) -> None:
        report(case, draw(guarded, family.c), draw(model, family.weighted()), draw(model, family.c))

    def perp_neg(patcher, positive):
        guider = Guider_PerpNeg(patcher)
        guider.set_conds(positive, family.s2, family.u)
        guider.set_cfg(3.0, 0.5)
        return family.draw(patcher, guider=guider)

    def dual_model(patcher, positive):
        guider = Guider_DualModel(patcher, model)
        guider.inner_set_conds({"positive": positive, "negative": family.u})
        guider.set_cfg(3.0)
        return family.draw(patcher, guider=guider)

    both("guider PerpNeg", perp_neg)
    both("guider DualModel", dual_model)
    guider = Guider_DualCFG(guarded)
    guider.set_conds(family.c, family.n, family.u)
    guider.set_cfg(3.0, 2.0)
    try:
        family.draw(guarded, guider=guider)
        found["guider DualCFG"] = "it was not refused"
    except InputError as error:
        found["guider DualCFG"] = str(error)
    # A perturbed prediction is not guarded once more: the guard's rows are asked for once a step.
    counted = Rows()
    family.draw(counted.on(PerturbedAttentionGuidance.execute(guarded, 1.0).result[0]), cfg=1.0)
    found["rows with perturbed attention"] = counted.shapes


class Rows:
    """Notes the number of rows of every forward pass."""

    def __init__(self):
        self.shapes = []

    def on(self, model):
        def note(executor, x, *arguments, **options):
            self.shapes.append(len(x))
            return executor(x, *arguments, **options)

        noted = model.clone()
        noted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test_rows", note)
        return noted


def check_closed(family: Family) -> None:
    """Nothing may change where no gate opens, of a batch only what is open, and nothing in the next sampling."""
    plain, model = family.draw(family.model), family.model
    for case, guard in {
        "closed by presence": family.guard(threshold=1e9),
        "closed by strength": family.guard(strength=0.0),
        "closed by text": family.guard(opens_by_text=lambda context: torch.zeros(len(context), 1, dtype=torch.bool)),
        "closed outside its part": family.guard(start_percent=0.999999, end_percent=0.9999999),
        "closed sld": family.guard("sld", threshold=1e9),
    }.items():
        counted = Rows()
        drawn = family.draw(counted.on(add_guard(model, guard)))
        found[case] = [float((drawn - plain).abs().max()), sum(counted.shapes)]
    half = family.guard(opens_by_text=lambda context: torch.arange(len(context))[:, None] == 1)
    guarded = add_guard(model, half)
    drawn, again = family.draw(guarded), family.draw(guarded)
    found["half open"] = [float((drawn - plain)[0].abs().max()), float((drawn - plain)[1].abs().max())]
    found["the same again"] = [float((drawn - again).abs().max()), float((family.draw(model) - plain).abs().max())]


def check_choice(family: Family) -> None:
    """Of several concepts the one that the model's own predictions show: here another one in each row."""
    other = [[2 * family.s[0][0] - family.n[0][0], {}]]  # on the other side of the safe twin
    prompt = [[torch.cat([other[0][0], family.n[0][0]]), {}]]
    concepts = [GuardConcept(("hate",), K, family.n, family.s), GuardConcept(("violence",), K, other, family.s)]
    guarded = add_guard(family.model, family.guard(concepts=concepts, threshold=0.2))
    expected = torch.cat(
        [
            family.draw(family.model, family.weighted(prompt=prompt, unsafe=unsafe))[[row]]
            for row, unsafe in enumerate([other, family.n])
        ]
    )
    plain = family.draw(family.model, prompt)
    report("choice of a concept", family.draw(guarded, prompt), expected, plain)
    concepts[0] = replace(concepts[0], is_allowed=True)
    drawn = family.draw(add_guard(family.model, family.guard(concepts=concepts)), prompt)
    report("where what is allowed is further", drawn[:1], expected[:1], plain[:1])
    found["where what is allowed is nearer"] = float((drawn - plain)[1].abs().max())
    drawn = family.draw(add_guard(family.model, family.guard(concepts=concepts[:1])), prompt)
    found["nothing but what is allowed"] = float((drawn - plain).abs().max())


def random_expert(family: Family, seed: int, categories) -> tuple[Expert, dict]:
    generator = torch.Generator().manual_seed(seed)
    known = comfy.lora.model_lora_keys_unet(family.model.model, {})
    ends = ("attn1_to_q", "attn2_to_v", "attn_to_q", "attn_to_v", "attn.to_q", "attn.to_v")
    weights = family.model.model.state_dict()  # SD3's map also names layers of other sizes of it
    keys = {
        name: key
        for name, key in known.items()
        if name.endswith(ends) and name.startswith("lora_") and (key if isinstance(key, str) else key[0]) in weights
    }
    keys = {name: key for key, name in {key: name for name, key in keys.items()}.items()}  # one spelling of each
    layers = {}
    for name, key in keys.items():
        weight = weights[key if isinstance(key, str) else key[0]]
        out = weight.shape[0] if isinstance(key, str) else key[1][2]
        down = torch.randn(2, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        layers[name] = LoraLayer(down, 0.5 * torch.randn(out, 2, generator=generator), 2.0)
    assert len(layers) >= 4, sorted(known)[:40]
    return Expert(layers, ExpertInfo(categories=categories), "random"), keys


def hooked(condition, expert: Expert):
    hooks = comfy.hooks.create_hook_lora(expert.state_dict(), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(condition, hooks)


def in_weights(family: Family, expert: Expert, keys):
    model = family.model.clone()
    model.add_patches(comfy.lora.load_lora(expert.state_dict(), keys))
    note_applied(model, AppliedExpert(expert, keys, True))
    return model


def check_experts(name: str, family: Family) -> None:
    """The guard's own predictions are made without the expert, wherever it is; the prompt's with it."""
    expert, keys = random_expert(family, 3, ("violence",))
    patched = in_weights(family, expert, keys)
    prompt = hooked(family.c, expert)
    expected = family.draw(family.model, family.weighted(prompt=prompt), cfg=1.0)
    plain = family.draw(family.model, prompt, cfg=1.0)
    report(f"expert in the weights, {name}", family.draw(add_guard(patched, family.guard()), cfg=1.0), expected, plain)
    if name == "eps":
        gated = add_gated_layers(add_guard(family.model, family.guard()), keys, expert, 0.0, 1.0)
        note_applied(gated, AppliedExpert(expert, keys, False))
        report("expert behind a gate, on a guarded model", family.draw(gated, cfg=1.0), expected, plain)
    covered = family.draw(
        add_guard(patched, family.guard(concepts=[GuardConcept(("violence",), K, family.n, family.s)])), cfg=1.0
    )
    found[f"covered by the expert, {name}"] = float((covered - family.draw(patched, cfg=1.0)).abs().max())


def check_stack(family: Family) -> None:
    """Two guards and an expert, in two orders, against weighted means with the expert's hook on the prompt."""
    expert, keys = random_expert(family, 3, ("violence",))
    first = family.guard()
    second = family.guard(concepts=[GuardConcept(("shocking",), 0.4, family.n2, family.s2)])
    prompt = family.weighted(0.4, hooked(family.c, expert), family.n2, family.s2)
    expected = family.draw(family.model, family.weighted(prompt=prompt), cfg=1.0)
    plain = family.draw(family.model, cfg=1.0)
    for case, model in {
        "stack: expert, guard, guard": add_guard(add_guard(in_weights(family, expert, keys), first), second),
        "stack: guard, guard, gated expert": add_gated_layers(
            add_guard(add_guard(family.model, second), first), keys, expert, 0.0, 1.0
        ),
    }.items():
        report(case, family.draw(model, cfg=1.0), expected, plain)


def main() -> None:
    toy, *_ = comfy.sd.load_checkpoint_guess_config(sys.argv[2], output_clip=False, output_vae=False)
    eps = Family(toy, 4, 768, None)
    velocity = Family(ModelSamplingDiscrete().patch(toy, "v_prediction", False)[0], 4, 768, None)
    flow = Family(comfy.sd.load_diffusion_model(sys.argv[3]), 16, 160, 96)
    check_formulas("eps", eps, toy)
    check_formulas("v", velocity, velocity.model)
    check_formulas("flow", flow, flow.model)
    check_sld_without_sigma(eps)
    check_samplers(eps)
    check_guiders(eps)
    check_closed(eps)
    check_choice(eps)
    check_experts("eps", eps)
    check_experts("flow", flow)
    check_stack(eps)


with torch.inference_mode():
    try:
        main()
    finally:
        sys.stdout.write(json.dumps(found, indent=1))
