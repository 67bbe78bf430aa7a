"""A map of layers by experts, from a trace: how often each expert was used, and how long it was in memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hermes_async.cli.pictures import pyplot, save
from hermes_async.config import format_count
from hermes_async.pipeload.trace import Timeline

_MAX_COLUMNS = 64  # of the map as text
_SHADES = " .:-=+*#%@"


@dataclass(frozen=True)
class ExpertMap:
    """What a trace tells of experts within some seconds.

    Attributes:
        modules: Names of the experts' modules, in the order in which they are computed.
        num_sweeps: Sweeps that began within these seconds.
        num_hits: Experts that were in memory, or on their way there, when these sweeps asked for them.
        num_misses: Experts that had to be read when these sweeps asked for them.
        uses: Of each module, how many times each expert was computed, [experts].
        shares: Of each module, the share of the time that each expert was in memory, [experts].
        kept: Of each module, whether each expert was in memory at the end of these seconds, [experts].
    """

    modules: tuple[str, ...]
    num_sweeps: int
    num_hits: int
    num_misses: int
    uses: tuple[NDArray[np.int64], ...]
    shares: tuple[NDArray[np.float64], ...]
    kept: tuple[NDArray[np.bool_], ...]

    @classmethod
    def of(cls, timeline: Timeline, start: float, end: float) -> ExpertMap:
        """What happened from `start` to `end`."""
        uses = {module: np.zeros(count, np.int64) for module, count in timeline.experts.items()}
        shares = {module: np.zeros(count) for module, count in timeline.experts.items()}
        kept = {module: np.zeros(count, bool) for module, count in timeline.experts.items()}
        for span in timeline.rows.get("inference agent", ()):
            expert = timeline.expert_of(span)
            if expert is not None and start <= span.start < end and not span.name.startswith("wait for "):
                uses[expert[0]][expert[1]] += 1
        for (module, idx), changes in _changes(timeline).items():
            since: float | None = None
            for moment, is_loaded in changes:
                if is_loaded and since is None:
                    since = moment
                elif not is_loaded and since is not None:
                    shares[module][idx] += max(0.0, min(moment, end) - max(since, start))
                    kept[module][idx] |= since < end < moment
                    since = None
            if since is not None:
                shares[module][idx] += max(0.0, end - max(since, start))
                kept[module][idx] |= since < end
        sweeps = [sweep for sweep in timeline.rows.get("sweeps", ()) if start <= sweep.start < end]
        return cls(
            modules=tuple(timeline.experts),
            num_sweeps=len(sweeps),
            num_hits=sum(sweep.args.get("expert_hits", 0) for sweep in sweeps),
            num_misses=sum(sweep.args.get("expert_misses", 0) for sweep in sweeps),
            uses=tuple(uses.values()),
            shares=tuple(share / max(end - start, 1e-9) for share in shares.values()),
            kept=tuple(kept.values()),
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The modules' names without what all of them have in common: mostly the numbers of the layers."""
        parts = [module.split(".") for module in self.modules]
        num_first = _num_equal(parts)
        num_last = _num_equal([part[num_first:][::-1] for part in parts])
        return tuple(".".join(part[num_first : len(part) - num_last]) or ".".join(part) for part in parts)

    @property
    def most_uses(self) -> int:
        """Of the expert that was used most often."""
        return max(int(uses.max(initial=0)) for uses in self.uses)

    def __str__(self) -> str:
        """The map as text: two blocks, each with a line for each layer and a sign for each expert."""
        used = [f"{np.count_nonzero(uses)} of {len(uses)}" for uses in self.uses]
        kept = [
            f"{np.count_nonzero(of_layer)} at the end, {shares.mean():.0%} on average"
            for of_layer, shares in zip(self.kept, self.shares, strict=True)
        ]
        most = max(self.most_uses, 1)
        lines = [
            self._summary(),
            f'used, by layer and expert ("{_SHADES[-1]}": in {most / max(self.num_sweeps, 1):.0%} of the sweeps)',
            *self._block([uses / most for uses in self.uses], used),
            f'in memory, by layer and expert ("{_SHADES[-1]}": all the time)',
            *self._block(self.shares, kept),
        ]
        return "\n".join(lines)

    def _block(self, values: Sequence[NDArray[np.float64]], notes: Sequence[str]) -> Iterator[str]:
        """A line for each layer, of values from 0 to 1."""
        per_column = -(-max(map(len, values)) // _MAX_COLUMNS)
        width = max(map(len, self.names))
        for name, of_layer, note in zip(self.names, values, notes, strict=True):
            columns = [of_layer[start : start + per_column].mean() for start in range(0, len(of_layer), per_column)]
            drawn = "".join(_SHADES[math.ceil(share * (len(_SHADES) - 1))] for share in columns)
            yield f"{name:{width}} |{drawn}| {note}"

    def _summary(self) -> str:
        num_experts, asked = sum(map(len, self.uses)), self.num_hits + self.num_misses
        hit_rate = f"; {self.num_hits / asked:.0%} of {asked} were in memory when they were needed" if asked else ""
        layers = format_count(len(self.modules), "layer")
        return f"{format_count(num_experts, 'expert')} in {layers}, {format_count(self.num_sweeps, 'sweep')}{hit_rate}"

    def draw(self, output: Path) -> None:
        """Draws the uses on the left, and the time in memory on the right.

        Raises:
            ConfigError: matplotlib is not installed, or the picture cannot be written.
        """
        plots = pyplot()
        num_layers = len(self.modules)
        figure, both = plots.subplots(
            1, 2, figsize=(14, 2.5 + 0.16 * min(num_layers, 100)), sharey=True, layout="constrained"
        )
        figure.suptitle(self._summary(), fontsize=10)
        uses = [of_layer / max(self.num_sweeps, 1) for of_layer in self.uses]
        for axes, title, values, most in (
            (both[0], "used: share of the sweeps", uses, max(self.most_uses / max(self.num_sweeps, 1), 1e-9)),
            (both[1], "in memory: share of the time (a dot: at the end)", self.shares, 1.0),
        ):
            image = axes.imshow(_matrix(values), aspect="auto", interpolation="nearest", vmin=0.0, vmax=most)
            axes.set(title=title, xlabel="expert")
            figure.colorbar(image, ax=axes)
        kept = [(idx, layer) for layer, of_layer in enumerate(self.kept) for idx in np.flatnonzero(of_layer)]
        both[1].scatter(*zip(*kept, strict=True) if kept else ((), ()), s=2, color="white")
        ticks = range(0, num_layers, max(1, num_layers // 24))
        both[0].set(ylabel="layer", yticks=ticks, yticklabels=[self.names[idx] for idx in ticks])
        save(figure, output)


def _num_equal(lists: Sequence[Sequence[str]]) -> int:
    """How many elements all lists begin with."""
    return sum(1 for _ in takewhile(lambda elements: len(set(elements)) == 1, zip(*lists, strict=False)))


def _changes(timeline: Timeline) -> Mapping[tuple[str, int], Sequence[tuple[float, bool]]]:
    """Of each expert, the moments at which it came into memory (True) and left it (False), in order."""
    changes: dict[tuple[str, int], list[tuple[float, bool]]] = defaultdict(list)
    for row, spans in timeline.rows.items():
        if row != "daemon agent" and not row.startswith("loading agent"):
            continue
        for span in spans:
            expert = timeline.expert_of(span)
            if expert is not None:
                is_loaded = row != "daemon agent"
                changes[expert].append((span.end if is_loaded else span.start, is_loaded))
    return {expert: sorted(of_expert) for expert, of_expert in changes.items()}


def _matrix(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """[rows, columns]; shorter rows end with NaN."""
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for idx, row in enumerate(rows):
        matrix[idx, : len(row)] = row
    return matrix
