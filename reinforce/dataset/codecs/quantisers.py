"""Product quantisation and residual codes: a byte chooses one of 256 stored vectors. faiss fits and encodes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from reinforce.dataset.codecs.base import Arrays, Codes, FittedCodec, Floats

_BITS, _CHOICES = 8, 256  # of a byte
_LEAST_FOR_EACH = 4  # vectors of a sample for each choice
_BEAM = 4  # candidates that the encoder of residual codes keeps; to fit them, one, which is faster and no worse


class _Quantiser(FittedCodec):
    """Bytes that choose among ``codebook`` [bytes, 256, n] float32, which is ``stored_as`` in ``quantiser`` of faiss.

    A ``residual`` one keeps several candidates when it encodes.
    """

    quantiser: ClassVar[str]
    stored_as: ClassVar[str]
    residual: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.codes, self.least = int(name[2:]), _LEAST_FOR_EACH * _CHOICES
        self.encoder = ("select", f"codec {name}", "faiss")

    def fit(self, sample: Floats, seed: int) -> Arrays:
        with self._faiss(sample.shape[1], 1) as (faiss, quantiser):
            quantiser.cp.seed = seed % 2**31
            quantiser.cp.min_points_per_centroid = 1  # `least` is the bound
            quantiser.cp.max_points_per_centroid = -(-len(sample) // _CHOICES)
            quantiser.train(np.ascontiguousarray(sample))
            found = faiss.vector_to_array(getattr(quantiser, self.stored_as))
        return {"codebook": found.reshape(self.shapes(sample.shape[1])["codebook"])}

    def encode(self, values: Floats, arrays: Arrays) -> Codes:
        with self._faiss(values.shape[1], _BEAM) as (faiss, quantiser):
            faiss.copy_array_to_vector(arrays["codebook"].ravel(), getattr(quantiser, self.stored_as))
            codes: Codes = quantiser.compute_codes(np.ascontiguousarray(values))
        return codes

    @contextlib.contextmanager
    def _faiss(self, dim: int, beam: int) -> Iterator[tuple[Any, Any]]:
        """The module and its quantiser of vectors of length ``dim``, which takes a codebook or is trained.

        It has one thread, so that k-means gives the same numbers again. Raises UserError.
        """
        self.require_encoder()
        import faiss

        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            quantiser = getattr(faiss, self.quantiser)(dim, self.codes, _BITS)
            if self.residual:
                quantiser.max_beam_size = beam
                quantiser.is_trained = True  # for a codebook that is copied into it
            yield faiss, quantiser
        finally:
            faiss.omp_set_num_threads(threads)


class ProductQuantiser(_Quantiser):
    """A vector is cut into equal parts, and each part is replaced by the nearest of 256 that k-means has found."""

    pattern = r"pq[1-9]\d{0,3}"
    example = "pq96"
    quantiser = "ProductQuantizer"
    stored_as = "centroids"

    def dim(self, dim: int) -> int:
        if dim % self.codes:
            fits = divisor(dim, self.codes)
            raise ValueError(f"{self.name}: vectors of {dim} numbers have no {self.codes} equal parts; choose pq{fits}")
        return dim

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"codebook": (self.codes, _CHOICES, dim // self.codes)}

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        codebook = arrays["codebook"]
        parts: Floats = codebook[np.arange(self.codes), codes]
        return parts.reshape(len(codes), self.codes * codebook.shape[2])


def divisor(dim: int, most: int) -> int:
    """The largest number of equal parts, at most so many."""
    return max(parts for parts in range(1, min(most, dim) + 1) if dim % parts == 0)


class ResidualQuantiser(_Quantiser):
    """The sum of stored vectors, of which each is nearest to what those before it leave."""

    pattern = r"rq[1-9]\d{0,2}"
    example = "rq32"
    quantiser = "ResidualQuantizer"
    residual = True
    stored_as = "codebooks"

    def shapes(self, dim: int) -> Mapping[str, tuple[int, ...]]:
        return {"codebook": (self.codes, _CHOICES, dim)}

    def decode(self, codes: Codes, arrays: Arrays) -> Floats:
        import torch  # takes seconds; sums without copies of what it gathers

        codebook = arrays["codebook"]
        rows = codes + _CHOICES * np.arange(self.codes)
        flat = torch.from_numpy(codebook.reshape(-1, codebook.shape[2]))
        total: Floats = torch.nn.functional.embedding_bag(torch.from_numpy(rows), flat, mode="sum").numpy()
        return total
