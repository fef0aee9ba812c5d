"""The README.md of a vector folder, from its manifest alone.

What is written here is read on a model hub by people who have no reasonvec yet: what the vector is,
how much of which module it changes, whether it is exact, and the lines that apply it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from reasonvec.errors import FormatError
from reasonvec.inspection import GroupMeasure, Inspection, TensorMeasure
from reasonvec.names import kind_of, layer_of
from reasonvec.wording import (
    count,
    legible,
    magnitude,
    percent,
    short_count,
    short_digests,
    shortened,
    size,
)

__all__ = ["vector_card"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_NAMED = 10


def vector_card(config: Mapping[str, object]) -> str:
    """The card as Markdown with YAML front matter, the same text for the same manifest.

    ``config`` is the parsed ``vector_config.json``. ``base_model`` (a hub repository or a list of
    them) goes into the front matter when the manifest has it. Of an absolute donor path only the
    last name is written: a card is published, and where a disk was mounted is nobody's business.

    Raises:
        FormatError: a row of ``tensors`` lacks a field or has one of another type.
    """
    rows = _rows(config)
    tensors = tuple(_measure(row, at) for at, row in enumerate(rows))
    donors = _donors(config)
    report = Inspection("", "", "vector", tensors, _string(config, "recipe"), {})
    return "\n".join(
        (
            _front_matter(config, donors),
            *_opening(report, donors),
            *_figures(report),
            *_exactness(rows, tensors, donors),
            *_use(),
            *_origin(config, donors),
        )
    )


def _front_matter(config: Mapping[str, object], donors: Mapping[str, Mapping[str, object]]) -> str:
    lines = ["---", "library_name: reasonvec"]
    bases = _base_models(config, donors)
    if bases:
        lines.append("base_model:")
        lines += [f'- "{base}"' for base in bases]
        lines.append("base_model_relation: adapter")
    lines += ["tags:", "- reasonvec", "- reasoning-vector", "- task-arithmetic", "---", ""]
    return "\n".join(lines)


def _opening(report: Inspection, donors: Mapping[str, Mapping[str, object]]) -> list[str]:
    total = report.totals()
    positive, negative = (_place(donors.get(which)) for which in ("positive", "negative"))
    origin = report.recipe or (f"{positive} - {negative}" if positive and negative else "")
    title = f"# Reasoning vector {_code(origin)}" if origin else "# Reasoning vector"
    if not total.elements:
        return [title, "", "A vector in weight space that holds no elements.", ""]
    per = total.bytes_per_parameter
    stored = "" if per is None else f", stored in {per:.2f} bytes a parameter"
    return [
        title,
        "",
        "A vector in weight space: the difference of two checkpoints, to be added to a third of "
        "the same family. It is not a model and does not load as one.",
        "",
        f"{percent(total.moved, total.elements)} % of {short_count(total.elements)} parameters "
        f"moved{stored}; norm {magnitude(total.norm)}, largest change {magnitude(total.max)}.",
        "",
    ]


def _figures(report: Inspection) -> list[str]:
    if not report.tensors:
        return []
    lines = [
        "## What it changes",
        "",
        "| kind of module | tensors | parameters | moved | norm | largest change | stored "
        "| bytes a parameter | encodings |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for kind, group in report.by_kind().items():
        members = tuple(row for row in report.tensors if row.kind == kind)
        lines.append(_figure_row(_code(kind, in_table=True), group, members))
    lines.append(_figure_row("**all**", report.totals(), report.tensors))
    lines.append("")
    return lines


def _figure_row(label: str, group: GroupMeasure, members: tuple[TensorMeasure, ...]) -> str:
    held = Inspection("", "", "vector", members, None, {}).encodings()
    per = group.bytes_per_parameter
    cells = (
        label,
        count(group.tensors),
        short_count(group.elements),
        f"{percent(group.moved, group.elements)} %",
        magnitude(group.norm),
        magnitude(group.max),
        "" if group.stored_bytes is None else size(group.stored_bytes),
        "" if per is None else f"{per:.3f}",
        ", ".join(f"{count(n)} {_code(encoding, in_table=True)}" for encoding, n in held.items()),
    )
    return f"| {' | '.join(cells)} |"


def _exactness(
    rows: Sequence[Mapping[str, object]],
    tensors: tuple[TensorMeasure, ...],
    donors: Mapping[str, Mapping[str, object]],
) -> list[str]:
    heading = ["## Exactness", ""]
    if any("residual" in row for row in rows):
        return [*heading, *_compression(rows)]
    if not {"positive", "negative"} <= donors.keys():
        return [
            *heading,
            "It was not taken from two donors directly, so there is no donor to rebuild and no "
            "test to report.",
            "",
        ]
    inexact = {
        row.name: _whole(raw, "inexact", at)
        for at, (raw, row) in enumerate(zip(rows, tensors, strict=True))
    }
    wide = sum(_whole(raw, "wide", at) for at, raw in enumerate(rows))
    elements = sum(row.elements for row in tensors)
    missed = sum(inexact.values())
    corrected = (
        f" In {count(wide)} of them the rounded difference alone does not; those carry a "
        "correction in f64."
        if wide
        else ""
    )
    if not missed:
        return [
            *heading,
            "Exact: `negative + vector` gives the positive donor back bit for bit, in all "
            f"{count(elements)} elements of {count(len(tensors))} tensors. Every element was "
            f"checked when the vector was extracted.{corrected}",
            "",
        ]
    named = [name for name, n in inexact.items() if n]
    more = f" and {count(len(named) - _NAMED)} more" if len(named) > _NAMED else ""
    return [
        *heading,
        f"**Not exact**: `negative + vector` misses the positive donor in {count(missed)} of "
        f"{count(elements)} elements. They are in "
        f"{', '.join(_code(name) for name in named[:_NAMED])}{more}.{corrected}",
        "",
    ]


def _compression(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """What a low-rank vector left out, as it was measured."""
    cut = [(at, row) for at, row in enumerate(rows) if "residual" in row]
    left = math.sqrt(sum(_real(row, "residual", at) ** 2 for at, row in cut))
    norm = math.sqrt(sum(_real(row, "norm", at) ** 2 for at, row in enumerate(rows)))
    ranks = sorted(_whole(row, "rank", at) if "rank" in row else 0 for at, row in cut)
    span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    return [
        f"Not exact, on request: {count(len(cut))} of {count(len(rows))} tensors are products of "
        f"two thin matrices, of rank {span}. What that leaves out has the norm {magnitude(left)}; "
        f"what is stored has {magnitude(norm)}. The other tensors are exact.",
        "",
    ]


def _use() -> list[str]:
    return [
        "## How to apply it",
        "",
        "`VECTOR` is this folder, `TARGET` a checkpoint of the same pretrained family, with the "
        "same layers, shapes and token ids.",
        "",
        "```sh",
        "pip install reasonvec",
        "reasonvec apply VECTOR --to TARGET -o OUTPUT --alpha 1.0",
        "reasonvec verify OUTPUT",
        "```",
        "",
        "```python",
        "import reasonvec as rv",
        "",
        '(rv.open("TARGET") + 1.0 * rv.load("VECTOR")).save("OUTPUT")',
        "```",
        "",
        "A negative alpha subtracts. `OUTPUT` keeps the target's tokenizer, chat template and "
        "shard names. A bf16 target loses the smallest updates to rounding, the more the smaller "
        "alpha is: `apply` reports how much, and `--out-dtype float32` keeps them.",
        "",
        "The data files open with the plain `safetensors` library; `vector_config.json` says how "
        "each tensor is encoded.",
        "",
    ]


def _origin(config: Mapping[str, object], donors: Mapping[str, Mapping[str, object]]) -> list[str]:
    lines = ["## Where it came from", ""]
    facts: list[tuple[str, str]] = []
    recipe = _string(config, "recipe")
    if recipe:
        facts.append(("recipe", _code(recipe, in_table=True)))
    for which, donor in donors.items():
        said = [_place(donor), _string(donor, "digest")]
        facts.append(
            (
                _code(which, in_table=True) if which not in ("positive", "negative") else which,
                " ".join(_code(short_digests(one), in_table=True) for one in said if one),
            )
        )
    version = _string(config, "reasonvec") or _string(config, "version")
    form = config.get("format")
    written = [f"reasonvec {_code(version, in_table=True)}"] if version else ["reasonvec"]
    if isinstance(form, int):
        written.append(f"format {form}")
    facts.append(("written by", ", ".join(written)))
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {label} | {fact} |" for label, fact in facts]
    lines.append("")
    return lines


# ---- reading the manifest


def _rows(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    listed = config.get("tensors")
    if not isinstance(listed, list):
        raise FormatError(f'vector_config.json: "tensors": expected a list, found {_kind(listed)}')
    rows: list[Mapping[str, object]] = []
    for at, row in enumerate(listed):
        if not isinstance(row, Mapping):
            raise FormatError(
                f"vector_config.json: tensors[{at}]: expected an object, found {_kind(row)}"
            )
        rows.append(row)
    return rows


def _measure(row: Mapping[str, object], at: int) -> TensorMeasure:
    name = _words(row, "name", at)
    shape = row.get("shape")
    if not isinstance(shape, list) or not all(_is_count(extent) for extent in shape):
        raise _wrong(row, "shape", at, "a list of whole numbers")
    spot = row.get("max_at")
    return TensorMeasure(
        name=name,
        kind=kind_of(name),
        layer=layer_of(name),
        dtype=_words(row, "dtype", at),
        shape=tuple(shape),
        elements=_whole(row, "elements", at),
        moved=_whole(row, "moved", at),
        norm=_real(row, "norm", at),
        max=_real(row, "max", at),
        max_at=None if spot is None else _whole(row, "max_at", at),
        stored_bytes=_whole(row, "bytes", at),
        encoding=_words(row, "encoding", at),
    )


def _words(row: Mapping[str, object], key: str, at: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _wrong(row, key, at, "a string")
    return value


def _whole(row: Mapping[str, object], key: str, at: int) -> int:
    value = row.get(key)
    if not isinstance(value, int) or not _is_count(value):
        raise _wrong(row, key, at, "a whole number")
    return value


def _real(row: Mapping[str, object], key: str, at: int) -> float:
    # JSON has no NaN: the manifest writes null for a norm that is not finite.
    value = row.get(key, "")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(row, key, at, "a number or null")
    return float(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(row: Mapping[str, object], key: str, at: int, expected: str) -> FormatError:
    found = repr(row[key])[:80] if key in row else "nothing"
    return FormatError(
        f'vector_config.json: tensors[{at}]: "{key}": expected {expected}, found {found}'
    )


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _string(fields: Mapping[str, object], key: str) -> str | None:
    value = fields.get(key)
    return value if isinstance(value, str) and value else None


def _donors(config: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    listed = config.get("donors")
    if not isinstance(listed, Mapping):
        return {}
    return {
        str(which): donor if isinstance(donor, Mapping) else {"path": donor}
        for which, donor in listed.items()
    }


def _base_models(
    config: Mapping[str, object], donors: Mapping[str, Mapping[str, object]]
) -> list[str]:
    """Hub repositories, each once; anything else that stands there is left out of the YAML."""
    named: list[object] = []
    for fields in (config, *donors.values()):
        value = fields.get("base_model")
        named += value if isinstance(value, list) else [value]
    return list(
        dict.fromkeys(one for one in named if isinstance(one, str) and _REPOSITORY.fullmatch(one))
    )


def _place(donor: Mapping[str, object] | None) -> str | None:
    path = None if donor is None else _string(donor, "path")
    if path is None:
        return None
    for flavour in (PurePosixPath(path), PureWindowsPath(path)):
        if flavour.is_absolute():
            return flavour.name or path
    return path


def _code(text: str, *, in_table: bool = False) -> str:
    """A code span that nothing in the text can leave: names come from strangers."""
    shown = shortened(legible(text), 200)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    # A pipe would end the cell even inside a code span, and is unescaped again by the table.
    inner = shown.replace("|", "\\|") if in_table else shown
    return f"{fence} {inner} {fence}" if longest else f"{fence}{inner}{fence}"
