"""`reasonvec merge`: a mergekit YAML in, a checkpoint out, under mergekit-yaml's own flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from reasonvec.cli.console import Session
from reasonvec.cli.options import (
    INPUT,
    digest_option,
    missing_option,
    nonfinite_option,
    out_dtype_option,
    overwrite_option,
    resume_option,
    seed_option,
    session_options,
    sync_option,
)

if TYPE_CHECKING:
    from reasonvec.apply import OutDtype
    from reasonvec.compat.alignment import MissingPolicy
    from reasonvec.merging.method import Numerics
    from reasonvec.run import DigestName

__all__ = ["merge"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NOTES = "reasonvec.merge.notes"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
# mergekit-yaml's flags that change nothing here, and why.
_FLAGS: dict[str, str] = {
    "allow-crimes": "tensors are matched by name and shape, whatever the architecture is called",
    "async-write": "shards are written as they are made",
    "clone-tensors": "every tensor is written where it stands",
    "cuda": "a merge is bound by the disk and not by arithmetic",
    "gpu-rich": "a merge is bound by the disk and not by arithmetic",
    "lazy-unpickle": "pickles are never loaded",
    "low-cpu-memory": "memory is bounded by --memory-budget",
    "multi-gpu": "a merge is bound by the disk and not by arithmetic",
    "read-to-gpu": "a merge is bound by the disk and not by arithmetic",
    "safe-serialization": "weights are always written as safetensors",
    "trust-remote-code": "code of a model is never run",
    "unsafe-truncate-embeddings": "rows are never cut off; see tokenizer_source in the config",
}
_VALUES: dict[str, str] = {
    "device": "a merge is bound by the disk and not by arithmetic",
    "lora-merge-cache": "adapters are applied tile by tile, and nothing is kept",
    "lora-merge-dtype": "adapters are applied in the working precision",
    "transformers-cache": "nothing is downloaded",
    "write-threads": "--threads says how many workers there are",
}


def _note(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if parameter.name is None or context.get_parameter_source(parameter.name) is None:
        return
    if context.get_parameter_source(parameter.name) == click.core.ParameterSource.DEFAULT:
        return
    flag = parameter.name.replace("_", "-")
    notes: list[str] = context.meta.setdefault(_NOTES, [])
    notes.append(f"--{flag} changes nothing: {(_FLAGS | _VALUES)[flag]}")


def _idle_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Flags that scripts for mergekit-yaml have, accepted and answered with a note."""
    for flag in _FLAGS:
        name = f"--{flag}" if flag == "gpu-rich" else f"--{flag}/--no-{flag}"
        command = click.option(
            name, is_flag=True, default=None, hidden=True, expose_value=False, callback=_note
        )(command)
    for flag in _VALUES:
        command = click.option(f"--{flag}", hidden=True, expose_value=False, callback=_note)(
            command
        )
    return command


def _shard_size(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """Bytes from "5B", "500MB", "2GiB" or "5000000000"; units are decimal, as shards are named."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTB]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and found[2].upper() in {"", "B"}):
        message = f"expected a size such as 5B, 5GB or 2GiB, found {text!r}"
        raise click.BadParameter(message, context, parameter)
    unit = found[2].upper()
    factor = 1 << (10 * " KMGT".index(unit)) if found[3] else _UNITS[unit]
    size = int(float(found[1]) * factor)
    if size < 1:
        raise click.BadParameter("a shard has at least one byte", context, parameter)
    return size


@click.command()
@click.argument("config", type=INPUT, metavar="CONFIG.yml")
@click.argument("out", type=INPUT, metavar="OUT")
@click.option(
    "--out-shard-size",
    "--max-shard-size",
    "shard_size",
    callback=_shard_size,
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Bytes of a shard at most.",
)
@click.option(
    "--numerics",
    type=click.Choice(["default", "mergekit"]),
    default="default",
    show_default=True,
    help="Whose rounding of steps, rescaling of what is dropped, and zeros.",
)
@seed_option("For the methods that drop elements at random.", "--random-seed")
@click.option("--strict", is_flag=True, help="A key that is not known is an error.")
@missing_option("What a tensor is that some models lack.")
@out_dtype_option("In place of the config's.")
@click.option(
    "--copy-tokenizer/--no-copy-tokenizer",
    default=True,
    help="Whether tokenizer files are written.",
)
@click.option("--write-model-card/--no-write-model-card", default=True, help="Write README.md.")
@digest_option
@nonfinite_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would become of every tensor, and every problem; write nothing.",
)
@resume_option
@overwrite_option
@sync_option
@click.option("--num-threads", type=click.IntRange(min=0), hidden=True)
@click.option("--verbose", "-v", count=True, hidden=True, expose_value=False)
@click.option("--no-quiet", is_flag=True, hidden=True, expose_value=False)
@_idle_options
@session_options
@click.pass_context
def merge(
    context: click.Context,
    session: Session,
    config: Path,
    out: Path,
    shard_size: int,
    numerics: Numerics,
    random_seed: int,
    missing: MissingPolicy,
    out_dtype: OutDtype | None,
    digest: DigestName,
    num_threads: int | None,
    *,
    strict: bool,
    copy_tokenizer: bool,
    write_model_card: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    sync: bool,
) -> None:
    """Merge models as a mergekit YAML says, in one pass."""
    from reasonvec.compat.problem import demand
    from reasonvec.config import read_recipe

    if num_threads is not None:
        session.threads = num_threads
    if not session.silent:
        for note in context.meta.get(_NOTES, []):
            click.echo(f"note: {note}", err=True)
    with session.running("merging", bar=not dry_run) as options:
        recipe = read_recipe(config, strict=strict)
        if recipe.merge is None:
            # No plan will tell the warnings, and a typo may be what is behind an error.
            for problem in recipe.problems:
                if problem.severity == "warning" and not session.silent:
                    click.echo(f"warning: {problem.message}", err=True)
            demand(recipe.problems)
            raise SystemExit(2)
        plan = recipe.merge.plan(
            out,
            shard_size=shard_size,
            numerics=numerics,
            seed=random_seed,
            missing=missing,
            out_dtype=out_dtype,
            copy_tokenizer=copy_tokenizer,
            card=write_model_card,
            digest=digest,
            allow_nonfinite=allow_nonfinite,
            resume=resume,
            overwrite=overwrite,
            sync=sync,
            **options,
        )
        # What is wrong with the file comes before what is wrong with the models.
        plan.problems[:0] = recipe.problems
        report = None if dry_run else plan.run()

    def show() -> None:
        from reasonvec.cli.show import show_apply, show_merge_plan

        if report is None:
            show_merge_plan(plan)
        else:
            show_apply(report)

    session.emit(plan.as_json if report is None else report.as_json, show)
    raise SystemExit(1 if report is None and plan.errors else 0)
