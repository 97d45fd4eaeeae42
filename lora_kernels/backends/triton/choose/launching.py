"""How a pass is launched, and what that takes the host: the other half of what a plan costs.

========  ============================================================================================
GRAPH     replayed from a captured CUDA graph, ``torch.compile``'s too: launching takes the host nothing
PREPARED  one call into C++ for all launches, where the library ``launch`` is there
PYTHON    Python launches one kernel after the other
========  ============================================================================================

Outside of a graph a plan costs the longer of what the device and the host take: only what ran before lets the host be
ahead, and nobody knows of that here. A second stream is more than that. Its host time comes on top of the device's, so
it is taken only where it saves the device more. Otherwise a model whose other parts keep the host busy would lose.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GRAPH", "PREPARED", "PYTHON", "WAYS_TO_LAUNCH", "Launching"]


@dataclass(frozen=True, slots=True)
class Launching:
    """Seconds of the host; measured on an H100 (``bench/results/nvidia-h100/host.json``), at one token.

    Attributes:
        layer: what a call of a layer takes above its backend, and ``call`` in it, with its results' memory.
        launch: one launch more.
        second_stream: forking and joining two streams.
    """

    name: str
    layer: float = 0.0
    call: float = 0.0
    launch: float = 0.0
    second_stream: float = 0.0

    def host(self, launches: int, beside: bool, calls: int = 1) -> float:
        """Seconds of ``calls`` calls of one layer's backend, or of layers of one x, with so many launches in all."""
        return self.layer + calls * self.call + launches * self.launch + beside * self.second_stream

    def cost(self, device: float, host: float, beside: bool) -> float:
        """Seconds that a plan costs, of what the device and the host take."""
        return max(device + beside * self.second_stream, host)


# layer(x) without its launches takes 17.0 us, 6.7 of which are the kept run's. A launch by Python takes 7.4 us and its
# result's memory 3.3 more; by Triton's C code alone 4.2. In C++ two launches take 13.2 in all. By Python, a layer with
# a second stream and three launches takes 123 us, in training 149. In C++ a second stream is two records and two waits.
GRAPH = Launching("graph")
PREPARED = Launching("prepared", layer=10.3e-6, call=4.7e-6, launch=4.2e-6, second_stream=5e-6)
PYTHON = Launching("python", layer=10.3e-6, call=6.7e-6, launch=10.7e-6, second_stream=80e-6)
WAYS_TO_LAUNCH = {way.name: way for way in (GRAPH, PREPARED, PYTHON)}
