"""The sweep: what is done once, never mixed, and gone on with; its statistics and tables.

Most tests put stand-ins in the place of train.py and eval_math.py, which write what those write and
take no time; one runs the real ones.
"""

import json
import math
import signal
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest

from experiments import rows, stats, sweep, tables
from system.errors import UserError
from system.files import read_rows
from train import Settings

TRAIN = """
import json, os, sys
from pathlib import Path
here, words = Path(__file__).parent, sys.argv[1:]
flags = {w[2:].replace("-", "_"): v for w, v in zip(words, words[1:]) if w.startswith("--")}
folder = Path(flags.get("resume") or flags["out"])
with open(folder / "starts", "a") as file:
    file.write("resume " if "resume" in flags else "new ")
if "resume" in flags:
    s = json.loads((folder / "config.json").read_text())["settings"]
else:
    s = json.loads((here / "defaults.json").read_text())
    s |= {k: type(s[k])(v) for k, v in flags.items()}
    (folder / "config.json").write_text(json.dumps(dict(settings=s)))
path = folder / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
for step in range(done + 1, s["steps"] + 1):
    row = dict(step=step, reward=step / 10, gini=0.5, effective_token_ratio=0.25)
    row |= dict(groups_mixed=1, skipped=0)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\\n")
    if step == 2 and (here / "die").exists():
        (here / "die").unlink()
        os.kill(os.getpid(), 9)
(folder / "evals.jsonl").write_text(json.dumps(dict(step=s["steps"], greedy=0.5)) + "\\n")
"""
EVAL = """
import json, sys
out = sys.argv[sys.argv.index("--out") + 1]
verdicts = [(None, True), (None, False), *((i % 4, i < 3) for i in range(8))]
rows = [dict(sample=sample, verdict=verdict) for sample, verdict in verdicts]
open(out, "w").write("".join(json.dumps(row) + "\\n" for row in rows))
"""
SHARED = Settings(steps=4, eval_problems=2)
CELLS = (("base", 0, 0.0), ("uniform", 2, 1.0), ("arca", 1, 2.0))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder of stand-ins for the scripts that a sweep starts."""
    place = tmp_path / "house"
    place.mkdir()
    (place / "train.py").write_text(TRAIN)
    (place / "eval_math.py").write_text(EVAL)
    (place / "defaults.json").write_text(json.dumps(asdict(Settings())))
    monkeypatch.setattr(sweep, "ROOT", place)
    return place


def planned(out, shared=SHARED):
    return [sweep.run_of(cell, 1, shared, out) for cell in CELLS]


def starts(out, name):
    return (out / name / "starts").read_text().split()


# ---- Done once, and gone on with -----------------------------------------------------------------


def test_what_is_done_is_skipped_and_the_rest_gone_on_with(tmp_path, house, capsys):
    """A sweep that does finished runs again takes hours for a table; one that takes a training for
    a run has no answers to compare; a child that is killed, for want of memory say, must neither
    stop the others nor count as done, and be resumed instead of begun anew."""
    runs = planned(tmp_path)
    (house / "die").touch()
    assert sweep.work_through(runs, 1) == 1
    assert "failed: " + str(tmp_path / "uniform-r2-p1-s1") in capsys.readouterr().out
    assert [sweep.next_command(run) is None for run in runs] == [True, False, True]
    (tmp_path / "arca-r1-p2-s1" / "answers.jsonl").unlink()
    assert sweep.work_through(runs, 2) == 0
    assert starts(tmp_path, "uniform-r2-p1-s1") == ["new", "resume"]
    assert starts(tmp_path, "arca-r1-p2-s1") == ["new"]
    base, uniform, arca = map(rows.row_of, runs)
    assert (base["greedy"], base["right"]) == ("10", "30") and "reward" not in base
    assert uniform["reward"] == arca["reward"] == [0.1, 0.2, 0.3, 0.4]


def test_ctrl_c_leaves_no_child(tmp_path, house, monkeypatch):
    """A child that outlives the sweep would go on writing while the next sweep resumes its run."""
    (house / "train.py").write_text("import time\ntime.sleep(60)")
    begun, start = [], sweep.start

    def kept(run, command):
        begun.append(start(run, command))
        return begun[-1]

    def interrupted(seconds):
        raise KeyboardInterrupt(signal.SIGINT)

    monkeypatch.setattr(sweep, "start", kept)
    monkeypatch.setattr(sweep.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        sweep.work_through(planned(tmp_path)[1:], 2)
    assert [process.poll() for process in begun] == [-signal.SIGTERM] * 2


# ---- Never mixed ---------------------------------------------------------------------------------


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--jobs", "2", *map(str, flags)])
    sweep.main()


def test_other_settings_are_refused(tmp_path, house, monkeypatch, capsys):
    """Runs of two budgets in one table would be compared as if they were of one: also where only
    the untrained model is there yet, or somebody has copied or edited a folder."""
    flags = ("--preset", "chat", "--model", "tiny", "--data", "tiny", "--out", tmp_path)
    flags = (*flags, "--no-controls", "--eval-problems", "2", "--steps", "3", "--seeds", "1")
    monkeypatch.setitem(sweep.CHAT, "chat", False)
    (house / "eval_math.py").write_text(EVAL.replace("range(8)", "range(0)"))
    call(monkeypatch, *flags)
    assert "arca  " in capsys.readouterr().out
    call(monkeypatch, *flags, "--seeds", "1", "2")  # more of the same
    assert starts(tmp_path, "arca-r16-p2-s1") == ["new"] == starts(tmp_path, "arca-r16-p2-s2")
    for changed in (("--lr", "0.5"), ("--eval-problems", "1"), ("--max-new-tokens", "9")):
        with pytest.raises(UserError, match=f"other {changed[0][2:].replace('-', '_')}.*: give"):
            call(monkeypatch, *flags, *changed)
    path = tmp_path / "arca-r16-p2-s1" / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.0002', '"lr": 0.5'))
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match="arca-r16-p2-s1 was made with other lr"):
        call(monkeypatch, *flags)
    assert not (tmp_path / "results.json").exists()


def test_the_paper_s_seven_runs(tmp_path):
    """The preset must be what was published: a row more or less, another rank, alpha or exponent
    would be compared with a number that it has nothing to do with."""
    shared, ranks, seeds, rules = sweep.PRESETS["paper"]
    seven = sweep.cells(rules, ranks, controls=False)
    assert {cell[:2] for cell in seven} == tables.PUBLISHED.keys() and seeds == (1337,)
    for cell in seven:
        run = sweep.run_of(cell, 1337, Settings(**shared), tmp_path)
        assert run.model == "Qwen/Qwen3-1.7B-Base" and run.data == "math"
        assert (run.steps, run.prompts, run.samples, run.eval_problems) == (100, 8, 4, 200)
        assert (run.credit, run.rank, run.alpha, run.lr) == (*cell[:2], 2 * cell[1], 5e-6)
        assert run.sharpening == (1 if cell[0] == "uniform" else 2)
    everything = sweep.cells(rules, ranks)
    assert {("uniform", 4, 1.0), ("permuted", 64, 1.0), ("random", 64, 2.0)} < set(everything)
    assert len(everything) == len(set(everything)) == 17


def test_a_greedy_sweep_has_no_pass_at_4(tmp_path):
    """A chat model costs a hundred times the embedded one: a sweep of it that also sampled would
    run out of its hour; and no sample is not "none right"."""
    run = sweep.run_of(CELLS[0], 1, replace(SHARED, eval_samples=0), tmp_path)
    command = sweep.next_command(run)
    assert command[command.index("--samples") + 1] == "0"
    (tmp_path / "base-s1").mkdir()
    verdicts = [json.dumps(dict(sample=None, verdict=right)) + "\n" for right in (True, False)]
    (tmp_path / "base-s1" / "answers.jsonl").write_text("".join(verdicts))
    about, found = small()
    text = tables.tables(about, [rows.row_of(run), *found[1:]])
    assert text.splitlines()[4].split() == [
        "base",
        "-",
        "-",
        "1",
        "-",
        "50.0",
        "[9.5,",
        "90.5]",
        "-",
        "missing",
        "-",
    ]


def test_wrong_flags_are_one_line(tmp_path, monkeypatch):
    """A typing mistake must not start a sweep of something else."""
    for flags, says in (
        (("--preset", "papr"), "papr"),
        (("--data", "problems.jsonl"), "--eval-data"),
        (("--eval-problems", 0), "1 or more"),
        (("--seeds", -1), "--seeds"),
    ):
        with pytest.raises(UserError, match=says):
            call(monkeypatch, *flags, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- Statistics ----------------------------------------------------------------------------------


def test_student_s_t():
    """A wrong tail makes every interval and p-value wrong. Closed forms for one and two degrees of
    freedom, and the tables' quantiles."""
    for t in (0.1, 1.0, 3.0, 40.0):
        assert stats.t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-6)
        assert stats.t_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)
    for df, known in ((1, 12.706), (4, 2.776), (30, 2.042), (1e5, 1.960)):
        assert stats.t_quantile(df) == pytest.approx(known, abs=6e-4)


def test_interval_over_seeds():
    """Five numbers, by hand: mean 3, variance 2.5, so 3 +- 2.776 sqrt(2.5 / 5)."""
    e = stats.crossed([[1.0], [2.0], [3.0], [4.0], [5.0]])
    assert (e.mean, e.seeds) == (3, 5)
    assert (e.low, e.high) == pytest.approx((1.0369, 4.9631), abs=1e-3)
    assert e.p == pytest.approx(0.0132, abs=1e-4)  # t = 4.2426, df = 4
    assert math.isnan(stats.crossed([[0.5]]).low)


def test_seeds_and_problems_both_count():
    """Where x = a_seed + b_problem the variance of the mean is var(a) / S + var(b) / P, by hand:
    1 / 3 + (5 / 3) / 4 = 0.75. An interval over seeds alone, or problems alone, would be too
    short."""
    a, b = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0, 3.0])
    x = a[:, None] + b
    df = 0.75**2 / ((1 / 3) ** 2 / 2 + (5 / 12) ** 2 / 3)
    e, spread = stats.crossed(x), stats.t_quantile(df) * math.sqrt(0.75)
    assert (e.mean, e.low, e.high) == pytest.approx((2.5, 2.5 - spread, 2.5 + spread), abs=1e-9)


def test_a_true_null_is_seldom_rejected():
    """Outcomes of one run go together: to count each as independent rejects a true null in two of
    three cases here. At 5 % it should be 5 %, in 100 trials at most 14 % (p < 1e-3)."""
    rng, rejected, naive = np.random.default_rng(3), 0, 0
    for _ in range(100):
        x = 0.4 * rng.normal(size=(5, 1)) + 0.2 * rng.normal(size=(1, 60))
        x = x + rng.normal(size=(5, 60))
        rejected += stats.crossed(x).p < 0.05
        naive += abs(x.mean()) > 1.96 * x.std() / math.sqrt(x.size)
    assert rejected <= 14 < 50 < naive


def test_holm():
    """By hand: 0.01 x 3, 0.03 x 2, and 0.04 may not be below the one before it."""
    found = stats.holm([0.01, 0.04, math.nan, 0.03])
    assert found[:2] + found[3:] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(found[2]) and stats.holm([0.7, 0.9]) == [1.0, 1.0]


def test_ratio():
    """The ends of a ratio's interval are where x - r y can just not be told from 0: an interval of
    the quotients' mean, or one that forgets how x and y vary together, has others."""
    rng = np.random.default_rng(0)
    y = rng.normal(2, 0.3, size=(5, 1))
    x = y + rng.normal(0, 0.3, size=(5, 1))
    e = stats.ratio(x, y)
    assert e.low < e.mean < e.high
    for end in (e.low, e.high):
        assert stats.crossed(x - end * y).p == pytest.approx(0.05, abs=1e-4)
    assert math.isnan(stats.ratio(x, y - 2).low)  # y could be 0


# ---- Tables --------------------------------------------------------------------------------------


def row(rule, rank, power, seed, greedy, right, reward, gini=0.0):
    """A run of two steps on four problems."""
    about = dict(rule=rule, rank=rank, sharpening=power, seed=seed, greedy=greedy, right=right)
    return about | dict(reward=reward, gini=[gini, gini], effective_token_ratio=[1.0, 0.5])


def small():
    """Two seeds of uniform and of ARCA, one of the base model; divergence is missing."""
    found = [row("base", 0, 0.0, 1, "1000", "1020", [])]
    found += [row("uniform", 16, 1.0, 1, "1100", "4021", [0.2, 0.4])]
    found += [row("uniform", 16, 1.0, 2, "1010", "0000", [0.4, 0.6])]
    found += [row("arca", 16, 2.0, 1, "1111", "4444", [0.5, 0.7], 0.4)]
    found += [row("arca", 16, 2.0, 2, "1110", "1000", [0.7, 0.9], 0.6)]
    cells = [("uniform", 16, 1.0), ("arca", 16, 2.0), ("divergence", 16, 2.0)]
    about = dict(preset="tiny", cells=cells, seeds=[1, 2], rank=16, problems=4, steps=2)
    return about | dict(prompts=1, samples=4), found


def test_tables_by_hand():
    """Numbers in the wrong cell, or differences between runs that are not of one seed, would be
    believed. ARCA 7 of 8 greedy, uniform 4 of 8; of the difference, per seed 2/4 and 1/4."""
    about, found = small()
    lines = [line.split() for line in tables.tables(about, found).splitlines()]
    base, uniform, arca, missing = lines[4:8]
    assert base[:6] == ["base", "-", "-", "1", "-", "25.0"] and "50.0" in base
    assert uniform[:5] == ["uniform", "16", "-", "2", "0.400"]
    assert {"50.0", "50,", "37.5"} < set(uniform)
    assert arca[:5] == ["arca", "16", "2", "2", "0.700"] and {"87.5", "100,", "62.5"} < set(arca)
    assert missing[:5] == ["divergence", "16", "2", "0", "of"] and missing.count("missing") == 3
    second = [line for line in lines if line[:2] == ["arca", "16"]][1]
    assert second[4] == "0.500" and "0.750" in second
    difference = rows.paired(found, ("arca", 16, 2.0), ("uniform", 16, 1.0), "greedy")
    assert difference.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    (against,) = [line for line in lines if line[:3] == ["arca", "-", "uniform"]]
    assert against[5] == "2" and [against[i] for i in (6, 10, 14)] == ["0.300", "37.5", "25.0"]


def test_p_values_are_corrected_for_all_tests(monkeypatch):
    """Claims choose among three outcomes: a correction for each outcome apart lets three times as
    many false claims through. ARCA has p = 0.01 in all, and divergence is missing."""
    about, found = small()
    sure = lambda x: stats.Estimate(0.3, 0.1, 0.5, 0.01 if x.size else math.nan)  # noqa: E731
    monkeypatch.setattr(tables, "crossed", sure)
    text = tables.difference_table(about, found, about["cells"])
    assert "for the 3 tests" in text
    line = next(x for x in text.splitlines() if x.startswith("arca"))
    assert line.count("0.030") == 3


def test_pairs_are_of_the_same_seed():
    """Where a seed is missing on one side, its runs have no partner: pairing by place would compare
    seed 1 with seed 2."""
    about, found = small()
    found = [r for r in found if (r["rule"], r["seed"]) != ("uniform", 1)]
    x = rows.paired(found, ("arca", 16, 2.0), ("uniform", 16, 1.0), "greedy")
    assert x.tolist() == [[0, 1, 0, 0]]
    assert "1 of 2" in tables.tables(about, found)


def test_tables_do_not_depend_on_order(tmp_path):
    """The runs end in any order; the file and the tables must be the same, byte for byte."""
    about, found = small()
    rows.write_results(tmp_path / "a.json", about, found)
    again = rows.read_results(tmp_path / "a.json")
    assert tables.tables(*again) == tables.tables(about, found[::-1])
    rows.write_results(tmp_path / "b.json", *again)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_rounding_is_told_from_other_numbers():
    """Another processor rounds otherwise: if that were "others", readers would distrust what they
    reproduced. One reward or verdict more, or a run of other steps, is no rounding."""
    kept = small()[1]
    row = json.loads(json.dumps(kept[3]))
    row["gini"][0] += 6e-4
    assert sweep.near(row, kept) and sweep.near(kept[0], kept)
    for key, value in (
        ("reward", [0.5, 0.7 + 1 / 128]),
        ("greedy", "0000"),
        ("gini", [0.4]),
        ("seed", 3),
    ):
        assert not sweep.near(row | {key: value}, kept), key


@pytest.mark.long
def test_the_real_scripts(tmp_path):
    """The stand-ins above could be unlike the real ones: what train.py evaluates at its end, and
    the sweep from the adapter on disk, must be the same answers."""
    shared = Settings(steps=2, prompts=2, samples=2, eval_problems=6, max_new_tokens=64)
    run = sweep.run_of(("uniform", 2, 1.0), 1, shared, tmp_path)
    assert sweep.work_through([run], 1) == 0
    found = rows.row_of(run)
    assert len(found["greedy"]) == len(found["right"]) == 6 and found["gini"] == [0, 0]
    after = read_rows(tmp_path / "uniform-r2-p1-s1" / "evals.jsonl")[-1]
    assert found["greedy"].count("1") / 6 == pytest.approx(after["greedy"], abs=1e-5)
    assert set(found["right"]) <= set("01234")
