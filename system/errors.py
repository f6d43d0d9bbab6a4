"""How a command ends when something is wrong: one line that says what to do, and an exit code."""

import signal
import sys
import unicodedata

STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what is no sign of its own


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def printable(text, signs=None) -> str:
    """Text from a model or a file, fit for a terminal: what would steer it (escapes, carriage
    returns), reorder a line (bidi controls) or cannot be written (half of a surrogate pair) becomes
    U+FFFD. Line ends and tabs stay, or become what `signs` says."""
    signs = signs or {"\n": "\n", "\t": "\t"}
    bad = [c for c in set(text) if unicodedata.category(c) in STEERING]
    return text.translate(str.maketrans(dict.fromkeys(bad, "\ufffd") | signs))


def run_cli(main):
    """Run a command line. What the user or the machine got wrong is one line, and exit code 2; with
    Ctrl-C or SIGTERM it is 130 or 143."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows a ? for what it lacks
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    code = 2
    try:
        return main()
    except KeyboardInterrupt as stop:
        number, *said = stop.args
        line, code = ": ".join(["stopped", *said]), 128 + number
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).split())
        if not isinstance(error, (UserError, OSError)):
            if not out_of_memory(error):
                raise
            line = "out of memory: lower --micro-tokens, --samples, --prompts or --max-new-tokens"
        line = f"error: {line}"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # torchrun's comes while we end: the line is said
    print(printable(line[:1000]), file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # should the interpreter not find its end
    sys.exit(code)


def out_of_memory(error) -> bool:
    """Not so is an illegal memory access."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def interrupt(number, frame):
    raise KeyboardInterrupt(number)
