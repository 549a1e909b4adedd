// The run page: the panel with the whole window to itself.
import { RunPanel } from "./panel.mjs";

const query = new URLSearchParams(location.search);
const isLight = query.get("theme") === "light";
document.documentElement.dataset.theme = isLight ? "light" : "dark";
const panel = new RunPanel({
  urlOf: (path) => path,
  layout: "page",
  choose: (runs) => (runs.find(({ is_active }) => is_active) ?? runs[0])?.name,
  blurs: () => true,
});
panel.element.classList.toggle("light", isLight);
document.body.append(panel.element);
if (query.get("run")) panel.pin(query.get("run"));
