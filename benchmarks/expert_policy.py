"""Measures which experts a cache should keep, and how well the next layer's experts can be guessed.

    python -m benchmarks.expert_policy [--text FILE] [--seconds 240] [--sizes 0.1,0.2,0.4,0.6] [--sessions 1,4,16,64]
                                       [--tokens 200]

A quick try: --seconds 10 --tokens 40 --sizes 0.2 --sessions 1,4. A mixture of 20 million weights is trained on a text,
with a loss that balances its experts, and its routes over the end of the text are recorded. Other routes are drawn with
a Zipf-like skew. The engine's own `ExpertCache` then runs on these routes, without reading, with the engine's policy
and with others in its place. The best that any policy can do is to let those experts go that are needed last, which
needs to know the future.

A guess of the next layer's experts is what its router says of this layer's hidden states, before this layer's experts
are added. A guess is useful if it is right and its expert is not in memory.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import numpy as np
from numpy.typing import NDArray

from benchmarks.expert_routes import Guesses, Routes, own_text, recorded_routes, trained_mixture, zipf_routes
from hermes_async.pipeload import expert_cache
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageLayout, StageState

_SLOT_BYTES = 4096
_USE_KEPT = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
_WARMUP = 0.25  # of the tokens, in which the cache is filled
_TOPIC_TOKENS = 50  # after which other experts are popular, in some of the drawn routes
_GUESSES_AT = 0.2  # the cache's size where guesses are counted

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_policy", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=None, help="a text to train on (default: the documents)")
    parser.add_argument("--seconds", type=float, default=240, help="of training (default 240)")
    parser.add_argument("--sizes", default="0.1,0.2,0.4,0.6", help="shares of the experts that the cache holds")
    parser.add_argument("--sessions", default="1,4,16,64", help="numbers of sessions (default 1,4,16,64)")
    parser.add_argument("--tokens", type=int, default=200, help="of each session (default 200)")
    parser.add_argument("--zipf", default="0.5,1", help="exponents of drawn routes (default 0.5,1)")
    args = parser.parse_args()
    sizes = [float(size) for size in args.sizes.split(",")]
    numbers = [int(number) for number in args.sessions.split(",")]
    text = own_text(Path(__file__).parents[1]) if args.text is None else args.text.read_text()
    print(f"training for {args.seconds:.0f} s on {len(text):,} characters", flush=True)
    model, held_out = trained_mixture(text, args.seconds)
    recorded, guesses, loss = recorded_routes(model, held_out, max(numbers), args.tokens)
    print(f"loss {loss:.2f} on text it was not trained on; most popular tenth of experts: {_top_tenth(recorded):.2f}")
    topics = [None] if args.tokens <= _TOPIC_TOKENS else [None, _TOPIC_TOKENS]
    drawn = [
        zipf_routes(float(exponent), max(numbers), args.tokens, topic_tokens)
        for exponent in args.zipf.split(",")
        for topic_tokens in topics
    ]
    tables = []
    for routes in (recorded, *drawn):
        table = anyio.run(_table, routes, sizes, numbers)
        tables.append({"routes": routes.name, "rows": table})
        _print_table(routes.name, table, sizes)
    useful = {extra: anyio.run(_useful_guesses, recorded, guesses, extra) for extra in guesses.recall}
    for extra, recall in guesses.recall.items():
        print(
            f"guesses of the next layer, {extra} more than are chosen: {recall:.2f} of the choices are among them. "
            f"With {_GUESSES_AT:.0%} of the experts in memory, {useful[extra]['right']:.2f} of the guesses that are "
            f"not there are right, and they are {useful[extra]['of_misses']:.2f} of what would be read"
        )
    print(json.dumps({"loss": loss, "tables": tables, "recall": guesses.recall, "useful": useful}))


def _top_tenth(routes: Routes) -> float:
    """The share of the choices that the most popular tenth of a layer's experts has."""
    counts = np.stack(
        [np.bincount(routes.chosen[:, :, layer].reshape(-1), minlength=routes.num_experts) for layer in _layers(routes)]
    )
    top = np.sort(counts, axis=1)[:, -(routes.num_experts // 10) :]
    return float(top.sum() / counts.sum())


def _layers(routes: Routes) -> range:
    return range(routes.chosen.shape[2])


# --- policies ---


class _Other(ExpertCache):
    """A cache with another policy: those go first whose `_likelihoods` are least."""

    def __init__(self, layers: Sequence[Sequence[Stage]], memory: MemoryGovernor, unions: Sequence[list[int]]) -> None:
        super().__init__(layers, memory)
        # All mutable state of policies: when each expert was last used, in visits of all layers and of its own; how
        # often; and the number of visits so far, of each layer and of all.
        count = len(self.experts)
        self._last, self._last_of_layer, self._count = (np.full(count, -1e9), np.full(count, -1e9), np.zeros(count))
        self._visits, self._num_visits = np.zeros(len(self.layers)), 0
        self._layers_of_experts = np.array(self._layer_of)

    def ask(self, experts: Sequence[Stage]) -> bool:
        wanted = [self._index[expert] for expert in experts]
        layer = self._layer_of[wanted[0]]
        self._num_visits += 1
        self._visits[layer] += 1
        self._last[wanted], self._last_of_layer[wanted] = self._num_visits, self._visits[layer]
        self._count[wanted] += 1
        return super().ask(experts)


class _Recency(_Other):
    def _likelihoods(self) -> NDArray[np.float64]:
        return self._last


class _RecencyByLayer(_Other):
    def _likelihoods(self) -> NDArray[np.float64]:
        return self._last_of_layer - self._visits[self._layers_of_experts]


class _Frequency(_Other):
    def _likelihoods(self) -> NDArray[np.float64]:
        return self._count


class _None(_Other):
    """Keeps nothing that was computed: no expert is in memory when it is asked for."""

    def ask(self, experts: Sequence[Stage]) -> bool:
        for stage in self.experts:
            if stage.state is StageState.READY:
                _free(self, stage)
        return super().ask(experts)


class _Future(_Other):
    """Lets those go first that are needed last."""

    def __init__(self, layers: Sequence[Sequence[Stage]], memory: MemoryGovernor, unions: Sequence[list[int]]) -> None:
        super().__init__(layers, memory, unions)
        self._uses_of: list[list[int]] = [[] for _ in self.experts]
        for visit, union in enumerate(unions, start=1):
            for idx in union:
                self._uses_of[idx].append(visit)

    def _likelihoods(self) -> NDArray[np.float64]:
        return -np.array([self._next_use(uses) for uses in self._uses_of])

    def _next_use(self, uses: list[int]) -> float:
        place = bisect_right(uses, self._num_visits)
        return uses[place] if place < len(uses) else 1e9


_OTHERS: dict[str, type[_Other]] = {
    "none": _None,
    "recency": _Recency,
    "recency by layer": _RecencyByLayer,
    "frequency": _Frequency,
    "the future": _Future,
}


# --- a cache that is driven without reading ---


async def _table(routes: Routes, sizes: Sequence[float], numbers: Sequence[int]) -> list[Record]:
    """Hit rates: for each policy, those of each number of sessions, for each size."""
    rows = []
    for number in numbers:
        for policy in (*_OTHERS, *_USE_KEPT):
            rates = [_hit_rate(routes, policy, number, size) for size in sizes]
            rows.append({"sessions": number, "policy": policy, "hit_rates": rates})
    return rows


def _hit_rate(routes: Routes, policy: str | float, number: int, size: float) -> float:
    hits, misses = 0, 0
    unions = _unions(routes, number)
    cache = _cache(routes, policy, size, unions)
    num_warmup = int(_WARMUP * len(unions))
    kept = expert_cache.USE_KEPT if isinstance(policy, str) else policy
    with patch.object(expert_cache, "USE_KEPT", kept):
        for visit, union in enumerate(unions):
            if visit == num_warmup:
                hits, misses = -cache.statistics.num_hits, -cache.statistics.num_misses
            _visit(cache, union)
    hits, misses = hits + cache.statistics.num_hits, misses + cache.statistics.num_misses
    return hits / (hits + misses)


def _unions(routes: Routes, number: int) -> list[list[int]]:
    """The experts that each visit of a layer asks for, as indices among those of all layers."""
    return [
        [layer * routes.num_experts + expert for expert in routes.union(0, number, token, layer)]
        for token in range(routes.chosen.shape[1])
        for layer in _layers(routes)
    ]


def _cache(routes: Routes, policy: str | float, size: float, unions: Sequence[list[int]]) -> ExpertCache:
    layers = [
        [Stage(0, StageLayout(f"{layer}.{idx}", (), (), 0, _SLOT_BYTES, 0), resident=False, is_expert=True)
         for idx in range(routes.num_experts)]
        for layer in _layers(routes)
    ]  # fmt: skip
    memory = MemoryGovernor(round(size * routes.num_experts * len(layers)) * _SLOT_BYTES)
    if isinstance(policy, str):
        return _OTHERS[policy](layers, memory, unions)
    return ExpertCache(layers, memory)


def _visit(cache: ExpertCache, union: Sequence[int]) -> None:
    """A sweep asks for experts of a layer. Those that are in memory are computed when another one needs a place."""
    asked = [cache.experts[idx] for idx in union]
    cache.ask(asked)
    missing = set(asked)
    while missing:
        found = cache.next_asked()
        if found is None:
            stage = next(stage for stage in asked if stage in missing and stage.state is StageState.READY)
            missing.remove(stage)
            cache.leave(stage)
            continue
        _load(cache, *found)


def _load(cache: ExpertCache, expert: Stage, victims: Sequence[Stage]) -> None:
    for victim in victims:
        _free(cache, victim)
    expert.start_loading(*cache.take(expert))
    expert.set_ready(None)
    cache.loaded(expert)


def _free(cache: ExpertCache, expert: Stage) -> None:
    buffer, lease = expert.clear()
    if lease is not None:
        lease.release()
    cache.give_back(expert, buffer)


async def _useful_guesses(routes: Routes, guesses: Guesses, extra: int) -> Record:
    """Of one session: which share of the guessed experts that are not in memory is right, and what share of misses."""
    cache = _cache(routes, expert_cache.USE_KEPT, _GUESSES_AT, ())
    num_layers, num_chosen = routes.chosen.shape[2:]
    num_right, num_wrong, num_missed = 0, 0, 0
    for token in range(routes.chosen.shape[1]):
        for layer in range(num_layers):
            own = set(routes.union(0, 1, token, layer))
            first = layer * routes.num_experts
            absent = {idx for idx in range(routes.num_experts) if cache.experts[first + idx].state is StageState.EMPTY}
            if layer and token > _WARMUP * routes.chosen.shape[1]:
                guessed = set(guesses.chosen[0, token, layer - 1, : num_chosen + extra].tolist()) & absent
                num_right += len(guessed & own)
                num_wrong += len(guessed - own)
                num_missed += len(own & absent)
            _visit(cache, [first + idx for idx in sorted(own)])
    return {"right": num_right / max(1, num_right + num_wrong), "of_misses": num_right / max(1, num_missed)}


def _print_table(name: str, rows: Sequence[Record], sizes: Sequence[float]) -> None:
    print(f"\n{name}: hit rates, by the share of the experts that the cache holds")
    print(f"  {'sessions':>8} {'policy':>18} " + " ".join(f"{size:6.0%}" for size in sizes))
    for row in rows:
        policy = row["policy"] if isinstance(row["policy"], str) else f"uses kept {row['policy']:g}"
        print(
            f"  {row['sessions']:8} {policy:>18} " + " ".join(f"{rate:6.3f}" for rate in row["hit_rates"]), flush=True
        )


if __name__ == "__main__":
    main()
