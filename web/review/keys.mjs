// The key map: what the help dialog lists and what docs/review.md repeats.

export const KEYS = [
  { action: "accept", keys: ["a", "1"], text: "Accept: the labels are right" },
  { action: "flip", keys: ["f", "2"], text: "Flip: the other picture is the safe one" },
  { action: "drop", keys: ["d", "3"], text: "Drop: train on neither" },
  { action: "undo", keys: ["u", "Ctrl+z"], text: "Undo the last decision" },
  { action: "next", keys: ["ArrowRight", "j"], text: "Next pair" },
  { action: "previous", keys: ["ArrowLeft", "k"], text: "Previous pair" },
  { action: "down", keys: ["ArrowDown"], text: "Grid: one row down" },
  { action: "up", keys: ["ArrowUp"], text: "Grid: one row up" },
  { action: "unreviewed", keys: ["n"], text: "Next pair that is not reviewed" },
  { action: "first", keys: ["Home"], text: "First pair" },
  { action: "last", keys: ["End"], text: "Last pair" },
  { action: "hold", keys: [" "], text: "Hold: show the blurred picture while the key is down" },
  { action: "veil", keys: ["b"], text: "Blur off and on" },
  { action: "zoom", keys: ["z"], text: "Zoom both pictures; Shift+arrows move, + and - change it" },
  { action: "compare", keys: ["c"], text: "Compare slider: one picture over the other" },
  { action: "splitLeft", keys: ["["], text: "Compare slider to the left" },
  { action: "splitRight", keys: ["]"], text: "Compare slider to the right" },
  { action: "grid", keys: ["g", "Enter"], text: "Grid or one pair" },
  { action: "prompts", keys: ["p"], text: "Hide or show prompts and scores" },
  { action: "filters", keys: ["/"], text: "Filters" },
  { action: "help", keys: ["?"], text: "This list" },
  { action: "close", keys: ["Escape"], text: "Close, or back to the grid" },
  { action: "zoomIn", keys: ["+", "="], text: "" },
  { action: "zoomOut", keys: ["-"], text: "" },
  { action: "panLeft", keys: ["Shift+ArrowLeft"], text: "" },
  { action: "panRight", keys: ["Shift+ArrowRight"], text: "" },
  { action: "panUp", keys: ["Shift+ArrowUp"], text: "" },
  { action: "panDown", keys: ["Shift+ArrowDown"], text: "" },
];

const actions = new Map(KEYS.flatMap(({ action, keys }) => keys.map(key => [key, action])));
const NAMES = { " ": "Space", ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", Escape: "Esc" };

export const nameOf = key => key.split(/(?<=.)\+(?=.)/).map(part => NAMES[part] ?? (part.length === 1 ? part.toUpperCase() : part)).join("+");

export function actionOf(event) {
  if (event.altKey) return undefined;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const control = event.ctrlKey || event.metaKey ? "Ctrl+" : "";
  const shift = event.shiftKey && key.startsWith("Arrow") ? "Shift+" : "";
  return actions.get(control + shift + key);
}
