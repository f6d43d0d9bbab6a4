"""From run folders to one small file with every number of the tables and figures, and back.

A row is a run: its setting, the outcome on every problem, and what it logged at every step.
Nothing in a row depends on the clock, on the machine's paths or on the order of the runs.
"""

from pathlib import Path

import numpy as np

from run.answers import read_answers
from run.metrics import CLASSES
from system.errors import UserError
from system.files import checked, is_number, read_json, read_rows, to_json, write_whole

CURVES = ("reward", "entropy", "gini", "effective_token_ratio")  # of metrics.jsonl, by step


def outcomes(path):
    """The answers of eval_math.py as two texts with a digit a problem: whether the greedy one is
    right, and how many (of at most 9) samples are; the second is empty where none were drawn."""
    answers = read_answers(str(path), "verdict", "sample")
    if not all(a["verdict"] in (True, False) for a in answers):
        raise UserError(f"{path} has a verdict that is neither true nor false: move it away")
    greedy = [int(a["verdict"]) for a in answers if a["sample"] is None]
    drawn = [int(a["verdict"]) for a in answers if a["sample"] is not None]
    if not greedy or len(drawn) % len(greedy) or len(drawn) > 9 * len(greedy):
        raise UserError(f"{path} holds other answers than the sweep's: move it away")
    right = np.reshape(drawn, (len(greedy), -1)).sum(axis=1)
    return "".join(map(str, greedy)), "".join(map(str, right)) if drawn else ""


def training(folder) -> dict:
    """What a run logged: curves over its steps, the mean shares of tokens and credit by class, and
    greedy accuracy by step."""
    steps = read_rows(folder / "metrics.jsonl")
    shares = [f"{kind}/{name}" for kind in ("tokens", "credit") for name in CLASSES]
    for step in steps:
        for key in (*CURVES, *shares):
            if not is_number(step.get(key)):
                raise UserError(f"{folder}: {key} of step {step['step']} is no number: train again")
    row = {key: [step[key] for step in steps] for key in CURVES}
    for kind in ("tokens", "credit"):
        shares = [[step[f"{kind}/{name}"] for step in steps] for name in CLASSES]
        means = np.mean(shares, axis=1, dtype=float)  # null makes nan
        row[kind] = [round(float(x), 6) for x in means]
    evals = read_rows(folder / "evals.jsonl")
    return row | dict(held_out={str(x["step"]): x["greedy"] for x in evals})


def row_of(run) -> dict:
    """The row of a Run (experiments/plan.py) that is complete."""
    cfg = run.settings
    row = dict(zip(("rule", "rank", "sharpening"), run.cell, strict=True), seed=cfg["seed"])
    row["greedy"], row["right"] = outcomes(run.folder / "answers.jsonl")
    if run.cell[0] != "base":
        row |= training(run.folder)
    if run.measured:
        path = run.folder / "concentration.json"
        row["concentration"] = checked(read_json(path), path, rules=dict).get("rules", {})
    return row


def write_results(path, about, rows):
    """The file: JSON with a run a line, so that two of them can be compared by eye."""
    lines = ",\n".join(to_json(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f'{{"about": {to_json(about)},\n"runs": [\n{lines}\n]}}\n'.encode())


def read_results(path):
    """(about, rows) of such a file; UserError if it is none."""
    found = read_json(path)
    if not isinstance(found.get("about"), dict) or not isinstance(found.get("runs"), list):
        raise UserError(f"{path} holds no results: make them with experiments/sweep.py")
    return found["about"], found["runs"]


# ---- Rows as matrices ----------------------------------------------------------------------------


def in_cell(rows, cell):
    """The rows of a cell (rule, rank, sharpening) by seed."""
    return {r["seed"]: r for r in rows if (r["rule"], r["rank"], r["sharpening"]) == tuple(cell)}


def values(row, metric):
    """A metric of a run as a list: by problem for greedy and pass@k, else one number."""
    if metric == "greedy":
        return [int(c) for c in row["greedy"]]
    if metric == "pass":
        return [int(c != "0") for c in row["right"]]
    return [float(np.mean(row[metric], dtype=float))]


def matrix(rows, cell, metric, seeds=None):
    """A metric of a cell (S, P), a row a seed: of these seeds, or of all in their order."""
    found = in_cell(rows, cell)
    chosen = sorted(found) if seeds is None else seeds
    return np.array([values(found[seed], metric) for seed in chosen], dtype=np.float64)


def paired(rows, cell, other, metric):
    """cell minus other (S, P) on the seeds, and thus problems, that both have."""
    seeds = sorted(in_cell(rows, cell).keys() & in_cell(rows, other).keys())
    if not seeds:
        return np.zeros((0, 1))
    return matrix(rows, cell, metric, seeds) - matrix(rows, other, metric, seeds)


def default_file():
    return Path(__file__).parent / "results" / "tiny.json"
