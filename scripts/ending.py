"""How every script ends: with one line, whatever ends it, and with an exit code that a scheduler understands.

130 and 143: stopped by Ctrl-C or SIGTERM, what was done is kept; 1: a file could not be written, or cells failed; 2:
bad input. A reader of the output that goes away, as `| head` does, ends a script without a word.

    ending.run(main)
"""

import contextlib
import os
import signal
import sys
from pathlib import Path


class Stopped(SystemExit):
    """A signal asked this process to end. kept: a few words on what the same command will go on from."""

    def __init__(self, number, kept=""):
        super().__init__(128 + number)
        self.number, self.kept = number, kept


def run(main):
    """Call main() as a command of its own; never return."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _signalled)
    code = 0
    try:
        main()
        sys.stdout.flush()
    except Stopped as stop:
        say(f"stopped by {signal.Signals(stop.number).name}; {stop.kept or 'what was finished is kept'}")
        code = stop.code
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"error: {where}{error.strerror or error}; what was finished before is kept")
        code = 1
    except RuntimeError as error:
        if type(error).__name__ != "Lost":  # of lib.ranks, which needs torch
            raise
        say(f"error: {error}")
        code = 1
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it ends now anyway; torch's own last steps would be torn
        _close_output()
    sys.exit(code)


def say(line):
    with contextlib.suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def check():
    """End now if a signal has asked for it; called where everything that is done is kept."""
    if _asked:
        raise Stopped(_asked[0])


@contextlib.contextmanager
def later():
    """Within this context the first signal waits for the next `check`; a second one ends at once."""
    global _waits
    _waits += 1
    try:
        yield
    finally:
        _waits -= 1
    if _asked:
        raise Stopped(_asked[0])


_asked, _waits = [], 0


def _signalled(number, frame):
    first = not _asked
    _asked.append(number)
    if not (_waits and first):
        raise Stopped(number)


def _close_output():
    """Flush what is left, so that the interpreter does not fail at it, with a traceback, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
