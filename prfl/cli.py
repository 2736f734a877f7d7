"""The command line: which commands there are, and what becomes of their errors.  Each is a file in prfl/commands.

What a command does is imported when it runs, so that ``prfl --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from prfl.commands import (
    cache,
    completion,
    convert,
    doctor,
    evaluate,
    export,
    init,
    labels,
    questions,
    sample,
    schema,
    score,
    train,
    unpack,
)
from prfl.commands.options import add_command, config_of, in_file, print_any_name
from prfl.utils.errors import PrflError
from prfl.utils.interrupts import ended_by_signals
from prfl.utils.streams import lossy_output, silence
from prfl.utils.threads import let_threads_sleep

COMMANDS = (
    init, train, cache, evaluate, sample, score, export, labels, unpack, questions, convert, doctor, schema,
)  # fmt: skip
OVERVIEW = f"Align a video generator with preferences, by the gradient of a latent reward.\n\n{train.EXAMPLES}"


def main(arguments: Sequence[str] | None = None) -> int:
    let_threads_sleep()
    top = parser()
    if completion.TURNED_ON in os.environ:
        completion.complete(top)
    options, rest = top.parse_known_args(arguments)
    if strange := [text for text in rest if text.startswith("-") or "=" not in text]:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    if "overrides" not in options and rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = getattr(options, "overrides", []) + rest  # argparse stops at the first option
    print_any_name()
    with nullcontext() if prints_its_result(options) else lossy_output():
        return run(options, sys.argv[1:] if arguments is None else arguments)


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """The exit code of the command.  arguments: its words."""
    from prfl.utils.console import forget_warnings

    forget_warnings()  # those of an earlier command in this process
    try:
        with ended_by_signals(), in_file(config_of(options)):
            tell_of_own_config(options)
            options.command.run(options)
            if sys.stdout:
                sys.stdout.flush()
    except PrflError as error:
        complain(error)
        return 2
    except UnicodeEncodeError as error:  # of a file's name
        name, fix = str(error.object)[:200], "export PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        complain(PrflError(f"the locale's encoding, {error.encoding}, cannot write this name", where=name, fix=fix))
        return 2
    except KeyboardInterrupt:
        say(f"prfl: interrupted{how_to_go_on(options, arguments)}")
        return 130
    except BrokenPipeError:  # who read the result has enough
        silence(sys.stdout)
        return 1
    except OSError as error:
        if not prints_its_result(options) or error.filename is not None:
            raise
        silence(sys.stdout)
        print(f"prfl: the standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def tell_of_own_config(options: argparse.Namespace) -> None:
    """Say it where the config is not the user's: one of that name comes with prfl."""
    from prfl.config.places import find_config

    if options.config and getattr(options, "run", None) is None and (path := find_config(options.config)):
        if path != Path(options.config):
            say(f"{options.config} is not here; taken is the one that comes with prfl: {path}")


def complain(error: PrflError) -> None:
    """Print an error on the standard error.  One that is of a command names the program itself."""
    who = f"prfl, process {os.environ['RANK']}: " if "RANK" in os.environ else "prfl: "
    say(str(error) if error.where.startswith("prfl ") else f"{who}{error}")


def say(text: str) -> None:
    from prfl.utils.console import messages

    messages.say(text)


def how_to_go_on(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """What to do after an interruption, in words; nothing for a command that begins anew each time."""
    words = list(arguments)
    if not getattr(options.command, "GOES_ON", False) or getattr(options, "dry_run", False):
        return ""
    if "--resume" in words:
        at = words.index("--resume")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--resume=")]
    again = "" if "RANK" in os.environ else f":\n  {shlex.join(['prfl', *words])}"
    return f"; the same command goes on where it stopped{again}"


def prints_its_result(options: argparse.Namespace) -> bool:
    """Whether the standard output is what the command is for; elsewhere it is told what goes on."""
    return getattr(options.command, "PRINTS_RESULT", False) or getattr(options, "dry_run", False)


class Version(argparse.Action):
    """Looks it up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"prfl {version('prfl')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="prfl", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = getattr(command, "NAME", command.__name__.rpartition(".")[2])
        added = add_command(commands, name, command.SUMMARY, getattr(command, "HELP", command.EXAMPLES))
        added.set_defaults(command=command, config=None)
        if config := getattr(command, "CONFIG", None):
            count = "?" if config == "optional" else None
            named = "a yaml file, or one that comes with prfl, as tiny.yaml"
            file = added.add_argument("config", metavar="CONFIG", nargs=count, help=named)
            keys = added.add_argument("overrides", metavar="key=value", nargs="*", help="as training.steps=10")
            file.completer, keys.completer = completion.configs, completion.overrides  # type: ignore[attr-defined]
        command.add_arguments(added)
    return top


if __name__ == "__main__":
    sys.exit(main())
