"""The Pipeline Planner: divides the budget between resident stages, the ring, KV caches and workspace.

Source: Hermes (arXiv 2409.04249), section IV (Pipeline Planner), extended by a fixed resident set: a cyclic scan that
keeps R of S bytes in memory reads S - R bytes each time round, and no other choice of what to keep reads less.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from hermes_async.config import EngineConfig, format_bytes
from hermes_async.errors import ConfigError, MemoryBudgetError
from hermes_async.pipeload.stage import StageLayout
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Partitioned, Plan
from hermes_async.planning.prediction import steady_seconds
from hermes_async.planning.reasons import Reasons
from hermes_async.planning.reserve import Reserve, Share
from hermes_async.planning.speeds import Speeds
from hermes_async.planning.sweep_room import SweepRoom, num_outputs
from hermes_async.planning.ways import NEW_TOKENS, StageSums, Way, geometric_mean
from hermes_async.storage.buffers import align_up

LEAST_KV_TOKENS = 256
"""There is always room for the KV of one sequence so long, or as long as the context."""

_UNCUT = 1.1  # of a stage size asked for: a buffer so much larger holds a module that cannot be cut
_CLOSE = 1.2  # what is within this of the best rough cost is simulated
_LOOKED_AT = 6  # but no more than so many
_STAGES_LOOKED_AT = 1000  # or as many as have so many stages
_SWEEP_TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # of which the best is enough
_ALIKE = 1.01  # plans that cost within this of the best


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
    if config.kernels == "fastest":
        speeds = speeds.with_fastest_kernels()
    choices = _Choices(budget - sizes.draft_bytes, cut, sizes, config, speeds)
    minimum, smallest = min(choices.minimum(), choices.minimum_resident())
    minimum += sizes.draft_bytes
    if minimum > budget:
        raise MemoryBudgetError(
            f"a memory budget of {format_bytes(budget)} is too small for this model: the smallest that works is "
            f"{minimum} bytes ({format_bytes(minimum)}): {smallest}"
            + (f", and {format_bytes(sizes.draft_bytes)} for the draft model" if sizes.draft_bytes else ""),
            requested_bytes=minimum,
            budget_bytes=budget,
            minimum_bytes=minimum,
        )
    chosen = choices.all_resident(minimum) or choices.best_streamed(minimum)
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
        """The smallest budget that works while stages are streamed, and what it is made of."""
        buffers, least = self._num_buffers(self._fewest_agents), self.reserve.least
        partition = self._smallest
        slot = slot_bytes_of(partition.stages)
        workspace = least.workspace_bytes + align_up(partition.cast_bytes)
        return self._streamed_bytes(partition) + least.nbytes, (
            f"{format_bytes(partition.base.slot_bytes)} of weights that always stay, {buffers} buffers of "
            f"{format_bytes(slot)}, {format_bytes(least.kv_bytes)} of KV and {format_bytes(workspace)} of workspace"
        )

    def minimum_resident(self) -> tuple[int, str]:
        """As `minimum`, with all of the model in memory; huge where that is not allowed."""
        if self._whole_bytes == sys.maxsize:
            return sys.maxsize, ""
        least, cast = self.reserve.least, align_up(self.cut(None).cast_bytes)
        return self._whole_bytes + least.nbytes, (
            f"{format_bytes(self._whole_bytes - cast)} of weights, {format_bytes(least.kv_bytes)} of KV and "
            f"{format_bytes(least.workspace_bytes + cast)} of workspace"
        )

    def all_resident(self, minimum: int) -> Plan | None:
        """The plan that reads everything once, if it fits."""
        if self.reserve.for_weights(self.budget) < self._whole_bytes:
            return None
        partition = self.cut(None)
        return self._plan(
            partition,
            frozenset(range(len(partition.stages))),
            self.reserve.of(self.budget),
            num_loading_agents=self.config.num_loading_agents or 2,
            num_buffers=0,
            slot_bytes=0,
            minimum_budget=minimum,
            reasons=(
                "all weights fit: they are read once, and no sweep waits for the disk",
                *self.speeds.reasons,
            ),
        )

    # --- streaming: every way is reckoned roughly, the best ones are simulated ---

    def best_streamed(self, minimum: int) -> Plan:
        """The plan in which sessions take the least time, alone and together.

        Of those that cost about the same, the one in which a session alone is fastest. So another budget, in which
        another one is ahead by a little, does not make a session slower.
        """
        limits = self._distinct()
        share, weights = self.reserve.of(self.budget), self.reserve.for_weights(self.budget)
        ways = [self._way(limit, agents, share, weights) for limit in limits for agents in self.agents()]
        best_of = {(way.limit, way.agents): way for way in ways if way.room >= 0}
        if not best_of:
            raise ConfigError(f"no plan fits {self.config} into {format_bytes(self.budget)}")
        ranked = sorted(best_of.values(), key=lambda way: way.cost)
        close = [way for way in ranked if way.cost <= _CLOSE * ranked[0].cost]
        stages = list(accumulate(len(way.partition.stages) for way in close))
        close = close[: max(_LOOKED_AT, bisect_right(stages, _STAGES_LOOKED_AT))]
        looked_at = {(way.limit, way.agents): (way, *self._simulated(way, minimum)) for way in close}
        simulated = {key: cost for key, (_, _, cost) in looked_at.items()}
        alike = [one for one in looked_at.values() if one[2] <= _ALIKE * min(simulated.values())]
        way, plan, _ = min(alike, key=lambda one: self._alone(*one))
        return replace(plan, reasons=Reasons(self.config, way, best_of, simulated).of(plan))

    def _alone(self, way: Way, plan: Plan, cost: float) -> float:
        """What one session alone takes a sweep; without generating, there are no sessions, and the cost is all."""
        if not self.sizes.kv_bytes_per_token:
            return cost
        share = plan.bytes_per_sweep / max(1, way.sums[0].read_bytes)
        others_s = [sums.sweep_seconds(share, 1, 1) for sums in way.sums[1:]]
        return geometric_mean([steady_seconds(plan, num_tokens=1, num_outputs=1), *others_s])

    def _distinct(self) -> list[int]:
        """The stage sizes that need other memory than the next larger one; with the same, fewer reads are better."""
        of_memory = {
            (slot_bytes_of(self.cut(limit).stages), self.cut(limit).cast_bytes): limit
            for limit in reversed(self.limits)
        }
        return sorted(of_memory.values(), reverse=True)

    def _way(self, limit: int, agents: int, share: Share, weights: int) -> Way:
        """Streaming with so much set aside, and so many bytes for weights: too many to stream if `room` is negative."""
        partition = self.cut(limit)
        slot = slot_bytes_of(partition.stages)
        buffers = self._num_buffers(agents)
        most = len(partition.stages)
        if self.config.max_resident_layers is not None:
            most = max(0, self.config.max_resident_layers - buffers)
        machines = (self.speeds, *self.speeds.others)
        tokens, sequences, kv = share.tokens, share.sequences, share.kv_bytes
        return Way(
            limit,
            partition,
            tuple(StageSums(partition, self.sizes, speeds, agents) for speeds in machines),
            agents,
            buffers,
            slot,
            tokens,
            self.sweep_room.most_tokens(sequences, tokens, sequences, kv),
            self.sweep_room.most_tokens(1, tokens, sequences, kv),
            sequences,
            self.config.max_sequences / sequences,
            share,
            weights - partition.base.slot_bytes - buffers * slot - align_up(partition.cast_bytes),
            most,
        )

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
        return self._plan(
            way.partition,
            spread(way.partition.stages, way.room, way.most),
            way.share,
            num_loading_agents=way.agents,
            num_buffers=way.buffers,
            slot_bytes=way.slot,
            minimum_budget=minimum,
            reasons=(),
        )

    def _plan(
        self,
        partition: Partitioned,
        resident: frozenset[int],
        share: Share,
        *,
        num_loading_agents: int,
        num_buffers: int,
        slot_bytes: int,
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
            share.kv_bytes,
            share.workspace_bytes + align_up(partition.cast_bytes),
            # More with fewer outputs: found for what is chosen alone.
            (share.tokens,) * num_outputs(share.tokens, share.sequences),
            share.sequences,
            minimum_budget,
            self.sizes.kv_bytes_per_token,
            frozenset(idx for idx, stage in enumerate(partition.stages) if self.sizes.is_head(stage)),
            frozenset(idx for idx, stage in enumerate(partition.stages) if self.sizes.is_looked_up(stage)),
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

    def _least_kv(self) -> int:
        return max(self.min_kv, align_up(self._kv_asked()))

    def _kv_asked(self) -> int:
        assert not isinstance(self.config.kv_budget, str)
        return self.config.kv_budget or 0

    def _kv_is_fixed(self) -> bool:
        return bool(self._kv_asked()) or not self.sizes.kv_bytes_per_token

    # --- what is set aside for sequences, and the least and the most that weights take ---

    @cached_property
    def reserve(self) -> Reserve:
        return Reserve(
            self.sizes,
            self.config,
            self.sweep_room,
            least_kv=self._least_kv(),
            kv_is_fixed=self._kv_is_fixed(),
            least_weights=min(self._streamed_bytes(self._smallest), self._whole_bytes),
            most_weights=self._whole_bytes,
            enough_tokens=self._enough_tokens(),
        )

    @property
    def _fewest_agents(self) -> int:
        return self.config.num_loading_agents or 1

    @cached_property
    def _smallest(self) -> Partitioned:
        """Cut so that streaming takes the least memory."""
        return min((self.cut(limit) for limit in self.limits), key=self._streamed_bytes)

    def _streamed_bytes(self, partition: Partitioned) -> int:
        """What weights take that are all streamed."""
        ring = self._num_buffers(self._fewest_agents) * slot_bytes_of(partition.stages)
        return partition.base.slot_bytes + ring + align_up(partition.cast_bytes)

    @cached_property
    def _whole_bytes(self) -> int:
        """What weights take that are all resident; huge where that is not allowed."""
        partition = self.cut(None)
        if self.config.max_resident_layers is not None and self.config.max_resident_layers < len(partition.stages):
            return sys.maxsize
        weights = partition.base.slot_bytes + sum(stage.slot_bytes for stage in partition.stages)
        return weights + align_up(partition.cast_bytes)

    def _enough_tokens(self) -> int:
        """How many tokens a sweep are best where a half of the weights has to do; the same for every budget."""
        budget = self.sizes.weight_bytes // 2
        kv = self._least_kv() if self._kv_is_fixed() else max(self._least_kv(), budget // 10)

        def cost(tokens: int) -> float:
            sequences = self.sweep_room.most_sequences(tokens, kv)
            share = Share(kv, tokens, sequences, self.sweep_room.workspace_bytes(tokens, sequences, kv))
            return self._way(self.limits[0], self.agents()[-1], share, budget - share.nbytes).cost

        counts = self.sweep_room.token_counts()
        return min((count for count in counts if count in _SWEEP_TOKENS), key=cost, default=counts[0])


def spread(stages: Sequence[StageLayout], room: int, most: int) -> frozenset[int]:
    """Picks stages to keep resident in `room` bytes, spread evenly over the depth. More room never keeps less.

    Between two streamed stages the resident ones then give the loading agents time, which evens out the load.
    """
    counts = _counts_that_fit(stages, room, most)
    taken = sum(count * size for size, count in counts.items())
    total = sum(stage.slot_bytes for stage in stages)
    share = taken / total if total else 0.0
    chosen: set[int] = set()
    taken, passed = 0, 0
    for idx, stage in enumerate(stages):
        passed += stage.slot_bytes
        if counts[stage.slot_bytes] and taken + stage.slot_bytes <= passed * share + stage.slot_bytes / 2:
            chosen.add(idx)
            taken += stage.slot_bytes
            counts[stage.slot_bytes] -= 1
    for size, count in counts.items():
        left = [idx for idx, stage in enumerate(stages) if stage.slot_bytes == size and idx not in chosen]
        chosen.update(left[(2 * idx + 1) * len(left) // (2 * count)] for idx in range(count))
    return frozenset(chosen)


def _counts_that_fit(stages: Sequence[StageLayout], room: int, most: int) -> Counter[int]:
    """How many stages of each size to keep: of all sizes the same share, then whatever still fits.

    They are tried in an order that is always the same: then more room keeps more, or as much.
    """
    sizes = Counter(stage.slot_bytes for stage in stages)
    order = sorted(((idx + 0.5) / count, -size) for size, count in sizes.items() for idx in range(count))
    counts: Counter[int] = Counter()
    for _, negative in order:
        if -negative <= room and most > 0:
            counts[-negative] += 1
            room, most = room + negative, most - 1
    return counts


def slot_bytes_of(stages: Sequence[StageLayout]) -> int:
    """Of a buffer that any of the stages fits into."""
    return max((stage.slot_bytes for stage in stages), default=0)
