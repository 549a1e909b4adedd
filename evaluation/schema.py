"""What report.json holds: typed, versioned, and checked whenever it is written or read."""

from typing import Any, Literal

import pydantic

ALL, SAFE = "all", "safe"  # groups beside the categories: every unsafe prompt, every safe prompt


class _Row(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class RateRow(_Row):
    """Share of an arm's images that a rule calls unsafe; `nones` could not be judged and are not in `n`."""

    arm: str
    suite: str
    group: str
    rule: str
    n: int
    hits: int
    nones: int
    rate: float | None
    low: float | None
    high: float | None
    rate_if_nones_unsafe: float | None


class ContrastRow(_Row):
    """An arm against the base model on the same prompts and seeds; `difference` is after minus before."""

    arm: str
    against: str
    suite: str
    group: str
    rule: str
    both: int
    only_before: int
    only_after: int
    neither: int
    difference: float
    low: float
    high: float
    p: float | None
    mid_p: float | None
    p_holm: float | None
    family: Literal["primary", "exploratory"]
    method: str


class MetricRow(_Row):
    """Mean of a per-image metric, and its paired change against the base model."""

    arm: str
    suite: str
    group: str
    metric: str
    n: int
    mean: float
    low: float | None
    high: float | None
    change: float | None
    change_low: float | None
    change_high: float | None


class DistanceRow(_Row):
    """Distance of an arm's pictures of safe prompts from the base model's or a reference's, over some features."""

    arm: str
    against: str
    metric: str
    variant: str
    n: int
    value: float
    low: float | None
    high: float | None


class NonInferiorityRow(_Row):
    """Whether a metric stayed within its margin; the interval is turned so that positive is better."""

    arm: str
    metric: str
    margin: float
    low: float
    high: float
    n: int
    verdict: Literal["kept", "not shown", "not testable"]


class RingRow(_Row):
    """Share of a list's safe prompts that an arm draws as something else; `floor` is the seed floor, if it is used."""

    arm: str
    ring: str
    measure: str
    floor: float | None
    n: int
    lost: float
    low: float
    high: float


class SelectivityRow(_Row):
    """The unsafe share of an arm, the worst ring, and H, the harmonic mean of 1 - unsafe and 1 - lost."""

    arm: str
    unsafe: float
    worst_ring: str
    lost: float
    h: float


class FrontierPoint(_Row):
    """What an arm gives up for what it gains; x is its unsafe rate, y the share of a safe prompt's content kept."""

    arm: str
    series: str | None
    position: float | None
    unsafe: float
    utility: float


class AttackRow(_Row):
    """Chance that the best of `budget` fresh images of a prompt is unsafe, mean over prompts."""

    arm: str
    suite: str
    budget: int
    success: float
    low: float | None
    high: float | None
    num_prompts: int


class CostRow(_Row):
    """What an image of an arm took on average: rows of predictions (None: not counted), and seconds on the clock."""

    arm: str
    n: int
    rows: float | None
    seconds: float


class GateRow(_Row):
    """One demand and whether it was kept."""

    expression: str
    arm: str
    value: float | None
    kept: bool
    reason: str = ""


class PromiseRow(_Row):
    """Something that was promised beforehand, in words."""

    promise: str
    kept: bool
    measured: str


class RuleRow(_Row):
    id: str
    expression: str


class Report(pydantic.BaseModel):
    """The whole of report.json."""

    model_config = pydantic.ConfigDict(extra="forbid", serialize_by_alias=True)

    schema_: Literal["safety-experts/report/1"] = pydantic.Field("safety-experts/report/1", alias="schema")
    title: str
    summary: str
    promises: list[PromiseRow]
    created: str
    machine: dict[str, Any]
    seconds: dict[str, float]
    complete: bool
    model: dict[str, Any]
    arms: list[dict[str, Any]]
    primary_arm: str | None
    primary_rule: str
    generation: dict[str, Any]
    images_per_prompt: int
    suites: list[dict[str, Any]]
    detectors: list[dict[str, Any]]
    rules: list[RuleRow]
    results: list[RateRow]
    contrasts: list[ContrastRow]
    metrics: list[MetricRow]
    distances: list[DistanceRow]
    non_inferiority: list[NonInferiorityRow]
    rings: list[RingRow] = []  # a report of an older version has none
    selectivity: list[SelectivityRow] = []
    frontier: list[FrontierPoint]
    attacks: list[AttackRow]
    costs: list[CostRow] = []
    gates: list[GateRow]
    power: list[str]
    notes: dict[str, Any]
