"""This verifier beside math-verify, on the same labelled answers in the same run.

    python bench/verifier.py [FILE ...]    # by default all labelled files of ../shared/verifier

math-verify takes minutes: it stops at 5 s, many times. A FILE is a JSONL of gold, completion, label
and kind. The kind `fallback` is judged with strict=False; `convention`, on which graders disagree,
is left out. Hostile cases are counted on their own: right means the labelled verdict, without an
exception, within 0.2 s. Times are those of one process on one core, imports excluded.
"""

import collections
import json
import logging
import sys
import time
from pathlib import Path

HOUSE = Path(__file__).parent.parent
sys.path.insert(0, str(HOUSE))

from eval_math import verify  # noqa: E402
from system.errors import Parser, UserError, run_cli  # noqa: E402

try:
    import resource
except ModuleNotFoundError:
    resource = None  # on Windows

LABELLED = [HOUSE.parent / "shared" / "verifier" / f"{name}.jsonl" for name in ("dev", "attacks")]
LIMIT = 0.2  # seconds of a hostile case


def peer():
    """math-verify as its README calls it, the gold answer in a box; None if it is not installed."""
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
        from math_verify import verify as compare
    except ImportError:
        return None
    logging.disable(logging.ERROR)  # it writes whole hostile completions to the log
    boxed = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def math_verify(completion, gold, strict):
        meant = parse(f"\\boxed{{{gold}}}", boxed)
        return compare(meant, parse(completion, boxed))

    return math_verify


def measure(judge, cases):
    """Counts of one verifier over all cases, and the seconds of each."""
    counts, seconds, hostile = collections.Counter(), [], []
    for case in cases:
        is_hostile = case["kind"].startswith("hostile") or case["kind"] == "awkward"
        started = time.perf_counter()
        try:
            verdict = judge(case["completion"], case["gold"], case["kind"] != "fallback")
        except Exception:
            verdict = None
            counts["raised"] += 1
        (hostile if is_hostile else seconds).append(time.perf_counter() - started)
        right = verdict is case["label"]
        if is_hostile:
            counts["hostile"] += 1
            counts["hostile right"] += right and hostile[-1] <= LIMIT
        else:
            counts["scored"] += 1
            counts["right"] += right
        counts["FP"] += verdict is True and not case["label"]
        counts["FN"] += verdict is not True and case["label"]
    return counts, seconds, hostile


def main():
    parser = Parser(description="Our verifier beside math-verify.")
    parser.add_argument("files", nargs="*", default=LABELLED, help="labelled answers (JSONL)")
    files = parser.parse_args().files
    if not resource:
        raise UserError("bench/verifier.py takes Linux or macOS, or Windows' WSL: use one of these")
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(f"no file {path}: give a JSONL of gold, completion, label and kind")
        cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        report(path.name, [case for case in cases if case["kind"] != "convention"])


def report(name, cases):
    """Print the counts and times of both verifiers on the cases of one file."""
    print(f"{len(cases)} cases of {name}")
    verifiers = {"ours": verify, "math-verify": peer()}
    for name, judge in verifiers.items():
        if judge is None:
            print(f"{name:11}  is not installed: pip install -r requirements-dev.txt")
            continue
        counts, seconds, hostile = measure(judge, cases)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name:11}  right {counts['right']} of {counts['scored']} "
            f"({100 * counts['right'] / max(1, counts['scored']):.2f} %), FP {counts['FP']}, "
            f"FN {counts['FN']}, hostile right within {LIMIT} s {counts['hostile right']} of "
            f"{counts['hostile']}, raised {counts['raised']}\n{'':11}  "
            f"{len(seconds) / max(1e-9, sum(seconds)):.0f} checks a second, slowest "
            f"{max(seconds, default=0):.3f} s, of hostile ones {max(hostile, default=0):.3f} s, "
            f"peak memory so far {memory:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)
