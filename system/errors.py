"""How a command begins and ends: numbers within bounds, errors of one line, an exit code."""

import argparse
import os
import signal
import sys
import unicodedata

ADVICE = "lower --micro-batch-tokens (in training), --samples or --max-new-tokens"
# Of the processes that torchrun starts, and numbers, only the first says that it was stopped.
FIRST = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories of what is no sign of its own
LIMITS = {  # (the least, the most): the flags whose numbers these are
    (0, 2**64 - 1): "seed seeds",  # what torch's generators take
    (1, 2**31 - 1): "steps save_every problems max_prompt_tokens micro_batch_tokens",
    (0, 2**31 - 1): "warmup eval_every eval_problems top_k",
    (1, 2**17): "max_new_tokens tokens warm_tokens prompt_tokens",
    (1, 2**14): "prompts samples keep_checkpoints",
    (0, 2**14): "eval_samples",
    (6, 2**10): "batches",  # of which pairs are left out
    (1, 2**12): "rank epochs_per_rollout rounds threads jobs processes kills rows",
    (1e-30, 1e30): "lr alpha max_grad_norm",  # what fp32 holds, and products of it
    (0.0, 1e30): "kl_coef clip_eps_high results",
    (0.001, 1000.0): "sharpening temperature",
    (1e-6, 1.0): "top_p",
    (0.0, 0.999999): "beta2 clip_eps_low",
}


class UserError(Exception):
    """What the user gave cannot be used. The message is one line: what is wrong and what to do."""


def before_imports():
    """Prepare a command for its slow imports: Ctrl-C ends them without a traceback; then idle
    threads spin for microseconds and sleep (libgomp's default keeps the cores from others)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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


class Parser(argparse.ArgumentParser):
    """Raises UserError, and knows no abbreviations: --sample is a slip, not --samples."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, or_zero=()):
        self.allow_abbrev = False
        given = super().parse_args()
        check_numbers(vars(given), or_zero)
        return given


def flag_name(name) -> str:
    """Return the flag of a setting, such as --top-p for top_p."""
    return f"--{name.replace('_', '-')}"


def check_numbers(given: dict, or_zero=()):
    """Raise UserError on a number beyond its LIMITS that is not a 0 of the names in or_zero."""
    for (least, most), names in LIMITS.items():
        for name in names.split():
            found = given.get(name)
            for x in found if isinstance(found, list) else [found]:
                fits = not isinstance(x, int | float) or least <= x <= most
                if not fits and not (x == 0 and name in or_zero):
                    known = f"{least} to {most}" + " or 0" * (name in or_zero)
                    raise UserError(f"{flag_name(name)} {x}: use {known}")


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
