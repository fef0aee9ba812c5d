"""Looking at a vector or a checkpoint: norms, sparsity, largest changes, by layer and module."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from reasonvec.algebra import Vector
from reasonvec.compat.layout import FLOATS, Layout
from reasonvec.compat.problem import demand, shorten
from reasonvec.errors import FormatError, MismatchError
from reasonvec.extract import Row
from reasonvec.folders import VECTOR_CONFIG, CheckpointFolder, VectorFolder
from reasonvec.inspection import Inspection, TensorMeasure
from reasonvec.json_values import Json
from reasonvec.measure import Quantities, measure
from reasonvec.names import kind_of, layer_of
from reasonvec.run import RunOptions
from reasonvec.terms import Operands, elements, leaf_folders, leaf_layout, vector_quantity

__all__ = ["inspect_checkpoint", "inspect_vector"]


def inspect_checkpoint(folder: CheckpointFolder, **options: Unpack[RunOptions]) -> Inspection:
    """Norms, non-zero elements and largest magnitudes of a checkpoint's float tensors. One pass."""
    operands = Operands()
    operands.number(folder)
    tensors = {n: t for n, t in folder.layout.tensors.items() if t.dtype in FLOATS}
    quantities = [
        Quantities(
            n,
            elements(t.shape),
            [[{"coefficient": 1.0, "source": {"tensor": operands.ref(folder, n)}}]],
        )
        for n, t in tensors.items()
    ]
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    rows = tuple(
        TensorMeasure(
            row.name,
            kind_of(row.name),
            layer_of(row.name),
            tensors[row.name].dtype,
            tensors[row.name].shape,
            elements(tensors[row.name].shape),
            row.moved[0],
            row.norm(0),
            row.max[0],
            row.max_at[0],
            elements(tensors[row.name].shape) * size[tensors[row.name].dtype],
            None,
        )
        for row in measure(quantities, operands, options, allow_nonfinite=True)
    )
    return Inspection(folder.path.name, str(folder.path), "checkpoint", rows, None, {})


def inspect_vector(vector: Vector, **options: Unpack[RunOptions]) -> Inspection:
    """Norms, moved elements and largest changes of a vector's tensors. A stored vector as it is
    answers from its manifest; anything else takes one pass.

    Raises:
        MismatchError: the vector is empty, or its parts have no sum.
    """
    if not vector.terms:
        message = "an empty vector (a point minus itself) has nothing to be inspected"
        raise MismatchError(message)
    if len(vector.terms) == 1 and not vector.terms[0].factors and vector.terms[0].control is None:
        leaf = vector.terms[0].leaf
        if isinstance(leaf, VectorFolder):
            return _from_manifest(leaf)
    operands = Operands()
    first = leaf_layout(vector.terms[0].leaf)
    quantities, problems = vector_quantity(vector, first, operands)
    demand(problems)
    rows = measure(
        [Quantities(n, elements(first.tensors[n].shape), [q]) for n, q in quantities.items()],
        operands,
        options,
    )
    measured = tuple(
        _row(row.name, first, row.moved[0], row.norm(0), row.max[0], row.max_at[0]) for row in rows
    )
    return Inspection(str(vector), "", "vector", measured, str(vector), _donor_paths(vector))


def _row(
    name: str, layout: Layout, moved: int, norm: float, largest: float, at: int | None
) -> TensorMeasure:
    info = layout.tensors[name]
    n = elements(info.shape)
    return TensorMeasure(
        name, kind_of(name), layer_of(name), info.dtype, info.shape, n, moved, norm, largest, at
    )


def _donor_paths(vector: Vector) -> dict[str, str]:
    donors: dict[str, str] = {}
    for i, scaled in enumerate(vector.terms):
        suffix = f" {i + 1}" if len(vector.terms) > 1 else ""
        for role, folder in leaf_folders(scaled.leaf).items():
            donors[f"{role}{suffix}"] = str(folder.path)
    return donors


def _missing(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _from_manifest(folder: VectorFolder) -> Inspection:
    rows = []
    for row in folder.rows:
        try:
            r, at = Row.of(row), row["max_at"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            message = (
                f"{folder.path / VECTOR_CONFIG}: the row of {shorten(row.get('name'))} is damaged "
                f"({_missing(error)}); extract the vector again"
            )
            raise FormatError(message) from None
        rows.append(
            TensorMeasure(
                r.name,
                kind_of(r.name),
                layer_of(r.name),
                r.dtype,
                r.shape,
                r.elements,
                r.moved,
                r.norm,
                r.max,
                at if isinstance(at, int) else None,
                r.bytes,
                r.encoding,
            )
        )
    donors: dict[str, str] = {}
    said = folder.config.get("donors")
    for role, donor in (said if isinstance(said, dict) else {}).items():
        if isinstance(donor, dict):
            donors[role] = Path(str(donor.get("path", ""))).name
    recipe: Json | object = folder.config.get("recipe")
    return Inspection(
        folder.path.resolve().name,
        str(folder.path),
        "vector",
        tuple(rows),
        recipe if isinstance(recipe, str) else None,
        donors,
    )
