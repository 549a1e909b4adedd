"""Preference objectives: what policy and reference predicted goes in, a loss per pair and its metrics come out.

Vocabulary: the policy is the UNet with the adapter on, the reference the same UNet with it off; an error is the mean
squared error of a prediction over channels and latent pixels. Errors and rewards are per pair, [b] float32.
"""

from dataclasses import dataclass

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


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample: [b, c, h, w], [b, c, h, w] -> [b] float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def sigmoid_loss(errors: PairErrors, *, beta: float) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO: prefer the chosen image's denoising error over the rejected one's, relative to the reference.

        u = -(beta/2) [(policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)]
        loss = -log sigmoid(u)

    Args:
        errors: mean squared errors, [b] each; noise and timestep are shared within a pair.
        beta: strength of the pull towards the reference, > 0, dimensionless.

    Returns:
        (loss [b], u [b]); a fresh adapter has u = 0 and loss = ln 2.

    Source: Wallace et al., arXiv 2311.12908; AlignGuard (arXiv 2412.10493) as released, Visualignment/SafetyDPO
    train.py about L1158-1198. Worked numbers: tests/training/test_objectives.py.
    """
    chosen, rejected = errors.rewards(beta)
    margin = chosen - rejected
    return -functional.logsigmoid(margin), margin


def anchor_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean squared change of the predictions on prompts that should stay as they are: [b, c, h, w] twice -> [] float32.

    The term lambda * mean ||eps_theta - eps_ref||^2 of DUO (arXiv 2407.21035), here on safe and empty prompts at any
    timestep rather than on pure noise.
    """
    return mean_squared_error(policy, reference).mean()


def preference_metrics(errors: PairErrors, margin: Tensor, *, beta: float) -> dict[str, float]:
    """Return the batch means under TRL's names; accuracy is the fraction of pairs with margin > 0."""
    chosen, rejected = errors.rewards(beta)
    return {
        "rewards/chosen": float(chosen.detach().mean()),
        "rewards/rejected": float(rejected.detach().mean()),
        "rewards/margins": float(margin.detach().mean()),
        "rewards/accuracies": float((margin.detach() > 0).float().mean()),
    }
