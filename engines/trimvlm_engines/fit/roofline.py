"""The least time that a target can take: per layer the longer of its FLOPs at the peak and its bytes at the
bandwidth. An estimate, never a measurement; what really runs is slower.

Bytes of a layer: its weights, the caches that it reads and writes, and what its matrix products read and
write; all else is taken to be fused into them.
"""

from __future__ import annotations

from collections import defaultdict

from trimvlm.target import Target
from trimvlm.value import Value
from trimvlm_engines.fit.graph import Graph, Sized
from trimvlm_engines.fit.memory import decodes
from trimvlm_engines.fit.outcomes import Shape
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject

CACHES = ("past_key", "past_value", "present_key", "present_value")


class Work(Value, frozen=True, kw_only=True):
    """What a run of a graph has to do, and the least seconds for it; None: the target does not say enough."""

    flops: int
    bytes: int
    seconds: float | None


class Times(Value, frozen=True, kw_only=True):
    """Estimates.

    Attributes:
        before: everything before the decoder, for all images.
        prefill: the decoder over the prompt.
        step: one token in the middle of the answer.
        unknown: fields of the target that are missing and what is left out for it.
    """

    before: Work
    prefill: Work
    step: Work
    unknown: tuple[str, ...]

    @property
    def first_token(self) -> float | None:
        """Least seconds to the first token."""
        if self.before.seconds is None or self.prefill.seconds is None:
            return None
        return self.before.seconds + self.prefill.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Most tokens per second after it."""
        return 1 / self.step.seconds if self.step.seconds else None


def estimate(subject: Subject, request: Request, target: Target, dtype: str) -> Times:
    """Times of one answer to a request; the decoder must be whole."""
    # The target's peak is that of float16's tensor cores; float32 runs with TF32 off.
    peak = target.tflops if dtype != "float32" else None
    bandwidth = target.bandwidth_gb_s
    unknown = []
    if peak is None:
        said = "the float32 peak" if target.tflops else "tflops"
        unknown.append(f"{said}: times count bytes alone")
    if bandwidth is None:
        unknown.append("bandwidth_gb_s: no times")

    def work(role: str, shapes: dict[str, Shape]) -> Work:
        graph = subject.graphs[role]
        return _work(graph, graph.sized(shapes), peak, bandwidth)

    before: list[Work] = []
    for role in subject.graphs:
        if not decodes(role):
            runs = 1 if role == "router" else request.images
            before += [work(role, subject.first(role, request))] * runs
    return Times(
        before=_sum(before),
        prefill=work("decoder", subject.first("decoder", request)),
        step=work("decoder", subject.step(request, request.new_tokens // 2)),
        unknown=tuple(unknown),
    )


def _work(graph: Graph, sized: Sized, peak: float | None, bandwidth: float | None) -> Work:
    flops: dict[int | None, int] = defaultdict(int)
    moved: dict[int | None, int] = defaultdict(int)
    caches = {
        name: sized.tensors[name].bytes for name in (*graph.inputs, *graph.outputs) if name.startswith(CACHES)
    }
    for node in sized.nodes:
        flops[node.layer] += node.flops
        for name in dict.fromkeys((*node.inputs, *node.outputs)):
            weight = graph.weights.get(name)
            if weight and not weight.looked_up:
                moved[node.layer] += weight.bytes
            elif name in caches:
                moved[node.layer] += caches.pop(name)
            elif node.flops and not weight:
                moved[node.layer] += sized.tensors[name].bytes
    seconds = None
    if bandwidth is not None:
        seconds = sum(
            max(moved[layer] / (bandwidth * 1e9), flops[layer] / (peak * 1e12) if peak else 0.0)
            for layer in {**flops, **moved}
        )
    return Work(flops=sum(flops.values()), bytes=sum(moved.values()), seconds=seconds)


def _sum(works: list[Work]) -> Work:
    seconds = [work.seconds for work in works]
    return Work(
        flops=sum(work.flops for work in works),
        bytes=sum(work.bytes for work in works),
        seconds=None if None in seconds else sum(second or 0.0 for second in seconds),
    )
