"""OpenVINO, the weights: int8 and int4 through NNCF; tables and fitted matrices by us. `openvino.py` does the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightship.errors import UnsupportedError
from lightship.recipe import Precision
from lightship.targets._integers import Floats, Integers, nearest
from lightship.targets._sensitivity import key_of

# Weights of a decoder's embedding and head that share a scale. NNCF gives a token's whole row one: on the demo model in
# int8 (1536 tokens) groups lower the mean KLD from 0.0049 to 0.0042 and raise top-1 agreement from 94.7 % to 96.0 %,
# for 3 % more bytes in the head. What is left to gain: OpenVINO's CPU plugin (2026.4) rounds logits to bf16 where it
# computes in bf16, since with integer weights the output has the input's type; and the mark that keeps a product in
# float32 (DisablePrecisionConversion) is lost where it takes such weights.
TABLE_GROUP = 64
MATRIX_TEXT = 4000  # bytes that a matrix in integers adds to the description of a graph


@dataclass(frozen=True)
class Plan:
    """What becomes of a decoder's body in int4: by key (see `key_of`) the matrices that are `narrow`, None for all; and
    of those the ones that are `fitted`, with their integers. The rest stays in int8."""

    narrow: frozenset[str] | None = None
    fitted: Mapping[str, Integers] = field(default_factory=dict)


WHOLE = Plan()
Planner = Callable[[float, int], Plan]  # (bytes of the graph beside its body, matrices in the body) → plan


def compress(
    graph: Any, precision: Precision, rows: list[Any], *, decodes: bool, planner: Planner | None = None
) -> Any:
    """`graph` with its weights compressed; of a decoder (`decodes`) embedding and head apart from the body.

    int8 is symmetric per output channel, int4 symmetric in groups along the input; `rows`, inputs of the graph, feed
    the data-aware options, and `planner` says which matrices of the body stay in int8 or are fitted. A decoder's
    embedding and head are in int8 or int4 (`precision.tables`), symmetric in groups along the input, and stay one table
    where they are. Of other models they take int8 unless `precision.tables` is int4.
    Raises `UnsupportedError` for groups that do not fit, or options that miss their rows.
    """
    import nncf

    nncf.set_log_level(logging.ERROR)
    if not decodes:
        narrow = precision.tables == "int4"
        return _int8(graph) if precision.name == "int8" else _int4(graph, precision, rows, (), all_layers=narrow)
    _store_tables(graph, precision)
    if precision.name == "int8":
        return _int8(graph)
    matrices = {name: matrix for name, matrix in _matrices(graph) if name != _head(graph).get_friendly_name()}
    plan = WHOLE if planner is None else planner(_other_bytes(graph, matrices), len(matrices))
    keys = {name: key_of(matrix.values()) for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        if keys[name] in plan.fitted:
            matrix.store(plan.fitted[keys[name]])
    if precision.fit:
        lost = [name for name, key in keys.items() if plan.narrow is None and key not in plan.fitted]
        if lost:
            raise UnsupportedError(f"{len(lost)} of {len(keys)} matrices of this model cannot be fitted",
                                   hint="use --no-fit, or --awq")  # fmt: skip
        return _int8(graph)
    wide = [name for name, key in keys.items() if plan.narrow is not None and key not in plan.narrow]
    wide += [name for name, _ in _matrices(graph) if name not in matrices]  # a head that could not be stored
    graph = _int4(graph, precision, rows, wide, all_layers=True) if len(wide) < len(keys) else graph
    return _int8(graph) if wide else graph


# ── Embedding and head ──────────────────────────────────────────────────────


def _head(graph: Any) -> Any:
    """The matrix product that makes a decoder's logits: all the others lead to it."""
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"][-1]


def _store_tables(graph: Any, precision: Precision) -> None:
    """Put a decoder's embeddings and head into integers, a tied table once. A head that lies the other way round is
    left to NNCF."""
    bits = 4 if precision.tables == "int4" else 8
    asked = precision.group_size if bits == 4 and precision.name == "int4" else TABLE_GROUP
    for table in list(_tables(graph)):
        values = table.values()
        width = values.shape[1]
        if bits == 4 and width % asked:
            raise UnsupportedError(f"groups of {asked} do not divide the width of embedding and head, {width}",
                                   hint="choose a --group-size that does, such as 64 or 32")  # fmt: skip
        table.store(nearest(values, bits, width if width % asked else asked))


def _tables(graph: Any) -> Iterator[_Matrix]:
    """The constants that tokens are looked up in, and the head's, each once."""
    found: dict[str, _Matrix] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Gather":
            source, port = node.input_value(0), 0
        elif node == _head(graph) and node.get_attributes()["transpose_b"]:
            source, port = node.input_value(1), 1
        else:
            continue
        matrix = _constant(source, node, port, transposed=True)
        if matrix is not None:
            found[matrix.node.get_friendly_name()] = matrix
    return iter(found.values())


# ── Matrices of a graph ─────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Matrix:
    """A constant of floats with two axes, (outputs, inputs) where it is `transposed`, else the other way round."""

    node: Any
    transposed: bool

    def values(self) -> Floats:
        """The matrix (outputs, inputs)."""
        shape = tuple(self.node.shape)
        found: Floats = self.node.get_data(dtype=np.float32).reshape(shape)
        return found if self.transposed else found.T

    def store(self, integers: Integers) -> None:
        """Let everything that reads this constant, itself or as float32, read `integers` in its place."""
        weights = _graph_of(integers, self.node.get_friendly_name(), self.transposed)
        for use in list(self.node.output(0).get_target_inputs()):
            reader = use.get_node()
            if reader.get_type_name() == "Convert":  # of a checkpoint in 16 bits
                reader.output(0).replace(weights)
            else:
                use.replace_source_output(weights)


def _matrices(graph: Any) -> Iterator[tuple[str, _Matrix]]:
    """The matrix products with a constant, by name, in the order of the graph."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            matrix = _constant(node.input_value(1), node, 1, transposed=node.get_attributes()["transpose_b"])
            if matrix is not None:
                yield node.get_friendly_name(), matrix


def _constant(source: Any, reader: Any, port: int, *, transposed: bool) -> _Matrix | None:
    """The constant of floats with two axes that `reader` takes at `port`; None where there is none such."""
    node = source.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or len(node.shape) != 2 or not node.get_element_type().is_real():
        return None
    return _Matrix(node, transposed)


def _graph_of(integers: Integers, name: str, transposed: bool) -> Any:
    """Nodes that compute the matrix in float32, in the form in which OpenVINO keeps integers in memory."""
    import openvino as ov
    from openvino import opset13

    outputs, groups, width = integers.levels.shape
    shape = (outputs, width) if groups == 1 else (outputs, groups, width)
    kind = ov.Type.i4 if integers.bits == 4 else ov.Type.i8
    stored = opset13.constant(integers.levels.reshape(shape), dtype=kind)
    stored.set_friendly_name(name)
    scales = opset13.constant(integers.scales.reshape(*shape[:-1], 1))
    weights = opset13.multiply(opset13.convert(stored, "f16"), scales)
    if groups > 1:
        weights = opset13.reshape(weights, np.array([outputs, groups * width]), special_zero=False)
    whole = opset13.convert(weights, "f32")
    return whole.output(0) if transposed else opset13.transpose(whole, np.array([1, 0])).output(0)


def _other_bytes(graph: Any, matrices: Mapping[str, _Matrix]) -> float:
    """Bytes of the constants of `graph` that are none of `matrices`."""
    inner = {matrix.node.get_friendly_name() for matrix in matrices.values()}
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    return float(sum(node.get_byte_size() for node in constants if node.get_friendly_name() not in inner))


# ── NNCF ────────────────────────────────────────────────────────────────────


def _int8(graph: Any) -> Any:
    """`graph` with every matrix that is in floats in int8."""
    import nncf

    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)


def _int4(graph: Any, precision: Precision, rows: list[Any], but: Any, *, all_layers: bool) -> Any:
    """`graph` with its matrices in int4, those of the products called `but` in floats still."""
    import nncf

    if precision.data_aware and not rows:
        raise UnsupportedError("int4 with awq, scale estimation or gptq needs a calibration set")
    aware = precision.awq or precision.scale_estimation or precision.gptq
    try:
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=precision.group_size,
            ratio=precision.ratio,
            all_layers=all_layers,
            ignored_scope=nncf.IgnoredScope(names=list(but)) if but else None,
            awq=precision.awq,
            scale_estimation=precision.scale_estimation,
            gptq=precision.gptq,
            dataset=nncf.Dataset(rows) if aware else None,
        )
    except nncf.errors.InvalidGroupSizeError as error:
        raise UnsupportedError(
            f"groups of {precision.group_size} do not divide every width of this model",
            hint="choose a --group-size that does, such as 64 or 32",
        ) from error
