"""The sweep: what is done once, never mixed, and gone on with; its statistics and tables.

Most tests put stand-ins in the place of train.py and eval_math.py, which write what those write and
take no time; one runs the real ones.
"""

import fcntl
import json
import math
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest

from data.problems import TINY
from experiments import plan, rows, stats, sweep, tables
from experiments.concentration import PUBLISHED
from experiments.plan import Preset
from system.errors import UserError
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
shares = {f"{kind}/{c}": 1 / 7 for kind in ("tokens", "credit") for c in %r}
for step in range(done + 1, s["steps"] + 1):
    row = dict(step=step, reward=step / 10, entropy=0.1, gini=0.5, effective_token_ratio=0.25)
    row |= dict(groups_mixed=1, skipped=0)
    with open(path, "a") as file:
        file.write(json.dumps(row | shares) + "\\n")
    if step == 2 and (here / "die").exists():
        (here / "die").unlink()
        os.kill(os.getpid(), 9)
(folder / "evals.jsonl").write_text(json.dumps(dict(step=s["steps"], greedy=0.5)) + "\\n")
"""
EVAL = """
import json, sys
out = sys.argv[sys.argv.index("--out") + 1]
verdicts = [(None, True), (None, False), (0, True), (1, True), (0, False), (1, True)]
rows = [dict(sample=sample, verdict=verdict) for sample, verdict in verdicts]
open(out, "w").write("".join(json.dumps(row) + "\\n" for row in rows))
"""
PRESET = Preset(dict(steps=4, eval_problems=2), 2, (1,), (1,), 2)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder of stand-ins for the scripts that a sweep starts."""
    from run.metrics import CLASSES

    place = tmp_path / "house"
    place.mkdir()
    (place / "train.py").write_text(TRAIN % (CLASSES,))
    (place / "eval_math.py").write_text(EVAL)
    (place / "defaults.json").write_text(json.dumps(asdict(Settings())))
    monkeypatch.setattr(sweep, "ROOT", place)
    return place


def planned(out, rules, given=None, seeds=(1,)):
    """The Runs of a small sweep that are of these rules."""
    code = plan.code_key()
    runs = plan.plan(PRESET, given or {}, list(seeds), True, out, code)
    return [run for run in runs if run.cell[0] in rules], code


def starts(run):
    return (run.folder / "starts").read_text().split()


# ---- Done once, and gone on with -----------------------------------------------------------------


def test_what_is_done_is_skipped(tmp_path, house):
    """A sweep that does finished runs again would take hours for a table, and one that takes a
    finished training for a finished run would have no answers to compare."""
    runs, code = planned(tmp_path, ("base", "uniform"))
    assert sweep.work_through(runs, 2, code) == 0
    assert all(plan.next_command(run) is None for run in runs)
    assert [len(starts(run)) for run in runs[1:]] == [1, 1]  # uniform, at two ranks
    (runs[1].folder / "answers.jsonl").unlink()
    assert sweep.work_through(runs, 2, code) == 0
    assert starts(runs[1]) == ["new"]
    assert (runs[1].folder / "answers.jsonl").exists()


def test_a_killed_child_is_gone_on_with(tmp_path, house, capsys):
    """A child that the system kills, for want of memory say, must neither stop the others nor count
    as done; the next sweep resumes it instead of beginning anew beside it."""
    runs, code = planned(tmp_path, ("uniform",))
    (house / "die").touch()
    assert sweep.work_through(runs, 1, code) == 1
    assert "failed: uniform-r2" in capsys.readouterr().out
    assert [plan.next_command(run) is None for run in runs] == [False, True]
    assert sweep.work_through(runs, 1, code) == 0
    assert starts(runs[0]) == ["new", "resume"]
    a, b = (rows.row_of(run) for run in runs)
    assert a["reward"] == b["reward"] == [0.1, 0.2, 0.3, 0.4]


def test_an_evaluation_that_was_cut_off_counts_for_nothing(tmp_path, house):
    """Half of the answers under the file's own name would pass for all of them."""
    runs, code = planned(tmp_path, ("base",))
    (house / "eval_math.py").write_text(EVAL + "sys.exit(1)")
    assert sweep.work_through(runs, 1, code) == 1
    assert not (runs[0].folder / "answers.jsonl").exists()
    (house / "eval_math.py").write_text(EVAL)
    assert sweep.work_through(runs, 1, code) == 0
    assert rows.row_of(runs[0])["greedy"] == "10"


def test_ctrl_c_leaves_no_child(tmp_path, house, monkeypatch):
    """A child that outlives the sweep would go on writing while the next sweep resumes its run."""
    runs, code = planned(tmp_path, ("uniform",))
    (house / "train.py").write_text("import time\ntime.sleep(60)")
    begun = []
    popen = subprocess.Popen
    kept = lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1]  # noqa: E731
    monkeypatch.setattr(sweep.subprocess, "Popen", kept)

    def interrupted(seconds):
        raise KeyboardInterrupt(2)

    monkeypatch.setattr(sweep.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.work_through(runs, 2, code)
    assert [process.poll() for process in begun] == [-15, -15]


def test_two_sweeps_do_not_share_a_folder(tmp_path, house):
    """Two processes that write one run's files tear them; the lock outlives a killed sweep, since
    its children hold it too."""
    runs, code = planned(tmp_path, ("uniform",))
    runs[0].folder.mkdir()
    with open(runs[0].folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            sweep.work_through(runs, 1, code)
    assert sweep.work_through(runs, 1, code) == 0


# ---- Never mixed ---------------------------------------------------------------------------------


def test_other_settings_and_inputs_are_other_runs(tmp_path):
    """Runs of two budgets in one table would be compared as if they were of one."""
    first = {run.folder for run in planned(tmp_path, ("uniform", "arca"))[0]}
    for given in (dict(steps=5), dict(lr=1e-3), dict(eval_problems=1), dict(max_new_tokens=9)):
        assert not first & {run.folder for run in planned(tmp_path, ("uniform", "arca"), given)[0]}
    moved = shutil.copytree(TINY, tmp_path / "elsewhere")
    at = dict(model=str(moved))
    assert first == {run.folder for run in planned(tmp_path, ("uniform", "arca"), at)[0]}
    with open(moved / "config.json", "a") as file:
        file.write("\n")
    plan.content.cache_clear()
    assert not first & {run.folder for run in planned(tmp_path, ("uniform", "arca"), at)[0]}


def test_other_code_is_another_run(tmp_path, monkeypatch):
    """Half a sweep from before a change and half from after it is a sweep of nothing."""
    for path in plan.source_files():
        copy = tmp_path / path.relative_to(plan.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    before = plan.code_key()
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    assert plan.code_key() == before  # a clone elsewhere has the same runs
    (tmp_path / "run/folder.py").write_text("# only shows")
    assert plan.code_key() == before
    for name in ("grpo.py", "verifier/values.py", "fast/packing.py", "run/metrics.py"):
        with open(tmp_path / name, "a") as file:
            file.write("#\n")
        assert plan.code_key() != before
        before = plan.code_key()
    with pytest.raises(UserError, match="code was changed"):
        sweep.start(None, [], None, "of before")


def test_a_folder_with_another_run_is_refused(tmp_path, house):
    """A folder that somebody has copied or edited would pass for the run that its name says."""
    runs, code = planned(tmp_path, ("uniform",))
    sweep.work_through(runs, 1, code)
    path = runs[0].folder / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["lr"] = 0.5
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="other lr"):
        sweep.work_through(runs, 1, code)


def test_the_paper_s_seven_runs(tmp_path):
    """The preset must be what was published: a row more or less, another rank, alpha or exponent
    would be compared with a number that it has nothing to do with."""
    preset = plan.PRESETS["paper"]
    runs = plan.plan(preset, {}, list(preset.seeds), False, tmp_path, "code")[1:]
    assert {run.cell[:2] for run in runs} == PUBLISHED.keys()
    for run in runs:
        s, (rule, rank, _) = run.settings, run.cell
        assert s["model"] == "Qwen/Qwen3-1.7B-Base" and s["data"] == "math"
        assert (s["steps"], s["prompts"], s["samples"], s["seed"]) == (100, 8, 4, 1337)
        assert (s["credit"], s["rank"], s["alpha"], s["lr"]) == (rule, rank, 2 * rank, 5e-6)
        assert s["sharpening"] == (1 if rule == "uniform" else 2) and run.problems == 200
    everything = plan.cells(preset.rank, preset.others)
    assert {("uniform", 4, 1.0), ("permuted", 64, 1.0), ("random", 64, 2.0)} < set(everything)
    assert len(everything) == len(set(everything)) == 17


def test_a_greedy_sweep_has_no_pass_at_4(tmp_path):
    """A chat model costs a hundred times the embedded one: a sweep of it that also sampled, or
    measured adapters, would run out of its hour; and no sample is not "none right"."""
    files = dict(data="a.jsonl", eval_data="b.jsonl", model="tiny")
    runs = plan.plan(plan.PRESETS["chat"], files, [1, 2], False, tmp_path, "code")
    assert [r.cell[0] for r in runs] == ["base", "uniform", "arca", "uniform", "arca"]
    words, made = plan.next_command(runs[0])
    assert words[words.index("--samples") + 1] == "0" and made.name == "answers.jsonl"
    assert not any(run.measured for run in runs)
    rights = [json.dumps(dict(sample=None, verdict=right)) + "\n" for right in (True, False)]
    (tmp_path / "answers.jsonl").write_text("".join(rights))
    found = small()[1]
    found[-1]["greedy"], found[-1]["right"] = rows.outcomes(tmp_path / "answers.jsonl")
    assert (found[-1]["greedy"], found[-1]["right"]) == ("10", "")
    assert tables.estimate(found[-1:], ("arca", 16, 2.0), "pass") is None


def test_wrong_flags_are_one_line(monkeypatch, tmp_path):
    """A typing mistake must not start a sweep of something else."""
    monkeypatch.setattr(sweep.sys, "argv", ["sweep.py", "--preset", "papr"])
    with pytest.raises(UserError, match="use one of tiny, paper"):
        sweep.main()
    with pytest.raises(UserError, match="--eval-data"):
        planned(tmp_path, (), dict(data="problems.jsonl"))
    monkeypatch.setattr(sweep, "fcntl", None)  # as on Windows
    monkeypatch.setattr(sweep.sys, "argv", ["sweep.py", "--out", str(tmp_path / "none")])
    with pytest.raises(UserError, match="takes Linux or macOS"):
        sweep.main()
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
    seeds, problems, both = (v for v, _ in stats.variance_parts(x))
    assert (seeds, problems, both) == pytest.approx((1 / 3, 5 / 12, 0), abs=1e-12)
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
    assert [line[4] for line in lines[-3:-1]] == ["25.0", "62.5"]  # minus base's 25.0
    assert "missing" in lines[-1]


def test_p_values_are_corrected_for_all_tests(monkeypatch):
    """Claims choose among three outcomes: a correction for each outcome apart lets three times as
    many false claims through. ARCA has p = 0.01 in all, and divergence is missing."""
    about, found = small()
    sure = lambda x: stats.Estimate(0.3, 0.1, 0.5, 0.01, 2) if x.size else None  # noqa: E731
    monkeypatch.setattr(tables, "compared", sure)
    text = tables.difference_table(about, found)
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
    part = json.loads(json.dumps(kept[3:]))
    assert sweep.likeness(part, kept) == "the same numbers"
    part[0]["gini"][0] += 6e-4
    assert sweep.likeness(part, kept) == "the same but for rounding"
    for key, value in (
        ("reward", [0.5, 0.9 + 1 / 128]),
        ("greedy", "0000"),
        ("gini", [0.6]),
        ("seed", 3),
    ):
        assert sweep.likeness([part[1], part[0] | {key: value}], kept) == "others", key


@pytest.mark.long
def test_the_real_scripts(tmp_path):
    """The stand-ins above could be unlike the real ones: what train.py evaluates at its end,
    and the sweep from the adapter on disk, must be the same answers."""
    small = dict(steps=2, prompts=2, samples=2, eval_problems=6, max_new_tokens=64)
    runs, code = planned(tmp_path, ("uniform",), small)
    run = runs[0]
    run.settings["eval_problems"] = 6
    assert sweep.work_through([run], 1, code) == 0
    found = rows.row_of(run)
    assert len(found["greedy"]) == len(found["right"]) == 6 and len(found["gini"]) == 2
    assert found["greedy"].count("1") / 6 == pytest.approx(found["held_out"]["2"], abs=1e-5)
    assert set(found["right"]) <= set("01234") and found["gini"] == [0, 0]
