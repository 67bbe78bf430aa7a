"""How the weights of a model are stored, summed up for a plan."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from hermes_async.planning.model_sizes import WeightFormat
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import PlainEncoding


def weight_formats(parameters: Iterable[EncodedParameter]) -> tuple[WeightFormat, ...]:
    """The formats of all matrices that are dequantized, those with most bytes first. Plain numbers are left out.

    Stored tensors that several weights share, such as those of tied weights, count once.
    """
    formats: dict[str, WeightFormat] = {}
    counted: set[tuple[Path, int]] = set()
    for matrix in (matrix for parameter in parameters for matrix in parameter.matrices):
        encoding = matrix.encoding
        if isinstance(encoding, PlainEncoding) or (matrix.first.file, matrix.first.offset) in counted:
            continue
        specs = {(spec.file, spec.offset): spec for spec in matrix.parts.values()}
        num_bytes = sum(spec.nbytes for place, spec in specs.items() if place not in counted)
        counted.update(specs)
        detail = encoding.detail(*matrix.shape[-2:])
        name = f"{encoding.name} ({detail})" if detail else encoding.name
        before = formats.get(name, WeightFormat(name, 0, 0, 0.0))
        num_elements = prod(matrix.shape)
        formats[name] = WeightFormat(
            name=name,
            stored_bytes=before.stored_bytes + num_bytes,
            num_elements=before.num_elements + num_elements,
            dequantizing_s=before.dequantizing_s + num_elements / encoding.elements_per_second,
        )
    return tuple(sorted(formats.values(), key=lambda one: -one.stored_bytes))
