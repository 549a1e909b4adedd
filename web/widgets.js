// Widgets: the category takes a listed one or one of the person's own, which it asks for; what is legacy stays hidden.
import { ask, hideCompanions, isOurs, redraw, register } from "./host.js";

const OWN = "own …";

async function askForCategory(widget, before) {
  const typed = await ask("Category", "Name a category of your own", "");
  widget.value = typed?.trim() || before;
  redraw();
}

register({
  name: "SafetyExperts.Widgets",
  nodeCreated(node) {
    if (!isOurs(node.comfyClass)) return;
    hideCompanions(node);
    const changed = node.onWidgetChanged;
    node.onWidgetChanged = function (name, value, before, widget) {
      changed?.apply(this, arguments);
      if (/(^|\.)category$/.test(name) && value === OWN) askForCategory(widget, before);
    };
  },
});
