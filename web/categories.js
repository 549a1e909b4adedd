// The category widget takes a listed category or one of the person's own, which it asks for.
import { ask, isOurs, redraw, register } from "./host.js";

const OWN = "own …";

async function askForCategory(widget, before) {
  const typed = await ask("Category", "Name a category of your own", "");
  widget.value = typed?.trim() || before;
  redraw();
}

register({
  name: "SafetyExperts.Categories",
  nodeCreated(node) {
    if (!isOurs(node.comfyClass)) return;
    const changed = node.onWidgetChanged;
    node.onWidgetChanged = function (name, value, before, widget) {
      changed?.apply(this, arguments);
      if (/(^|\.)category$/.test(name) && value === OWN) askForCategory(widget, before);
    };
  },
});
