"""Entry point of the `echokv` command.

A subcommand is a module with `add_parser(subparsers)`, which sets `run` to a function of the parsed
arguments. Such a module imports nothing heavy before `run` is called.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from echokv_vllm import __version__

COMMAND_MODULES = ("echokv_vllm.cli.train", "echokv_vllm.cli.eval", "echokv_vllm.cli.demo")
"""Modules of the subcommands, in the order of the help text. Register a new one here."""


def build_parser() -> argparse.ArgumentParser:
    """Parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="echokv", description="EchoKV: smaller KV caches for vLLM by rebuilding KV heads."
    )
    parser.add_argument("--version", action="version", version=f"echokv {__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error instead of one line"
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Arguments without the program name; those of the process when None.

    Returns:
        Exit code: 0 on success, 2 when the user or the system must act, 130 when interrupted.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        if parsed.debug:
            raise
        print(f"echokv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("echokv: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
