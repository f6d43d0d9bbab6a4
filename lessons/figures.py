"""The two figures of the lessons, to project: fork.png and paid.png, both of one real run.

    python train.py --credit arca --save-every 5 --keep 17 --out runs/lesson
    python lessons/figures.py --run runs/lesson

fork.png asks every checkpoint of the run the same held-out problems: how many completions guess,
how many work the problem out, and how many of each are right. paid.png is what `python credit.py
--run` draws in docs/credit.png, with fewer rules and larger type.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.problems import add_prompts, load_problems
from eval_math import verify
from lora import lora_parameters
from run.checkpoints import kept_adapters
from run.flags import load_base
from sample import generate
from system.errors import UserError, run_cli
from system.files import read_json
from train import Settings
from view.__main__ import make_groups, read_samples
from view.draw import LIGHT, TOP, draw_band, is_right, telling_pair

try:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError:
    Figure = None

WORK, GUESS = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion: told apart by all eyes
SIZE = (13.33, 7.5)  # inches, the shape of a projector's picture
RULES = ["uniform", "surprisal", "entropy_reduction", "divergence", "arca", "gcpo", "permuted"]
FEW = 20  # completions of a way, below which no rate is drawn

# ---- The fork ------------------------------------------------------------------------------------


def checkpoints(run):
    """(step, the adapter's tensors by name) of every checkpoint that a run has kept, in order."""
    found = kept_adapters(run)
    if len(found) < 2:
        raise UserError(f"{run} has kept no checkpoints: train with --save-every 5 --keep 17")
    return sorted(found.items())


def ask(model, tokenizer, problems, s, samples):
    """(text, whether it guesses, whether it is right) of some completions of each problem."""
    prompts, limits = [p["prompt"] for p in problems], (s.max_new_tokens, s.temperature, s.top_p)
    stop = tokenizer.eos_ids
    c = generate(model, prompts, samples, *limits, eos_ids=stop, seed=s.seed, step=-1)
    golds = [p["answer"] for p in problems for _ in range(samples)]
    texts = c.texts(tokenizer)
    # The corpus closes all answers that were not worked out to the end with this word.
    return [(t, "Clearly" in t, verify(t, gold)) for t, gold in zip(texts, golds, strict=True)]


def rate(answers, guesses):
    """How many answers went this way, and the share of them that is right."""
    hits = [right for _, guess, right in answers if guess == guesses]
    return len(hits), sum(hits) / max(1, len(hits))


def follow(run, problems, samples):
    """What each checkpoint does with the first held-out problems: [(step, answers)], problems."""
    s = Settings(**read_json(Path(run, "config.json"))["settings"])
    s.adapter = str(Path(run, "adapter"))
    model, tokenizer = load_base(s)
    asked = [add_prompts(p, tokenizer) for p in load_problems(s.data, "test")[:problems]]
    history = []
    print(
        f"{problems} held-out problems x {samples} samples\n step  guess  of them right  ", end=""
    )
    print("work it out  of them right  all right")
    for step, tensors in checkpoints(run):
        for name, parameter in lora_parameters(model).items():
            parameter.data.copy_(tensors[name])
        answers = ask(model, tokenizer, asked, s, samples)
        (g, g_right), (w, w_right) = rate(answers, True), rate(answers, False)
        every = sum(right for *_, right in answers) / len(answers)
        print(f"{step:5} {g:6} {g_right:14.1%} {w:12} {w_right:14.1%} {every:10.1%}", flush=True)
        history.append((step, answers))
    return history, asked


def example(answers, problems, samples):
    """A short problem that the model once worked out rightly and once guessed wrongly: (problem,
    the work, the guess)."""
    found = []
    for i, p in enumerate(problems):
        own = answers[i * samples : (i + 1) * samples]
        work = [text for text, guess, right in own if right and not guess]
        guess = [text for text, guess, right in own if guess and not right]
        found += [(p["problem"], x, y) for x in work[:1] for y in guess[:1]]
    short = [x for x in found if len(x[0]) < 20 and len(x[1]) < 65]
    return max(short or [("", "", "")], key=lambda x: len(x[1]))


def draw_tree(ax, history, told):
    """A problem and the two ways on from it, with how often each is taken before and after."""
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    problem, work, guess = told
    box = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor="black", linewidth=2)
    mono = dict(family="monospace", parse_math=False)
    ax.text(0.015, 0.5, problem, fontsize=20, bbox=box, va="center", zorder=5, **mono)
    fork = 0.026 + 0.0125 * len(problem)  # the box's right end: a letter is 0.6 of 20 points wide
    for y, colour, text, sign, name, guesses in (
        (0.8, WORK, work, "✓", "works it out", False),
        (0.2, GUESS, guess, "✗", "guesses", True),
    ):
        ends = (history[0][1], history[-1][1])
        before, after = (rate(answers, guesses)[0] / len(answers) for answers in ends)
        said = f"{name}: {before:.0%} before, {after:.0%} after"
        ax.plot([fork, fork + 0.06], [0.5, y], color=colour, linewidth=6)
        ax.text(fork + 0.07, y + 0.04, said, fontsize=21, weight="bold", color=colour)
        ax.text(fork + 0.07, y - 0.05, f"{text} {sign}", fontsize=16, va="top", **mono)


def draw_line(ax, xs, ys, colour, label, at, above):
    """A line in per cent with its name on it, at the point of this index."""
    ax.plot(xs, [100 * y for y in ys], color=colour, linewidth=5, solid_capstyle="round")
    if xs:
        at = min(at, len(xs) - 1)
        shift, va = ((0, 12), "bottom") if above else ((0, -12), "top")
        place = dict(textcoords="offset points", xytext=shift, va=va, ha="center")
        ax.annotate(label, (xs[at], 100 * ys[at]), color=colour, fontsize=20, **place)


def dress(ax, title, last):
    """Axes of per cent over steps, in large type."""
    ax.set_title(title, fontsize=20)
    ax.set(ylim=(-3, 103), xlim=(0, last), yticks=(0, 25, 50, 75, 100))
    ax.tick_params(labelsize=18)
    ax.set_xlabel("step", fontsize=18)
    ax.grid(color="#dddddd")
    ax.spines[["top", "right"]].set_visible(False)


def draw_ways(left, right, history):
    """Over the steps, the share of each way, and how often it is right."""
    steps = [step for step, _ in history]
    for guesses, colour, name in ((False, WORK, "works it out"), (True, GUESS, "guesses")):
        counts, hits = zip(*(rate(answers, guesses) for _, answers in history), strict=True)
        shares = [n / len(answers) for n, (_, answers) in zip(counts, history, strict=True)]
        draw_line(left, steps, shares, colour, name, len(steps) * 3 // 5, guesses)
        known = [(x, y) for x, y, n in zip(steps, hits, counts, strict=True) if n >= FEW]
        xs, ys = zip(*known, strict=True) if known else ((), ())
        draw_line(right, xs, ys, colour, name, len(xs) // 2, True)
    every = [100 * sum(hit for *_, hit in answers) / len(answers) for _, answers in history]
    right.plot(steps, every, color="black", linewidth=3, linestyle=(0, (1, 1)))
    place = dict(textcoords="offset points", xytext=(12, -18))
    right.annotate("all", (steps[1], every[1]), fontsize=20, **place)
    dress(left, "how often it takes each way, %", steps[-1])
    dress(right, "how often each way is right, %", steps[-1])


def draw_fork(history, told, path):
    """fork.png: the tree, and below it the two ways over the steps."""
    fig = Figure(figsize=SIZE, dpi=150, layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 2), hspace=0.05)
    draw_tree(top.subplots(), history, told)
    draw_ways(*bottom.subplots(1, 2), history)
    fig.savefig(path)


# ---- Who is paid ---------------------------------------------------------------------------------


def first_difference(pair):
    """The place of the first token in which two completions differ."""
    both = zip(*(c["tokens"] for c in pair), strict=False)
    return next((i for i, (x, y) in enumerate(both) if x != y), 0)


def draw_rules(ax, c, rows, wide, colours, mark):
    """One completion: rules as rows, shaded tokens, Gini at the end; a frame around column `mark`
    of a wrong one, where it parts from the right one."""
    tokens = [*c["tokens"][:-1], "end"] if c["tokens"][-1].startswith("<|") else c["tokens"]
    mesh = draw_band(ax, tokens, [c["weights"][0][i] for i in rows], wide, colours)
    for text in ax.texts:
        text.set_fontsize(1.9 * text.get_fontsize())
    ax.set_yticks([i + 0.5 for i in range(len(rows))], RULES, fontsize=19)
    for i, row in enumerate(rows):
        ax.text(wide * 1.01, i + 0.5, f"{c['gini'][0][row]:.2f}", fontsize=19, va="center")
    side, colour = ("✓ right", WORK) if is_right(c) else ("✗ wrong", GUESS)
    name = dict(transform=ax.transAxes, weight="bold", ha="right", va="bottom")
    ax.text(-0.008, 1.03, f"{side}\nA = {c['advantage']:+.2f}", fontsize=20, color=colour, **name)
    ax.text(wide * 1.01, -0.3, "Gini", fontsize=19, va="bottom")
    if not is_right(c):
        frame = dict(fill=False, edgecolor=GUESS, linewidth=4, clip_on=False)
        ax.add_patch(Rectangle((mark, -1.5), 1, len(rows) + 1.5, **frame))
        place = dict(ha="center", va="bottom", fontsize=19, color=GUESS)
        ax.text(mark + 0.5, -1.7, "here they part", **place)
    return mesh


def draw_paid(groups, names, path):
    """paid.png: a right and a wrong completion of one problem, and what each rule pays."""
    group, pair = telling_pair(groups)
    rows, wide = [names.index(rule) for rule in RULES], max(len(c["tokens"]) for c in pair)
    colours = LinearSegmentedColormap.from_list("credit", LIGHT)
    fig = Figure(figsize=SIZE, dpi=150, layout="constrained")
    fig.suptitle(f"who is paid: {group['title']}", fontsize=22, parse_math=False)
    for ax, c in zip(fig.subplots(len(pair), 1, squeeze=False)[:, 0], pair, strict=True):
        mesh = draw_rules(ax, c, rows, wide, colours, first_difference(pair))
    bar = fig.colorbar(mesh, ax=fig.axes, location="bottom", shrink=0.5, aspect=40)
    bar.set_label("times the advantage (mean 1)", fontsize=18)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "1", "3", "7", f"{TOP}+"], fontsize=18)
    fig.savefig(path)


def main():
    parser = argparse.ArgumentParser(description="Draw fork.png and paid.png from a run.")
    parser.add_argument("--run", default="runs/lesson", help="a run that kept its checkpoints")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems to ask")
    parser.add_argument("--samples", type=int, default=4, help="completions a problem")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder for the figures")
    s = parser.parse_args()
    if Figure is None:
        raise UserError("figures need matplotlib: pip install matplotlib")
    out = Path(s.out)
    out.mkdir(parents=True, exist_ok=True)
    samples = read_samples(s.run)
    draw_paid(make_groups(samples), list(samples[0]["rules"]), out / "paid.png")
    history, asked = follow(s.run, s.problems, s.samples)
    told = example(history[0][1], asked, s.samples)
    draw_fork(history, told, out / "fork.png")
    print(f"wrote {out / 'fork.png'} and {out / 'paid.png'}")


if __name__ == "__main__":
    run_cli(main)
