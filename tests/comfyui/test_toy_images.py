"""The toy checkpoint through ComfyUI's own nodes: a sample of what demo/check_toy.py draws."""

import random

from safety_experts.demo.check_toy import all_scenes, draw_scenes, measure_drawings


def test_stock_nodes_draw_what_prompts_ask_for(server, checkpoint):
    scenes = random.Random(0).sample(all_scenes(num_unmarked=3), 48)
    rates = measure_drawings(draw_scenes(server, checkpoint, scenes, first_seed=0))
    assert rates["with"].mark.value >= 0.9
    assert rates["without"].mark.value <= 0.1
    for group in ("with", "without"):
        assert rates[group].colour.value >= 0.9
        assert rates[group].shape.value >= 0.85
