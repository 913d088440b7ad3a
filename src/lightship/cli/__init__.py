"""The command line: one verb a file; each parses, calls the library and prints, nothing else.

Results go to standard output, progress and errors to standard error. Exit codes: 0 fine, 1 a check or limit failed,
2 wrong use or input/output.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import click

from lightship.errors import LightshipError

VERBS = ("ship", "init", "run", "advise", "compress", "convert", "evaluate", "check", "tune", "serve", "reload",
         "rollback", "keys", "chat", "bench", "show", "list", "doctor", "demo", "completion")  # fmt: skip
KEEPING = ("run", "compress")  # verbs whose finished stages stay


class Verbs(click.Group):
    """Loads a verb's file when it is called; the help page reads their docstrings without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"lightship.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, _first_line(Path(__file__).parent / f"{name}.py")) for name in VERBS]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from lightship import __version__

        click.echo(__version__)
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Make a language model light, and ship it."""


def _left(arguments: list[str]) -> str:
    """What is there after Ctrl-C."""
    kept = next(iter(arguments), "") in KEEPING
    return "finished stages are kept, the next run goes on from there" if kept else "nothing was left behind"


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit. Errors of ours print one message and no traceback."""
    try:
        code = cli.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"stopped; {_left(sys.argv[1:] if arguments is None else arguments)}", err=True)
        sys.exit(130)
    except LightshipError as error:
        click.echo(f"lightship: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"lightship: {error}", err=True)
        sys.exit(2)
    except MemoryError:
        click.echo("lightship: out of memory\n  → a smaller model or precision, or a machine with more", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
