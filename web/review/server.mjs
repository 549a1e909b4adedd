// What the page asks of its server (preferences/reviewing/routes.py); addresses are relative to the page's own.

export function imageUrl(dataset, id, side, size) {
  return `image?${new URLSearchParams({ dataset, id, side, size })}`;
}

export const fetchDatasets = async () => (await ask("datasets")).datasets;

export const fetchPairs = async dataset => (await ask(`pairs?${new URLSearchParams({ dataset })}`)).pairs;

/** Resolves once the decision is on the server's disk. */
export const saveReview = (dataset, id, review) =>
  ask("review", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ dataset, id, review }),
  });

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; start it again, nothing that was saved is lost");
  }
  const content = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(content.error ?? `the server answered ${answer.status}`);
  return content;
}
