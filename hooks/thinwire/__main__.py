"""The command line: ``python -m thinwire info``, and ``python -m thinwire advise train.py ...`` under torchrun."""

import argparse
import sys

from thinwire import info
from thinwire.advice import command


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the arguments name; its exit status."""
    parser = argparse.ArgumentParser("python -m thinwire", description="thinwire's commands")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = commands.add_parser("info", help="which parts are live here, and why the others are not")
    about.set_defaults(run=lambda args: info.main())
    command.add_arguments(commands.add_parser("advise", help="would it help this script? Start it with torchrun"))
    args = parser.parse_args(arguments)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
