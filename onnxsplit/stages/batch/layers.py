"""Rules for products of matrices, attention, recurrent and other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnxsplit.stages.batch.combine import Rule, all_leading, first_alone, leading, together
from onnxsplit.stages.batch.facts import Call, Dependence, Fact, Mixes, from_front, rows
from onnxsplit.stages.batch.moves import equal


def batch_normalised(call: Call) -> Sequence[Fact] | Fact:
    """BatchNormalization keeps rows apart if its statistics are stored; in training they come from the batch."""
    stored = not call.integer("training_mode", 0) if call.opset >= 7 else call.integer("is_test", 0)
    if not stored or sum(1 for name in call.node.output if name) > 1:
        raise Mixes("it takes mean and variance from the batch")
    fact = leading(0)(call)
    assert isinstance(fact, Fact)
    return fact


def dropout(call: Call) -> Fact:
    """Dropout is elementwise if it drops nothing."""
    if call.opset < 7 and not call.integer("is_test", 0):
        raise Mixes("it is in training mode")
    if call.has(2) and any(call.ints(2)):
        raise Mixes("it is in training mode")
    return first_alone(call)


def quantized(call: Call) -> Fact:
    """QuantizeLinear and DequantizeLinear have one scale for all elements, or one for each entry of an axis."""
    fact = first_alone(call)
    if call.rank(1) > 0 and call.shape(1) != (1,):
        axis = from_front(call.integer("axis", 1), call.rank(0))
        if fact.axis == axis:
            raise Mixes("it has a scale for each entry along the axis of the rows")
    return fact


def matrices(first: int = 0, second: int = 1) -> Rule:
    """Products of matrices in the last two axes; the axes before them are broadcast."""

    def rule(call: Call) -> Fact:
        call.others_same(first, second)
        ranks = call.rank(first), call.rank(second)
        if min(ranks) < 2:
            if ranks[0] >= 2 and ranks[1] == 1 and not call.carries(second):
                fact = call.require(first)
                if fact.axis < ranks[0] - 1:
                    return rows(fact.axis, fact.per_row)
            raise Mixes("it sums over the rows")
        places = {i: call.facts[i].axis - call.rank(i) for i in (first, second) if call.carries(i)}  # type: ignore[union-attr]
        swapped = {
            first: bool(call.integer("transA", 0)),
            second: bool(call.integer("transB", 0)),
        }
        if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
            raise Mixes("it moves the axes of its matrices")
        for index, back in places.items():
            inner = -1 if index == first else -2
            if swapped[index]:
                inner = -3 - inner
            if back == inner:
                raise Mixes("it sums over the rows")
            if back > -3:
                if len(places) > 1:
                    raise Mixes("it multiplies rows with rows")
                fact = call.require(index)
                return rows(max(ranks) + (-2 if index == first else -1), fact.per_row)
        return together(call, [first, second])

    return rule


def gemm(call: Call) -> Fact:
    """Gemm multiplies two matrices and adds a third tensor."""
    product = matrices()(_first_two(call))
    assert isinstance(product, Fact)
    addend = call.fact(2)
    if addend is None or addend.kind is Dependence.SAME:
        rank, back = (call.rank(2), product.axis - 2) if addend is not None else (0, -1)
        if rank >= -back and call.shape(2)[back] != 1:
            raise Mixes("the tensor that it adds has an entry for each row")
        return product
    if addend.kind is not Dependence.ROWS or (addend.axis - call.rank(2), addend.per_row) != (
        product.axis - 2,
        product.per_row,
    ):
        raise Mixes("it combines rows that lie along different axes")
    return product


def _first_two(call: Call) -> Call:
    return replace(call, facts=call.facts[:2], shapes=call.shapes[:2])


def recurrent(call: Call) -> Sequence[Fact]:
    """LSTM, GRU and RNN: the batch is the second axis of the sequence, or the first if the attribute layout is 1."""
    batch_first = call.integer("layout", 0)
    call.others_same(0, 4, 5, 6)
    place = 0 if batch_first else 1
    for index, axis in ((0, place), (4, 0), (5, place), (6, place)):
        fact = call.fact(index)
        if fact is not None and (fact.kind is not Dependence.ROWS or (fact.axis, fact.per_row) != (axis, 1)):
            raise Mixes(f"its input {index} does not carry the rows along axis {axis}")
    call.require(0)
    return [rows(0 if batch_first else 2), rows(place), rows(place)][: len(call.node.output)]


def resized(call: Call) -> Fact:
    """Resize and Upsample: the axis of the rows must keep its length."""
    call.others_same(0, 1, 2, 3)
    fact = call.require(0)
    if any(call.carries(index) for index in range(1, len(call.facts))):
        raise Mixes("its new size depends on the rows")
    axes = call.integers("axes")
    place = fact.axis if axes is None else None
    if axes is not None:
        listed = [from_front(axis, call.rank(0)) for axis in axes]
        place = listed.index(fact.axis) if fact.axis in listed else None
        if place is None:
            return rows(fact.axis, fact.per_row)
    assert place is not None
    if call.attribute("coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
        raise Mixes("it crops")
    if call.attribute("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise Mixes("it has one factor for all axes, including that of the rows")
    scales = 1 if call.node.op_type == "Upsample" or call.opset < 11 else 2
    attribute = call.attribute("scales") if call.node.op_type == "Upsample" else None
    if attribute is not None:
        kept = list(attribute)[place] == 1  # type: ignore[call-overload]
    elif call.has(3):
        kept = equal(call.numbers(3)[place], call.dims(0)[fact.axis])
    else:
        factors = call.numbers(scales)
        kept = not factors or equal(factors[place], 1)
    if not kept:
        raise Mixes("it changes the number of rows")
    return rows(fact.axis, fact.per_row)


def attention(call: Call) -> Fact:
    """ONNX's Attention: all inputs except the mask have their rows first; the mask is broadcast against four axes."""
    fact = all_leading(0, 1, 2, 4, 5, 6)(_with_mask_same(call, 3))
    mask = call.fact(3)
    if mask is not None and mask.kind is not Dependence.SAME:
        if mask.kind is not Dependence.ROWS or (mask.axis, mask.per_row) != (0, 1) or call.rank(3) != 4:
            raise Mixes("the rows of its mask are not those of its queries")
    elif mask is not None and call.rank(3) == 4 and call.shape(3)[0] != 1:
        raise Mixes("its mask has an entry for each row")
    assert isinstance(fact, Fact)
    if fact.per_row != 1:
        raise Mixes("each of its rows has more than one entry")
    return fact


def multi_head(*carriers: int, masks: Sequence[int] = ()) -> Rule:
    """Attention ops of com.microsoft: rows lie along the first axis, one entry each; masks of rank 1 are refused."""

    def rule(call: Call) -> Fact:
        fact = leading(*carriers, *masks)(call)
        assert isinstance(fact, Fact)
        if fact.per_row != 1:
            raise Mixes("each of its rows has more than one entry")
        for index in masks:
            if call.fact(index) is not None and call.carries(index) and call.rank(index) < 2:
                raise Mixes("its mask is a list of positions")
        return fact

    return rule


def rotary(call: Call) -> Fact:
    """RotaryEmbedding; its tables of angles by position have rank 2 and are the same for all rows."""
    tables = [index for index in (1, 2, 3) if not call.carries(index) and call.has(index) and call.rank(index) == 2]
    fact = multi_head(*(index for index in range(4) if index not in tables))(call)
    assert isinstance(fact, Fact)
    return fact


def _with_mask_same(call: Call, index: int) -> Call:
    facts = [Fact(Dependence.SAME) if i == index and f is not None else f for i, f in enumerate(call.facts)]
    return replace(call, facts=facts)


def features(call: Call) -> Fact:
    """ArrayFeatureExtractor takes columns of a table with rows, or looks up labels by indices with rows."""
    call.others_same(0, 1)
    if call.carries(0) and not call.carries(1) and call.rank(0) == 2 and call.require(0).axis == 0:
        return call.require(0)
    if call.carries(1) and not call.carries(0) and call.rank(0) == call.rank(1) == 1:
        return rows(1, call.require(1).per_row)
    raise Mixes("it picks rows by position")


def bit_rows(call: Call) -> Fact:
    """GatherBlockQuantized picks rows of a stored quantised matrix by number."""
    call.others_same(1)
    fact = call.require(1)
    return rows(from_front(call.integer("gather_axis", 0), call.rank(0)) + fact.axis, fact.per_row)


def bit_matrices(call: Call) -> Fact:
    """MatMulNBits multiplies with a stored quantised matrix."""
    call.others_same(0)
    fact = call.require(0)
    if fact.axis >= call.rank(0) - 1:
        raise Mixes("it sums over the rows")
    return rows(fact.axis, fact.per_row)
