"""What an output has besides its shards: side files, the record, the way back; the index last."""

from __future__ import annotations

import json
import re
from pathlib import Path

from reasonvec import _reasonvec as core
from reasonvec.adapter import AdapterFolder
from reasonvec.algebra import Adapter, Difference, Point, Scaled, Vector
from reasonvec.apply import ApplyOptions, ApplyPlan, ApplyReport, TensorChange, WrittenTensor
from reasonvec.destination import MANIFEST, STAGES, UNDO, relative, write_json
from reasonvec.folders import CheckpointFolder, Folder
from reasonvec.json_values import Json, json_bytes, read_json
from reasonvec.rounding import Rounding
from reasonvec.run import settings
from reasonvec.terms import Operands, elements

__all__ = ["finish"]


def finish(plan: ApplyPlan, rows: list[WrittenTensor], out: Path) -> ApplyReport:
    """Everything besides the shards: side files, manifest, index last. ``out`` is where the shards
    are: the plan's folder, or one that will take its place."""
    options = plan.options
    sync = options.get("sync", True)
    digest = options.get("digest", "xxh3-128")
    tensors = [_done(change, row) for change, row in zip(_in_order(plan, rows), rows, strict=True)]
    report = ApplyReport(
        plan.out, str(plan.point), tensors, [p for p in plan.problems if p.severity == "warning"]
    )
    files: dict[str, str | None] = {}
    beside = _of_target(plan) if plan.beside is None else plan.beside
    written = beside.files(plan)
    card = beside.card(plan, tensors)
    if card is not None:
        written["README.md"] = card.encode()
    for name, content in written.items():
        if isinstance(content, Path):
            core.copy_whole(content, out / name, sync)
        else:
            core.write_whole(out / name, content, sync)
        files[name] = core.digest_file(out / name, digest)
    template = options.get("chat_template_from")
    if template is not None:
        for name in _take_chat_template(template, out, sync=sync):
            files.pop("chat_template.jinja", None)
            files[name] = core.digest_file(out / name, digest)
    index = beside.index(plan)
    if index is not None:
        files[index[0]] = None
    write_json(out / MANIFEST, _manifest(plan, report, rows, files, beside.said(plan)), sync=sync)
    if index is not None:
        core.write_whole(out / index[0], index[1], sync)
    if options.get("keep_undo", False):
        _store_undo(plan, out, sync=sync)
    return report


class _OfTarget:
    """The small files of a target: the same bytes, but where the dtype is another."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def files(self, plan: ApplyPlan) -> dict[str, Path | bytes]:
        paths = self.point.base.files()
        return {path.name: _side_file(path, self.point, plan) or path for path in paths}

    def index(self, plan: ApplyPlan) -> tuple[str, bytes] | None:
        name = self.point.base.handle.index
        if name is None:
            return None
        path = self.point.base.folder / name
        return path.name, _side_file(path, self.point, plan) or path.read_bytes()

    def said(self, plan: ApplyPlan) -> Json:
        terms = [_term(scaled, plan.operands) for scaled in self.point.vector.terms]
        return {"target": 0, "terms": terms}

    def card(self, plan: ApplyPlan, tensors: list[TensorChange]) -> str | None:
        return None


def _of_target(plan: ApplyPlan) -> _OfTarget:
    if not isinstance(plan.point, Point):
        raise TypeError("only a point has a target")
    return _OfTarget(plan.point)


def _in_order(plan: ApplyPlan, rows: list[WrittenTensor]) -> list[TensorChange]:
    by_name = {change.name: change for change in plan.tensors}
    return [by_name[row["name"]] for row in rows]


def _done(change: TensorChange, row: WrittenTensor) -> TensorChange:
    rounding = row["rounding"]
    kept = rounding is not None and change.action == "update"
    return change._replace(
        digest=row["digest"],
        rounding=Rounding.of(rounding) if rounding is not None and kept else None,
    )


def _side_file(path: Path, point: Point, plan: ApplyPlan) -> bytes | None:
    """What a file of the target becomes; None for the same bytes."""
    asked = plan.options.get("out_dtype")
    if asked is None or plan.written_bytes == 0:
        return None
    if path.name == "config.json":
        config = read_json(path)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                for key in ("torch_dtype", "dtype"):
                    if key in part:
                        part[key] = asked
        return json_bytes(config)
    if path.name == point.base.handle.index:
        index = read_json(path)
        size = sum(elements(t.shape) * _item(t.dtype) for t in plan.tensors)
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = size
        return json_bytes(index, ascii_only=True)
    return None


def _item(dtype: str) -> int:
    """Bytes of an element, from the bits in the format's name."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _take_chat_template(folder: Path, out: Path, *, sync: bool) -> list[str]:
    """The chat template of another folder, as transformers keeps it: a file or a field."""
    if (folder / "chat_template.jinja").is_file():
        core.copy_whole(folder / "chat_template.jinja", out / "chat_template.jinja", sync)
        return ["chat_template.jinja"]
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    ours = out / "tokenizer_config.json"
    config = read_json(ours) if ours.is_file() else {}
    config["chat_template"] = template
    core.write_whole(ours, json_bytes(config), sync)
    (out / "chat_template.jinja").unlink(missing_ok=True)
    return ["tokenizer_config.json"]


def _manifest(
    plan: ApplyPlan,
    report: ApplyReport,
    rows: list[WrittenTensor],
    files: dict[str, str | None],
    said: Json,
) -> Json:
    out, options = plan.out, plan.options
    folders, template = plan.operands.folders, options.get("chat_template_from")
    digests: list[dict[str, str]] = [{} for _ in folders]
    staged = [] if plan.stages is None else plan.stages.rows
    for row in (*staged, *rows):
        for operand, name, digest in row["inputs"]:
            if digest is not None:
                digests[operand][name] = digest
    for folder, known in zip(folders, digests, strict=True):
        if isinstance(folder, AdapterFolder):
            known |= _factor_digests(folder, options)
    inputs: list[Json] = [
        {"path": relative(folder.path, out), "kind": _kind(folder), "tensors": tensors}
        for folder, tensors in zip(folders, digests, strict=True)
    ]
    return {
        "format": 1,
        "reasonvec": core.version(),
        "recipe": str(plan.point),
        **said,
        "options": {
            "vocab": options.get("vocab", "strict"),
            "missing": options.get("missing", "error"),
            "map_prefix": [list(pair) for pair in options.get("map_prefix", ())],
            "out_dtype": options.get("out_dtype"),
            "allow_nonfinite": options.get("allow_nonfinite", False),
            "chat_template_from": None if template is None else relative(template, out),
        },
        "digest": options.get("digest", "xxh3-128"),
        "inputs": inputs,
        "output": {
            "tensors": {
                t.name: {
                    "file": t.file,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "digest": t.digest,
                    "coefficients": list(t.coefficients),
                }
                for t in report.tensors
            },
            "files": files,
        },
        "undo": UNDO if options.get("keep_undo", False) else None,
        "report": report.as_json() | {"path": None},
    }


def _kind(folder: Folder) -> str:
    if folder.path.parent.name == STAGES:
        return "stage"
    if isinstance(folder, AdapterFolder):
        return "adapter"
    return "checkpoint" if isinstance(folder, CheckpointFolder) else "vector"


def _factor_digests(folder: AdapterFolder, options: ApplyOptions) -> dict[str, str]:
    """Factors are read where they are used, over and over: their digests take a pass of their own,
    over a small file."""
    names = list(folder.tensors)
    digests = core.digest_tensors(
        folder.handle, names, options.get("digest", "xxh3-128"), json.dumps(settings(options))
    )
    return {name: digest for name, digest in zip(names, digests, strict=True) if digest is not None}


def _term(scaled: Scaled, operands: Operands) -> Json:
    leaf = scaled.leaf
    if isinstance(leaf, Adapter):
        numbers = operands.number(leaf.folder), operands.number(leaf.base)
        return {"text": scaled.text, "adapter": numbers[0], "base": numbers[1]}
    parts: Json = (
        {"positive": operands.number(leaf.positive), "negative": operands.number(leaf.negative)}
        if isinstance(leaf, Difference)
        else {"vector": operands.number(leaf)}
    )
    return {"text": scaled.text} | parts


def _store_undo(plan: ApplyPlan, out: Path, *, sync: bool) -> None:
    """The exact vector from the output back to the target, and the target's own headers and config
    where the output's differ."""
    from reasonvec.extract import ExtractOptions, write_vector

    target, made = _of_target(plan).point.base, CheckpointFolder(out)
    # What the manifest is to call it.
    made.path = plan.out
    way_back = Vector([Scaled(Difference(target, made))])
    folder = out / UNDO
    folder.mkdir(exist_ok=True)
    run: ExtractOptions = {"sync": sync}
    for key in ("threads", "memory_budget", "progress"):
        if key in plan.options:
            run[key] = plan.options[key]
    write_vector(way_back, plan.out / UNDO, run, checked=False, card=False, place=folder)
    if plan.options.get("out_dtype") is not None:
        for file in target.handle.shards():
            path = target.folder / file
            with path.open("rb") as shard:
                length = int.from_bytes(shard.read(8), "little")
                core.write_whole(folder / f"{file}.header", shard.read(length), sync)
        for name in ("config.json", target.handle.index):
            if name is not None and (target.folder / name).is_file():
                core.copy_whole(target.folder / name, folder / name, sync)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if plan.options.get("chat_template_from") is not None and (target.folder / name).is_file():
            core.copy_whole(target.folder / name, folder / name, sync)
