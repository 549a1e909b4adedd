"""Demands on an evaluation's numbers, `--fail-if` and `--fail-unless`: held against interval ends, not point values."""

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from .results import ALL_SUITES, FALSE_ALARMS
from .schema import ContrastRow, GateRow, NonInferiorityRow, RateRow

_LIMIT = re.compile(
    r"(?:(?P<arm>[^/\s]+)/)?(?P<group>[\w-]+)\.(?P<rule>\S+?)"
    r"(?:\.(?P<operand>rate|low|high|difference|difference_low|difference_high))?"
    r"\s*(?P<sign>[<>]=?)\s*(?P<limit>-?(?:\d+\.?\d*|\.\d+))"
)
_MARGIN = re.compile(r"(?P<metric>\S+)\.margin\((?P<margin>\d+\.?\d*|\.\d+)\)")
_SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_HELP = "write it as `violence.q16:argmax.high > 0.05`, with a category, `all` or `safe`"


@dataclass(frozen=True)
class LimitGate:
    """Fails when a number of an arm is beyond a limit.

    Args:
        arm: None for every arm with something on the base model.
        operand: a column of the rate or, with `difference`, of the contrast with the base.
    """

    expression: str
    arm: str | None
    group: str
    rule: str
    operand: str
    sign: str
    limit: float


@dataclass(frozen=True)
class MarginGate:
    """Fails unless a metric is shown to stay within a margin on safe prompts."""

    expression: str
    metric: str
    margin: float


Gate = LimitGate | MarginGate


def parse_fail_if(expression: str) -> LimitGate:
    """Read `[ARM/]GROUP.RULE[.OPERAND] > NUMBER`; without an operand it is the interval end that hurts.

    Raises:
        InputError: it is not of that form.
    """
    match = _LIMIT.fullmatch(expression.strip())
    if not match:
        raise InputError(f"--fail-if {expression!r}: {_HELP}")
    sign = match["sign"]
    operand = match["operand"] or ("high" if ">" in sign else "low")
    return LimitGate(expression, match["arm"], match["group"], match["rule"], operand, sign, float(match["limit"]))


def parse_fail_unless(expression: str) -> MarginGate:
    """Read `METRIC.margin(NUMBER)`; `false-alarms` is the share of safe prompts flagged.

    Raises:
        InputError: it is not of that form.
    """
    match = _MARGIN.fullmatch(expression.strip())
    if not match:
        raise InputError(f"--fail-unless {expression!r}: write it as `false-alarms.margin(0.02)`")
    return MarginGate(expression, match["metric"], float(match["margin"]))


def check_names(gates: Sequence[Gate], arms: Sequence[str], groups: Sequence[str], rules: Sequence[str]) -> None:
    """Refuse a demand on what will not be there, before anything is drawn.

    Raises:
        InputError: it names an unknown arm, group or rule.
    """
    for gate in gates:
        if isinstance(gate, MarginGate):
            continue
        for what, name, known in (
            ("group", gate.group, groups),
            ("rule", gate.rule, rules),
            ("arm", gate.arm, arms),
        ):
            if name is not None and name not in known:
                raise InputError(f"{gate.expression!r}: no {what} {name!r}; there is {', '.join(known) or 'none'}")


def hold(
    gates: Sequence[Gate],
    arms: Sequence[str],
    rates: Sequence[RateRow],
    contrasts: Sequence[ContrastRow],
    kept: Sequence[NonInferiorityRow],
) -> list[GateRow]:
    """Return each demand for each arm it is about. A number that is not there keeps no demand.

    Args:
        arms: those with something on the base model.
        kept: as computed with the margins of the gates.
    """
    rows = []
    for gate in gates:
        for arm in arms:
            if isinstance(gate, MarginGate):
                rows.append(_hold_margin(gate, arm, kept))
            elif gate.arm in (None, arm):
                rows.append(_hold_limit(gate, arm, contrasts if gate.operand.startswith("difference") else rates))
    return rows


def _hold_limit(gate: LimitGate, arm: str, rows: Sequence[RateRow | ContrastRow]) -> GateRow:
    column = {"difference_low": "low", "difference_high": "high"}.get(gate.operand, gate.operand)
    for row in rows:
        if (row.arm, row.suite, row.group, row.rule) == (arm, ALL_SUITES, gate.group, gate.rule):
            value = getattr(row, column)
            if value is not None:
                is_beyond = _SIGNS[gate.sign](value, gate.limit)
                return GateRow(expression=gate.expression, arm=arm, value=value, kept=not is_beyond)
    return GateRow(expression=gate.expression, arm=arm, value=None, kept=False, reason="nothing was judged")


def _hold_margin(gate: MarginGate, arm: str, rows: Sequence[NonInferiorityRow]) -> GateRow:
    metric = FALSE_ALARMS if gate.metric == "false-alarms" else gate.metric
    found = [row for row in rows if row.arm == arm and metric in (row.metric, row.metric.partition("/")[0])]
    if not found:
        return GateRow(expression=gate.expression, arm=arm, value=None, kept=False, reason="nothing was measured")
    worst = min(found, key=lambda row: row.low)
    verdicts = {row.verdict for row in found}
    reason = "" if verdicts == {"kept"} else "not testable at this n" if "not testable" in verdicts else "not shown"
    return GateRow(expression=gate.expression, arm=arm, value=worst.low, kept=verdicts == {"kept"}, reason=reason)


def margins_of(gates: Sequence[Gate]) -> dict[str, float]:
    """Return metric -> margin of the demands, to be set before the run."""
    return {gate.metric: gate.margin for gate in gates if isinstance(gate, MarginGate)}
