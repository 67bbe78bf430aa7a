"""Makes stages of a plan resident, and streams the others: weights are taken out of the model before they leave."""

from __future__ import annotations

from collections.abc import Collection

from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.planning.plan import Plan


class ResidentStages:
    """The stages of a loaded model, by their index in the plan. Event-loop side only.

    Args:
        num_stages: Of the plan. The pipeline may have one more before them, the base, which is always resident.
    """

    def __init__(self, pipeline: Pipeline, model: StreamedModel, num_stages: int) -> None:
        self._pipeline = pipeline
        self._model = model
        self._base = pipeline.stages[: len(pipeline.stages) - num_stages]
        self._stages = pipeline.stages[len(pipeline.stages) - num_stages :]

    async def set(self, resident: Collection[int]) -> None:
        """Makes exactly these stages of the plan resident; between sweeps only.

        Raises:
            MemoryBudgetError: The system does not give the memory of stages that come. Those that leave have left.

        Cancellation: as `Pipeline.set_resident`.
        """
        for idx, stage in enumerate(self._stages):
            if stage.resident and idx not in resident:
                self._model.unbind(stage)
        staying = (stage for idx, stage in enumerate(self._stages) if idx in resident)
        await self._pipeline.set_resident([*self._base, *staying])


def slots_of(plan: Plan, indices: Collection[int]) -> int:
    """Bytes of the buffers of these stages of a plan."""
    return sum(plan.stages[idx].slot_bytes for idx in indices)
