"""The part of the engine for single forward passes: outputs, sentence vectors, labels and scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hermes_async.config import Pooling
from hermes_async.engine.streaming import Streaming
from hermes_async.foreign_errors import one_request

if TYPE_CHECKING:  # these import torch, which only an engine that opens may do
    import numpy as np
    import numpy.typing as npt

    from hermes_async.results import Embeddings, Label, RankedDocument


class Forwarding(Streaming):
    """Calls of `Engine` that do not generate."""

    async def forward(self, **inputs: Any) -> Any:
        """Runs the model's own `forward`, and returns transformers' output object.

        Forward passes that wait at the same time share a sweep, if there is memory for their activations. Each is
        computed as if it were alone.

        Args:
            inputs: Arguments of the model's class: tensors, arrays or lists, such as `input_ids=[[1, 2]]` or
                `pixel_values=` [images, channels, height, width]; flags such as `output_hidden_states=True`.

        Raises:
            RequestError: The model's forward does not take an input, or does not run on it.
            ContextLengthError: More tokens than the model has positions.
            MemoryBudgetError: The activations may take more memory than the plan's workspace.
            ReadError: Weights could not be read; the engine goes on.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: the pass ends before its next stage.
        """
        from hermes_async.serving.forward_passes import prepare_forward

        with self._call():
            job = await self._prepare(lambda opened: prepare_forward(opened, inputs))
            return await self._model().forward(job)

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        truncate: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Sentence vectors, float32 [texts, out], or [out] for one text. They equal those of sentence-transformers.

        `out` is the hidden size, or the size after the checkpoint's Dense layers.
        Texts of similar length share a forward pass, and passes share sweeps, also with other calls.

        Args:
            pooling: "mean", "cls", "max", "last", "weightedmean" or "mean_sqrt_len". None takes that of the checkpoint
                (sentence-transformers' files), else "last" for a causal language model, else "mean".
            normalize: Scale vectors to length 1. None takes the checkpoint's setting if `pooling` is None too.
            truncate: Cut texts that are longer than the checkpoint allows, or refuse them. None cuts them if the
                checkpoint has sentence-transformers' files.
            prompt_name: One of the checkpoint's prompts, put before each text; None takes its default, if any.
            prompt: A text to put before each text.
            truncate_dim: The length to which each vector is cut; None takes the checkpoint's setting.

        Raises:
            RequestError: An item is not a text, or the model does not take texts, or has no hidden states.
            ContextLengthError: A text is too long.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.embedding import EmbeddingOptions, embed_batches, prepare_embedding

        with one_request("the reading of the texts"):
            several = [texts] if isinstance(texts, str) else list(texts)
        options = EmbeddingOptions(
            pooling=pooling,
            normalize=normalize,
            truncate=truncate,
            prompt_name=prompt_name,
            prompt=prompt,
            truncate_dim=truncate_dim,
        )
        with self._call():
            batches = await self._prepare(lambda opened: prepare_embedding(opened, several, options))
            vectors = await embed_batches(self._model(), batches)
        return vectors[0] if isinstance(texts, str) else vectors

    async def embed_counted(
        self, inputs: Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None
    ) -> Embeddings:
        """As `embed` with the checkpoint's own settings, and with the numbers of tokens; for servers.

        Args:
            inputs: Texts; or token ids, which are computed as they are, without a prompt and special tokens.
            dimensions: The length to which each vector is cut; it is scaled to length 1 then. Unlike `truncate_dim`, it
                may be less than the vectors' own length only where the checkpoint says that it was trained for that:
                `matryoshka_dimensions` or `is_matryoshka` in its `config.json`, or a `truncate_dim` in
                `config_sentence_transformers.json`, which is then the most that is allowed.

        Raises:
            RequestError: As `embed`; or the checkpoint does not allow `dimensions`.
            ContextLengthError: A text or an item of token ids is too long, and is not truncated.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.embedding import EmbeddingOptions, embed_batches, prepare_embedding
        from hermes_async.results import Embeddings

        with one_request("the reading of the inputs"):
            several: Any = list(inputs)
        options = EmbeddingOptions(dimensions=dimensions)
        with self._call():
            batches = await self._prepare(lambda opened: prepare_embedding(opened, several, options))
            vectors = await embed_batches(self._model(), batches)
        num_tokens = {
            idx: length for batch in batches for idx, length in zip(batch.indices, batch.lengths, strict=True)
        }
        return Embeddings(vectors, tuple(num_tokens[idx] for idx in sorted(num_tokens)))

    async def classify(
        self, item: str | os.PathLike[str] | Sequence[str], *, truncate: bool = False
    ) -> Sequence[Label]:
        """All labels of a text, or of an image file if the model takes images, the most likely first.

        A pair of texts works too, for cross-encoders: `classify((query, document))`.

        Raises:
            RequestError: The model does not classify texts or images, or the file is not an image.
            ContextLengthError: The text is too long; `truncate` cuts it.
            CheckpointError: The checkpoint does not say how images are prepared.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.classification import prepare_classification

        with self._call():
            job = await self._prepare(lambda opened: prepare_classification(opened, item, truncate=truncate))
            labels: Sequence[Label] = await self._model().forward(job)
        return labels

    async def rank(self, query: str, documents: Sequence[str]) -> list[RankedDocument]:
        """Scores of documents for a query by a cross-encoder with one label, the best first.

        They equal those of sentence-transformers' `CrossEncoder.rank`, whose settings are read from the checkpoint. A
        pair that is too long is truncated. All pairs share sweeps, also with other calls.

        Raises:
            RequestError: The model is not a cross-encoder with one label, or an item is not a text.
            ContextLengthError: The query alone is far longer than a pair may be.
            MemoryBudgetError, ReadError, EngineClosedError, EngineFailedError: As `forward`.

        Cancellation: as `forward`.
        """
        from hermes_async.engine.embedding import embed_batches
        from hermes_async.engine.ranking import prepare_ranking, ranked

        with one_request("the reading of the documents"):
            several = [documents] if isinstance(documents, str) else list(documents)
        with self._call():
            batches = await self._prepare(lambda opened: prepare_ranking(opened, query, several))
            return ranked(batches, await embed_batches(self._model(), batches))
