"""Preference objectives: what policy and reference predicted goes in, a loss per pair comes out.

Vocabulary: the policy is the model with the adapter on, the reference the same model with it off; an error is the mean
squared error of a prediction over channels and latent pixels. The logit of a pair, in every objective, is

    u = -(beta/2) [(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)]

Other code writes beta where we write beta/2 (diffusers, DUO, Diffusion-KTO): double their number for ours. Code that
sums the squares instead of taking their mean (SimpleTuner) has a beta smaller by the number of latent elements.

A new objective is a function and an entry of OBJECTIVES: recipes, help texts, node options and the table in
docs/training.md come from there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PairErrors:
    """Mean squared errors of one batch of pairs, each [b] float32."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def rewards(self, beta: float) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards (chosen, rejected) = -(beta/2) (policy error - reference error), each [b]."""
        return (
            -beta / 2 * (self.policy_chosen - self.reference_chosen),
            -beta / 2 * (self.policy_rejected - self.reference_rejected),
        )

    def logit(self, beta: float) -> Tensor:
        """Return u [b]: the chosen reward minus the rejected one."""
        chosen, rejected = self.rewards(beta)
        return chosen - rejected

    def where_swapped(self, swap: Tensor) -> "PairErrors":
        """Return the errors with chosen and rejected exchanged where `swap` [b] is true."""
        return PairErrors(
            torch.where(swap, self.policy_rejected, self.policy_chosen),
            torch.where(swap, self.policy_chosen, self.policy_rejected),
            torch.where(swap, self.reference_rejected, self.reference_chosen),
            torch.where(swap, self.reference_chosen, self.reference_rejected),
        )


@dataclass(frozen=True)
class PairPredictions:
    """Everything an objective may look at. Predictions and targets are [b, c, h, w] float32.

    `chosen_unsafe` and `rejected_unsafe` [b] bool are SafeDPO's indicators, from the dataset.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    target_chosen: Tensor
    target_rejected: Tensor
    chosen_unsafe: Tensor
    rejected_unsafe: Tensor

    def errors(self) -> PairErrors:
        return PairErrors(
            mean_squared_error(self.policy_chosen, self.target_chosen),
            mean_squared_error(self.policy_rejected, self.target_rejected),
            mean_squared_error(self.reference_chosen, self.target_chosen),
            mean_squared_error(self.reference_rejected, self.target_rejected),
        )


class Parameters(BaseModel):
    """What a recipe may say of one objective; an objective with numbers of its own adds them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(1.0, ge=0, description="Weight among the objectives of a recipe.")


class RobustParameters(Parameters):
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="Assumed fraction of flipped labels.")


class BoundedParameters(Parameters):
    rejected_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Mixture weight of the rejected image (lambda): it adds at most -log(1 - lambda) to u.",
    )


class SafeDpoParameters(Parameters):
    safety_margin: float = Field(1.0, ge=0, description="Margin Delta asked of safe over unsafe pairs, in units of u.")
    margin_share: float = Field(
        0.0,
        ge=0,
        description="Delta as this part, say 0.5, of the u that is reached when the chosen error has fallen by the "
        "whole gap to the rejected one, instead of safety_margin; 0: off.",
    )


class ScDpoParameters(Parameters):
    cost_weight: float = Field(2.0, ge=0, description="Cost of an unsafe image against a preference of 1 (lambda).")
    focus: float = Field(1.0, ge=0, description="Exponent that weighs pairs up the model still gets wrong (gamma).")


class DmpoParameters(Parameters):
    target_probability: float = Field(0.99, gt=0.5, lt=1, description="Confidence the pair is pulled to (1 - alpha).")


class MapoParameters(Parameters):
    mapo_beta: float = Field(0.1, gt=0, description="Weight of its preference term.")


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample: [b, c, h, w], [b, c, h, w] -> [b]."""
    return (prediction - target).square().flatten(1).mean(1)


def sigmoid(predictions: PairPredictions, beta: float, _: Parameters) -> Tensor:
    """Diffusion-DPO as AlignGuard releases it: loss = -log sigmoid(u); ln 2 for a fresh adapter.

    Source: Wallace et al., arXiv 2311.12908; AlignGuard (arXiv 2412.10493), Visualignment/SafetyDPO train.py about
    L1158-1198. Worked numbers of this and all others: tests/training/test_objectives.py.
    """
    return -functional.logsigmoid(predictions.errors().logit(beta))


def hinge(predictions: PairPredictions, beta: float, _: Parameters) -> Tensor:
    """loss = max(0, 1 - u). Source: SLiC (arXiv 2305.10425), as diffusers' DPO script has it."""
    return functional.relu(1 - predictions.errors().logit(beta))


def ipo(predictions: PairPredictions, beta: float, _: Parameters) -> Tensor:
    """loss = (u - 1/2)^2: a finite goal for the margin instead of an endless one.

    Source: IPO (arXiv 2310.12036), (l - 1/(2 b))^2 with u = b l, times b^2 so that its size does not depend on beta.
    """
    return (predictions.errors().logit(beta) - 0.5).square()


def robust(predictions: PairPredictions, beta: float, parameters: RobustParameters) -> Tensor:
    """Unbiased when a fraction e of the labels is flipped: [-(1-e) log s(u) + e log s(-u)] / (1 - 2e).

    Source: rDPO (arXiv 2403.00409), TRL's `robust`.
    """
    u, e = predictions.errors().logit(beta), parameters.label_smoothing
    return (-(1 - e) * functional.logsigmoid(u) + e * functional.logsigmoid(-u)) / (1 - 2 * e)


def bounded(predictions: PairPredictions, beta: float, parameters: BoundedParameters) -> Tensor:
    """A rejected image that cannot be pushed without limit: its likelihood ratio is mixed with the reference's.

        u_b = r_chosen - log(lambda exp(r_rejected) + 1 - lambda),  loss = -log sigmoid(u_b)

    lambda 1 would be the sigmoid loss, 0 drops the rejected image. Our diffusion form of the mixture in Diff-SNPO's
    bounded DPO (ICLR 2026), whose lambda is 0.9.
    """
    chosen, rejected = predictions.errors().rewards(beta)
    share = torch.tensor(parameters.rejected_share, dtype=rejected.dtype, device=rejected.device)
    mixed = torch.logaddexp(share.log() + rejected, torch.log1p(-share).expand_as(rejected))
    return -functional.logsigmoid(chosen - mixed)


def safe_dpo(predictions: PairPredictions, beta: float, parameters: SafeDpoParameters) -> Tensor:
    """SafeDPO: swap a pair whose chosen image alone is unsafe, drop one where both are, ask a margin.

        loss = -log sigmoid(u - (h_rejected - h_chosen) Delta)      h = 1 where unsafe, after the swap

    With `margin_share` Delta = share (beta/2) gap, gap = mean of the reference's chosen minus rejected errors over the
    kept pairs of the batch: a Delta of 1 is 6 % of that on the toy world, so it is no margin there.

    Dropped pairs have loss 0 and the others count for them: the mean over the batch is that over kept pairs, since the
    paper drops from the data. Source: arXiv 2505.20065; the mapping to diffusion (Delta in units of u) is ours.
    """
    swap = predictions.chosen_unsafe & ~predictions.rejected_unsafe
    dropped = predictions.chosen_unsafe & predictions.rejected_unsafe
    is_safe_over_unsafe = predictions.chosen_unsafe ^ predictions.rejected_unsafe
    errors = predictions.errors().where_swapped(swap)
    num_kept = (~dropped).sum().clamp(min=1)
    margin: Tensor | float = parameters.safety_margin
    if parameters.margin_share:
        gap = ((errors.reference_chosen - errors.reference_rejected) * ~dropped).sum() / num_kept
        margin = parameters.margin_share * beta / 2 * gap.detach().clamp(min=0)
    losses = -functional.logsigmoid(errors.logit(beta) - is_safe_over_unsafe * margin) * ~dropped
    return losses * (len(losses) / num_kept)


def sc_dpo(predictions: PairPredictions, beta: float, parameters: ScDpoParameters) -> Tensor:
    """SC-DPO-style, not the paper's exact form: order pairs by preference minus cost, weigh hard pairs up.

        reward = [chosen] - lambda [unsafe], pairs ordered by it;  loss = -(2 - 2 sigmoid(u))^gamma log sigmoid(u)

    The weight is 1 at u = 0, so that gamma does not weaken a fresh expert's gradient, and carries none. Our reading of
    arXiv 2504.14290 (methods §3), with the dataset's flags as cost.
    """
    cost_chosen, cost_rejected = predictions.chosen_unsafe * 1.0, predictions.rejected_unsafe * 1.0
    swap = 1 - parameters.cost_weight * cost_chosen < -parameters.cost_weight * cost_rejected
    u = predictions.errors().where_swapped(swap).logit(beta)
    return -((2 - 2 * torch.sigmoid(u.detach())) ** parameters.focus) * functional.logsigmoid(u)


def kto(predictions: PairPredictions, beta: float, _: Parameters) -> Tensor:
    """Diffusion-KTO on both images: 2 - sigmoid(r_chosen - z) - sigmoid(z - r_rejected), halved.

    r are the implicit rewards, z = max(0, batch mean of all r), without gradient. Source: arXiv 2404.04465,
    jacklishufan/diffusion-kto train_kto_sd_v1.5.py; their beta 1000 is our 2000.
    """
    chosen, rejected = predictions.errors().rewards(beta)
    baseline = torch.cat([chosen, rejected]).mean().detach().clamp(min=0)
    return (2 - torch.sigmoid(chosen - baseline) - torch.sigmoid(baseline - rejected)) / 2


def dspo(predictions: PairPredictions, beta: float, _: Parameters) -> Tensor:
    """Score matching on the chosen image: mean ((p - target) - beta (1 - sigmoid(u)) (p - reference))^2.

    sigmoid(u) carries gradient, as in the code. Give it a small beta (0.001). Source: DSPO as in
    AIDC-AI/Diffusion-SDPO train.py L1210-1219, SD1.5 form.
    """
    pull = beta * (1 - torch.sigmoid(predictions.errors().logit(beta))).view(-1, 1, 1, 1)
    change = predictions.policy_chosen - predictions.reference_chosen
    return mean_squared_error(predictions.policy_chosen - pull * change, predictions.target_chosen)


def dmpo(predictions: PairPredictions, beta: float, parameters: DmpoParameters) -> Tensor:
    """Reverse divergence to a finite confidence p: KL(Bernoulli(sigmoid(u)) || Bernoulli(p)), p = 0.99.

    Source: DMPO as in AIDC-AI/Diffusion-SDPO train.py L1220-1235 (alpha = 1 - p = 0.01).
    """
    u = predictions.errors().logit(beta)
    goal = torch.logit(torch.tensor(parameters.target_probability, dtype=u.dtype, device=u.device))
    log_yes, log_no = functional.logsigmoid(u), functional.logsigmoid(-u)
    return torch.sigmoid(u) * (log_yes - functional.logsigmoid(goal)) + torch.sigmoid(-u) * (
        log_no - functional.logsigmoid(-goal)
    )


def mapo(predictions: PairPredictions, beta: float, parameters: MapoParameters) -> Tensor:
    """Without a reference: m_chosen - beta_mapo log sigmoid(1000 (f(m_chosen) - f(m_rejected))), f(m) = sm/(e^sm - 1).

    s = 0.5. Source: MaPO (arXiv 2406.06424), mapo-t2i/mapo utils.py L286-301.
    """
    errors = predictions.errors()

    def likelihood(error: Tensor) -> Tensor:
        return 0.5 * error / torch.expm1(0.5 * error)

    ratio = 1000 * (likelihood(errors.policy_chosen) - likelihood(errors.policy_rejected))
    return errors.policy_chosen - parameters.mapo_beta * functional.logsigmoid(ratio)


@dataclass(frozen=True)
class Objective:
    """One preference objective.

    Args:
        title: as people call it.
        source: where it comes from.
        formula: the loss of a pair in u, as plain text.
        loss: (predictions, beta, parameters) -> [b].
        untrained_loss: parameters -> loss of a safe over unsafe pair at u = 0; None where it depends on the data.
        parameters: what a recipe may set, with defaults.
    """

    title: str
    source: str
    formula: str
    loss: Callable[[PairPredictions, float, Any], Tensor]
    untrained_loss: Callable[[Any], float | None]
    parameters: type[Parameters] = Parameters


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(
        "Diffusion-DPO, AlignGuard", "arXiv 2311.12908", "-log s(u)", sigmoid, lambda parameters: math.log(2)
    ),
    "bounded": Objective(
        "Bounded DPO (our diffusion form)",
        "Diff-SNPO, ICLR 2026",
        "-log s(r_chosen - log(lambda exp(r_rejected) + 1 - lambda))",
        bounded,
        lambda parameters: math.log(2),
        BoundedParameters,
    ),
    "safe-dpo": Objective(
        "SafeDPO",
        "arXiv 2505.20065",
        "-log s(u - Delta), pairs swapped or dropped by their unsafe flags",
        safe_dpo,
        lambda parameters: None if parameters.margin_share else math.log1p(math.exp(parameters.safety_margin)),
        SafeDpoParameters,
    ),
    "sc-dpo": Objective(
        "SC-DPO (our reading)",
        "arXiv 2504.14290",
        "-(2 - 2 s(u))^gamma log s(u), pairs ordered by preference minus cost",
        sc_dpo,
        lambda parameters: math.log(2),
        ScDpoParameters,
    ),
    "ipo": Objective("IPO", "arXiv 2310.12036", "(u - 1/2)^2", ipo, lambda parameters: 0.25),
    "hinge": Objective("SLiC", "arXiv 2305.10425", "max(0, 1 - u)", hinge, lambda parameters: 1.0),
    "robust": Objective(
        "rDPO",
        "arXiv 2403.00409",
        "[-(1-e) log s(u) + e log s(-u)] / (1 - 2e)",
        robust,
        lambda parameters: math.log(2),
        RobustParameters,
    ),
    "kto": Objective(
        "Diffusion-KTO",
        "arXiv 2404.04465",
        "[2 - s(r_chosen - z) - s(z - r_rejected)] / 2",
        kto,
        lambda parameters: 0.5,
    ),
    "dspo": Objective(
        "DSPO",
        "arXiv 2511.03317 (code)",
        "mean ((p - target) - beta (1 - s(u)) (p - reference))^2 of the chosen image",
        dspo,
        lambda parameters: None,
    ),
    "dmpo": Objective(
        "DMPO",
        "arXiv 2511.03317 (code)",
        "KL divergence of s(u) from p",
        dmpo,
        lambda parameters: (
            -math.log(2) - (math.log(parameters.target_probability) + math.log1p(-parameters.target_probability)) / 2
        ),
        DmpoParameters,
    ),
    "mapo": Objective(
        "MaPO",
        "arXiv 2406.06424",
        "m_chosen - beta_mapo log s(1000 (f(m_chosen) - f(m_rejected))), without a reference",
        mapo,
        lambda parameters: None,
        MapoParameters,
    ),
}


def preserve_winner(predictions: PairPredictions, strength: float) -> PairPredictions:
    """Scale the rejected image's gradient so that, to first order, the chosen image's error cannot rise.

        scale = clip((1 - mu) |g_chosen|^2 / (g_chosen . g_rejected), 0, 1) where the product is positive, else 1

    g are the gradients of the two errors with respect to the predictions, over the whole batch; values stay as they
    are. Source: Diffusion-SDPO (arXiv 2511.03317), AIDC-AI/Diffusion-SDPO train.py L84-127; `strength` is mu.
    """
    with torch.no_grad():
        chosen = (predictions.policy_chosen - predictions.target_chosen).flatten()
        rejected = (predictions.policy_rejected - predictions.target_rejected).flatten()
        product = chosen @ rejected
        scale = ((1 - strength) * (chosen @ chosen) / product).clamp(0, 1) if product > 0 else torch.ones_like(product)
    fixed = predictions.policy_rejected.detach()
    return replace(predictions, policy_rejected=fixed + scale * (predictions.policy_rejected - fixed))


def anchor_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean squared change of the predictions on prompts that should stay as they are: [b, c, h, w] twice -> [].

    The term lambda * mean ||eps_theta - eps_ref||^2 of DUO (arXiv 2407.21035), there at pure noise under the empty
    prompt, here on safe and empty prompts at any timestep.
    """
    return mean_squared_error(policy, reference).mean()


def preference_metrics(errors: PairErrors, *, beta: float) -> dict[str, float]:
    """Return the batch means; names with rewards/ are TRL's. Accuracy is the fraction of pairs with a logit above 0.

    gradient_factor = sigmoid(-u) is what the gradient of the sigmoid loss is scaled by (0.5 for a fresh expert);
    error_margin = |2 u / beta|; error/chosen and error/reference_chosen are the errors of the chosen images.
    """
    chosen, rejected = errors.rewards(beta)
    u = chosen - rejected
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": u,
        "rewards/accuracies": (u > 0).float(),
        "gradient_factor": torch.sigmoid(-u),
        "error_margin": (2 / beta * u).abs(),
        "error/chosen": errors.policy_chosen,
        "error/reference_chosen": errors.reference_chosen,
    }
    means = torch.stack([value.detach().float().mean() for value in values.values()])
    return dict(zip(values, means.tolist(), strict=True))
