"""errors.py: a user's mistake ends with one line on stderr and exit code 2 (how the program was called) or 1 (what it
found when it ran), never with a stack trace.
Every script imports this module before those that need numpy, so that its absence is such a line, too.
"""
import argparse
import importlib.util
import os
import sys

if importlib.util.find_spec("numpy") is None:
    sys.exit(f"{os.path.basename(sys.argv[0])}: the package numpy is needed: .venv/bin/pip install numpy")


class DataError(Exception):
    """The data or the machine is not as needed; exit code 1."""

    exit_code = 1


class UsageError(DataError):
    """The command line is wrong; exit code 2."""

    exit_code = 2


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line; --help has the rest."""

    def error(self, message):
        raise UsageError(f"{message} (see --help)")


def run_main(main, argv=None):
    """Calls main(argv or sys.argv[1:]) and turns the exceptions a user can cause into a line and an exit code."""
    program = os.path.basename(sys.argv[0])
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except DataError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        message, code = f"{error.filename or 'I/O'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"{program}: {message}", file=sys.stderr)
    return code
