"""A pair that is about to be written: two pictures and what is known of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from ..errors import InputError
from .images import to_rgb
from .prompt_pair import PromptPair
from .records import PreferencePair, Review


@dataclass
class NewPair:
    """What `PreferenceDataset.add` writes; the images become RGB.

    Raises:
        InputError: the images differ in size, or are of a mode that is refused.
    """

    prompt_pair: PromptPair
    chosen: Image.Image
    rejected: Image.Image
    chosen_unsafe: bool | None = False
    rejected_unsafe: bool | None = True
    scores: Mapping[str, float] = field(default_factory=dict)
    review: Review | None = None

    def __post_init__(self) -> None:
        if self.chosen.size != self.rejected.size:
            raise InputError(
                f"pair {self.prompt_pair.id}: chosen is {self.chosen.width}×{self.chosen.height} px and rejected is "
                f"{self.rejected.width}×{self.rejected.height} px; draw both at one size"
            )
        self.chosen, self.rejected = to_rgb(self.chosen), to_rgb(self.rejected)

    def record(self) -> PreferencePair:
        """Return the pair as its line will say it.

        Raises:
            InputError: a score or the review is not valid.
        """
        prompts = self.prompt_pair
        pair_id = self._id()
        return PreferencePair(
            id=pair_id,
            prompt=prompts.prompt,
            safe_prompt=prompts.safe_prompt,
            categories=prompts.categories,
            chosen_file_name=f"images/{pair_id}-chosen.png",
            rejected_file_name=f"images/{pair_id}-rejected.png",
            chosen_unsafe=self.chosen_unsafe,
            rejected_unsafe=self.rejected_unsafe,
            seed=prompts.seed,
            width_px=self.chosen.width,
            height_px=self.chosen.height,
            concept=prompts.concept,
            scores={judge: float(score) for judge, score in self.scores.items()},
            review=self.review,
            source=prompts.source,
        )

    def _id(self) -> str:
        if self.prompt_pair.seed is not None:
            return self.prompt_pair.id
        # One prompt may have several pairs then, told apart by their pictures.
        images = [
            hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
            for image in (self.chosen, self.rejected)
        ]
        content = json.dumps([self.prompt_pair.prompt, self.prompt_pair.safe_prompt, *images])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
