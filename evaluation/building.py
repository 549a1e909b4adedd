"""Drawing a preference dataset outside ComfyUI: resumable, and shared out among processes, always the same bits."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..files import refuse_link
from ..preferences.dataset import DatasetInfo, NewPair, PreferenceDataset
from ..preferences.prompt_pair import MAX_SEED, PromptPair
from .judges.judge import JudgeChoice

_SHARDS = ".shards"

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]  # (prompts, seeds) -> an image each
Both = tuple[list[Image.Image], list[Image.Image]]  # the rejected (unsafe) and the chosen (safe) images of some pairs
DrawBoth = Callable[[Sequence[PromptPair]], Both]


class BuildingStoppedError(SafetyExpertsError):
    """Drawing was stopped; what was drawn is kept."""


@dataclass(frozen=True)
class Share:
    """This process among those that draw one dataset together.

    Args:
        rank: this process, from 0.
        count: how many there are.
        wait: returns when all of them have called it.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def several_seeds(pairs: Iterable[PromptPair], images_per_prompt: int) -> list[PromptPair]:
    """Return every pair `images_per_prompt` times: with its own seed first, then with seeds made from it.

    Raises:
        InputError: a pair has no seed to draw from.
    """
    repeated = []
    for pair in pairs:
        if pair.seed is None:
            raise InputError("a prompt pair has no seed to draw it from; give every line one, or none at all")
        for number in range(images_per_prompt):
            digest = hashlib.sha256(f"{pair.seed} {number}".encode()).digest()
            seed = pair.seed if number == 0 else int.from_bytes(digest[:8], "big") & MAX_SEED
            repeated.append(replace(pair, seed=seed))
    return repeated


class JudgePanel:
    """Judges that choose among several drawings of one prompt pair.

    Args:
        choices: the judges with their rules.
        device: where they compute.
    """

    def __init__(self, choices: Sequence[JudgeChoice], device: str = "cpu"):
        self.choices = choices
        self._judges = [choice.load(device) for choice in choices]

    def num_agreeing(self, pair: PromptPair, chosen: Image.Image, rejected: Image.Image) -> int:
        """Return how many verdicts agree with the labels: each judge's on the chosen (safe) and the rejected image."""
        num_agreeing = 0
        for choice, judge in zip(self.choices, self._judges, strict=True):
            scores = judge.read([chosen, rejected], [pair.prompt] * 2)
            verdicts = [choice.decide(found, pair.categories) for found in scores]
            num_agreeing += (verdicts[0] is False) + (verdicts[1] is True)
        return num_agreeing


def independently(draw: Draw) -> DrawBoth:
    """Return what draws both images of every pair in one call of `draw`, the unsafe prompts first."""

    def draw_both(pairs: Sequence[PromptPair]) -> Both:
        seeds = [pair.seed or 0 for pair in pairs]
        images = draw([*(pair.prompt for pair in pairs), *(pair.safe_prompt for pair in pairs)], seeds * 2)
        return images[: len(pairs)], images[len(pairs) :]

    return draw_both


def build_dataset(
    pairs: Sequence[PromptPair],
    folder: Path,
    info: DatasetInfo,
    draw: DrawBoth,
    *,
    batch_size: int = 4,
    best_of: int = 1,
    panel: JudgePanel | None = None,
    share: Share | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> PreferenceDataset:
    """Draw both images of every prompt pair, from the pair's seed; a pair that is there is not drawn again.

    Batches are always the same pairs together, however many processes there are and whatever was drawn before, since a
    picture's last bits may depend on what it is drawn with. Of several processes each fills a dataset of its own in
    `.shards`; the first puts them together in the order of `pairs`, so the folder is the one that one process makes.

    Args:
        draw: draws both images of pairs, each of which has a seed.
        batch_size: pairs drawn together (twice as many images).
        best_of: draw every pair from so many seeds (its own first) and keep one.
        panel: chooses it: where most verdicts agree with the labels, the first of several such; None with 1 only.
        on_progress: called with (pairs of this process done, pairs of this process).

    Raises:
        InputError: the folder holds a dataset of another model or other settings.
        SafetyExpertsError: it cannot be written.
        BuildingStoppedError: `should_stop` said so.
    """
    share = share or Share()
    if share.rank == 0:
        PreferenceDataset.create(folder, info)
    share.wait()
    dataset = PreferenceDataset.open(folder)
    done = set(dataset.ids).union(*(shard.ids for shard in _shards(folder)))
    share.wait()  # everybody has looked before anybody writes
    target = dataset
    if share.count > 1:
        target = PreferenceDataset.create(folder / _SHARDS / f"{share.rank:03}-of-{share.count:03}", info)
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    mine = batches[share.rank :: share.count]
    num_done, num_mine = 0, sum(map(len, mine))
    for batch in mine:
        # Of a pair's several seeds the one that was kept may be any.
        missing = [pair for pair in batch if done.isdisjoint(seeded.id for seeded in several_seeds([pair], best_of))]
        if missing:
            if should_stop():
                raise BuildingStoppedError(
                    f"stopped after {num_done} of {num_mine} pairs; run the same command again to go on"
                )
            candidates: dict[str, list[NewPair]] = {pair.id: [] for pair in missing}
            for seeded in zip(*(several_seeds([pair], best_of) for pair in batch), strict=True):
                for pair, new in zip(batch, _draw_batch(draw, seeded), strict=True):
                    if pair.id in candidates:
                        candidates[pair.id].append(new)
            target.add_many([_best(found, panel) for found in candidates.values()])
        num_done += len(batch)
        on_progress(num_done, num_mine)
    share.wait()
    if share.rank == 0:
        _put_together(folder, dataset, [seeded.id for seeded in several_seeds(pairs, best_of)])
    share.wait()
    dataset.refresh()
    return dataset


def _draw_batch(draw: DrawBoth, pairs: Sequence[PromptPair]) -> list[NewPair]:
    rejected, chosen = draw(pairs)
    return [NewPair(*parts) for parts in zip(pairs, chosen, rejected, strict=True)]


def _best(candidates: list[NewPair], panel: JudgePanel | None) -> NewPair:
    if panel is None or len(candidates) == 1:
        return candidates[0]
    return max(candidates, key=lambda new: panel.num_agreeing(new.prompt_pair, new.chosen, new.rejected))


def _shards(folder: Path) -> list[PreferenceDataset]:
    """Return what several processes drew and was not put together yet, also of a run with another number of them."""
    refuse_link(folder / _SHARDS)
    found = sorted(path for path in folder.glob(f"{_SHARDS}/*-of-*") if (path / "dataset.json").exists())
    for path in found:
        refuse_link(path)
    return [PreferenceDataset.open(path) for path in found]


def _put_together(folder: Path, dataset: PreferenceDataset, order: Sequence[str]) -> None:
    shards = _shards(folder)
    owners = {pair_id: shard for shard in shards for pair_id in shard.ids}
    missing = [pair_id for pair_id in dict.fromkeys(order) if pair_id in owners and pair_id not in dataset.ids]
    start = 0
    while start < len(missing):
        # A run of pairs of one shard, at most some tens, in one go.
        owner = owners[missing[start]]
        end = start + 1
        while end < len(missing) and end < start + 32 and owners[missing[end]] is owner:
            end += 1
        dataset.copy_from(owner, [owner.pair(pair_id) for pair_id in missing[start:end]])
        start = end
    shutil.rmtree(folder / _SHARDS, ignore_errors=True)
