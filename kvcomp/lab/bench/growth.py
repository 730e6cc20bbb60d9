"""How the time of each stage grows with the prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from kvcomp.core.stages import STAGES, Stage
from kvcomp.lab.bench.cases import Case
from kvcomp.lab.bench.shapes import Shape
from kvcomp.lab.bench.timing import time_case


@dataclass(frozen=True)
class Growth:
    """One stage of one case over prompt lengths.

    Attributes:
        case: name of the case.
        stage: of its compression.
        seconds: median over turns, for each length.
        exponent: of the tokens, fitted to the logarithms; None where the stage takes no time worth measuring.
    """

    case: str
    stage: Stage
    seconds: tuple[float, ...]
    exponent: float | None


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log(value) over log(tokens), by least squares.

    >>> round(exponent([1024, 2048, 4096], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(count) for count in tokens], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_growth(
    model: nn.Module,
    shape: Shape,
    cases: Sequence[Case],
    tokens: Sequence[int],
    repeats: int,
    *,
    least_seconds: float = 1e-3,
    on_step: Callable[[str], None] = lambda what: None,
) -> list[Growth]:
    """Return how each stage of each case grows.

    Args:
        model: of the shape, in evaluation mode.
        shape: makes the prompts.
        cases: strategies.
        tokens: prompt lengths, at least two.
        repeats: turns for each length; one more, at the first, warms up.
        least_seconds: stages that take less at the longest prompt have no exponent.
        on_step: is told of each run before it.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    seconds: dict[tuple[str, Stage], list[float]] = {(case.name, name): [] for case in cases for name in STAGES}
    for count in (tokens[0], *tokens):
        prompt = shape.prompt(count, device, dtype)
        for case in cases:
            on_step(f"{count} tokens: {case.name}")
            runs = [time_case(model, prompt, case, decoded=1).stages for _ in range(repeats)]
            for name in STAGES:
                seconds[case.name, name].append(statistics.median(run[name] for run in runs))
    grown = []
    for (case_name, name), (_, *counted) in seconds.items():
        fitted = exponent(tokens, counted) if counted[-1] >= least_seconds and min(counted) > 0 else None
        grown.append(Growth(case_name, name, tuple(counted), fitted))
    return grown
