// What the page knows of pairs: sides, veils, filters, counts. No DOM, no server.

export const REVIEWS = ["unreviewed", "accepted", "flipped", "dropped"];

export const stateOf = pair => pair.review ?? "unreviewed";

/** The stored side ("chosen", "rejected") that stands on the preferred side of the page: a flip exchanges them. */
export const storedSide = (pair, side) =>
  pair.review === "flipped" ? (side === "chosen" ? "rejected" : "chosen") : side;

export const flagOf = (pair, side) => pair[`${storedSide(pair, side)}_unsafe`];

/** Whether a side is covered until asked for: what is not preferred, and what is flagged unsafe. */
export const isVeiled = (pair, side, veilBoth) => veilBoth || side === "rejected" || flagOf(pair, side) === true;

/** Whether what judges found contradicts the labels as they are now, or says nothing. */
export const isDoubtful = pair =>
  flagOf(pair, "chosen") === true ||
  flagOf(pair, "rejected") === false ||
  (Object.keys(pair.scores).length > 0 && (pair.chosen_unsafe === null || pair.rejected_unsafe === null));

/** Scores are called judge/side/what; returns [{judge, side, what, value}]. */
export const scoresOf = pair =>
  Object.entries(pair.scores).map(([key, value]) => {
    const [judge, side, ...what] = key.split("/");
    return { judge, side, what: what.join("/"), value };
  });

export const judgesOf = pair => new Set(scoresOf(pair).map(score => score.judge));

export function countBy(pairs, keysOf) {
  const counts = new Map();
  for (const pair of pairs) for (const key of keysOf(pair)) counts.set(key, (counts.get(key) ?? 0) + 1);
  return counts;
}

/** The pairs that pass {review, category, judge, doubtful}; an empty value passes everything. */
export const filterPairs = (pairs, { review, category, judge, doubtful }) =>
  pairs.filter(
    pair =>
      (!review || stateOf(pair) === review) &&
      (!category || pair.categories.includes(category)) &&
      (!judge || judgesOf(pair).has(judge)) &&
      (!doubtful || isDoubtful(pair)),
  );

/** The position of the next unreviewed pair after `position`, from the start again at the end; -1 if there is none. */
export function nextUnreviewed(pairs, position) {
  for (let step = 1; step <= pairs.length; step++) {
    const at = (position + step) % pairs.length;
    if (pairs[at].review === null) return at;
  }
  return -1;
}
