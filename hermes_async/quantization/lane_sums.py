"""Sums of the products of vectors of sixteen numbers, for functions that Numba compiles.

Source: as `lanes`.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from llvmlite import ir
from numba import types

from hermes_async.quantization.kernel_sizes import LANES
from hermes_async.quantization.lanes import (
    FLOATS,
    INT16,
    INT32,
    address_of,
    fused_multiply_add,
    intrinsic,
    load_from,
    shuffled,
    vector_of,
)


def empty_sums(num_lines: int):
    """A function that returns sums of a number of lines, which are zero: a tuple of sixteen numbers for each line."""
    sums = types.UniTuple(FLOATS, num_lines)

    @intrinsic
    def zeros(typing_context):
        return sums(), lambda context, builder, signature, args: ir.Constant(context.get_value_type(sums), None)

    return zeros


@intrinsic
def add_products(typing_context, sums, lanes, lines, at, line_length):
    """Sums, to which the products with sixteen elements of each line are added: those at an index of the first line.

    Each line is `line_length` elements after the one before.
    """

    def build(context, builder, signature, args):
        sums, lanes, array, at, line_length = args
        for line in range(signature.args[0].count):
            address = address_of(context, builder, signature.args[2], array, at)
            elements = load_from(builder, address, lanes.type)
            sum_of_line = fused_multiply_add(builder, lanes, elements, builder.extract_value(sums, line))
            sums = builder.insert_value(sums, sum_of_line, line)
            at = builder.add(at, line_length)
        return sums

    return sums(sums, FLOATS, lines, types.intp, types.intp), build


def tile_adder(num_rows: int, num_lines: int):
    """A function that adds the products of sixteen columns of some rows with those of some lines to a tile of sums.

    It takes the sums, a tuple that has those of the first line first, one for each row; the array of the rows, and two
    numbers: where the columns of the first row are in it, and the length of a row; and the array of the lines, and
    where the columns of the first line are in it. Those of the next line follow. Rows are in float32, or the bits of
    bfloat16 in uint16.
    """

    @intrinsic
    def add_tile(typing_context, sums, rows, place, lines, at_line):
        def build(context, builder, signature, args):
            sums, rows, place, lines, at_line = args
            at_row, row_length = (builder.extract_value(place, idx) for idx in range(2))
            of_rows, of_lines = signature.args[1], signature.args[3]
            load_row = _load_bfloat16 if of_rows.dtype == types.uint16 else _load_floats
            columns = []
            for _ in range(num_rows):
                columns.append(load_row(builder, address_of(context, builder, of_rows, rows, at_row)))
                at_row = builder.add(at_row, row_length)
            first = address_of(context, builder, of_lines, lines, at_line)
            for line in range(num_lines):
                elements = _load_floats(builder, builder.gep(first, [ir.Constant(at_line.type, line * LANES)]))
                for row, of_row in enumerate(columns):
                    idx = line * num_rows + row
                    added = fused_multiply_add(builder, of_row, elements, builder.extract_value(sums, idx))
                    sums = builder.insert_value(sums, added, idx)
            return sums

        return sums(sums, rows, types.UniTuple(types.intp, 2), lines, types.intp), build

    return add_tile


def tile_finisher(num_rows: int, num_lines: int):
    """A function that adds the totals of a tile of sums, as `tile_adder` has them, to an array of float32.

    It takes the sums, the array, the index of the first row's totals, and how many numbers the next row's are behind
    them. The totals of a row are one number for each line, one behind the other. The number of lines is a power of two.
    """

    @intrinsic
    def add_totals(typing_context, sums, array, at, row_length):
        def build(context, builder, signature, args):
            sums, array, at, row_length = args
            for row in range(num_rows):
                vectors = [builder.extract_value(sums, line * num_rows + row) for line in range(num_lines)]
                while len(vectors) > 1:
                    vectors = [_pair_sums(builder, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
                (totals,) = vectors
                length = LANES
                while length > num_lines:
                    length //= 2
                    even = shuffled(builder, totals, range(0, 2 * length, 2))
                    totals = builder.fadd(even, shuffled(builder, totals, range(1, 2 * length, 2)))
                address = address_of(context, builder, signature.args[1], array, at)
                before = load_from(builder, address, totals.type)
                builder.store(
                    builder.fadd(before, totals), builder.bitcast(address, totals.type.as_pointer())
                ).align = 4
                at = builder.add(at, row_length)
            return context.get_dummy_value()

        return types.void(sums, array, types.intp, types.intp), build

    return add_totals


def _pair_sums(builder, first, second):
    """The sums of neighbours: those of the first vector, and then those of the second."""
    even, odd = (
        builder.shuffle_vector(
            first, second, ir.Constant(ir.VectorType(INT32, LANES), list(range(start, 2 * LANES, 2)))
        )
        for start in range(2)
    )
    return builder.fadd(even, odd)


def _load_floats(builder, address):
    return load_from(builder, address, vector_of(ir.FloatType()))


def _load_bfloat16(builder, address):
    of_ints = vector_of(INT32)
    bits = builder.zext(load_from(builder, address, vector_of(INT16)), of_ints)
    return builder.bitcast(builder.shl(bits, ir.Constant(of_ints, [16] * LANES)), vector_of(ir.FloatType()))


@intrinsic
def totals(typing_context, sums):
    """The sum of each line: halves of the sixteen numbers are added until one number is left."""

    def build(context, builder, signature, args):
        result = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for line in range(sums.count):
            rest, length = builder.extract_value(args[0], line), LANES
            while length > 1:
                length //= 2
                low = shuffled(builder, rest, range(length))
                rest = builder.fadd(low, shuffled(builder, rest, range(length, 2 * length)))
            result = builder.insert_value(result, builder.extract_element(rest, ir.Constant(INT32, 0)), line)
        return result

    return types.UniTuple(types.float32, sums.count)(sums), build
