"""One case of the fuzzer: a file of a checkpoint is changed, an engine opens it, and the outcome is named.

Most cases leave out what the changed file has no part in. A whole engine opens the others, one in `_WHOLE_ONE_IN`.
"""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import anyio

from hermes_async import Engine, EngineConfig, HermesError, RequestError, SamplingParams
from hermes_async.engine.opening import OpenedModel, load_tokenizer, open_model
from hermes_async.engine.prompt import detokenize, encode, prepare
from hermes_async.engine.response import prepare_response_stream
from hermes_async.foreign_errors import one_checkpoint, one_request
from hermes_async.serving.request import EncodedPrompt
from hermes_async.serving.speculation import AcceptanceRates
from hermes_async.serving.tokenizer import SharedTokenizer
from hermes_async.storage.checkpoint import Checkpoint
from tests.fuzz.corpus import MODELS, Model, save_profile_of
from tests.fuzz.mutations import PLACES, mutate, put_in_place

_SHARES = {
    "header": 30, "index": 14, "gguf": 16, "config": 18, "generation": 6, "tokenizer": 6, "tokenizer settings": 3,
    "template": 3, "profile": 2, "pooling": 1, "place": 1,
}  # fmt: skip
"""How often each part is changed, in percent."""

_TEXT_PARTS = ("tokenizer", "tokenizer settings", "template")
"""What a model is not built from: only prompts are made and tokens decoded, as the engine does it on its threads."""
_CHECKED_PARTS = ("config", "gguf", "place")
"""What the self-check's small model is built from."""
_WHOLE_ONE_IN = 10

_BUDGET = "8MiB"
_CONFIG = EngineConfig(max_sequences=2, max_tokens_per_sweep=16)
_UNCHECKED = replace(_CONFIG, self_check="skip")
_PARAMS = SamplingParams(max_tokens=2)
_TEXTS = (("user", "w3 w4 w7 w7 w7 w7 w7 w7 w7 w7"), ("assistant", "w5"), ("user", "w6"))
_ANSWER = " w5 <think>w6 w7</think> <call>w8=w9</call> w7 w7 w7 w7"
_MESSAGES = [{"role": role, "content": content} for role, content in _TEXTS]


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        outcome: "opened", "refused" (an error of ours), "foreign" (another error) or "memory".
        error: The class and the text of the error.
        seconds: CPU time of the process.
        more_bytes: By how much the process was larger at most than before.
    """

    number: int
    part: str
    what: str
    outcome: str
    error: str
    seconds: float
    more_bytes: int


def chosen(number: int, seed: int, only: str | None) -> tuple[Random, str, Model]:
    """The random numbers of a case, the part that it changes, and the model."""
    random = Random(f"{seed}:{number}")
    part = random.choices(list(_SHARES), list(_SHARES.values()))[0] if only is None else only
    having = [model for model in MODELS if part in ("place", *model.parts)] or [MODELS[0]]
    return random, part, random.choice(having)


class Cases:
    """Makes and opens cases in a folder of its own, which has a copy of the corpus.

    Args:
        cache: Where profiles are: `XDG_CACHE_HOME` of this process.
    """

    def __init__(self, corpus: Path, folder: Path, seed: int, only: str | None = None) -> None:
        self._corpus, self._folder, self._seed, self._only = corpus, folder, seed, only
        shutil.copytree(corpus, folder, dirs_exist_ok=True)
        self._profile = save_profile_of(folder / "llama")
        self._profile_data = self._profile.read_bytes()
        self._unchanged: OpenedModel | None = None  # that of the corpus, once it is needed

    def run(self, number: int) -> Result:
        """Changes the files, opens the model, and puts the files back."""
        random, part, model = chosen(number, self._seed, self._only)
        if part == "profile":
            file, data = self._profile, self._profile_data
        else:
            name = random.choice(list(model.parts)) if part == "place" else part
            file = self._folder / model.name / model.parts[name]
            data = (self._corpus / model.name / model.parts[name]).read_bytes()
        what = f"{model.name}/{file.name}"
        try:
            if part == "place":
                place = random.choice(list(PLACES))
                put_in_place(place, file)
                what = f"{place} as {what}"
            else:
                file.write_bytes(mutate(random, part, data))
            return self._opened(number, part, what, model, whole=number % _WHOLE_ONE_IN == 0)
        finally:
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
            file.write_bytes(data)

    def _opened(self, number: int, part: str, what: str, model: Model, *, whole: bool) -> Result:
        source = model.source(self._folder)
        config = _CONFIG if whole or part in _CHECKED_PARTS else _UNCHECKED
        if self._unchanged is None and part in _TEXT_PARTS and not whole:
            self._unchanged = open_model(model.source(self._corpus), _BUDGET, _UNCHECKED)
        before, started = _reset_peak(), time.process_time()
        outcome, text = "opened", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if part in _TEXT_PARTS and not whole:
                    assert self._unchanged is not None
                    _use_tokenizer(source, self._unchanged)
                else:
                    anyio.run(_use, source, config, model.name == "bert")
        except HermesError as error:
            outcome, text = "refused", f"{type(error).__name__}: {error}"
            if _wanted_memory(error):
                outcome = "memory"
            elif part == "profile":
                outcome = "foreign"  # a damaged profile is not used, and the model opens
        except BaseException as error:
            outcome, text = "foreign", f"{type(error).__name__}: {error}"
        return Result(number, part, what, outcome, text[:500], time.process_time() - started, max(0, _peak() - before))


async def _use(source: Path, config: EngineConfig, is_encoder: bool) -> None:
    async with Engine(source, memory_budget=_BUDGET, config=config) as engine:
        if is_encoder:
            await engine.embed(["w3 w4"])
        elif engine.plan is not None:
            try:
                completion = await engine.complete(_MESSAGES, _PARAMS)
                responses = await engine.response_stream(_MESSAGES)
                if responses is not None:
                    responses.push(completion.text + _ANSWER)
                    responses.finish()
            except RequestError as error:  # of the template or the tokenizer
                if _wanted_memory(error):
                    raise
                await engine.complete([3, 4], _PARAMS)


def _use_tokenizer(source: Path, unchanged: OpenedModel) -> None:
    """Prepares a chat, and decodes an answer. Errors of other libraries become ours where they do in an engine."""
    with one_checkpoint(source):
        tokenizer, error = load_tokenizer(Checkpoint.open(source))
    shared = None if tokenizer is None else SharedTokenizer(tokenizer)
    opened = replace(unchanged, tokenizer=shared, tokenizer_error=error)
    prompt = EncodedPrompt([3, 4])
    try:
        with one_request("the preparation of the request"):
            prompt = encode(opened, _MESSAGES)
            responses = prepare_response_stream(opened, _MESSAGES, tools=None, chat_template_kwargs=None)
            if responses is not None:
                responses.push(_ANSWER)
                responses.finish()
            detokenize(opened, [3, 4, 5])
    except RequestError as refused:
        if _wanted_memory(refused):
            raise
    with one_request("the preparation of the request"):
        prepared = prepare(opened, prompt, _PARAMS, prompt_lookup=True, prior=AcceptanceRates())
    if prepared.text_stream is not None:
        with one_request("the decoding of a token"):
            for token_id in range(2, 8):
                prepared.text_stream.push(token_id, final=token_id == 7)


def _wanted_memory(error: BaseException | None) -> bool:
    """Whether memory was refused to a library before the error of ours."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- the memory of this process ---


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _reset_peak() -> int:
    """Forgets the peak of this process's memory, and returns what it takes now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def as_json(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}
