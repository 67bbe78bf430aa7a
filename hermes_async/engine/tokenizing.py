"""The part of the engine that turns texts into token ids and back, on threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hermes_async.engine.lifetime import EngineLifetime
from hermes_async.engine.prompt import Prompt, detokenize, token_strings, tokenize

if TYPE_CHECKING:  # imports torch
    from hermes_async.engine.opening import OpenedModel
    from hermes_async.engine.response import ResponseStream

T = TypeVar("T")


class Tokenizing(EngineLifetime):
    """Calls of `Engine` that need only its tokenizer."""

    async def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of a text or of chat messages, as `generate` would use them.

        Args:
            prompt: Text, or chat messages, which go through the checkpoint's chat template.
            tools: As `generate`.
            chat_template_kwargs: As `generate`.
            add_special_tokens: Whether a text gets the tokenizer's special tokens. A chat template has its own.
            add_generation_prompt: Whether chat messages end with the beginning of an answer.

        Raises:
            RequestError: The prompt or a tool cannot be used, or the checkpoint has no tokenizer or chat template.
            ContextLengthError: The text is far longer than the model's context.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: at once.
        """
        with self._call():
            return await self._prepare(
                lambda opened: tokenize(
                    opened,
                    prompt,
                    tools=tools,
                    chat_template_kwargs=chat_template_kwargs,
                    add_special_tokens=add_special_tokens,
                    add_generation_prompt=add_generation_prompt,
                )
            )

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Raises:
            RequestError: A token id is not in the vocabulary, or the checkpoint has no tokenizer.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: at once.
        """
        with self._call():
            return await self._prepare(
                lambda opened: detokenize(opened, token_ids, skip_special_tokens=skip_special_tokens)
            )

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own strings of token ids, such as "Ġword" for " word".

        Raises:
            RequestError: A token id is not in the vocabulary, or the checkpoint has no tokenizer.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: at once.
        """
        with self._call():
            return await self._prepare(lambda opened: token_strings(opened, token_ids))

    async def response_stream(
        self,
        prompt: Prompt,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ResponseStream | None:
        """What divides the answer to a prompt into content, reasoning and calls of tools.

        Generate with `SamplingParams(skip_special_tokens=False)`, because the division may depend on special tokens.

        Args:
            prompt: The prompt of the answer, as for `generate`. Its end may be the beginning of the answer's message.
            tools: The request's tools. Their schemas say of which types the arguments of calls are.
            chat_template_kwargs: As `generate`, if the prompt is chat messages.

        Returns:
            A stream for one answer. None if the checkpoint's tokenizer has no `response_template`; then the text is the
            content.

        Raises:
            RequestError: The prompt or a tool cannot be used.
            CheckpointError: The `response_template` is not valid.
            EngineClosedError, EngineFailedError: The engine was closed, or failed.

        Cancellation: at once.
        """
        from hermes_async.engine.response import prepare_response_stream

        with self._call():
            return await self._prepare(
                lambda opened: prepare_response_stream(
                    opened, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs
                )
            )

    async def _prepare(self, check: Callable[[OpenedModel], T]) -> T:
        """As `Preparations.run`, for calls that do not generate."""
        serving = self._model()
        opened = self._opened_model()
        return await serving.preparations.run(lambda: check(opened))
