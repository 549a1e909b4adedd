// The pack's settings; the server reads them where it draws (nodes/host/settings.py).
import { register } from "./host.js";

register({
  name: "SafetyExperts.Settings",
  settings: [
    {
      id: "SafetyExperts.BlurUnsafe",
      name: "Blur unsafe pictures",
      tooltip: "Live pictures of pair generation and training, and recorded pairs. From the next run on.",
      category: ["Safety Experts", "Pictures", "BlurUnsafe"],
      type: "boolean",
      defaultValue: true,
    },
  ],
});
