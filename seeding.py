"""Random draws that are functions of a seed and a purpose alone, so that nothing about them has to be resumed."""

import hashlib

import torch


def seeded_generator(seed: int, *purpose: object) -> torch.Generator:
    """Return a CPU generator that depends only on `seed` and `purpose` (say "noise", step): no state to resume."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
