"""How many experts a sweep uses, and how many of these the cache is expected to hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hermes_async.pipeload.expert_policy import NEARLY_ALL, USE_KEPT, slot_sizes

if TYPE_CHECKING:
    from hermes_async.pipeload.stage import StageLayout


class LayerOfExperts(Protocol):
    """The experts of a layer; see `hermes_async.modeling.experts.ExpertLayer`."""

    @property
    def layouts(self) -> tuple[StageLayout, ...]: ...
    @property
    def position(self) -> int: ...


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The sizes of a layer's experts.

    Attributes:
        position: How many stages are entered before these experts.
        slot_bytes: Of the place of one expert in the cache.
        read_bytes: Of one expert, on average.
    """

    position: int
    num_experts: int
    slot_bytes: int
    read_bytes: int


def expert_sizes(layers: Sequence[LayerOfExperts]) -> tuple[ExpertSizes, ...]:
    """The sizes of the experts of each layer."""
    slots = slot_sizes([[one.slot_bytes for one in layer.layouts] for layer in layers])
    return tuple(
        ExpertSizes(
            position=layer.position,
            num_experts=len(layer.layouts),
            slot_bytes=slot_bytes,
            read_bytes=round(sum(one.read_bytes for one in layer.layouts) / len(layer.layouts)),
        )
        for layer, slot_bytes in zip(layers, slots, strict=True)
    )


def least_expert_bytes(layers: Sequence[ExpertSizes], num_agents: int) -> int:
    """The fewest bytes for experts: one is computed while each agent reads another one."""
    return min((num_agents + 1) * max((layer.slot_bytes for layer in layers), default=0), all_expert_bytes(layers))


def all_expert_bytes(layers: Sequence[ExpertSizes]) -> int:
    """The bytes that all experts of all layers take in memory."""
    return sum(layer.num_experts * layer.slot_bytes for layer in layers)


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """What a sweep is expected to use of a layer.

    Attributes:
        num_used: Distinct experts.
        num_hits: Those of them that are in the cache.
        num_read: Those that are read. If nearly all are used, the others are read with them.
        is_nearly_all: Whether nearly all are used.
    """

    num_used: float
    num_hits: float
    num_read: float
    is_nearly_all: bool


@lru_cache(maxsize=4096)
def expected_use(uses: tuple[float, ...], num_tokens: int, num_cached: float) -> ExpertUse:
    """The use of one layer by a sweep.

    The cache keeps the experts that are most likely to be used. Tokens are routed independently of each other. So of n
    tokens, none uses an expert that one token uses with probability p with a probability of (1-p)**n.

    Args:
        uses: The probability that one token uses the likeliest expert of the layer, the next one, and so on.
        num_cached: Experts that the cache has room for.
    """
    used = hits = 0.0
    for rank, probability in enumerate(uses):
        by_any = 1 - (1 - min(1.0, probability)) ** num_tokens
        used += by_any
        hits += by_any * min(1.0, max(0.0, num_cached - rank))
    is_nearly_all = used >= NEARLY_ALL * len(uses)
    num_read = max(0.0, len(uses) - num_cached) if is_nearly_all else used - hits
    return ExpertUse(used, hits, num_read, is_nearly_all)


@lru_cache(maxsize=256)
def uses_of_one_token(num_experts: int, num_per_token: int, measured: tuple[float, ...] = ()) -> tuple[float, ...]:
    """The probability that one token uses the likeliest expert of a layer, the next one, and so on.

    Args:
        num_per_token: Experts of one token; 0 if that is not known, and all may be used.
        measured: These probabilities, as they were measured; empty if they were not. Then no expert is likelier than
            another one.
    """
    if len(measured) == num_experts:
        return measured
    return (min(1.0, (num_per_token or num_experts) / num_experts),) * num_experts


def measured_uses(layers: Sequence[Sequence[Collection[int]]], num_experts: int) -> tuple[float, ...]:
    """The probability that one token uses the likeliest expert of a layer, the next one, and so on, from a run.

    Which experts are likely is decided as the cache does it: by the tokens before. So an expert that is used by chance
    more often than others does not count as likely, and an expert that several tokens in a row use does.

    Args:
        layers: Of each layer, the experts that each token used, one token after another. The first quarter of them
            only shows which experts are likely.
    """
    uses = np.zeros(num_experts)
    num_counted = 0
    for tokens in layers:
        likelihoods = np.zeros(num_experts)
        for place, used in enumerate(tokens):
            likelihoods *= USE_KEPT
            chosen = list(used)
            if place >= len(tokens) // 4:
                ranks = np.argsort(np.argsort(-likelihoods, kind="stable"))
                uses[ranks[chosen]] += 1
                num_counted += 1
            likelihoods[chosen] += 1
    return tuple((uses / max(1, num_counted)).tolist())
