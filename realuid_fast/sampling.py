"""Sampling: a multi-step teacher on any path, by an ordinary or a stochastic equation, and the one-step generator."""

from .models.calls import (
    LINEAR,
    Ends,
    arguments,
    both,
    call,
    ends,
    follows_flow,
    needs_endpoint,
    null_labels,
    takes_endpoint,
)
from .models.multi_step import MultiStep, multi_step
from .models.one_step import (
    START_SHARE,
    START_SIGMA,
    Start,
    default_start,
    one_step,
    starting,
    state_from,
    step_at,
    step_from,
)
from .models.solvers import (
    RHO,
    SOLVERS,
    check_solver,
    edm_sampler,
    evaluations,
    integrate,
)

__all__ = [
    "LINEAR",
    "RHO",
    "SOLVERS",
    "START_SHARE",
    "START_SIGMA",
    "Ends",
    "MultiStep",
    "Start",
    "arguments",
    "both",
    "call",
    "check_solver",
    "default_start",
    "edm_sampler",
    "ends",
    "evaluations",
    "follows_flow",
    "integrate",
    "multi_step",
    "needs_endpoint",
    "null_labels",
    "one_step",
    "starting",
    "state_from",
    "step_at",
    "step_from",
    "takes_endpoint",
]
