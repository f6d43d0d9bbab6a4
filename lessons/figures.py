"""The two figures of the lessons, to project: fork.png and paid.png, both of one real run.

    python train.py --credit arca --save-every 5 --keep-checkpoints 17 --out runs/lesson
    python lessons/figures.py --run runs/lesson

fork.png asks every checkpoint of the run the same held-out problems: how many completions guess,
how many work the problem out, and how many of each are right. paid.png is what
view/credit_figure.py draws, with fewer rules and larger type.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.problems import add_prompts, load_problems
from eval_math import verify
from experiments.truth import saved_adapters
from lora import lora_parameters
from run.checkpoints import read_settings
from run.flags import load_base
from sample import generate
from system.errors import Parser, UserError, run_cli
from train import Settings
from view.credit_figure import draw_band
from view.draw import LIGHT, TOP, is_right, telling_pair
from view.samples import make_groups, need_samples

try:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError:
    Figure = None

WORK = "#0072b2"  # Okabe and Ito's blue and vermilion: told apart by all eyes
GUESS = "#d55e00"
SIZE = (13.33, 7.5)  # inches, the shape of a projector's picture
RULES = ["uniform", "surprisal", "entropy_reduction", "divergence", "arca", "gcpo", "permuted"]
FEW = 20  # completions of a way, below which no rate is drawn


# ---- The fork ------------------------------------------------------------------------------------
@dataclass
class Answer:
    """A completion: its text, whether it guesses, and whether it is right."""

    text: str
    guesses: bool
    right: bool


def checkpoints(run):
    """Return (step, the adapter's tensors by name) of every checkpoint of a run, in order."""
    found = saved_adapters(run)
    if len(found) < 2:
        how = "train with --save-every 5 --keep-checkpoints 17"
        raise UserError(f"{run} has kept no checkpoints: {how}")
    return sorted(found.items())


def ask(model, tokenizer, problems, cfg, samples) -> list[Answer]:
    """Return some answers to each problem, a problem's side by side."""
    prompts = [p["prompt"] for p in problems]
    limits = (cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    keyed = dict(eos_ids=tokenizer.eos_ids, seed=cfg.seed, step=-1)
    texts = generate(model, prompts, samples, *limits, **keyed).texts(tokenizer)
    golds = [p["answer"] for p in problems for _ in range(samples)]
    pairs = zip(texts, golds, strict=True)
    # The corpus closes all answers that were not worked out to the end with this word.
    return [Answer(text, "Clearly" in text, verify(text, gold)) for text, gold in pairs]


def rate(answers, guesses):
    """Return how many answers went this way, and the share of them that is right."""
    own = [answer for answer in answers if answer.guesses == guesses]
    return len(own), sum(answer.right for answer in own) / max(1, len(own))


def share_right(answers):
    """Return the share of all answers that is right."""
    return sum(answer.right for answer in answers) / len(answers)


def follow(run, count, samples):
    """Ask each checkpoint the first held-out problems; return [(step, answers)], the problems."""
    cfg = Settings(**read_settings(run, Settings()))
    cfg.adapter = str(Path(run, "adapter"))
    model, tokenizer = load_base(cfg)
    problems = [add_prompts(p, tokenizer) for p in load_problems(cfg.data, "test")[:count]]
    print(f"{count} held-out problems x {samples} samples")
    print(" step  guess  of them right  work it out  of them right  all right")
    history = []
    for step, tensors in checkpoints(run):
        for name, parameter in lora_parameters(model).items():
            parameter.data.copy_(tensors[f"adapter.{name}"])
        answers = ask(model, tokenizer, problems, cfg, samples)
        guessed, guessed_right = rate(answers, True)
        worked, worked_right = rate(answers, False)
        print(f"{step:5} {guessed:6} {guessed_right:14.1%} {worked:12}", end=" ")
        print(f"{worked_right:14.1%} {share_right(answers):10.1%}", flush=True)
        history.append((step, answers))
    return history, problems


def example(answers, problems, samples):
    """Return a short problem that was once worked out rightly and once guessed wrongly: (problem,
    the work, the guess)."""
    told = ("", "", "")
    for i, problem in enumerate(problems):
        own = answers[i * samples : (i + 1) * samples]
        works = [answer.text for answer in own if answer.right and not answer.guesses]
        guesses = [answer.text for answer in own if answer.guesses and not answer.right]
        if not works or not guesses:
            continue
        short = len(problem["problem"]) < 20 and len(works[0]) < 65
        if short and len(works[0]) > len(told[1]):
            told = (problem["problem"], works[0], guesses[0])
    return told


def draw_tree(ax, history, told):
    """Draw a problem and the two ways on from it, with how often each is taken before and after."""
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis("off")
    problem, work, guess = told
    box = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor="black", linewidth=2)
    mono = dict(family="monospace", parse_math=False)
    ax.text(0.015, 0.5, problem, fontsize=20, bbox=box, va="center", zorder=5, **mono)
    fork = 0.026 + 0.0125 * len(problem)  # the box's right end: a letter is 0.6 of 20 points wide
    first = history[0][1]
    last = history[-1][1]
    for y, colour, text, name, guesses in (
        (0.8, WORK, f"{work} ✓", "works it out", False),
        (0.2, GUESS, f"{guess} ✗", "guesses", True),
    ):
        before = rate(first, guesses)[0] / len(first)
        after = rate(last, guesses)[0] / len(last)
        said = f"{name}: {before:.0%} before, {after:.0%} after"
        ax.plot([fork, fork + 0.06], [0.5, y], color=colour, linewidth=6)
        ax.text(fork + 0.07, y + 0.04, said, fontsize=21, weight="bold", color=colour)
        ax.text(fork + 0.07, y - 0.05, text, fontsize=16, va="top", **mono)


def draw_line(ax, points, colour, label, at, above):
    """Draw points (step, share) as a line in per cent, with its name at the point of this index."""
    if not points:
        return
    steps = [step for step, _ in points]
    percent = [100 * share for _, share in points]
    ax.plot(steps, percent, color=colour, linewidth=5, solid_capstyle="round")
    at = min(at, len(points) - 1)
    place = dict(xytext=(0, -12), va="top")
    if above:
        place = dict(xytext=(0, 12), va="bottom")
    place.update(textcoords="offset points", ha="center")
    ax.annotate(label, (steps[at], percent[at]), color=colour, fontsize=20, **place)


def dress(ax, title, last):
    """Give axes per cent over steps, in large type."""
    ax.set_title(title, fontsize=20)
    ax.set(ylim=(-3, 103), xlim=(0, last), yticks=(0, 25, 50, 75, 100))
    ax.tick_params(labelsize=18)
    ax.set_xlabel("step", fontsize=18)
    ax.grid(color="#dddddd")
    ax.spines[["top", "right"]].set_visible(False)


def draw_ways(left, right, history):
    """Draw over the steps the share of each way, and how often it is right."""
    for guesses, colour, name in ((False, WORK, "works it out"), (True, GUESS, "guesses")):
        shares = []
        rates = []
        for step, answers in history:
            count, hits = rate(answers, guesses)
            shares.append((step, count / len(answers)))
            if count >= FEW:
                rates.append((step, hits))
        draw_line(left, shares, colour, name, len(history) * 3 // 5, guesses)
        draw_line(right, rates, colour, name, len(rates) // 2, True)
    steps = [step for step, _ in history]
    every = [100 * share_right(answers) for _, answers in history]
    right.plot(steps, every, color="black", linewidth=3, linestyle=(0, (1, 1)))
    place = dict(textcoords="offset points", xytext=(12, -18))
    right.annotate("all", (steps[1], every[1]), fontsize=20, **place)
    dress(left, "how often it takes each way, %", steps[-1])
    dress(right, "how often each way is right, %", steps[-1])


def draw_fork(history, told, path):
    """Draw fork.png: the tree, and below it the two ways over the steps."""
    fig = Figure(figsize=SIZE, dpi=150, layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 2), hspace=0.05)
    draw_tree(top.subplots(), history, told)
    draw_ways(*bottom.subplots(1, 2), history)
    fig.savefig(path)


# ---- Who is paid ---------------------------------------------------------------------------------
def first_difference(pair):
    """Return the place of the first token in which two completions differ."""
    both = zip(*(completion["tokens"] for completion in pair), strict=False)
    return next((i for i, (one, other) in enumerate(both) if one != other), 0)


def draw_rules(ax, completion, rows, wide, colours, mark):
    """Draw one completion: rules as rows, shaded tokens, Gini at the end; around column `mark` of a
    wrong one, where it parts from the right one, a frame."""
    tokens = list(completion["tokens"])
    if tokens[-1].startswith("<|"):
        tokens[-1] = "end"
    weights = completion["weights"][0]  # (R, T) at sharpening 1
    mesh = draw_band(ax, tokens, [weights[row] for row in rows], wide, colours)
    for text in ax.texts:
        text.set_fontsize(1.9 * text.get_fontsize())
    ax.set_yticks([i + 0.5 for i in range(len(rows))], RULES, fontsize=19)
    for i, row in enumerate(rows):
        concentration = f"{completion['gini'][0][row]:.2f}"
        ax.text(wide * 1.01, i + 0.5, concentration, fontsize=19, va="center")
    ax.text(wide * 1.01, -0.3, "Gini", fontsize=19, va="bottom")

    right = is_right(completion)
    side = "✓ right" if right else "✗ wrong"
    name = dict(transform=ax.transAxes, weight="bold", ha="right", va="bottom", fontsize=20)
    name.update(color=WORK if right else GUESS)
    ax.text(-0.008, 1.03, f"{side}\nA = {completion['advantage']:+.2f}", **name)
    if not right:
        frame = dict(fill=False, edgecolor=GUESS, linewidth=4, clip_on=False)
        ax.add_patch(Rectangle((mark, -1.5), 1, len(rows) + 1.5, **frame))
        place = dict(ha="center", va="bottom", fontsize=19, color=GUESS)
        ax.text(mark + 0.5, -1.7, "here they part", **place)
    return mesh


def draw_paid(groups, names, path):
    """Draw paid.png: a right and a wrong completion of one problem, and what each rule pays."""
    group, pair = telling_pair(groups)
    rows = [names.index(rule) for rule in RULES]
    wide = max(len(completion["tokens"]) for completion in pair)
    colours = LinearSegmentedColormap.from_list("credit", LIGHT)
    fig = Figure(figsize=SIZE, dpi=150, layout="constrained")
    fig.suptitle(f"who is paid: {group['title']}", fontsize=22, parse_math=False)
    axes = fig.subplots(len(pair), 1, squeeze=False)[:, 0]
    for ax, completion in zip(axes, pair, strict=True):
        mesh = draw_rules(ax, completion, rows, wide, colours, first_difference(pair))
    bar = fig.colorbar(mesh, ax=fig.axes, location="bottom", shrink=0.5, aspect=40)
    bar.set_label("times the advantage (mean 1)", fontsize=18)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "1", "3", "7", f"{TOP}+"], fontsize=18)
    fig.savefig(path)


def main():
    parser = Parser(description="Draw fork.png and paid.png from a run.")
    parser.add_argument("--run", default="runs/lesson", help="a run that kept its checkpoints")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems to ask")
    parser.add_argument("--samples", type=int, default=4, help="completions a problem")
    parser.add_argument("--out", default=str(Path(__file__).parent), help="folder for the figures")
    args = parser.parse_args()
    if Figure is None:
        raise UserError("figures need matplotlib: pip install matplotlib")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    samples = need_samples(args.run)
    draw_paid(make_groups(samples), list(samples[0]["rules"]), out / "paid.png")
    history, problems = follow(args.run, args.problems, args.samples)
    told = example(history[0][1], problems, args.samples)
    draw_fork(history, told, out / "fork.png")
    print(f"wrote {out / 'fork.png'} and {out / 'paid.png'}")


if __name__ == "__main__":
    run_cli(main)
