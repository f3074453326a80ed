"""The command `moe-fx`: a thin front that parses arguments, calls the package and prints what it returns.

Exit status: 0 when the command did what it was asked, 1 when `doctor` finds no target that works or `cache verify` an
entry that cannot be used, 2 on a wrong argument or on any error that moe-fx raises on purpose.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_fx.errors import MoeFxError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` defaults to the process's arguments."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.handler(arguments))
    except MoeFxError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-fx", description="Find Mixture-of-Experts layers and lower them.")
    parser.add_argument("--version", action="version", version=f"moe-fx {importlib.metadata.version('moe-fx')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON instead of text")

    def command(name: str, handler: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        subparser: argparse.ArgumentParser = commands.add_parser(
            name, parents=[as_json], help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        subparser.set_defaults(handler=handler)
        return subparser

    command("doctor", _doctor, "tell which targets this machine can serve and what the others lack")
    command("passes", _passes, "list the passes in the order they run")
    command("options", _options, "list the options that torch.compile(..., options={...}) takes")

    cache = command("cache", _cache, "list, check or remove what the compile cache keeps")
    cache.add_argument("action", choices=("list", "verify", "clear"), help="what to do")
    cache.add_argument(
        "--dir", metavar="DIR", help="the cache directory (default: MOE_FX_CACHE_DIR, else the user's cache directory)"
    )

    explain = command("explain", _explain, "show what is matched in a model, what is missed, and why")
    explain.add_argument("model", metavar="MODEL", help="a model's folder or name, as transformers takes it")
    explain.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="build the first N layers (default: as few as hold every kind)",
    )
    explain.add_argument(
        "--tokens", type=_positive, default=16, metavar="N", help="tokens in the traced input (default: %(default)s)"
    )
    explain.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="the precision that the model is built in (default: %(default)s)",
    )
    explain.add_argument(
        "--experts-implementation",
        metavar="NAME",
        help="how transformers writes the experts, for example eager or grouped_mm (default: its own choice)",
    )
    explain.add_argument(
        "--dynamic",
        action=argparse.BooleanOptionalAction,
        help="trace with a symbolic or a fixed number of tokens (default: torch.compile's own choice)",
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="also write the report as one HTML page")
    explain.add_argument(
        "--trust-remote-code", action="store_true", help="let transformers run code that comes with the model"
    )

    tune = command("tune", _tune, "measure the best launch parameters of the CUDA expert kernels on this GPU")
    tune.add_argument(
        "--formats",
        nargs="+",
        choices=("bf16", "int4"),
        default=["bf16", "int4"],
        help="formats of the experts' weights",
    )
    tune.add_argument("--tokens", type=_positive, nargs="+", metavar="N", help="token counts to measure")
    tune.add_argument(
        "--shape",
        type=_positive,
        nargs=4,
        default=[2048, 768, 128, 8],
        metavar=("H", "I", "E", "K"),
        help="hidden and intermediate size, experts, experts a token (default: Qwen3-30B-A3B)",
    )
    tune.add_argument("--group", type=_positive, default=128, metavar="G", help="inputs a scale of int4 weights")
    tune.add_argument("--output", type=Path, metavar="FILE", help="the file to extend (default: the user's own)")

    ascend = command("build-ascend", _build_ascend, "build the Ascend C kernels for this machine's CANN and torch_npu")
    ascend.add_argument("--output", metavar="PATH", help="file, or folder/, to write (default: the package)")
    ascend.add_argument("--build-dir", type=Path, metavar="DIR", help="keep the build here, for a faster next one")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above zero")
    return number


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def _doctor(arguments: argparse.Namespace) -> int:
    from moe_fx import doctor

    diagnosis = doctor.diagnose()
    if arguments.json:
        _print_json(diagnosis.to_dict())
    else:
        Console().print(doctor.render(diagnosis))
    return 0 if any(target.ready for target in diagnosis.targets) else 1


def _passes(arguments: argparse.Namespace) -> int:
    from moe_fx import passes

    return _print_rows(passes.table(), arguments)


def _options(arguments: argparse.Namespace) -> int:
    from moe_fx import options

    return _print_rows(options.table(), arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from moe_fx import tuning

    console = Console(stderr=True)
    path, table = tuning.tune(
        arguments.shape,
        arguments.group,
        arguments.formats,
        arguments.tokens,
        arguments.output,
        lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    if arguments.json:
        _print_json({"file": str(path), "kernels": table})
    else:
        print(f"wrote {path}")
    return 0


def _build_ascend(arguments: argparse.Namespace) -> int:
    from moe_fx import ascend_build, ascend_library

    console = Console(stderr=True)
    path = ascend_build.build(
        arguments.output,
        arguments.build_dir,
        lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
    )
    if arguments.json:
        _print_json({"file": str(path)})
    elif path != ascend_library.default_path():
        print(f"set {ascend_library.VARIABLE}={path} where moe-fx runs")
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from moe_fx.cache import listing
    from moe_fx.cache.store import open_store
    from moe_fx.options import Options

    store = open_store(Options.from_user({"cache_dir": arguments.dir} if arguments.dir else None), create=False)
    if arguments.action == "clear":
        removed = store.clear()
        if arguments.json:
            _print_json({"removed": removed})
        else:
            print(f"removed {removed} {'entry' if removed == 1 else 'entries'} from {store.folder}")
        return 0
    if arguments.action == "list":
        return _print_rows(listing.entries(store), arguments)
    found = listing.verdicts(store)
    _print_rows(found, arguments)
    return int(any(row["verdict"] != "good" for row in found))


def _print_rows(rows: Iterable[Mapping[str, Any]], arguments: argparse.Namespace) -> int:
    """Print records that share their keys, one a line, under those keys."""
    rows = list(rows)
    if arguments.json:
        _print_json(rows)
        return 0
    table = Table(*(rows[0] if rows else ()), box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    Console().print(table)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from moe_fx.explain_model import explain_pretrained

    explanation = explain_pretrained(
        arguments.model,
        layers=arguments.layers,
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        experts_implementation=arguments.experts_implementation,
        dynamic=arguments.dynamic,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.html is not None:
        arguments.html.write_text(explanation.to_html(), encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
    if arguments.json:
        _print_json(explanation.to_dict())
    else:
        Console().print(explanation)
    return 0
