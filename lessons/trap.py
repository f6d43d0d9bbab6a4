"""Put a silent bug of the field into a copy of the project, and run the test that catches it.

python lessons/trap.py                     # the ten of traps.md
python lessons/trap.py 4                   # the fourth: its patch, and the assertion that fails
python lessons/trap.py 4 --out ../trap-4   # and keep the copy, to see what else the bug does
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lessons.blank import copy_project
from system.errors import Parser, UserError, run_cli

PAGE = Path(__file__).with_name("traps.md")
QUIETLY = ["-o", "addopts=", "-x", "-q", "--tb=short", "--no-header", "-p", "no:cacheprovider"]


@dataclass
class Trap:
    title: str
    patch: str  # a unified diff
    test: str  # the test that catches it, as pytest wants it


def read_traps() -> dict[str, Trap]:
    """Return the traps of traps.md by their numbers: a heading, the first diff and the first test
    under it. The page is their only source."""
    _, *parts = re.split(r"^## (\d+)\. ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    traps = {}
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        patch = re.search(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
        test = re.search(r"`(tests/\w+\.py::\w+)`", text)[1]
        traps[number] = Trap(text.split("\n")[0], patch, test)
    return traps


def apply(patch: str, folder: Path):
    """Change the files of a folder as a unified diff says. A hunk belongs where its old lines
    stand, whatever line that is now; UserError if they do not, or stand there more than once."""
    for part in re.split(r"^--- a/", patch, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@.*\n", part, flags=re.MULTILINE)
        path = folder / head.split("\n")[0]
        text = path.read_text(encoding="utf-8")
        for hunk in hunks:
            lines = [line or " " for line in hunk.removesuffix("\n").split("\n")]
            old = "".join(f"{line[1:]}\n" for line in lines if line[0] != "+")
            new = "".join(f"{line[1:]}\n" for line in lines if line[0] != "-")
            places = [m.start() for m in re.finditer(f"^(?={re.escape(old)})", text, re.MULTILINE)]
            if len(places) != 1:
                raise UserError(f"the patch does not fit {path.name} any more: mend {PAGE.name}")
            text = text[: places[0]] + new + text[places[0] + len(old) :]
        path.write_text(text, encoding="utf-8", newline="\n")


def make_trapped(trap: Trap, out: Path):
    """Make a copy of the project in `out` that has the bug."""
    copy_project(out)
    apply(trap.patch, out)


def evidence(said: str) -> str:
    """Return of what pytest printed the statement that failed and the first lines of why."""
    lines = [line[:100] for line in said.split("\n")]
    places = [i for i, line in enumerate(lines) if re.match(r"tests/\S+:\d+: in ", line)]
    return "\n".join(lines[places[-1] :][:6] if places else lines[-6:])


def caught(code: int, said: str) -> bool:
    """Return whether a test failed, and by an assertion: a crash is no proof that it looks at the
    bug."""
    return code == 1 and bool(re.search(r"^(E   +)?(assert|AssertionError)\b", said, re.MULTILINE))


def main():
    parser = Parser(description="A silent bug, and the test that catches it.")
    parser.add_argument("number", nargs="?", help="which of traps.md; without it they are listed")
    parser.add_argument("--out", help="keep the copy with the bug in this folder")
    args = parser.parse_args()
    traps = read_traps()
    if args.number is None:
        for number, trap in traps.items():
            print(f"{number:>2}  {trap.title}\n    {trap.test}")
        return
    if args.number not in traps:
        raise UserError(f"no trap {args.number}: there are 1 to {len(traps)}")
    trap = traps[args.number]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(args.out or f"{scratch}/copy")
        make_trapped(trap, out)
        print(f"{trap.title}\n\n{trap.patch}\n{trap.test}", flush=True)
        command = [sys.executable, "-m", "pytest", *QUIETLY, trap.test]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    print(evidence(done.stdout))
    if not caught(done.returncode, done.stdout):
        print("not caught")
        sys.exit(1)
    print("caught")


if __name__ == "__main__":
    run_cli(main)
