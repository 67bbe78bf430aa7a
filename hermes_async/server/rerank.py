"""`/v1/rerank`: documents in the order of their scores for a query, by a cross-encoder with one label."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, Tag

from hermes_async.server.errors import ERRORS
from hermes_async.server.fields import Body, Model, Text, User, new_id
from hermes_async.server.model_server import Server

router = APIRouter(responses=ERRORS)

_MAX_DOCUMENTS = 2048


class TextDocument(Body):
    """A document as an object."""

    text: Text


def _kind_of_document(value: object) -> str:
    return "text" if isinstance(value, str) else "object"


Document = Annotated[
    Annotated[Text, Tag("text")] | Annotated[TextDocument, Tag("object")], Discriminator(_kind_of_document)
]


class RerankRequest(Body):
    """A query, and the documents to rank.

    Attributes:
        top_n: Only so many are returned; 0 or None returns all.
        return_documents: Results have the documents' texts. None stands for True, as in vLLM.
    """

    model: Model | None = None
    query: Text
    documents: Annotated[list[Document], Field(min_length=1, max_length=_MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    return_documents: bool | None = None
    user: User | None = None

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RankedBody(BaseModel):
    """A document with its score; `index` is its place in the request."""

    index: int
    document: TextDocument | None = None
    relevance_score: float


class RerankUsage(BaseModel):
    """Token counts of all pairs of the query and a document."""

    prompt_tokens: int
    total_tokens: int


class Ranking(BaseModel):
    """Documents, the best first."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RankedBody]


@router.post("/v1/rerank")
@router.post("/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, request: Request, server: Server) -> Ranking:
    """Documents in the order of their scores. They equal those of sentence-transformers' `CrossEncoder.rank`."""
    server.check_model(body.model)
    texts = body.texts()
    ranked = await server.run(request, lambda: server.engine.rank(body.query, texts))
    num_tokens = sum(document.num_tokens for document in ranked)
    server.metrics.count_encoded(num_tokens)
    results = [
        RankedBody(
            index=document.index,
            document=None if body.return_documents is False else TextDocument(text=texts[document.index]),
            relevance_score=document.score,
        )
        for document in ranked[: body.top_n or None]
    ]
    usage = RerankUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return Ranking(id=new_id("rerank"), model=server.model_name, usage=usage, results=results)
