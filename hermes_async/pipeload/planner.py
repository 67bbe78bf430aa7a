"""The Pipeline Planner: divides the budget between resident stages, the ring, KV caches and workspace.

Source: Hermes (arXiv 2409.04249), section IV (Pipeline Planner), extended by a fixed resident set: a cyclic scan that
keeps R of S bytes in memory reads S - R bytes each time round, and no other choice of what to keep reads less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

from hermes_async.config import EngineConfig, format_bytes
from hermes_async.errors import ConfigError, MemoryBudgetError
from hermes_async.pipeload.model_sizes import ModelSizes
from hermes_async.pipeload.plan import Partitioned, Plan
from hermes_async.pipeload.prediction import steady_seconds
from hermes_async.pipeload.reasons import Reasons
from hermes_async.pipeload.speeds import Speeds
from hermes_async.pipeload.stage import StageLayout
from hermes_async.pipeload.sweep_room import SweepRoom, num_outputs
from hermes_async.pipeload.ways import NEW_TOKENS, StageSums, Way, geometric_mean
from hermes_async.storage.buffers import align_up

LEAST_KV_TOKENS = 256
"""There is always room for the KV of one sequence so long, or as long as the context."""

_WORKSPACE_SHARE = 1 / 3  # of the budget, at the most

_UNCUT = 1.1  # of a stage size asked for: a buffer so much larger holds a module that cannot be cut
_LOOKED_AT = 6  # of the best plans by the rough reckoning are simulated
_CLOSE = 1.1  # and only those whose rough cost is within this of the best
_WORTH_IT = 0.995  # what another agent, or smaller stages, must bring it down to


def plan(
    budget: int, cut: Callable[[int | None], Partitioned], sizes: ModelSizes, config: EngineConfig, speeds: Speeds
) -> Plan:
    """Chooses how to run a model in `budget` bytes.

    Args:
        cut: Partitions the model into stages of at most so many bytes; None for all of it in memory.
        speeds: What reading and computing take.

    Raises:
        MemoryBudgetError: The budget is too small; the error has the smallest that works.
        ConfigError: Options contradict each other.
    """
    if isinstance(config.kv_budget, int) and config.kv_budget >= budget:
        raise ConfigError(
            f"kv_budget={config.kv_budget} is not less than the whole memory budget of {budget} bytes, "
            "of which it is a part"
        )
    if config.kv_budget is not None and not sizes.kv_bytes_per_token:
        raise ConfigError(f"kv_budget={config.kv_budget}: this model does not generate, and keeps no KV caches")
    whole = cut(None)
    if config.kernels == "fastest":
        speeds = speeds.with_fastest_kernels()
    choices = _Choices(budget - sizes.draft_bytes, cut, sizes, config, speeds)
    minimum, smallest = min(choices.minimum(), choices.minimum_resident(whole))
    minimum += sizes.draft_bytes
    chosen = choices.all_resident(whole, minimum)
    if chosen is None and minimum > budget:
        raise MemoryBudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model: the smallest that works is "
            f"{minimum} bytes ({format_bytes(minimum)}): {smallest}"
            + (f", and {format_bytes(sizes.draft_bytes)} for the draft model" if sizes.draft_bytes else ""),
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    chosen = chosen or choices.best_streamed(minimum)
    most_tokens = choices.sweep_room.by_outputs(chosen.max_tokens_per_sweep, chosen.max_sequences, chosen.kv_bytes)
    return replace(chosen, memory_budget=budget, tokens_by_outputs=most_tokens)


class _Choices:
    def __init__(
        self,
        budget: int,
        cut: Callable[[int | None], Partitioned],
        sizes: ModelSizes,
        config: EngineConfig,
        speeds: Speeds,
    ) -> None:
        self.budget = budget
        self.cut = cut
        self.sizes = sizes
        self.config = config
        self.speeds = speeds
        context = sizes.context_length or LEAST_KV_TOKENS
        block = sizes.kv_block_tokens
        self.sweep_room = SweepRoom(sizes, config)
        self.min_kv = align_up(-(-min(context, LEAST_KV_TOKENS) // block) * block * sizes.kv_bytes_per_token)

    # --- the smallest budget that works, and the one in which everything stays ---

    @cached_property
    def limits(self) -> list[int]:
        """Stage sizes to consider, largest first: a whole layer, and halves of that down to where reads get too small.

        Where a module cannot be cut so small, every buffer is as large as it is: that size is one to consider too.
        """
        limits = [self.sizes.largest_layer_bytes]
        if self.config.max_resident_layers is not None:
            return limits
        smallest = max(16 * 1024, self.sizes.weight_bytes // 256)
        while limits[-1] > smallest:
            limits.append(max(smallest, limits[-1] // 2))
        slots = [slot_bytes_of(self.cut(limit).stages) for limit in limits]
        uncut = {slot for limit, slot in zip(limits, slots, strict=True) if slot > _UNCUT * limit}
        return sorted({*limits, *uncut}, reverse=True)

    def minimum(self) -> tuple[int, str]:
        """The smallest budget that works, and what it is made of."""
        agents = self.config.num_loading_agents or 1
        buffers = self._num_buffers(agents)
        kv = self._least_kv()
        tokens, sequences = self.sweep_room.sweeps(kv)[-1]
        best: tuple[int, str] | None = None
        for limit in self.limits:
            partition = self.cut(limit)
            slot = slot_bytes_of(partition.stages)
            workspace = self.sweep_room.workspace_bytes(partition, tokens, sequences, kv)
            total = partition.base.slot_bytes + buffers * slot + kv + workspace
            if best is None or total < best[0]:
                best = (
                    total,
                    (
                        f"{format_bytes(partition.base.slot_bytes)} of weights that always stay, {buffers} buffers of "
                        f"{format_bytes(slot)}, {format_bytes(kv)} of KV and {format_bytes(workspace)} of workspace"
                    ),
                )
        assert best is not None
        return best

    def minimum_resident(self, partition: Partitioned) -> tuple[int, str]:
        """As `minimum`, with all of the model in memory; huge where that is not allowed."""
        if self._capped(partition):
            return sys.maxsize, ""
        weights = partition.base.slot_bytes + sum(stage.slot_bytes for stage in partition.stages)
        kv = self._least_kv()
        workspace = self.sweep_room.workspace_bytes(partition, *self.sweep_room.sweeps()[-1], kv)
        return weights + kv + workspace, (
            f"{format_bytes(weights)} of weights, {format_bytes(kv)} of KV and {format_bytes(workspace)} of workspace"
        )

    def all_resident(self, partition: Partitioned, minimum: int) -> Plan | None:
        """The plan that reads everything once, if it fits."""
        if self._capped(partition):
            return None
        weights = partition.base.slot_bytes + sum(stage.slot_bytes for stage in partition.stages)
        least = self._least_kv()
        shares = (least,) if self._kv_is_fixed() else (self.budget - weights - least, least)
        for (tokens, sequences), most in product(self.sweep_room.sweeps(), shares):
            workspace = self.sweep_room.workspace_bytes(partition, tokens, sequences, max(least, most))
            if weights + least + workspace <= self.budget:
                return self._plan(
                    partition,
                    frozenset(range(len(partition.stages))),
                    num_loading_agents=self.config.num_loading_agents or 2,
                    num_buffers=0,
                    slot_bytes=0,
                    kv_bytes=min(max(least, most), self.budget - weights - workspace),
                    workspace_bytes=workspace,
                    tokens=tokens,
                    max_sequences=sequences,
                    minimum_budget=minimum,
                    reasons=(
                        "all weights fit: they are read once, and no sweep waits for the disk",
                        *self.speeds.reasons,
                    ),
                )
        return None

    # --- streaming: every way is reckoned roughly, the best ones are simulated ---

    def best_streamed(self, minimum: int) -> Plan:
        """The plan in which a request takes the least time.

        Another agent takes a buffer, and smaller stages take more reads: both must bring half a percent.
        """
        limits = self._distinct()
        ways = [way for limit in limits for agents in self.agents() for way in self._ways(limit, agents)]
        best_of: dict[tuple[int, int], Way] = {}
        for way in ways:
            key = way.limit, way.agents
            if key not in best_of or way.cost < best_of[key].cost:
                best_of[key] = way
        if not best_of:
            raise ConfigError(f"no plan fits {self.config} into {format_bytes(self.budget)}")
        ranked = sorted(best_of.values(), key=lambda way: way.cost)
        close = [way for way in ranked[:_LOOKED_AT] if way.cost <= _CLOSE * ranked[0].cost]
        looked_at = {(way.limit, way.agents): self._simulated(way, minimum) for way in close}
        plainest, *others = sorted(looked_at, key=lambda key: (key[1], -key[0]))
        chosen, (plan, cost) = plainest, looked_at[plainest]
        for key in others:
            candidate, seconds = looked_at[key]
            if seconds < cost * _WORTH_IT:
                chosen, plan, cost = key, candidate, seconds
        simulated = {key: seconds for key, (_, seconds) in looked_at.items()}
        return replace(plan, reasons=Reasons(self.config, best_of[chosen], best_of, simulated, ways).of(plan))

    def _distinct(self) -> list[int]:
        """The stage sizes that need other memory than the next larger one; with the same, fewer reads are better."""
        of_memory = {
            (slot_bytes_of(self.cut(limit).stages), self.cut(limit).cast_bytes): limit
            for limit in reversed(self.limits)
        }
        return sorted(of_memory.values(), reverse=True)

    def _ways(self, limit: int, agents: int) -> Iterator[Way]:
        """With each number of tokens that a sweep could have."""
        partition = self.cut(limit)
        slot = slot_bytes_of(partition.stages)
        buffers = self._num_buffers(agents)
        fixed = partition.base.slot_bytes + buffers * slot
        most = len(partition.stages)
        if self.config.max_resident_layers is not None:
            most = max(0, self.config.max_resident_layers - buffers)
        least = self._least_kv()
        shares = (least,) if self._kv_is_fixed() else (max(least, self._kv_share(fixed)), least)
        needed = max(self.sweep_room.sweeps()[-1][0], self.sizes.long_text_tokens)  # whatever workspace they take
        machines = (self.speeds, *self.speeds.others)
        sums = tuple(StageSums(partition, self.sizes, speeds, agents) for speeds in machines)
        for kv in shares:
            found = False
            for tokens, sequences in self.sweep_room.sweeps(kv):
                workspace = self.sweep_room.workspace_bytes(partition, tokens, sequences, kv)
                room = self.budget - fixed - kv - workspace
                if room < 0 or (tokens > needed and workspace > self.budget * _WORKSPACE_SHARE):
                    continue
                if found and tokens < 2 * sequences:
                    break  # what would leave sequences without a place is only for want of memory
                found = True
                yield Way(
                    limit,
                    partition,
                    sums,
                    agents,
                    buffers,
                    slot,
                    tokens,
                    self.sweep_room.most_tokens(sequences, tokens, sequences, kv),
                    self.sweep_room.most_tokens(1, tokens, sequences, kv),
                    sequences,
                    self.config.max_sequences / sequences,
                    kv,
                    workspace,
                    room,
                    most,
                )
                if not self.sizes.kv_bytes_per_token:
                    break
            if found:
                break

    def _simulated(self, way: Way, minimum: int) -> tuple[Plan, float]:
        """The plan of a way to stream, and what it costs with its sweeps simulated.

        Where the machine is not known, its sweeps on the other ones are reckoned roughly as before.
        """
        plan = self._streamed(way, minimum)
        first, *others = way.sums
        share = plan.bytes_per_sweep / max(1, first.read_bytes)
        return plan, geometric_mean(
            [self._simulated_cost(way, plan, share), *(way.cost_of(share, sums) for sums in others)]
        )

    def _simulated_cost(self, way: Way, plan: Plan, share: float) -> float:
        if not self.sizes.kv_bytes_per_token:
            texts_s = [steady_seconds(plan, num_tokens=length, num_outputs=0) for length in way.text_lengths]
            return way.sweeps_of_long_text * geometric_mean(texts_s)
        sums = way.sums[0]

        def slower(sessions: int) -> float:
            """A sweep of so many, than it was reckoned to be."""
            simulated_s = steady_seconds(plan, num_tokens=sessions, num_outputs=sessions)
            return simulated_s - sums.sweep_seconds(share, sessions, sessions)

        longer_s = (NEW_TOKENS - 1) * (slower(1) + way.rounds * slower(way.sequences))
        return way.cost_of(share, sums) + longer_s

    def _streamed(self, way: Way, minimum: int) -> Plan:
        partition, kv, workspace = way.partition, way.kv, way.workspace
        resident = spread(partition.stages, way.room, way.most)
        left = way.room - sum(partition.stages[idx].slot_bytes for idx in resident)
        # More KV can need more workspace, which is taken from what is left too.
        grown = self.sweep_room.workspace_bytes(partition, way.tokens, way.sequences, kv + left)
        if not self._kv_is_fixed() and grown - workspace <= left:
            kv, workspace = kv + left - (grown - workspace), grown
        return self._plan(
            partition,
            resident,
            num_loading_agents=way.agents,
            num_buffers=way.buffers,
            slot_bytes=way.slot,
            kv_bytes=kv,
            workspace_bytes=workspace,
            tokens=way.tokens,
            max_sequences=way.sequences,
            minimum_budget=minimum,
            reasons=(),
        )

    def _plan(
        self,
        partition: Partitioned,
        resident: frozenset[int],
        *,
        num_loading_agents: int,
        num_buffers: int,
        slot_bytes: int,
        kv_bytes: int,
        workspace_bytes: int,
        tokens: int,
        max_sequences: int,
        minimum_budget: int,
        reasons: tuple[str, ...],
    ) -> Plan:
        return Plan(
            self.budget,
            partition,
            resident,
            num_loading_agents,
            num_buffers,
            slot_bytes,
            kv_bytes,
            workspace_bytes,
            (tokens,) * num_outputs(tokens, max_sequences),  # more with fewer outputs: found for what is chosen alone
            max_sequences,
            minimum_budget,
            self.sizes.kv_bytes_per_token,
            frozenset(idx for idx, stage in enumerate(partition.stages) if self.sizes.is_head(stage)),
            self.speeds,
            reasons,
            self.sizes.context_length,
        )

    # --- parts of plans ---

    def agents(self) -> Sequence[int]:
        """Numbers of loading agents to consider."""
        if self.config.num_loading_agents is not None:
            return (self.config.num_loading_agents,)
        return self.speeds.num_agents or (1, 2)

    def _num_buffers(self, agents: int) -> int:
        """One being computed and one for each agent to fill, unless fewer layers may be in memory."""
        return min(agents + 1, self.config.max_resident_layers or agents + 1)

    def _capped(self, partition: Partitioned) -> bool:
        most = self.config.max_resident_layers
        return most is not None and most < len(partition.stages)

    def _least_kv(self) -> int:
        return max(self.min_kv, align_up(self._kv_asked()))

    def _kv_asked(self) -> int:
        assert not isinstance(self.config.kv_budget, str)
        return self.config.kv_budget or 0

    def _kv_is_fixed(self) -> bool:
        return bool(self._kv_asked()) or not self.sizes.kv_bytes_per_token

    def _kv_share(self, fixed: int) -> int:
        return min(self.budget // 10, max(0, self.budget - fixed) // 2)


def spread(stages: Sequence[StageLayout], room: int, most: int) -> frozenset[int]:
    """Picks stages to keep resident in `room` bytes, spread evenly over the depth, then fills what is left.

    Between two streamed stages the resident ones then give the loading agents time, which evens out the load.
    """
    total = sum(stage.slot_bytes for stage in stages)
    share = min(1.0, room / total) if total else 0.0
    chosen: set[int] = set()
    taken, passed = 0, 0
    for idx, stage in enumerate(stages):
        passed += stage.slot_bytes
        if taken + stage.slot_bytes <= min(room, passed * share + stage.slot_bytes / 2) and len(chosen) < most:
            chosen.add(idx)
            taken += stage.slot_bytes
    for idx in sorted(set(range(len(stages))) - chosen, key=lambda idx: -stages[idx].slot_bytes):
        if taken + stages[idx].slot_bytes <= room and len(chosen) < most:
            chosen.add(idx)
            taken += stages[idx].slot_bytes
    return frozenset(chosen)


def slot_bytes_of(stages: Sequence[StageLayout]) -> int:
    """Of a buffer that any of the stages fits into."""
    return max((stage.slot_bytes for stage in stages), default=0)
