"""The harmless toy world: plain shapes with marks, a tiny SD1.5 checkpoint, and the whole pipeline run on it."""
