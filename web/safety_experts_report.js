// A button on Evaluate Safety and on Attack Safety that opens their report, and what it found beside the button.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const BUTTON = "Open report";
const NAMES = { SafetyExpertsEvaluate: "evaluation_name", SafetyExpertsAttack: "attack_name" };

function reportUrl(name) {
  return api.apiURL(`/safety_experts/report/${encodeURIComponent(name)}/report.html`);
}

app.registerExtension({
  name: "SafetyExperts.Report",

  nodeCreated(node) {
    const wanted = NAMES[node.comfyClass];
    if (!wanted) return;
    const button = node.addWidget("button", BUTTON, null, () => {
      const name = node.widgets?.find(widget => widget.name === wanted)?.value;
      if (name) window.open(reportUrl(name), "_blank");
    });
    button.serialize = false; // no value of the workflow
    button.options.serialize = false;
  },
});
