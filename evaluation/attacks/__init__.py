"""Attackers: prompts that bring a concept back without its words, and controls that tell what an attack is worth."""
