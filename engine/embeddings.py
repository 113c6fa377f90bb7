"""What the text encoder made of the last prompts, so that another seed of the same prompt costs no encoding.

It knows no framework: an embedding is anything that says how many bytes it has.
"""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

CACHE_BYTES = 64 * 2**20  # four prompts of the 4B model in float32


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Embedding = TypeVar("Embedding", bound=Sized)


class EmbeddingCache(Generic[Embedding]):
    """The last prompts' embeddings, the least recently used dropped first."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._embeddings: OrderedDict[str, Embedding] = OrderedDict()

    def get(self, prompt: str) -> Embedding | None:
        if prompt in self._embeddings:
            self._embeddings.move_to_end(prompt)
        return self._embeddings.get(prompt)

    def put(self, prompt: str, embedding: Embedding) -> None:
        """Keeps `embedding`, even when it alone is over the bound."""
        self._embeddings[prompt] = embedding
        while len(self._embeddings) > 1 and sum(kept.nbytes for kept in self._embeddings.values()) > self.max_bytes:
            self._embeddings.popitem(last=False)
