"""Show runs, on the screen, as a page and as a picture: how they learned, and who got credit."""

from pathlib import Path

if __name__ == "__main__":
    from system.errors import before_imports

    before_imports()

from system.errors import Parser, printable, run_cli
from system.files import write_whole, writing
from view import picture
from view.curves import find_runs, make_lines, read_run
from view.draw import credit_data, curves_data, page, show, show_line
from view.samples import STEPS, make_groups, read_samples


def main():
    # 1) The runs, and what they have left so far.
    parser = Parser(prog="python -m view", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or of several")
    parser.add_argument("--sharpening", type=int, default=1, choices=(1, 2), help="of the screen")
    parser.add_argument("--out", default=".", help="folder for view.html and view.png")
    cfg = parser.parse_args()
    runs = [read_run(folder) for folder in find_runs(cfg.runs)]
    lines, every = make_lines(runs)
    credits = []
    for run in runs:
        samples = read_samples(run["folder"], max(2, STEPS // len(runs)))
        if samples:
            credits.append(credit_data(run, samples, make_groups(samples)))

    # 2) The page and the picture.
    out = Path(cfg.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    title = f"run {runs[0]['name']}" if len(runs) == 1 else f"{len(runs)} runs"
    html = page(title, curves_data(lines, every), credits, cfg.sharpening)
    write_whole(out / "view.html", html.encode())
    drawn = picture.draw(lines, title, out / "view.png")

    # 3) The screen.
    for line in lines:
        show_line(line)
    if credits:
        first = credits[0]
        show(first["groups"], [rule["name"] for rule in first["rules"]], cfg.sharpening)
    else:
        print("\nno completions are kept yet")
    if len(credits) > 1:
        print(printable(f"\nThese are of {credits[0]['run']}; the page has those of all runs."))
    print(printable(f"\npage: {out / 'view.html'}"))
    missing = "no picture: it needs matplotlib (pip install matplotlib)"
    print(printable(f"picture: {out / 'view.png'}") if drawn else missing)


if __name__ == "__main__":
    run_cli(main)
