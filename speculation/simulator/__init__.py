"""The session core, planner and policies on a virtual clock, with modelled workers, links and load.

What decides is the production code: `RelaySession`, `VerifierSession`, `DrafterSession`, `StepSchedule`, the policies.
What is modelled is what costs time or money: forward passes, links, the coordinator's handling, and which tokens a
model says. A run depends on its `Scenario` alone, seed included.
"""

from speculation.simulator.clients import session_seed
from speculation.simulator.report import Report, merged
from speculation.simulator.scenario import Costs, Latencies, Load, Scenario, ideal_of, plain_of
from speculation.simulator.tokens import AcceptanceByRun, AcceptanceTraces, RecordedText, Replay
from speculation.simulator.world import simulate

__all__ = [
    "AcceptanceByRun",
    "AcceptanceTraces",
    "Costs",
    "Latencies",
    "Load",
    "RecordedText",
    "Replay",
    "Report",
    "Scenario",
    "ideal_of",
    "merged",
    "plain_of",
    "session_seed",
    "simulate",
]
