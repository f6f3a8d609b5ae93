"""Product quantisation and residual codes: a byte chooses one of 256 stored vectors. faiss fits and encodes them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from reinforce.dataset.codecs.base import Arrays, Codes, FittedCodec, Floats
from reinforce.processes.imports import require

_BITS, _CHOICES = 8, 256  # of a byte
_LEAST_FOR_EACH = 4  # vectors of a sample for each choice
_BEAM = 4  # candidates that the encoder of residual codes keeps; to fit them, one, which is faster and no worse


@contextlib.contextmanager
def _faiss(name: str) -> Iterator[Any]:
    """The module for a codec, with one thread, so that k-means gives the same numbers again. Raises UserError."""
    require("select", f"codec {name}", "faiss")
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


class _Quantiser(FittedCodec):
    """Bytes that choose among ``codebook`` [bytes, 256, n] float32, which is ``stored_as`` in faiss's quantiser."""

    stored_as: ClassVar[str]

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._bytes = int(name[2:])

    def width(self, dim: int) -> int:
        return self._bytes

    def least(self, dim: int) -> int:
        return _LEAST_FOR_EACH * _CHOICES

    def require_encoder(self) -> None:
        with _faiss(self.name):
            pass

    def fit(self, sample: Floats, seed: int) -> Arrays:
        with _faiss(self.name) as faiss:
            quantiser = self._quantiser(faiss, sample.shape[1], 1)
            quantiser.cp.seed = seed % 2**31
            quantiser.cp.min_points_per_centroid = 1  # `least` is the bound
            quantiser.cp.max_points_per_centroid = -(-len(sample) // _CHOICES)
            quantiser.train(np.ascontiguousarray(sample))
            found = faiss.vector_to_array(getattr(quantiser, self.stored_as))
        return {"codebook": found.reshape(self.shapes(sample.shape[1])["codebook"])}

    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        with _faiss(self.name) as faiss:
            quantiser = self._quantiser(faiss, values.shape[1], _BEAM)
            faiss.copy_array_to_vector(arrays["codebook"].ravel(), getattr(quantiser, self.stored_as))
            codes: Codes = quantiser.compute_codes(np.ascontiguousarray(values))
        return codes

    @abstractmethod
    def _quantiser(self, faiss: Any, dim: int, beam: int) -> Any:
        """faiss's quantiser of vectors of length ``dim``, which takes a codebook or is trained."""


class ProductQuantiser(_Quantiser):
    """A vector is cut into equal parts, and each part is replaced by the nearest of 256 that k-means has found."""

    pattern = r"pq[1-9]\d{0,3}"
    example = "pq96"
    stored_as = "centroids"

    @staticmethod
    def choices(dim: int) -> list[str]:
        return [f"pq{_divisor(dim, max(1, dim // 8))}"]

    def dim(self, dim: int) -> int:
        if dim % self._bytes:
            fits = _divisor(dim, self._bytes)
            raise ValueError(
                f"{self.name}: vectors of {dim} numbers have no {self._bytes} equal parts; choose pq{fits}"
            )
        return dim

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"codebook": (self._bytes, _CHOICES, dim // self._bytes)}

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        codebook = arrays["codebook"]
        parts: Floats = codebook[np.arange(self._bytes), codes]
        return parts.reshape(len(codes), self._bytes * codebook.shape[2])

    def _quantiser(self, faiss: Any, dim: int, beam: int) -> Any:
        return faiss.ProductQuantizer(dim, self._bytes, _BITS)


def _divisor(dim: int, most: int) -> int:
    """The largest number of equal parts, at most so many."""
    return max(parts for parts in range(1, min(most, dim) + 1) if dim % parts == 0)


class ResidualQuantiser(_Quantiser):
    """The sum of stored vectors, of which each is nearest to what those before it leave."""

    pattern = r"rq[1-9]\d{0,2}"
    example = "rq32"
    stored_as = "codebooks"

    @staticmethod
    def choices(dim: int) -> list[str]:
        return [f"rq{min(32, max(1, dim // 24))}"]

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"codebook": (self._bytes, _CHOICES, dim)}

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        import torch  # takes seconds; sums without copies of what it gathers

        codebook = arrays["codebook"]
        rows = codes + _CHOICES * np.arange(self._bytes)
        flat = torch.from_numpy(codebook.reshape(-1, codebook.shape[2]))
        total: Floats = torch.nn.functional.embedding_bag(torch.from_numpy(rows), flat, mode="sum").numpy()
        return total

    def _quantiser(self, faiss: Any, dim: int, beam: int) -> Any:
        quantiser = faiss.ResidualQuantizer(dim, self._bytes, _BITS)
        quantiser.max_beam_size = beam
        quantiser.is_trained = True  # for a codebook that is copied into it
        return quantiser
