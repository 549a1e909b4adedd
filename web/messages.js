// Says in a toast what one of our nodes has to say, without a click: errors, refused inputs, and messages while it runs.
import { isOurs, onEvent, onRefused, register, titleOf, toast } from "./host.js";

const OUR_ERRORS = "safety_experts.";

/** Return the sentences of a refused node, each once: ComfyUI repeats it for every input as "input - sentence". */
export function sentences(errors) {
  const texts = errors.map(({ type, message, details }) =>
    type === "custom_validation_failed" ? details.replace(/^[\w.]+ - /, "") : `${message}: ${details}`,
  );
  return [...new Set(texts)];
}

register({
  name: "SafetyExperts.Messages",
  setup() {
    onEvent("execution_error", (error) => {
      // An expert on a model speaks up from within whatever node samples it, so the error's own name counts too.
      if (!isOurs(error.node_type) && !error.exception_type?.startsWith(OUR_ERRORS)) return;
      toast("error", titleOf(error.node_id, error.node_type), error.exception_message.trim());
    });
    onRefused((nodes) => {
      for (const [id, { class_type, errors }] of Object.entries(nodes)) {
        if (!isOurs(class_type)) continue;
        for (const text of sentences(errors)) toast("error", titleOf(id, class_type), text);
      }
    });
    onEvent("safety_experts.message", ({ node, text, severity }) => toast(severity, titleOf(node, "Safety Experts"), text));
  },
});
