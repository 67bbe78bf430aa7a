"""Why a plan is as it is: a line for each choice, with what the nearest others would have given."""

from __future__ import annotations

from collections.abc import Mapping

from hermes_async.config import EngineConfig, format_bytes, format_count
from hermes_async.planning.plan import Plan
from hermes_async.planning.ways import Way


class Reasons:
    """What to say of one way to stream.

    Args:
        chosen: The way.
        best_of: The best way with each stage size and number of agents.
        simulated: What those of them cost that were simulated.
    """

    def __init__(
        self,
        config: EngineConfig,
        chosen: Way,
        best_of: Mapping[tuple[int, int], Way],
        simulated: Mapping[tuple[int, int], float],
    ) -> None:
        self._config = config
        self._way = chosen
        self._best_of = best_of
        self._simulated = simulated

    def of(self, plan: Plan) -> tuple[str, ...]:
        lines = [self._stages(), self._agents(), self._resident(plan)]
        if plan.kv_bytes_per_token:
            asked = self._config.kv_budget is not None
            kv = "as kv_budget asks for" if asked else "a tenth of the budget, or half of it for the first sequences"
            lines.append(f"KV caches: {kv}")
        lines.append(self._tokens())
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
        taken = format_bytes(way.share.workspace_bytes)
        return f"{name}: their activations take {taken}; no smaller budget has longer sweeps, nor a larger one shorter"

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
