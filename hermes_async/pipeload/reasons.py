"""Why a plan is as it is: a line for each choice, with what the nearest others would have given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hermes_async.config import EngineConfig, format_bytes, format_count
from hermes_async.pipeload.plan import Plan
from hermes_async.pipeload.ways import Way


class Reasons:
    """What to say of one way to stream.

    Args:
        chosen: The way.
        best_of: The best way with each stage size and number of agents.
        simulated: What those of them cost that were simulated.
        ways: All that were reckoned.
    """

    def __init__(
        self,
        config: EngineConfig,
        chosen: Way,
        best_of: Mapping[tuple[int, int], Way],
        simulated: Mapping[tuple[int, int], float],
        ways: Sequence[Way],
    ) -> None:
        self._config = config
        self._way = chosen
        self._best_of = best_of
        self._simulated = simulated
        self._ways = ways

    def of(self, plan: Plan) -> tuple[str, ...]:
        lines = [self._stages(), self._agents(), self._resident(plan)]
        if plan.kv_bytes_per_token:
            asked = self._config.kv_budget is not None
            kv = "as kv_budget asks for" if asked else "a tenth of the budget, and what no stage fits into"
            lines += [f"KV caches: {kv}", self._tokens()]
        else:
            lines.append(f"{self._a_sweep()}: the most whose activations fit in a third of the budget")
        return (*lines, *plan.speeds.reasons)

    def _stages(self) -> str:
        way, size = self._way, f"stages of up to {format_bytes(self._way.slot)}"
        if self._config.max_resident_layers is not None:
            return f"{size}: whole layers, as max_resident_layers={self._config.max_resident_layers} asks for"
        limits = sorted({limit for limit, agents in self._best_of if agents == way.agents}, reverse=True)
        place = limits.index(way.limit)
        others = []
        for name, idx in (("larger", place - 1), ("smaller", place + 1)):
            if 0 <= idx < len(limits):
                other = self._best_of[limits[idx], way.agents]
                others.append(f"{name} ones ({format_bytes(other.slot)}) {self._compared(other)}")
        return f"{size}: {', '.join(others) or 'no other size works'}"

    def _agents(self) -> str:
        way, name = self._way, format_count(self._way.agents, "loading agent")
        if self._config.num_loading_agents is not None:
            return f"{name}, as asked for"
        fewer = [agents for limit, agents in self._best_of if limit == way.limit and agents < way.agents]
        more = [agents for limit, agents in self._best_of if limit == way.limit and agents > way.agents]
        parts = []
        if fewer:
            parts.append(f"{max(fewer)} {self._compared(self._best_of[way.limit, max(fewer)])}")
        if more:
            other = self._best_of[way.limit, min(more)]
            cost = format_bytes((other.buffers - way.buffers) * way.slot)
            parts.append(f"{min(more)} {self._compared(other)}, and cost {cost}: left out")
        else:
            parts.append("more were not measured, or there is no memory for their buffers")
        return f"{name}: {'; '.join(parts)}"

    def _resident(self, plan: Plan) -> str:
        resident, streamed = format_count(len(plan.resident), "resident stage"), len(plan.streamed)
        if self._config.max_resident_layers is not None:
            return f"{resident}, as max_resident_layers asks for; {streamed} streamed"
        return f"{resident}, spread over the depth: what ring, KV and workspace leave; {streamed} streamed"

    def _a_sweep(self) -> str:
        return f"{format_count(self._way.tokens, 'token')} a sweep"

    def _tokens(self) -> str:
        way, name = self._way, self._a_sweep()
        if way.prompt_tokens > way.tokens:
            name += f", {way.prompt_tokens} of a prompt alone"
        if self._config.max_tokens_per_sweep is not None:
            return f"{name}, as asked for"
        same = [other for other in self._ways if (other.limit, other.agents) == (way.limit, way.agents)]
        fewer = [other for other in same if other.tokens < way.tokens]
        more = [other for other in same if other.tokens > way.tokens]
        parts = []
        if fewer:
            less = max(fewer, key=lambda other: other.tokens)
            parts.append(f"{less.tokens} {_change(way.cost, less.cost)}")
        if more:
            larger = min(more, key=lambda other: other.tokens)
            taken = format_bytes(larger.workspace - way.workspace)
            parts.append(f"{larger.tokens} {_change(way.cost, larger.cost)}, with {taken} less for weights")
        else:
            parts.append("activations of more would take over a third of the budget")
        return f"{name}: {'; '.join(parts)}"

    def _compared(self, other: Way) -> str:
        """With another stage size or number of agents: as simulated, where both were, for by that it was chosen."""
        keys = [(way.limit, way.agents) for way in (self._way, other)]
        if all(key in self._simulated for key in keys):
            return _change(*(self._simulated[key] for key in keys))
        return _change(self._way.cost, other.cost)


def _change(chosen: float, other: float) -> str:
    """How the cost of another choice compares, in words."""
    percent = 100 * (other / chosen - 1) if chosen else 0.0
    if abs(percent) < 0.05:
        return "would take as long"
    return f"would take {abs(percent):.1f} % {'longer' if percent > 0 else 'less'}"
