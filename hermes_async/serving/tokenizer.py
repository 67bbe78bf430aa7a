"""A tokenizer that any number of threads can share."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, cast

from transformers import BatchEncoding, PreTrainedTokenizerBase

from hermes_async.modeling.chat_api import has_own_chat_format, template_variables
from hermes_async.modeling.transformers_api import changes_in_calls, forget_truncation_and_padding
from hermes_async.serving.chat_template import render_template
from hermes_async.serving.text_threads import TextThreads

_NUM_ENCODERS = 2  # copies for encoding, each for one thread at a time: a long text leaves the other one free
NUM_THREADS = max(_NUM_ENCODERS, (os.cpu_count() or 1) // 2)
"""Threads that encode at once with the Rust library, which needs no copies."""


class SharedTokenizer:
    """A tokenizer whose results do not depend on how many threads call it.

    Truncation and padding are a tokenizer's state, which a checkpoint's file may set. Here they are switched off once,
    and no call may ask for them: `encoding.truncated` shortens token ids instead.

    Tokenizers of the Rust library are not changed by their calls, so all threads use one without a lock. Other
    tokenizers are: those written in Python, and those that set a text's language in each call. They are copied, and
    each copy has one call at a time. One copy decodes, which is always short; the others do the rest.

    Args:
        tokenizer: Belongs to this object from here on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        forget_truncation_and_padding(tokenizer)
        self._tokenizer = tokenizer
        self._encoders: SimpleQueue[PreTrainedTokenizerBase] | None = None
        self._decoders: SimpleQueue[PreTrainedTokenizerBase] | None = None
        self._threads = TextThreads(NUM_THREADS)
        if changes_in_calls(tokenizer):
            self._encoders, self._decoders = SimpleQueue(), SimpleQueue()
            self._threads = TextThreads(_NUM_ENCODERS)
            self._decoders.put(copy.deepcopy(tokenizer))
            for _ in range(_NUM_ENCODERS):
                self._encoders.put(copy.deepcopy(tokenizer))

    @contextmanager
    def _encoder(self) -> Iterator[PreTrainedTokenizerBase]:
        """A tokenizer that encodes on this thread."""
        with self._threads.place(), self._taken(self._encoders) as tokenizer:
            yield tokenizer

    @contextmanager
    def _taken(self, copies: SimpleQueue[PreTrainedTokenizerBase] | None) -> Iterator[PreTrainedTokenizerBase]:
        """A tokenizer to call: the shared one, or a copy that no other thread uses meanwhile."""
        if copies is None:
            yield self._tokenizer
            return
        tokenizer = copies.get()
        try:
            yield tokenizer
        finally:
            copies.put(tokenizer)

    # --- calls, with transformers' names ---

    def __call__(self, text: str, pair: str | None = None, **options: Any) -> BatchEncoding:
        """Encodes one text, or a pair; `options` are transformers', without truncation and padding.

        Raises:
            RequestError: As `TextThreads.place`.
        """
        with self._encoder() as tokenizer:
            # A batch of one, because a single empty text would have no `input_ids`.
            encoded = tokenizer([text], None if pair is None else [pair], **options)
        return BatchEncoding({name: values[0] for name, values in encoded.items()})

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        with self._taken(self._decoders) as tokenizer:
            return cast(str, tokenizer.decode(list(token_ids), **options))

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        with self._taken(self._decoders) as tokenizer:
            return list(tokenizer.convert_ids_to_tokens(list(token_ids)))

    def pad(self, encoded: Sequence[dict[str, list[int]]], **options: Any) -> BatchEncoding:
        with self._encoder() as tokenizer:
            return tokenizer.pad(list(encoded), **options)

    def chat_text(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat, as `apply_chat_template` makes it; a template is rendered within bounds.

        Args:
            chat_template: In place of the tokenizer's; or the name of one of its templates.

        Raises:
            RequestError: The template takes more steps, time or memory than allowed.
            Exception: The template is not valid, or refuses the messages.
        """
        with self._encoder() as tokenizer:
            if has_own_chat_format(tokenizer):
                options = {**variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
                return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
            source = tokenizer.get_chat_template(chat_template, None if tools is None else list(tools))
            given = template_variables(tokenizer, messages, tools, add_generation_prompt, variables)
        return render_template(source, given)

    # --- properties that no call changes ---

    @property
    def chat_template(self) -> Any:
        return getattr(self._tokenizer, "chat_template", None)

    @property
    def response_template(self) -> Any:
        """How an answer is divided into content, reasoning and calls of tools; None if the checkpoint does not say."""
        return getattr(self._tokenizer, "response_template", None)

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of all special tokens, the longest first."""
        added = [str(token) for token in self.added_tokens_decoder.values() if token.special]
        texts = {*self.all_special_tokens, *added} - {""}
        return tuple(sorted(texts, key=lambda text: (-len(text), text)))

    @property
    def model_max_length(self) -> int:
        return int(self._tokenizer.model_max_length)

    @property
    def pad_token_id(self) -> int | None:
        return cast("int | None", self._tokenizer.pad_token_id)

    @property
    def truncation_side(self) -> str:
        return str(self._tokenizer.truncation_side)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self._tokenizer.all_special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        return list(self._tokenizer.all_special_ids)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        added: Any = self._tokenizer.added_tokens_decoder
        return dict(added) if isinstance(added, Mapping) else {}  # Mistral's own tokenizers have a method here
