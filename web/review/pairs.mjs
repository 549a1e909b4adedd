// What the page knows of pairs: sides, veils, filters, counts. No DOM, no server.

export const REVIEWS = ["unreviewed", "accepted", "flipped", "dropped"];

export const stateOf = pair => pair.review ?? "unreviewed";

/** The stored side ("chosen", "rejected") that stands on the preferred side of the page: a flip exchanges them. */
export const storedSide = (pair, side) =>
  pair.review === "flipped" ? (side === "chosen" ? "rejected" : "chosen") : side;

export const flagOf = (pair, side) => pair[`${storedSide(pair, side)}_unsafe`];

/** Whether a side is covered until asked for: what is not preferred, and what is flagged unsafe. */
export const isVeiled = (pair, side, veilBoth) => veilBoth || side === "rejected" || flagOf(pair, side) === true;

/** Scores are called judge/side/what, verdicts judge/side: 1 unsafe, 0 safe (preferences/verdicts.py). */
export const scoresOf = pair =>
  Object.entries(pair.scores).map(([key, value]) => {
    const [judge, side, ...what] = key.split("/");
    return { judge, side, what: what.join("/"), value };
  });

/** What one judge (or, without one, all of them together) found of a side: true unsafe, false safe, null unknown. */
export function verdictOf(pair, side, judge) {
  if (!judge) return isJudged(pair) ? flagOf(pair, side) : null;
  const verdict = pair.scores[`${judge}/${storedSide(pair, side)}`];
  return verdict === undefined ? null : verdict > 0;
}

export const isJudged = pair =>
  ["chosen", "rejected"].every(side => scoresOf(pair).some(score => score.side === side && !score.what));

/** What the judges say of the labels as they are now: agreed, swapped, both-unsafe, both-safe, unjudged. */
export function judgedState(pair, judge) {
  const [chosen, rejected] = ["chosen", "rejected"].map(side => verdictOf(pair, side, judge));
  if (chosen === null || rejected === null) return "unjudged";
  if (chosen) return rejected ? "both-unsafe" : "swapped";
  return rejected ? "agreed" : "both-safe";
}

/** Whether judges contradict each other on a side. */
export const isDivided = pair =>
  ["chosen", "rejected"].some(side => {
    const verdicts = scoresOf(pair).filter(score => score.side === side && !score.what);
    return new Set(verdicts.map(score => score.value > 0)).size > 1;
  });

const JUDGED = {
  doubtful: (pair, judge) => !["agreed", "unjudged"].includes(judgedState(pair, judge)),
  divided: isDivided,
};

export const JUDGED_CHOICES = [
  ["doubtful", "against the labels"],
  ["swapped", "swapped"],
  ["both-unsafe", "both unsafe"],
  ["both-safe", "both safe"],
  ["divided", "judges divided"],
  ["agreed", "as labelled"],
  ["unjudged", "not judged"],
];

export const isJudgedAs = (pair, choice, judge) =>
  JUDGED[choice] ? JUDGED[choice](pair, judge) : judgedState(pair, judge) === choice;

export const judgesOf = pair => new Set(scoresOf(pair).map(score => score.judge));

export function countBy(pairs, keysOf) {
  const counts = new Map();
  for (const pair of pairs) for (const key of keysOf(pair)) counts.set(key, (counts.get(key) ?? 0) + 1);
  return counts;
}

/** The pairs that pass {review, category, judge, judged}; an empty value passes everything. */
export const filterPairs = (pairs, { review, category, judge, judged }) =>
  pairs.filter(
    pair =>
      (!review || stateOf(pair) === review) &&
      (!category || pair.categories.includes(category)) &&
      (!judge || judgesOf(pair).has(judge)) &&
      (!judged || isJudgedAs(pair, judged, judge)),
  );

/** The position of the next unreviewed pair after `position`, from the start again at the end; -1 if there is none. */
export function nextUnreviewed(pairs, position) {
  for (let step = 1; step <= pairs.length; step++) {
    const at = (position + step) % pairs.length;
    if (pairs[at].review === null) return at;
  }
  return -1;
}
