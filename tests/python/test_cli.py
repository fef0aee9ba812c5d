"""The command line: every command, what it prints for people and for machines, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from shards import Stored, contents, read_checkpoint, stored, write_checkpoint

import reasonvec as rv
from reasonvec.cli.app import main
from reasonvec.family import Family

COMMANDS = [
    "check",
    "extract",
    "apply",
    "merge",
    "undo",
    "compress",
    "from-lora",
    "to-lora",
    "spectrum",
    "factors",
    "inspect",
    "compare",
    "verify",
    "diff",
    "demo",
]


def run(*arguments: object) -> Result:
    """A command, as a shell would give it. What is not an exit is a traceback that a person saw."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def done(*arguments: object, code: int = 0) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """The message of a refusal: on standard error, with code 2, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr
    return result.stderr


def parsed(*arguments: object, code: int = 0) -> dict[str, object]:
    value = json.loads(done(*arguments, "--json", code=code), parse_constant=pytest.fail)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def made(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vector, and an output of it. Read or copy, never write."""
    folder = tmp_path_factory.mktemp("made")
    reason, out = folder / "reason", folder / "out"
    done("extract", family.rl, family.sft, "-o", reason, "--no-sync", "-q")
    done("apply", reason, "--to", family.instruct, "-o", out, "--no-sync", "--keep-undo", "-q")
    return folder


# -- the story


def test_the_four_lines(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("grpo", family.rl), ("sft", family.sft), ("instruct", family.instruct)):
        shutil.copytree(path, tmp_path / f"qwen-{name}")
    monkeypatch.chdir(tmp_path)
    assert "compatible" in done("check", "qwen-grpo", "qwen-sft", "qwen-instruct")
    assert "exact" in done("extract", "qwen-grpo", "qwen-sft", "-o", "reason")
    text = done(
        "apply", "reason", "--to", "qwen-instruct", "-o", "qwen-reasoning", "--alpha", "0.8"
    )
    assert "lost to rounding" in text
    assert "whole" in done("verify", "qwen-reasoning")
    live = rv.open("qwen-grpo") - rv.open("qwen-sft")
    (rv.open("qwen-instruct") + 0.8 * live).save("again")
    assert read_checkpoint(Path("qwen-reasoning")) == read_checkpoint(Path("again"))


def test_help_lists_the_commands() -> None:
    text = done("--help")
    listed = re.findall(r"^  ([a-z-]+) ", text.partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS
    assert "Exit codes" in text
    for command in COMMANDS:
        assert "Usage:" in done(command, "--help")
        assert done(command, "-h") == done(command, "--help")


def test_the_installed_command(family: Family) -> None:
    script = Path(sys.executable).parent / "reasonvec"
    if not script.exists():
        pytest.skip("no script beside the interpreter: the package runs from its sources")

    def said(*arguments: str) -> tuple[int, str, str]:
        ended = subprocess.run([script, *arguments], capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    assert said("--version") == (0, f"reasonvec, version {rv.__version__}\n", "")
    code, _, error = said("aply")
    assert code == 2
    assert "apply" in error
    for other, code in ((family.rl, 0), (family.sft, 1), (Path("nowhere"), 2)):
        assert said("diff", str(family.rl), str(other), "-q")[0] == code
    # What goes into a pipe is all there when the process ends.
    words = said("apply", "--help")[1].partition("Options:")[2].split()
    assert words == done("apply", "--help").partition("Options:")[2].split()


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom reasonvec.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"


def test_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    text = done("demo", folder)
    for step in ("check", "extract", "inspect", "apply", "verify"):
        assert f"$ reasonvec {step} " in text
    assert "compatible" in text
    assert "whole" in text
    assert len(rv.open(folder / "reasoning")) == len(rv.open(folder / "instruct"))
    assert (folder / "reason.html").read_text(encoding="utf-8").startswith("<!")
    assert done("verify", folder / "reasoning")
    done("demo", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "not empty" in refused("demo", tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"letter.txt": b"dear"}


# -- exit codes, --json, -q

Line = Callable[[Family, Path, Path], Sequence[object]]

LINES: dict[str, Line] = {
    "check": lambda f, made, out: ["check", f.rl, f.sft, f.instruct],
    "check donors": lambda f, made, out: ["check", f.rl, f.sft],
    "extract": lambda f, made, out: ["extract", f.rl, f.sft, "-o", out],
    "apply": lambda f, made, out: ["apply", made / "reason", "--to", f.instruct, "-o", out],
    "dry run": lambda f, made, out: [
        "apply", made / "reason", "--to", f.instruct, "-o", out, "--dry-run",
    ],
    "undo": lambda f, made, out: ["undo", made / "out", "-o", out],
    "inspect": lambda f, made, out: ["inspect", made / "reason"],
    "inspect checkpoint": lambda f, made, out: ["inspect", f.rl],
    "compare": lambda f, made, out: ["compare", made / "reason", made / "reason"],
    "verify": lambda f, made, out: ["verify", made / "out"],
    "diff": lambda f, made, out: ["diff", f.rl, f.rl],
}  # fmt: skip

KEYS = {
    "check": {"verdict", "reasons", "problems", "total", "by_kind", "same_neurons"},
    "check donors": {"verdict", "reasons", "problems", "total", "by_kind", "same_neurons"},
    "extract": {
        "path", "recipe", "exact", "encodings", "warnings", "by_kind", "tensors", "elements",
        "moved", "moved_share", "norm", "bytes", "bytes_per_parameter",
    },
    "apply": {"path", "recipe", "rounding", "by_kind", "warnings", "tensors"},
    "dry run": {
        "recipe", "out", "ok", "problems", "actions", "read_bytes", "written_bytes",
        "peak_memory", "free_disk", "tensors",
    },
    "undo": {"path", "origin", "tensors"},
    "compare": {"first", "second", "total", "by_kind", "by_layer", "tensors"},
    "verify": {"path", "ok", "digest", "tensors", "files", "damage"},
    "diff": {"first", "second", "same", "elements", "differing", "tensors"},
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_json_is_all_that_is_printed(family: Family, made: Path, tmp_path: Path, name: str) -> None:
    line = LINES[name](family, made, tmp_path / "out")
    result = run(*line, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    value = json.loads(result.stdout, parse_constant=pytest.fail)
    assert set(value) >= KEYS.get(name, set())


@pytest.mark.parametrize("name", LINES)
def test_quiet(family: Family, made: Path, tmp_path: Path, name: str) -> None:
    result = run(*LINES[name](family, made, tmp_path / "out"), "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", LINES)
def test_people(family: Family, made: Path, tmp_path: Path, name: str) -> None:
    result = run(*LINES[name](family, made, tmp_path / "out"))
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert result.stderr == ""
    assert "\x1b" not in result.stdout, "colours are for terminals"


def test_no_is_one(family: Family, untied_family: Family, made: Path, tmp_path: Path) -> None:
    """Exit code 1: the command ran, and the answer is no."""
    value = parsed("check", family.rl, family.sft, untied_family.instruct, code=1)
    assert value["verdict"] == "incompatible"
    assert "incompatible" in done("check", family.rl, untied_family.sft, code=1)
    assert parsed("diff", family.rl, family.sft, code=1)["same"] is False
    assert "differ" in done("diff", family.rl, family.sft, code=1)
    damaged = shutil.copytree(made / "out", tmp_path / "damaged")
    (damaged / "tokenizer.json").unlink()
    assert parsed("verify", damaged, code=1)["ok"] is False
    assert "tokenizer.json" in done("verify", damaged, code=1)
    line = ["apply", made / "reason", "--to", untied_family.instruct, "-o", tmp_path / "o"]
    assert parsed(*line, "--dry-run", code=1)["ok"] is False
    assert "would stop" in done(*line, "--dry-run", code=1)
    result = run("verify", damaged, "-q")
    assert (result.exit_code, result.stdout) == (1, "")


def test_input_errors_are_two(
    family: Family, untied_family: Family, made: Path, tmp_path: Path
) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "o"
    for line in (
        ["check", nowhere, family.sft],
        ["extract", family.rl, nowhere, "-o", out],
        ["apply", nowhere, "--to", family.instruct, "-o", out],
        ["apply", made / "reason", "--to", nowhere, "-o", out],
        ["undo", nowhere, "-o", out],
        ["inspect", nowhere],
        ["compare", nowhere, made / "reason"],
        ["verify", nowhere],
        ["diff", nowhere, family.sft],
    ):
        assert "nowhere" in refused(*line), line
        assert refused(*line, "-q", "--json")
    assert not out.exists()
    assert "rv.load" in refused("check", made / "reason", family.sft)
    assert "--from" in refused("apply", family.rl, "--to", family.instruct, "-o", out)
    message = refused("apply", made / "reason", "--to", untied_family.instruct, "-o", out)
    assert len(message.splitlines()) > 2, "every problem at once"
    assert "unfinished" not in message
    assert not out.exists()


# -- usage


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory-budget", "lots"], "64MiB"),
        (["--memory-budget", "-1"], "64MiB"),
        (["--memory-budget", "64 PB"], "64MiB"),
        (["--memory-budget", "99999999T"], "memory"),
        (["--alpha", "big"], "--alpha"),
        (["--alpha", "nan"], "finite"),
        (["--alpha", "inf"], "finite"),
        (["--alpha", "1", "--alpha", "2"], "2 times for 1"),
        (["--alpha-for", "norm"], "REGEX=VALUE"),
        (["--alpha-for", "=1"], "REGEX=VALUE"),
        (["--alpha-for", "norm=much"], "REGEX=VALUE"),
        (["--alpha-for", "(=1"], "no regular expression"),
        (["--include", "["], "no regular expression"),
        (["--exclude", "*"], "no regular expression"),
        (["--layer-ramp", "1"], "A:B"),
        (["--layer-ramp", "1:"], "A:B"),
        (["--layer-ramp", "a:b"], "A:B"),
        (["--map-prefix", "model."], "A=B"),
        (["--control", "noise"], "--control"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--threads", "-1"], "--threads"),
        (["--out-dtype", "int8"], "--out-dtype"),
        (["--digest", "md5"], "--digest"),
        (["--vocab", "guess"], "--vocab"),
        (["--missing", "guess"], "--missing"),
        (["--chat-template-from", "nowhere"], "nowhere"),
        (["--from", "one"], "--from"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use(
    family: Family, made: Path, tmp_path: Path, more: Sequence[str], said: str
) -> None:
    out = tmp_path / "o"
    message = refused("apply", made / "reason", "--to", family.instruct, "-o", out, *more)
    assert said in message
    assert "understand" not in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("64MiB", 64 << 20), ("1G", 1 << 30), ("500MB", 500 << 20), ("1048576", 1 << 20),
     ("1.5k", 1536), (" 2 GiB ", 2 << 30), ("7B", 7)],
)  # fmt: skip
def test_sizes(text: str, bytes_: int) -> None:
    from reasonvec.cli.console import Session
    from reasonvec.cli.options import session_options

    @click.command()
    @session_options
    def told(session: Session) -> None:
        click.echo(session.memory_budget)

    result = CliRunner().invoke(told, ["--memory-budget", text])
    assert result.stdout == f"{bytes_}\n"


def test_a_seed_has_64_bits(family: Family, made: Path, tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    for command in (
        ("apply", made / "reason", "--to", family.instruct, "-o", tmp_path / "o"),
        ("spectrum", made / "reason"),
        ("factors", family.sft, "--rank", 2, "-o", file),
    ):
        for seed in (-1, 1 << 64):
            assert "0<=x<=18446744073709551615" in refused(*command, "--seed", seed)
    assert not file.exists()


def test_the_number_of_vectors(family: Family, made: Path, tmp_path: Path) -> None:
    reason, out = made / "reason", tmp_path / "o"
    assert "at least one vector" in refused("apply", "--to", family.instruct, "-o", out)
    assert "two vectors" in refused("compare", reason)
    assert "two vectors" in refused("compare", reason, reason, reason)
    assert "expected a vector, a checkpoint" in refused("inspect")
    assert "one vector" in refused("inspect", reason, "--from", family.rl, family.sft)
    assert refused("apply", reason, "-o", out)
    assert refused("apply", reason, "--to", family.instruct)
    assert refused("extract", family.rl, "-o", out)
    assert refused("nothing")


def test_a_model_minus_itself(family: Family, tmp_path: Path) -> None:
    itself = ["--from", family.rl, family.rl]
    assert "minus itself" in refused("inspect", *itself)
    assert "minus itself" in refused("compare", *itself, *itself)
    assert "minus itself" in refused("extract", family.rl, family.rl, "-o", tmp_path / "v")


# -- --from


def test_from_in_place_of_a_vector(family: Family, made: Path, tmp_path: Path) -> None:
    """The same bytes and the same figures, with nothing written in between."""
    pair, reason = ["--from", family.rl, family.sft], made / "reason"
    done("apply", *pair, "--to", family.instruct, "-o", tmp_path / "live", "--no-sync")
    assert read_checkpoint(tmp_path / "live") == read_checkpoint(made / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"live"}

    one, other = parsed("inspect", *pair), parsed("inspect", reason)
    assert figures(one) == pytest.approx(figures(other))

    both = parsed("compare", reason, *pair)
    assert both["total"] == parsed("compare", reason, reason)["total"]
    assert both["total"] == parsed("compare", *pair, *pair)["total"]
    total = both["total"]
    assert isinstance(total, dict)
    assert total["cosine"] == pytest.approx(1)
    assert total["overlap"] == total["sign_agreement"] == 1


def figures(value: object) -> list[float]:
    """Norms and counts of an inspection, wherever they stand."""
    if isinstance(value, dict):
        own = [float(value[k]) for k in ("norm", "moved") if isinstance(value.get(k), int | float)]
        return own + [x for part in value.values() for x in figures(part)]
    return [x for part in value for x in figures(part)] if isinstance(value, list) else []


def test_alphas_go_to_vectors_in_order(family: Family, made: Path, tmp_path: Path) -> None:
    """Folders first, then differences; what has no alpha has 1."""
    line = ["apply", made / "reason", "--from", family.sft, family.base, "--from", family.rl,
            family.base, "--to", family.instruct, "--dry-run", "-o", tmp_path / "o"]  # fmt: skip
    recipes = {
        (): "reason + (sft - base) + (rl - base)",
        ("-a", "0.5"): "0.5 * reason + (sft - base) + (rl - base)",
        ("-a", "1", "--alpha", "-2"): "1 * reason + -2 * (sft - base) + (rl - base)",
        ("-a", "1", "-a", "2", "-a", "0"): "1 * reason + 2 * (sft - base) + 0 * (rl - base)",
    }
    for alphas, recipe in recipes.items():
        assert parsed(*line, *alphas)["recipe"] == f"instruct + {recipe}"


def test_options_are_the_algebra(family: Family, made: Path, tmp_path: Path) -> None:
    v = rv.load(made / "reason")
    cases: dict[str, tuple[list[str], rv.Vector]] = {
        "alpha_for": (
            ["-a", "0.5", "--alpha-for", r"layers\.1=2"],
            (0.5 * v).alpha_for({r"layers\.1": 2}),
        ),
        "equals": (["--alpha-for", "a=b=2"], v.alpha_for({"a=b": 2})),
        "ramp": (["--layer-ramp", "0.25:1.5"], v.ramp(0.25, 1.5)),
        "where": (
            ["--include", "mlp", "--exclude", "up"],
            v.where(include=["mlp"], exclude=["up"]),
        ),
        "reverse": (["--control", "reverse"], -v),
        "random": (["--control", "random", "--seed", "7"], v.control("random", seed=7)),
        "shuffle": (["--control", "shuffle"], v.control("shuffle")),
    }
    for name, (options, vector) in cases.items():
        line = ["apply", made / "reason", "--to", family.instruct, "-o", tmp_path / name]
        done(*line, "--no-sync", *options)
        (rv.open(family.instruct) + vector).save(tmp_path / f"{name} api", sync=False)
        assert read_checkpoint(tmp_path / name) == read_checkpoint(tmp_path / f"{name} api"), name


# -- --dry-run


def test_a_dry_run_writes_nothing(family: Family, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    value = parsed("apply", made / "reason", "--to", family.instruct, "-o", out, "--dry-run")
    assert value["ok"] is True
    assert not out.exists()
    report = parsed("apply", made / "reason", "--to", family.instruct, "-o", out, "--no-sync")
    tensors, planned = report["tensors"], value["tensors"]
    assert isinstance(tensors, dict)
    assert isinstance(planned, list)
    assert {row["name"]: row["action"] for row in planned} == {
        name: row["action"] for name, row in tensors.items()
    }
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert value["written_bytes"] == pytest.approx(written, rel=0.02)


def test_a_dry_run_names_every_problem(family: Family, made: Path, tmp_path: Path) -> None:
    target = shutil.copytree(family.instruct, tmp_path / "target")
    config = json.loads((target / "config.json").read_bytes())
    config |= {"rope_theta": 1e4, "hidden_act": "gelu"}
    (target / "config.json").write_text(json.dumps(config))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "letter.txt").write_text("dear")
    line = ["apply", made / "reason", "--to", target, "-o", tmp_path / "o"]
    value = parsed(*line, "--dry-run", code=1)
    problems = value["problems"]
    assert isinstance(problems, list)
    text = "\n".join(problem["message"] for problem in problems)
    shown = done(*line, "--dry-run", code=1)
    for word in ("rope_theta", "hidden_act", "not empty"):
        assert word in text
        assert word in shown
    assert contents(tmp_path / "o") == {"letter.txt": b"dear"}
    assert "rope_theta" in refused(*line)


# -- strangers' names

HOSTILE = [
    "model.layers.0.[bold red]mlp[/bold red].weight",
    "[/]",
    "[link=file:///etc/passwd]click[/link]",
    "model.:smile:.weight",
    "trailing\\",
    "escape\x1b[31m.\x1b]0;title\x07.weight",
    "line\nbreak\r.weight",
    "right\u202eto left.weight",
    "zero\u200bwidth.weight",
    "wide " + "x" * 300,
    "数学.weight",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Donors and a target whose tensors have names that try things."""
    dice = np.random.default_rng(0)
    folders = []
    for name in ("p [red]", "n :smile:", "t [/]"):
        tensors: dict[str, Stored] = {
            key: stored("F32", dice.normal(size=8).astype(np.float32)) for key in HOSTILE
        }
        folder = tmp_path_factory.mktemp("hostile") / name.replace("/", "")
        folders.append(write_checkpoint(folder, tensors, config={"model_type": "[/bold]"}))
    return folders


def test_hostile_names_in_tables(hostile: Sequence[Path], tmp_path: Path) -> None:
    p, n, t = hostile
    lines = {
        "check": ["check", p, n, t],
        "extract": ["extract", p, n, "-o", tmp_path / "v"],
        "inspect": ["inspect", tmp_path / "v", "--html", tmp_path / "v.html"],
        "checkpoint": ["inspect", p],
        "plan": ["apply", "--from", p, n, "--to", t, "-o", tmp_path / "o", "--dry-run"],
        "apply": ["apply", "--from", p, n, "--to", t, "-o", tmp_path / "o"],
        "verify": ["verify", tmp_path / "o"],
        "diff": ["diff", p, n],
        "compare": ["compare", tmp_path / "v", "--from", t, n],
        "undo": ["undo", tmp_path / "o", "-o", tmp_path / "back"],
    }
    for name, line in lines.items():
        result = run(*line)
        assert result.exit_code in {0, 1}, (name, result.output)
        for unseen in "\x1b\x07\r\u202e\u200b":
            assert unseen not in result.output, (name, unseen)
    shown = done("inspect", p) + done("diff", p, n, code=1)
    for written in ("[bold red]", "[/]", ":smile:", "\\u001b[31m", "\\u202e", "数学"):
        assert written in shown.replace("\n", ""), written


def test_hostile_names_in_messages(hostile: Sequence[Path], family: Family, tmp_path: Path) -> None:
    p, n, _ = hostile
    message = refused("apply", "--from", p, n, "--to", family.instruct, "-o", tmp_path / "o")
    for unseen in "\x1b\x07\r\u202e\u200b":
        assert unseen not in message
    report = run("check", p, n, family.instruct)
    assert report.exit_code == 1
    for unseen in "\x1b\x07\r\u202e\u200b":
        assert unseen not in report.output


def test_nan_in_figures(tmp_path: Path) -> None:
    """JSON has no NaN: what is no number is null, not an error and not a word of its own."""
    x = np.array([1, np.nan, np.inf, 2], np.float32)
    folders = [
        write_checkpoint(tmp_path / name, {"weight": stored("F32", x * k)}, config={})
        for k, name in enumerate(("p", "n", "t"), 1)
    ]
    p, n, t = folders
    assert "NaN" in refused("extract", p, n, "-o", tmp_path / "v")
    value = parsed("extract", p, n, "-o", tmp_path / "w", "--allow-nonfinite", code=1)
    assert (value["exact"], value["norm"]) == (False, None)
    parsed("inspect", p)
    parsed("inspect", tmp_path / "w")
    line = ["apply", "--from", p, n, "--to", t, "-o", tmp_path / "o", "--allow-nonfinite"]
    parsed(*line)
    for show in (["inspect", p], ["inspect", tmp_path / "w"]):
        done(*show)
