"""`/v1/embeddings`: sentence vectors."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from hermes_async import Embeddings
from hermes_async.server.errors import ERRORS
from hermes_async.server.fields import Body, Model, Text, TokenIds, User
from hermes_async.server.model_server import Server

router = APIRouter(responses=ERRORS)

_MAX_INPUTS = 2048
_MAX_DIMENSIONS = 2**16


def _kind_of_input(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else value
    several = isinstance(value, list) and isinstance(first, str | list)
    if isinstance(first, list | int):
        return "lists" if several else "ids"
    return "texts" if isinstance(value, list) else "text"


Input = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Text], Field(min_length=1, max_length=_MAX_INPUTS), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=_MAX_INPUTS), Tag("lists")],
    Discriminator(_kind_of_input),
]


class EmbeddingRequest(Body):
    """A request for vectors of texts, or of token ids.

    Attributes:
        dimensions: A length to which vectors are cut. `Engine.embed_counted` says which models allow it.
    """

    model: Model | None = None
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=_MAX_DIMENSIONS)] | None = None
    user: User | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """Each text, or the token ids of each."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input


class EmbeddingBody(BaseModel):
    """One vector: numbers, or float32 in little-endian order as base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Vectors, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def embeddings(body: EmbeddingRequest, request: Request, server: Server) -> Response:
    """Vectors of texts. They equal those of sentence-transformers."""
    server.check_model(body.model)

    async def work() -> bytes:
        embedded = await server.engine.embed_counted(body.inputs(), dimensions=body.dimensions)
        server.metrics.count_encoded(sum(embedded.num_tokens))
        as_base64 = body.encoding_format == "base64"
        return await anyio.to_thread.run_sync(_json, server.model_name, embedded, as_base64, abandon_on_cancel=True)

    return Response(await server.run(request, work), media_type="application/json")


def _json(model_name: str, embedded: Embeddings, as_base64: bool) -> bytes:
    """The body of an answer; for a worker thread.

    It is made vector by vector: the interpreter runs nothing else while it writes a list, and there may be millions of
    numbers.
    """
    data = []
    for index, vector in enumerate(embedded.vectors.astype("<f4")):
        number_list = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
        data.append(EmbeddingBody(index=index, embedding=number_list).model_dump_json())
    num_tokens = sum(embedded.num_tokens)
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    rest = EmbeddingList(data=[], model=model_name, usage=usage).model_dump_json(exclude={"data"})
    return f'{{"data":[{",".join(data)}],{rest[1:]}'.encode()
