"""Live bytes by phase of a step, and its collectives."""

from __future__ import annotations

from megatron_cca.lab.planner.collectives import TrafficCounter
from megatron_cca.lab.planner.live_bytes import LiveBytes


class Observer(LiveBytes):
    """Counts what is made and sent inside; of real tensors as of fake ones.

    Attributes:
        phase: what the step is doing; the caller says.
        peaks: the most bytes alive in each phase.
        traffic: the collectives so far.
        has_numbers: whether the tensors hold any, not only shapes.
    """

    has_numbers = True

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setting up"
        self.peaks: dict[str, int] = {}
        self.traffic = TrafficCounter()

    def start_over(self) -> None:
        """Count peaks and collectives from now on."""
        self.peaks.clear()
        self.traffic.clear()
        self.reset_peak()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and count what it made and sent."""
        self.traffic.see(function, args, self.phase)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)
        return result
