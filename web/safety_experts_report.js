// A button on Evaluate Safety that opens its report, and what it found beside the button.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const BUTTON = "Open report";

function reportUrl(name) {
  return api.apiURL(`/safety_experts/report/${encodeURIComponent(name)}/report.html`);
}

app.registerExtension({
  name: "SafetyExperts.Report",

  nodeCreated(node) {
    if (node.comfyClass !== "SafetyExpertsEvaluate") return;
    const button = node.addWidget("button", BUTTON, null, () => {
      const name = node.widgets?.find(widget => widget.name === "evaluation_name")?.value;
      if (name) window.open(reportUrl(name), "_blank");
    });
    button.serialize = false; // no value of the workflow
    button.options.serialize = false;
  },
});
