"""Keep the links into the code right: find again the lines that each of them names.

    python lessons/links.py           # rewrite line numbers in README.md and lessons/*.md
    python lessons/links.py --check   # change nothing, name what is stale; then the exit code is 1

[`KVCache.start`](../model.py#L1-L9) leads to the lines that define a function, class, method or
constant. A link whose text is a line of code leads to the one line that reads so.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "lessons").glob("*.md"))]
LINK = re.compile(r"\[`([^`\n]+)`\]\(([\w./-]+\.py)#L[-L\d]*\)")


def definitions(nodes, prefix="") -> dict:
    """Return the first and last line of each function, class, method and constant by its name."""
    places = {}
    for node in nodes:
        names = []
        first = node.lineno
        if isinstance(node, ast.Assign):
            names = [ast.unparse(target) for target in node.targets]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
            first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
        if isinstance(node, ast.ClassDef):
            places |= definitions(node.body, f"{node.name}.")
        places |= {prefix + name: (first, node.end_lineno) for name in names}
    return places


def find_lines(source, text) -> str:
    """Return where a name is defined or a line of code stands, such as L3-L9; "" if nowhere, or if
    the line stands there more than once."""
    places = definitions(ast.parse(source).body)
    if text in places:
        first, last = places[text]
        return f"L{first}" if first == last else f"L{first}-L{last}"
    lines = [line.split("  #")[0].strip() for line in source.splitlines()]
    return f"L{lines.index(text) + 1}" if lines.count(text) == 1 else ""


def mend(page, text):
    """Return the text of a page with its links led right, and a line about each that was stale."""
    stale = []
    shown = page.relative_to(HOUSE)

    def lead(match):
        name, path = match.groups()
        target = page.parent / path
        lines = find_lines(target.read_text(encoding="utf-8"), name) if target.is_file() else ""
        right = f"[`{name}`]({path}#{lines})"
        if not lines:
            stale.append(f"{shown}: {path} has no `{name}`, or several: mend the link by hand")
            return match[0]
        if right != match[0]:
            stale.append(f"{shown}: `{name}` is at {path}#{lines}")
        return right

    return LINK.sub(lead, text), stale


def main():
    parser = argparse.ArgumentParser(description="Find again the lines that links name.")
    parser.add_argument("--check", action="store_true", help="only say which links are stale")
    check = parser.parse_args().check
    left = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        mended, stale = mend(page, text)
        if mended != text and not check:
            page.write_text(mended, encoding="utf-8", newline="\n")
            _, stale = mend(page, mended)  # what is left to do by hand
        left += stale
    print("\n".join(left) or "every link leads to its lines")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
