"""Embeddings and nearest neighbours: python embeddings.py [MODEL].

The demo model is no embedding model: it stands in with the hidden state of each text's last token. A checkpoint of
sentence-transformers, such as sentence-transformers/all-MiniLM-L6-v2, finds neighbours by meaning.
"""

import sys

import anyio
import numpy as np

from hermes_async import Engine
from hermes_async.demo import MODEL_PATH

TEXTS = [
    "The people want corn at a fair price.",
    "Give us bread, and give it cheap.",
    "He fought alone within the city's gates.",
    "A soldier stood against them all.",
    "She loves the son of her father's enemy.",
]
QUERY = "We are hungry, and grain costs too much."


async def main(model: str = str(MODEL_PATH)) -> None:
    """Prints the texts by their similarity to the query, nearest first."""
    async with Engine(model) as engine:
        vectors = await engine.embed(TEXTS, normalize=True)  # float32 [texts, hidden]
        query = await engine.embed(QUERY, normalize=True)  # float32 [hidden]
    similarities = vectors @ query  # the cosine, because all vectors have length 1
    print(QUERY)
    for idx in np.argsort(-similarities):
        print(f"{similarities[idx]:7.3f}  {TEXTS[idx]}")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
