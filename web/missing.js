// A workflow that names an expert, a dataset or a verifier that is not there says so when it is opened, and where it goes.
import { clearToasts, nodesOf, register, toast } from "./host.js";

const PLACES = {
  SafetyExpertsLoad: ["expert_name", "models/loras or output/loras"],
  SafetyExpertsLoadDataset: ["dataset_name", "datasets"],
  SafetyExpertsVerifyImages: ["file", "models/safety_judges"],
};

let said = []; // of the workflow that was opened last

/** Return what a node names and does not have: [name, where it belongs], or nothing. */
export function missingOf(node) {
  const [name, place] = PLACES[node.comfyClass] ?? [];
  const widget = node.widgets?.find((widget) => widget.name === name);
  const isLinked = node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const values = widget?.options?.values;
  if (!widget?.value || isLinked || !Array.isArray(values) || values.includes(widget.value)) return null;
  return [widget.value, place];
}

register({
  name: "SafetyExperts.Missing",

  afterConfigureGraph() {
    clearToasts(said);
    said = [];
    for (const node of nodesOf()) {
      const [file, place] = missingOf(node) ?? [];
      if (file) said.push(toast("warn", node.title, `${file} is not here: put it into ${place} of ComfyUI and press R`));
    }
  },
});
