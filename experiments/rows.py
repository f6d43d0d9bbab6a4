"""From run folders to one small file with every number of the tables, and back.

A row is a run: its setting, the outcome on every problem, and what it logged at every step. It does
not depend on the clock, on paths or on the order of the runs.
"""

from pathlib import Path

import numpy as np

from run.answers import read_answers
from system.errors import UserError
from system.files import read_json, read_rows, to_json, write_whole

RESULTS = Path(__file__).parent / "results"
CURVES = ("reward", "gini", "effective_token_ratio")  # of metrics.jsonl, by step


def row_of(run) -> dict:
    """The row of a complete run, from its folder; run: its settings. Answers are a text with a
    digit a problem: is the greedy one right (`greedy`), how many of the samples are (`right`)."""
    path = Path(run.out) / "answers.jsonl"
    answers = read_answers(path, "verdict", "sample")
    greedy = [int(a["verdict"] is True) for a in answers if a["sample"] is None]
    drawn = [int(a["verdict"] is True) for a in answers if a["sample"] is not None]
    if not greedy or len(drawn) != run.eval_samples * len(greedy):
        raise UserError(f"{path} is not whole: remove it, and start the sweep again")
    right = np.reshape(drawn, (len(greedy), -1)).sum(axis=1) if drawn else []
    row = dict(rule=run.credit, rank=run.rank, sharpening=run.sharpening, seed=run.seed)
    row |= dict(greedy="".join(map(str, greedy)), right="".join(map(str, right)))
    steps = read_rows(path.with_name("metrics.jsonl"))  # none of the untrained model
    return row | {key: [step[key] for step in steps] for key in CURVES if steps}


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


def matrix(rows, cell, metric):
    """A metric of a cell (S, P), a row a seed in their order."""
    found = in_cell(rows, cell)
    return np.array([values(found[seed], metric) for seed in sorted(found)], dtype=np.float64)


def paired(rows, cell, other, metric):
    """cell minus other (S, P) on the seeds, and thus problems, that both have."""
    seeds = in_cell(rows, cell).keys() & in_cell(rows, other).keys()
    rows = [row for row in rows if row["seed"] in seeds]
    return matrix(rows, cell, metric) - matrix(rows, other, metric)


def with_sweep(rows):
    """Return the rows of arms.py, and those of the sweep's runs that they are paired with: arca_1
    is ARCA with sharpening 1, arca_1_rate_1 the first three seeds of it."""
    rows = list(rows)
    about, swept = read_results(RESULTS / "tiny.json")
    for found in swept:
        if found["rank"] == about["rank"]:
            name = f"{found['rule']}_{found['sharpening']:g}"
            row = found | dict(arm=name, greedy=values(found, "greedy"))
            rows.append(row)
            if row["seed"] <= 3:
                rows.append(row | dict(arm=f"{name}_rate_1"))
    return rows


def by_seed(rows, metric, arms):
    """Return a number of each arm's runs, (S, 1) an arm, over the seeds that all of them have: the
    greedy accuracy after, or the mean reward of all steps."""
    found = {arm: {} for arm in arms}
    for row in rows:
        found.get(row["arm"], {})[row["seed"]] = np.mean(row[metric])
    seeds = sorted(set.intersection(*(set(of) for of in found.values())))
    return [np.array([[found[arm][seed]] for seed in seeds]) for arm in arms]
