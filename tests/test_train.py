"""train.py as its users run it: the command line, the run folder, errors in one line."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from credit import METHODS
from data.problems import problems_of_step
from run.flags import check
from run.folder import curve, new_run, run_name, summary
from system.errors import UserError, before_imports, run_cli
from system.files import append, write_json

HOUSE = Path(__file__).parent.parent
SMALL = "--steps 4 --prompts 3 --samples 3 --max-new-tokens 48 --eval-problems 8 --eval-samples 2"
SMALL = f"{SMALL} --save-every 2".split()


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def train_in(folder, *flags):
    """Run train.py in this process; returns what it printed."""
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(folder), *flags])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real run that compares the rules at each step: (folder, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, *train_in(folder, "--compare-rules")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of one real run of plain GRPO."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    train_in(folder, "--credit", "uniform", "--eval-samples", "0")
    return folder


def test_run_folder(run):
    """The run folder's format is what other tools read; a missing file or key breaks them."""
    folder, out, err = run
    names = {"config.json", "metrics.jsonl", "evals.jsonl", "samples.jsonl", "adapter"}
    names |= {"trainer.safetensors", "trainer.safetensors.1"}  # the newest checkpoint, and one more
    names |= {"process.lock", "process.txt"}  # whose it is
    assert names == {path.name for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["credit"] == "arca"
    assert config["settings"]["prompts"] == 3
    sides = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384)  # q and o, k and v, the MLP's three
    assert config["parameters"]["trained"] == 16 * 4 * sides  # rank x layers x (in + out)
    assert {"argv", "git", "versions"} <= config.keys()
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    keys = "reward loss grad_norm lr entropy completion_tokens truncated groups_mixed"
    keys += " groups_all_right groups_all_wrong gini effective_token_ratio credit_fallback"
    keys += " logp_mismatch seconds_rollout seconds_update tokens_per_second"
    assert all(set(keys.split()) <= row.keys() for row in metrics)
    assert all(row["logp_mismatch"] < 1e-4 for row in metrics)
    evals = rows(folder, "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 4]
    assert {"greedy", "greedy_95", "pass@2", "pass@2_95", "n"} <= evals[0].keys()
    sample = rows(folder, "samples.jsonl")[0]
    assert len(sample["tokens"]) == len(sample["weights"])
    assert sum(sample["weights"]) == pytest.approx(len(sample["weights"]), abs=0.01)
    assert "\r" not in out + err
    assert "held-out" in out
    assert str(folder) in out


def test_without_evaluation(tmp_path):
    """No way to leave out what takes half of a short run; or a run that cannot go on without."""
    folder = tmp_path / "run"
    flags = ["--credit", "uniform", "--eval-problems", "0", "--steps", "2", "--save-every", "1"]
    out, _ = train_in(folder, *flags)
    assert not (folder / "evals.jsonl").exists() and "held-out" not in out
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert "nothing to do" in train_in(folder, *flags, "--resume")[0]
    os.replace(folder / "trainer.safetensors.1", folder / "trainer.safetensors")  # of step 1
    assert "going on after step 1" in train_in(folder, *flags, "--resume")[0]
    assert [row["step"] for row in rows(folder)] == [1, 2]


def test_first_step_is_uniform_by_fallback(run):
    """With B = 0 ARCA and divergence have nothing to go by; noise must not pass for credit."""
    first, second = rows(run[0])[:2]
    assert first["gini"] == 0
    assert first["effective_token_ratio"] == 1
    assert first["credit_fallback"] == 1
    assert (second["credit_fallback"] == 0) == (first["groups_mixed"] > 0)
    assert {f"gini/{method}/2" for method in METHODS} <= first.keys()


def test_rules_are_compared_and_kept(run, plain):
    """Every rule's passes paid at every step, or a sample without what view/ shows of it."""
    compared = [row["step"] for row in rows(plain) if "rank_correlation/arca" in row]
    assert compared == [1, 4]  # the first of ten, and the evaluated one
    assert {row["step"] for row in rows(plain, "samples.jsonl")} == {1, 4}
    assert all("residual_mean" not in row for row in rows(plain)[1:3])
    for sample in rows(run[0], "samples.jsonl"):
        n = len(sample["tokens"])
        assert "".join(sample["tokens"]).startswith(sample["text"])
        assert sample["credit"] == "arca"
        assert sample["rules"].keys() == METHODS.keys()
        assert all(len(m) == n for pair in sample["rules"].values() for m in pair)
        assert all(len(sample[name]) == n for name in ("logp", "entropy", "residual"))
        assert sample["rules"]["arca"][0] == sample["weights"]
    assert all(row["rank_correlation/arca"] == pytest.approx(1) for row in rows(run[0])[1:])


def test_every_metric_is_in_the_glossary(run):
    """A logged number that nobody explains is noise."""
    readme = (HOUSE / "run" / "README.md").read_text(encoding="utf-8")
    keys = {key.split("/")[0] for key in rows(run[0])[0]}
    assert not {key for key in keys if f"`{key}`" not in readme and f"`{key}/" not in readme}


def cli(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        run_cli(train.main)
    return stop.value.code


BAD_LINE = '{"problem": "1+1?", "answer": 2}\n{"problem": "no gold"}\n'


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--credit", "arcane"], "--credit arcane: use one of uniform, surprisal"),
        (["--samples", 1], "--samples 2"),
        (["--advantage", "gae"], "--advantage gae: use one of grpo, rloo, centered"),
        (["--aggregate", "mean"], "--aggregate mean: use one of seq, token"),
        (["--preset", "big"], "--preset big: use one of paper"),
        (["--temperature", 0], "--temperature 0.0: use 0.001 to 1000.0"),
        (["--lr", "nan"], "--lr nan: use 1e-30 to 1e+30"),
        (["--beta2", 1], "--beta2 1.0: use 0.0 to 0.999999"),
        (["--seed", 2**64], "--seed 18446744073709551616: use 0 to 18446744073709551615"),
        (["--steps", "1e3"], "--steps: invalid int value: '1e3'"),
        (["--sample", 4], "unrecognized arguments: --sample 4"),  # argparse would take --samples
        (["--model", "no/where/at/all"], "no model folder"),
        (["--data", "nowhere.jsonl"], "no data nowhere.jsonl"),
        (["--data", "{bad}"], "line 2"),
        (["--max-prompt-tokens", 3], "--max-prompt-tokens"),
        (["--device", "cuda:99"], "no device 'cuda:99' here: use --device cpu"),
        (["--device", "meta"], "no device 'meta' here: use --device cpu"),
        (["--device", "cpu:1"], "no device 'cpu:1' here: use --device cpu"),
        (["--dtype", "int8"], "--dtype int8: use one of auto, fp32, bf16"),
        (["--chat"], "ChatML"),
        (["--thinking", "on"], "--thinking are about chat models: add --chat"),
        (["--eval-problems", -1], "--eval-problems -1: use 0 to"),
        (["--out", "{run}"], "--resume"),
        (["--out", "{held}"], "holds a run"),
        (["--adapter", "{run}", "--rank", 8], "the adapter has 16, so omit it"),
        (["--adapter", "{run}", "--alpha", 16], "the adapter has 32.0, so omit it"),
        (["--adapter", "{new}"], "adapter_config.json is missing"),
        (["--adapter", "runs/none"], "adapter_config.json is missing"),
        (["--out", "{run}", "--resume", "--lr", 1], "lr = 0.002"),
        (["--resume"], "no run runs/"),
        (["--out", "{new}", "--resume"], "config.json"),
        (["--out", "{bad}/run"], "Not a directory"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, run, flags, says):
    """A traceback, or silence, where a user made a slip; or a good run overwritten by it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(BAD_LINE)
    (tmp_path / "held" / "adapter").mkdir(parents=True)  # which a run would write over
    before = (run[0] / "metrics.jsonl").read_bytes()
    names = dict(bad=tmp_path / "bad.jsonl", run=run[0], new=tmp_path / "new")
    names["held"] = tmp_path / "held"
    assert cli(monkeypatch, *[str(flag).format(**names) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert says in error
    assert (run[0] / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_are_settings(preset):
    """A preset that names a setting which is gone, or that the checks refuse."""
    cfg = train.Settings(**train.PRESETS[preset], preset=preset)
    check(cfg)
    cfg.top_p = 0.0
    with pytest.raises(UserError, match="--top-p"):
        check(cfg)


def test_runs_name_themselves(monkeypatch, tmp_path):
    """Two runs of the same command must not write into one folder."""
    monkeypatch.chdir(tmp_path)
    cfg = train.Settings(credit="uniform", seed=3)
    names = [new_run(cfg, torch.nn.Linear(1, 1), {}).name for _ in range(3)]
    assert names == ["uniform-tiny-tiny-seed3" + end for end in ("", "-2", "-3")]


def test_rows_are_json_whatever_they_hold(tmp_path):
    """NaN and Infinity, which Python writes and no other program reads."""
    row = dict(
        step=1, loss=math.nan, grad_norm=math.inf, nested=[1.5, [-math.inf], {"a": math.nan}]
    )
    append(tmp_path / "metrics.jsonl", row)
    write_json(tmp_path / "config.json", row)
    for name in ("metrics.jsonl", "config.json"):
        text = (tmp_path / name).read_text()
        read = json.loads(text, parse_constant=pytest.fail)
        assert read == dict(step=1, loss=None, grad_norm=None, nested=[1.5, [None], {"a": None}])


def test_the_end_of_a_run_leaves_out_steps_that_were_skipped(capsys, tmp_path):
    """A TypeError or `Gini nan` at the end of a run of hours, for one step of it."""
    evaluation = {"n": 2, "greedy": 0.5, "greedy_95": [0.1, 0.9]}
    made = dict(reward=0.5, skipped=0, gini=0.25, effective_token_ratio=0.75)
    skipped = made | dict(skipped=1, gini=None, effective_token_ratio=math.nan)
    summary(tmp_path, [made, skipped], [evaluation] * 2, train.Settings())
    assert "Gini 0.250, effective-token ratio 0.750" in capsys.readouterr().out


def test_the_curve_at_the_end_of_a_run(monkeypatch):
    """A division by zero with one step or one value, a null drawn as 0, a line that wraps, question
    marks on a console without blocks."""
    lines = curve([0.25, None, math.nan, 1.0])
    assert [line[9:] for line in lines[1:]] == ["   █", "   █", "   █", "█  █"]
    for rewards in ([0.5], [0.0], [None], [0.4] * 100, [i / 1000 for i in range(1000)]):
        lines = curve(rewards)
        assert len(lines) == 5 and max(map(len, lines)) <= 80
    assert "1 to 1000, a column is the mean of 16" in lines[0] and lines[-1].endswith("██")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert [line[9:] for line in curve([0.5, 1.0])[1:]] == [" #", " #", "##", "##"]


def test_an_adapter_brings_its_rank_and_alpha(monkeypatch, tmp_path, run):
    """A config.json that states another rank than was trained; a preset whose rank the adapter
    cannot have; or the command that began a run refused when --resume is added to it."""
    monkeypatch.chdir(tmp_path)
    command = ["--preset", "paper", "--adapter", str(run[0]), "--rank", "16"]

    def parsed(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", *command, *more])
        return train.parse_settings(train.Settings, train.PRESETS, "Train")[0]

    cfg = parsed()
    assert (cfg.rank, cfg.alpha, cfg.lr) == (16, 32.0, train.PRESETS["paper"]["lr"])
    assert run_name(cfg) == "arca-Qwen3-1.7B-Base-math-seed1337-from-full"
    cfg.adapter += "/adapter"
    assert run_name(cfg).endswith("-from-full")
    cfg.adapter = str(run[0])
    assert parsed("--resume", str(new_run(cfg, torch.nn.Linear(1, 1), {}))).rank == 16


def test_schedule():
    """A warmup from 0 wastes the first step, a cosine that ends at 0 the last."""
    cfg = train.Settings(lr=1.0, warmup=4, steps=12)
    rates = [train.lr_at(step, cfg) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[11] < 0.05
    assert rates[7] == pytest.approx(0.5, abs=0.1)


def test_order_of_problems():
    """Problems drawn with replacement, or an order that depends on the batch size or on what ran
    before, cannot be resumed or compared."""
    problems = list(range(10))
    twos = [p for step in range(1, 11) for p in problems_of_step(problems, 2, 1, step)]
    fives = [p for step in range(1, 5) for p in problems_of_step(problems, 5, 1, step)]
    assert twos == fives
    assert sorted(twos[:10]) == sorted(twos[10:]) == problems
    assert twos[:10] != twos[10:]
    assert problems_of_step(problems, 10, 2, 1) != twos[:10]


def test_help_names_every_setting():
    """A setting without a flag, or a flag without a word of help, might as well not exist; and a
    command that its own file cannot start. (The one test here that starts a process.)"""
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    flags = """credit preset model revision adapter random-init chat system thinking data eval-data
        eval-problems
        eval-samples eval-every steps prompts samples max-prompt-tokens max-new-tokens temperature
        top-p rank alpha lr sharpening warmup beta2 max-grad-norm advantage aggregate
        epochs-per-rollout clip-eps-low clip-eps-high kl-coef micro-batch-tokens
        gradient-checkpointing seed device dtype out resume save-every keep-checkpoints tensorboard
        compare-rules"""
    for flag in flags.split():
        assert re.search(rf"^  --{flag}\b.*(\n {{4,}}|  )\w", done.stdout, re.MULTILINE), flag
    named = {field.replace("_", "-") for field in vars(train.Settings())}
    assert named | {"resume"} == set(flags.split())


@pytest.mark.parametrize("path", ["train.py", "sample.py", "eval_math.py", "view/__main__.py"])
def test_commands_prepare_before_torch(path):
    """The OpenMP library reads its environment when torch is imported: what is set later is not
    seen, and on a busy machine idle threads then take the cores from those that work."""
    text = (Path(train.__file__).parent / path).read_text()
    slow = re.search("\nimport torch|\nfrom view", text).start()
    assert 0 < text.index("    before_imports()") < slow


@pytest.mark.parametrize(
    "given, spins",
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_what_the_user_says_of_threads_holds(monkeypatch, given, spins):
    """A setting that overrides the user's own."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", os.environ | given)
    before_imports()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
