"""A FastAPI service of your own: HERMES_ASYNC_MODEL=... python fastapi_app.py.

    curl -N http://127.0.0.1:8000/generate --json '{"prompt": "ROMEO:"}'

A request that cannot be served gets an error status. The request of a client that goes away is freed within one stage.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from hermes_async import Chunk, Engine, QueueFullError, RequestError, SamplingParams
from hermes_async.demo import MODEL_PATH

engine = Engine(os.environ.get("HERMES_ASYNC_MODEL", MODEL_PATH))


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """The engine is open for as long as the application runs."""
    async with engine:
        yield


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """What a client sends. Bound each number, so that no client takes all memory."""

    prompt: str = Field(max_length=10_000)
    max_tokens: int = Field(default=64, ge=1, le=512)


async def answer(question: Question) -> AsyncIterator[AsyncIterator[Chunk]]:
    """The chunks of an answer. FastAPI leaves this function after the response, also if the client has gone away."""
    params = SamplingParams(max_tokens=question.max_tokens)
    async with engine.stream(question.prompt, params) as chunks:  # raises here if the request is refused
        yield chunks


@app.post("/generate")
async def generate(chunks: Annotated[AsyncIterator[Chunk], Depends(answer)]) -> StreamingResponse:
    """Streams the answer as plain text."""
    return StreamingResponse((chunk.text async for chunk in chunks), media_type="text/plain")


@app.exception_handler(RequestError)
async def refused(_: Request, error: RequestError) -> JSONResponse:
    """A request that the engine refused, before the first byte of the response."""
    status = 429 if isinstance(error, QueueFullError) else 400
    return JSONResponse({"error": str(error)}, status_code=status)


if __name__ == "__main__":
    uvicorn.run(app)
