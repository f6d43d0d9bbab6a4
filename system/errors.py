"""How a command ends when something is wrong: one line that says what to do, and an exit code."""

import os
import signal
import sys
import unicodedata

ADVICE = "lower --micro-batch-tokens (in training), --samples or --max-new-tokens"
# Of the processes that torchrun starts, and numbers, only the first says that it was stopped.
FIRST = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what is no sign of its own


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def run_cli(main):
    """Run a command. What the user or the machine got wrong is one line on stderr and exit code 2,
    Ctrl-C 130, SIGTERM 143; any other exception is a bug of ours and keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? for what it lacks
    try:
        try:
            on_signals(interrupt if FIRST else signal.SIG_DFL)
            return main()
        finally:  # a signal that arrives here is caught below; none arrives after this line
            on_signals(ignore)
    except KeyboardInterrupt as stop:
        number, *words = stop.args or [signal.SIGINT]  # train.py adds how to resume
        end(128 + number, ": ".join(["stopped", *words]), stop)
    except (UserError, OSError) as error:
        end(2, f"error: {error}", error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        end(2, f"error: out of memory: {ADVICE}", error)
    finally:
        on_signals(signal.SIG_DFL)  # should the interpreter hang at its end


def end(code, line, error):
    """Say this line, and the notes that an error was given on its way, and exit."""
    line = ", then ".join([line, *getattr(error, "__notes__", [])])
    print(printable(" ".join(line.split())[:1000]), file=sys.stderr, flush=True)
    sys.exit(code)


def on_signals(handler):
    """Have Ctrl-C and SIGTERM call this handler, or be ignored, or end the process."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def interrupt(number, frame):
    """Handle a signal: raise KeyboardInterrupt, and let no second one disturb what follows."""
    on_signals(ignore)
    raise KeyboardInterrupt(number)


def ignore(number, frame):
    """Handle a signal by nothing. (For SIG_IGN, Python complains of one that came just before.)"""


def out_of_memory(error) -> bool:
    """Return whether this is about memory that cannot be had (not an illegal access to it)."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def printable(text, signs=None) -> str:
    """Return text with U+FFFD for what would steer a terminal, reorder a line or cannot be written
    (half of a surrogate pair). Line ends and tabs stay, or become what the dict `signs` says."""
    bad = [sign for sign in set(text) if unicodedata.category(sign) in STEERING]
    table = dict.fromkeys(bad, "\ufffd") | (signs or {"\n": "\n", "\t": "\t"})
    return text.translate(str.maketrans(table))
