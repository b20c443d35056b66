"""errors.py: a user's mistake ends with one line on stderr and exit code 2 (how the program was called) or 1 (what it
found when it ran), never with a stack trace.
Every script imports this module before those that need numpy, so that its absence is such a line, too.
"""
import argparse
import contextlib
import importlib.util
import os
import signal
import sys

if importlib.util.find_spec("numpy") is None:
    sys.exit(f"{os.path.basename(sys.argv[0])}: the package numpy is needed: .venv/bin/pip install numpy")


class DataError(Exception):
    """The data or the machine is not as needed; exit code 1."""

    exit_code = 1


class UsageError(DataError):
    """The command line is wrong; exit code 2."""

    exit_code = 2


@contextlib.contextmanager
def names_the_file(path):
    """A failing write does not know whose it is: gives it the name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line; --help has the rest."""

    def error(self, message):
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, args=None, namespace=None):
        arguments = super().parse_args(args, namespace)
        for name, value in vars(arguments).items():
            if isinstance(value, list) and "" in value:
                self.error(f"{name}: a name is empty")
            if value == "" and self.get_default(name) != "":
                self.error(f"--{name.replace('_', '-')} needs a value that is not empty")
        return arguments


class Terminated(BaseException):
    """SIGTERM or SIGHUP has come: unwinds the stack, so that temporary files are removed on the way out."""


def _terminate(number, _):
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the way out is short: a second signal does not end it
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def run_main(main, argv=None):
    """Calls main(argv or sys.argv[1:]) and turns whatever it raises into one line and an exit code: 2 for a wrong call, 1
    for any other failure, 128 + N after the signal N."""
    program = os.path.basename(sys.argv[0])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so it stays
            signal.signal(number, _terminate)
    try:
        try:
            code = main(sys.argv[1:] if argv is None else argv) or 0
        except SystemExit as ended:  # --help
            code = ended.code
        sys.stdout.flush()
        return code
    except DataError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # nobody reads: nothing more to say, at the interpreter's own flush either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        message, code = f"{error.filename or 'I/O'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Terminated as signalled:
        message, code = f"ended by {signal.Signals(signalled.args[0]).name}", 128 + signalled.args[0]
    except MemoryError:
        message, code = "there is too little memory for this", 1
    except BaseException as error:  # what nobody foresaw
        message, code = f"{type(error).__name__}: {error}", 1
    print(f"{program}: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
