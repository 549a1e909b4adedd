"""Judging a preference dataset: raw scores, verdicts and flags of every pair; what is doubtful is left for review."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..files import write_atomically
from ..preferences.dataset import PreferenceDataset
from ..preferences.images import read_image
from ..preferences.records import PreferencePair, refuse_links
from ..preferences.verdicts import PAIR_STATES, PairState, count_states, raw_scores, score_key, state_of, verdict_key
from .judges import Judge, JudgeChoice, Scores

# A flush writes the whole metadata file, so it waits until there is something to lose.
_FLUSH_SECONDS = 5.0
_FLUSH_SHARE = 0.05  # of the time may go into flushing


class JudgingStoppedError(SafetyExpertsError):
    """Stopped by the user; every score so far is on the disk."""


@dataclass(frozen=True)
class JudgeCounts:
    """What one judge said of the images: how many, how many unsafe, of how many it could say nothing."""

    rule: str
    images: int
    unsafe: int
    unknown: int


@dataclass(frozen=True)
class JudgingSummary:
    """What the judges say of a dataset.

    Args:
        categories: category -> state of a pair (`verdicts.PAIR_STATES`) -> number of pairs; dropped ones left out.
        doubtful: pairs that are no agreed ones and that no reviewer decided.
        problems: images that could not be read, one line each.
    """

    pairs: int
    agreed: int
    doubtful: int
    categories: dict[str, dict[PairState, int]]
    judges: dict[str, JudgeCounts]
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """Return it as the lines that a terminal or a node shows."""
        rows = [[name, sum(counts.values()), *counts.values()] for name, counts in self.categories.items()]
        table = [["category", "pairs", *PAIR_STATES], *([str(cell) for cell in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        for name, counts in self.judges.items():
            unknown = f", {counts.unknown} could not be judged" if counts.unknown else ""
            lines.append(f"{name} ({counts.rule}): {counts.unsafe} of {counts.images} images unsafe{unknown}")
        lines += [f"not read: {problem}" for problem in self.problems]
        return "\n".join(
            [*lines, f"{self.agreed} of {self.pairs} pairs agree with their labels; {self.doubtful} are for review"]
        )


def judge_dataset(
    dataset: PreferenceDataset,
    judges: Sequence[JudgeChoice],
    *,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> JudgingSummary:
    """Let judges read every image of a dataset, then set `scores`, `chosen_unsafe` and `rejected_unsafe`.

    An image is unsafe when one of these judges says so, safe when all of them do, and unknown (None) otherwise. Scores
    that a judge of the same version gave before are not asked for again, so a stopped or killed run goes on where it
    was, and another rule or threshold needs no picture. Flags and verdicts are set last, all at once.

    Args:
        on_progress: called with (images judged, images in all, of all judges).

    Raises:
        InputError: two judges of one name, or a judge cannot be loaded.
        JudgingStoppedError: `should_stop` said so.
    """
    names = [choice.name for choice in judges]
    if not judges or len(set(names)) < len(names):
        raise InputError(f"judges {', '.join(names) or '(none)'}: name at least one, and each once")
    dataset.refresh()
    problems: dict[str, None] = {}
    for place, choice in enumerate(judges):
        judge = choice.load(device)
        _forget_other_version(dataset, choice.name, judge.version)
        done, total = 2 * place * len(dataset.pairs), 2 * len(judges) * len(dataset.pairs)
        for count in _read_images(dataset, choice.name, judge, problems):
            on_progress(done + count, total)
            if should_stop():
                raise JudgingStoppedError("judging was stopped; run it again to go on, nothing is judged twice")
        del judge  # two judges' weights need not fit into memory together
    decide(dataset, judges)
    return summarise(dataset, judges, tuple(problems))


def decide(dataset: PreferenceDataset, judges: Sequence[JudgeChoice]) -> None:
    """Set verdicts and flags of every pair from the scores there are, in one write."""
    changes: dict[str, dict[str, Any]] = {}
    for pair in dataset.pairs:
        scores: dict[str, float | None] = {}
        flags: dict[str, bool | None] = {}
        for side in ("chosen", "rejected"):
            verdicts = [_verdict(choice, pair, side) for choice in judges]
            for choice, verdict in zip(judges, verdicts, strict=True):
                scores[verdict_key(choice.name, side)] = None if verdict is None else float(verdict)
            flags[f"{side}_unsafe"] = combine(verdicts)
        is_changed = any(pair.scores.get(key) != value for key, value in scores.items())
        if is_changed or any(getattr(pair, name) is not value for name, value in flags.items()):
            changes[pair.id] = {"scores": scores, **flags}
    dataset.update_many(changes)


def combine(verdicts: Sequence[bool | None]) -> bool | None:
    """Return unsafe if one judge says so, safe if all do, else None: a judge that sees nothing finds nothing safe."""
    if any(verdicts):
        return True
    return None if None in verdicts else False


def summarise(
    dataset: PreferenceDataset, judges: Sequence[JudgeChoice], problems: tuple[str, ...] = ()
) -> JudgingSummary:
    """Count what the judges say of a dataset that was judged."""
    kept = [pair for pair in dataset.pairs if pair.review != "dropped"]
    counts = {}
    for choice in judges:
        verdicts = [_verdict(choice, pair, side) for pair in dataset.pairs for side in ("chosen", "rejected")]
        counts[choice.name] = JudgeCounts(choice.rule, len(verdicts), verdicts.count(True), verdicts.count(None))
    return JudgingSummary(
        pairs=len(dataset.pairs),
        agreed=sum(state_of(pair) == "agreed" for pair in kept),
        doubtful=sum(state_of(pair) != "agreed" and pair.review is None for pair in kept),
        categories=count_states(dataset.pairs),
        judges=counts,
        problems=problems,
    )


def _verdict(choice: JudgeChoice, pair: PreferencePair, side: str) -> bool | None:
    return choice.decide(raw_scores(pair, choice.name, side), pair.categories)


def _read_images(dataset: PreferenceDataset, name: str, judge: Judge, problems: dict[str, None]) -> Iterator[int]:
    """Read what has no scores of this judge yet; yield how many of the images are done."""
    missing = [
        (pair, side) for pair in dataset.pairs for side in ("chosen", "rejected") if not raw_scores(pair, name, side)
    ]
    done = 2 * len(dataset.pairs) - len(missing)
    yield done
    with _saving(dataset) as save:
        for start in range(0, len(missing), judge.batch_size):
            batch = missing[start : start + judge.batch_size]
            images = [_open(dataset, pair, side, problems) for pair, side in batch]
            readable = [(item, image) for item, image in zip(batch, images, strict=True) if image is not None]
            found: list[Scores] = []
            if readable:
                found = list(judge.read([image for _, image in readable], [pair.prompt for (pair, _), _ in readable]))
            for ((pair, side), _), scores in zip(readable, found, strict=True):
                save(pair.id, {score_key(name, side, what): value for what, value in scores.items()})
            done += len(batch)
            yield done


def _open(dataset: PreferenceDataset, pair: PreferencePair, side: str, problems: dict[str, None]) -> Image.Image | None:
    try:
        path = dataset.image_paths(pair)[side == "rejected"]
        return read_image(path)
    except InputError as error:
        problems[str(error)] = None
        return None


@contextlib.contextmanager
def _saving(dataset: PreferenceDataset) -> Iterator[Callable[[str, dict[str, float]], None]]:
    """Yield a function that adds scores to a pair; they are on the disk every few seconds and on leaving, however."""
    pending: dict[str, dict[str, float]] = {}
    next_flush = time.monotonic() + _FLUSH_SECONDS

    def flush() -> None:
        nonlocal next_flush
        started = time.monotonic()
        dataset.update_many({pair_id: {"scores": scores} for pair_id, scores in pending.items()})
        pending.clear()
        taken = time.monotonic() - started
        next_flush = time.monotonic() + max(_FLUSH_SECONDS, taken / _FLUSH_SHARE)

    def save(pair_id: str, scores: dict[str, float]) -> None:
        pending.setdefault(pair_id, {}).update(scores)
        if time.monotonic() >= next_flush:
            flush()

    try:
        yield save
    finally:
        flush()


def _forget_other_version(dataset: PreferenceDataset, name: str, version: str) -> None:
    """Remove the scores that another version of a judge gave, and note which version gives them now."""
    refuse_links(dataset.folder)
    path = Path(dataset.folder) / ".cache" / "judges.json"
    versions = _read_versions(path)
    if versions.get(name) == version:
        return
    changes: dict[str, dict[str, Any]] = {}
    for pair in dataset.pairs:
        if stale := [key for key in pair.scores if key.partition("/")[0] == name]:
            changes[pair.id] = {"scores": dict.fromkeys(stale)}
    dataset.update_many(changes)  # first, so that a kill in between leaves no old score under the new version
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(versions | {name: version}, indent=1), encoding="utf-8")


def _read_versions(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # unknown versions are read again
    return found if isinstance(found, dict) else {}
