"""Vectors of sixteen numbers, for functions that Numba compiles.

Numba has no vectors. Its compiler makes vector instructions of loops where it can, and it often cannot. A function that
handles `Lanes` asks for them: an operation on `Lanes` is one operation on a vector of LLVM, for which LLVM finds the
instructions that the processor has.

`Lanes` have the operators `+`, `-` and `*`, with `Lanes` of the same element or with one number of it. Bytes wrap
around, as in C. The functions here can be called in compiled functions only. Arrays are contiguous, and no index is
checked.

Source: LLVM Language Reference Manual, "Vector Type" and "Vector Operations".
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from hermes_async.quantization.kernel_sizes import LANES

# Numba's type says that such a function takes what its builder takes, which is one argument more.
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic


class Lanes(types.Type):
    """The type of sixteen numbers of an element type of Numba."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(manager.lookup(lanes.element).get_value_type(), LANES))


BYTES, INT8, FLOATS = Lanes(types.uint8), Lanes(types.int8), Lanes(types.float32)

_INT1, _INT8, INT16, INT32 = (ir.IntType(width) for width in (1, 8, 16, 32))


def vector_of(element):
    """LLVM's vector of sixteen elements."""
    return ir.VectorType(element, LANES)


# --- from memory, and into it ---


@intrinsic
def element_at(typing_context, array, at):
    """One element. An index in brackets may be negative, which takes time to check."""

    def build(context, builder, signature, args):
        return _load(context, builder, signature, args, context.get_value_type(array.dtype))

    return array.dtype(array, types.intp), build


@intrinsic
def lanes_at(typing_context, array, at):
    """Sixteen elements from an index on."""
    lanes = Lanes(array.dtype)

    def build(context, builder, signature, args):
        return _load(context, builder, signature, args, context.get_value_type(lanes))

    return lanes(array, types.intp), build


@intrinsic
def bits_at(typing_context, array, at):
    """The sixteen bits of two bytes from an index on, the lowest of the first byte first: a byte of 0 or 1 for each."""

    def build(context, builder, signature, args):
        bits = builder.bitcast(_load(context, builder, signature, args, INT16), vector_of(_INT1))
        return builder.zext(bits, vector_of(_INT8))

    return BYTES(array, types.intp), build


@intrinsic
def nibbles_at(typing_context, array, at):
    """The sixteen numbers of four bits in eight bytes from an index on; the first is in the lower half of its byte."""

    def build(context, builder, signature, args):
        of_words = ir.VectorType(INT16, LANES // 2)
        stored = _load(context, builder, signature, args, ir.VectorType(_INT8, LANES // 2))
        low = builder.zext(stored, of_words)
        both = builder.or_(low, builder.shl(low, ir.Constant(of_words, [4] * (LANES // 2))))
        masked = builder.and_(both, ir.Constant(of_words, [0x0F0F] * (LANES // 2)))
        return builder.bitcast(masked, vector_of(_INT8))

    return BYTES(array, types.intp), build


@intrinsic
def write_lanes(typing_context, array, at, lanes):
    """Writes sixteen elements from an index on."""

    def build(context, builder, signature, args):
        _store(context, builder, signature, args, args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes(array.dtype)), build


@intrinsic
def write_bfloat16(typing_context, array, at, lanes):
    """Writes sixteen numbers in float32, which are numbers of bfloat16, into an array of their bits in uint16."""

    def build(context, builder, signature, args):
        bits = builder.bitcast(args[2], vector_of(INT32))
        high = builder.trunc(builder.lshr(bits, ir.Constant(bits.type, [16] * LANES)), vector_of(INT16))
        _store(context, builder, signature, args, high)
        return context.get_dummy_value()

    return types.void(array, types.intp, FLOATS), build


def _store(context, builder, signature, args, value):
    address = address_of(context, builder, signature.args[0], args[0], args[1])
    builder.store(value, builder.bitcast(address, value.type.as_pointer())).align = 1


def _load(context, builder, signature, args, of_value):
    return load_from(builder, address_of(context, builder, signature.args[0], args[0], args[1]), of_value)


def load_from(builder, address, of_value):
    """Reads a value of a type of LLVM, at any address."""
    loaded = builder.load(builder.bitcast(address, of_value.as_pointer()))
    loaded.align = 1
    return loaded


def address_of(context, builder, of_array, array, at):
    """That of the element of an array at an index. `of_array` is Numba's type of the array."""
    return builder.gep(context.make_array(of_array)(context, builder, array).data, [at])


# --- operations ---


@intrinsic
def filled(typing_context, number):
    """Sixteen times the same number."""
    return Lanes(number)(number), lambda context, builder, signature, args: _filled(builder, args[0])


@intrinsic
def half_filled(typing_context, first, second):
    """Eight times a number, and then eight times another."""

    def build(context, builder, signature, args):
        is_second = ir.Constant(vector_of(_INT1), [lane >= LANES // 2 for lane in range(LANES)])
        return builder.select(is_second, _filled(builder, args[1]), _filled(builder, args[0]))

    return Lanes(first)(first, first), build


@intrinsic
def bits_of(typing_context, lanes, shift, mask):
    """Some bits of each byte: those of `mask`, after a shift to the right by the same number for all.

    `mask` has none of the highest bits, as many as `shift`. Processors shift words, but no bytes; so the bits that come
    from the next byte must be masked.
    """

    def build(context, builder, signature, args):
        of_words = ir.VectorType(INT16, LANES // 2)
        count = builder.zext(args[1], INT16)
        words = builder.lshr(builder.bitcast(args[0], of_words), _filled(builder, count, LANES // 2))
        return builder.and_(builder.bitcast(words, args[0].type), _filled(builder, args[2]))

    return BYTES(BYTES, types.uint8, types.uint8), build


@intrinsic
def bits_of_each(typing_context, lanes, shifts, masks):
    """Some bits of each byte, with a shift to the right and a mask for each."""
    return BYTES(BYTES, BYTES, BYTES), lambda context, builder, signature, args: builder.and_(
        builder.lshr(args[0], args[1]), args[2]
    )


@intrinsic
def high_bytes(typing_context, lanes, number):
    """The high bytes of the products of bytes and one byte."""

    def build(context, builder, signature, args):
        of_words = vector_of(INT16)
        words, factor = builder.zext(args[0], of_words), builder.zext(_filled(builder, args[1]), of_words)
        shifted = builder.lshr(builder.mul(words, factor), ir.Constant(of_words, [8] * LANES))
        return builder.trunc(shifted, args[0].type)

    return BYTES(BYTES, types.uint8), build


@intrinsic
def signed(typing_context, lanes):
    """The same bytes as numbers from -128 to 127."""
    return INT8(BYTES), lambda context, builder, signature, args: args[0]


@intrinsic
def floats(typing_context, lanes):
    """Integers as numbers in float32."""

    def build(context, builder, signature, args):
        extend = builder.sext if lanes.element.signed else builder.zext
        return builder.sitofp(extend(args[0], vector_of(INT32)), vector_of(ir.FloatType()))

    return FLOATS(lanes), build


@intrinsic
def floats_of_e4m3(typing_context, lanes):
    """Bytes as numbers in FP8 (e4m3) in float32.

    Sign, exponent and mantissa are moved to their places in float32. The result is the number times 2**-120, also where
    there is no leading one, because both formats have none at the smallest exponent. The bytes of NaN differ.

    Source: OCP 8-bit Floating Point Specification 1.0, section 5.2.
    """

    def build(context, builder, signature, args):
        of_ints, of_floats = vector_of(INT32), vector_of(ir.FloatType())
        moved = builder.shl(builder.sext(args[0], of_ints), ir.Constant(of_ints, [20] * LANES))
        bits = builder.and_(moved, ir.Constant(of_ints, [0x87F00000] * LANES))
        values = builder.fmul(builder.bitcast(bits, of_floats), ir.Constant(of_floats, [2.0**120] * LANES))
        magnitudes = builder.and_(args[0], ir.Constant(args[0].type, [0x7F] * LANES))
        is_nan = builder.icmp_unsigned("==", magnitudes, ir.Constant(args[0].type, [0x7F] * LANES))
        return builder.select(is_nan, ir.Constant(of_floats, [float("nan")] * LANES), values)

    return FLOATS(BYTES), build


@intrinsic
def rounded_to_bfloat16(typing_context, lanes):
    """Numbers in float32 as the nearest ones of bfloat16, still in float32; of two as near, the even one."""

    def build(context, builder, signature, args):
        of_ints = vector_of(INT32)
        bits = builder.bitcast(args[0], of_ints)
        last = builder.and_(builder.lshr(bits, ir.Constant(of_ints, [16] * LANES)), ir.Constant(of_ints, [1] * LANES))
        raised = builder.add(builder.add(bits, last), ir.Constant(of_ints, [0x7FFF] * LANES))
        return builder.bitcast(builder.and_(raised, ir.Constant(of_ints, [0xFFFF0000] * LANES)), args[0].type)

    return FLOATS(FLOATS), build


@intrinsic
def multiply_add(typing_context, first, second, third):
    """first * second + third, rounded once where the processor has an instruction for that, and twice elsewhere."""
    return FLOATS(FLOATS, FLOATS, FLOATS), lambda context, builder, signature, args: fused_multiply_add(builder, *args)


def fused_multiply_add(builder, *args):
    """As `multiply_add`, of three vectors of LLVM."""
    of_function = ir.FunctionType(args[0].type, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, of_function, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, args)


def _filled(builder, number, length: int = LANES):
    undefined = ir.Constant(ir.VectorType(number.type, length), ir.Undefined)
    return shuffled(builder, builder.insert_element(undefined, number, ir.Constant(INT32, 0)), [0] * length)


def shuffled(builder, lanes, places: Sequence[int]):
    """The elements of a vector of LLVM at these places."""
    mask = ir.Constant(ir.VectorType(INT32, len(places)), list(places))
    return builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), mask)


# --- operations with constants, which are known when a function is compiled ---


def constant_bytes(numbers: Sequence[int]):
    """A function that returns sixteen bytes. Fewer are repeated."""

    @intrinsic
    def constant(typing_context):
        def build(context, builder, signature, args):
            return ir.Constant(vector_of(_INT8), [*numbers] * (LANES // len(numbers)))

        return BYTES(), build

    return constant


def places(numbers: Sequence[int]):
    """A function of `Lanes`, which returns the elements at these sixteen places of them. Fewer places are repeated."""

    @intrinsic
    def at_places(typing_context, lanes):
        def build(context, builder, signature, args):
            return shuffled(builder, args[0], [*numbers] * (LANES // len(numbers)))

        return lanes(lanes), build

    return at_places


def table(numbers: Sequence[int]):
    """A function of bytes from 0 to 15, which returns the numbers at these places of a table, as int8.

    LLVM has no instruction for that. So each bit of the bytes chooses between two halves of the table.
    """

    @intrinsic
    def numbers_at(typing_context, lanes):
        def build(context, builder, signature, args):
            of_bytes = vector_of(_INT8)
            choices = [ir.Constant(of_bytes, [number] * LANES) for number in numbers]
            for bit in range(4):
                mask = builder.and_(args[0], ir.Constant(of_bytes, [1 << bit] * LANES))
                is_set = builder.icmp_unsigned("!=", mask, ir.Constant(of_bytes, [0] * LANES))
                pairs = zip(choices[::2], choices[1::2], strict=True)
                choices = [builder.select(is_set, odd, even) for even, odd in pairs]
            return choices[0]

        return INT8(BYTES), build

    return numbers_at


# --- operators ---


def _operation(of_integers: str, of_floats: str):
    @intrinsic
    def operation(typing_context, left, right):
        def build(context, builder, signature, args):
            is_float = isinstance(left.element, types.Float)
            return getattr(builder, of_floats if is_float else of_integers)(*args)

        return left(left, left), build

    return operation


def _overload_operator(of_operator, operation) -> None:
    @overload(of_operator, inline="always")
    def of_lanes(left, right):
        if not isinstance(left, Lanes):
            return None
        if isinstance(right, Lanes):
            return lambda left, right: operation(left, right)
        element = left.element
        return lambda left, right: operation(left, filled(element(right)))


_overload_operator(operator.add, _operation("add", "fadd"))
_overload_operator(operator.sub, _operation("sub", "fsub"))
_overload_operator(operator.mul, _operation("mul", "fmul"))
