"""RESULTS.md against the files it rests on; and real.py, which makes one of them."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.problems import TINY
from experiments import concentration, oracle_report, tables, theory
from experiments.rows import read_results
from system.files import read_json

HOUSE = Path(__file__).parent.parent
RESULTS = HOUSE / "experiments/results"
INTERVAL = re.compile(r"-?\d+(?:\.\d+)? \[ *-?\d[^]\n]*, *-?\d[^]\n]*\]")


def flat(text):
    return re.sub(r" +", " ", text)


def intervals(text):
    """Every `mean [low, high]` of a text."""
    return {flat(found).replace("[ ", "[") for found in INTERVAL.findall(text)}


@pytest.fixture(scope="module")
def sweep_tables():
    """What tables.py prints of the results of the sweep."""
    return tables.tables(*read_results(RESULTS / "tiny.json"))


@pytest.fixture(scope="module")
def printed(sweep_tables):
    """All that the scripts of experiments/ print of the result files."""
    oracle = read_json(RESULTS / "oracle.json")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for power in (1, 2):
            oracle_report.print_measured(oracle["measured"], power)
        oracle_report.print_trained(oracle["trained"])
        theory.print_table(read_json(RESULTS / "theory.json"))
        for found in read_json(RESULTS / "real.json")["after"].values():
            concentration.show(found["rules"], found)
    return sweep_tables + out.getvalue()


def test_no_interval_of_the_results_without_a_source(printed):
    """A number typed by hand, or left over from an older run, would be believed like the others:
    every interval of RESULTS.md is one that the scripts print of the files beside it."""
    stated = intervals((HOUSE / "experiments/RESULTS.md").read_text(encoding="utf-8"))
    assert len(stated) >= 100
    assert stated <= intervals(printed)


def test_no_interval_of_the_readme_without_a_source(printed):
    """Likewise what the root README says was found."""
    text = (HOUSE / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## What was found\n(.*?)(^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, "the README does not say what was found"
    assert intervals(section[1]) <= intervals(printed)


def test_the_tables_are_those_of_the_file(sweep_tables):
    """The tables that RESULTS.md shows whole must be what tables.py prints today."""
    text = (HOUSE / "experiments/RESULTS.md").read_text(encoding="utf-8")
    for part in sweep_tables.split("\n\nTable ")[:3]:
        assert part.removeprefix("Table ") in text


@pytest.mark.nightly
def test_a_real_model_is_trained_and_measured_once(tmp_path):
    """An hour of training must not be done twice, and what it was for must be in the file."""
    words = ["--model", TINY, "--data", "tiny", "--eval-data", "tiny", "--rules", "arca"]
    words += ["--steps", 2, "--prompts", 2, "--samples", 2, "--problems", 4, "--out", tmp_path]
    command = [sys.executable, "experiments/real.py", *map(str, words)]
    first, second = (subprocess.run(command, cwd=HOUSE, capture_output=True) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    metrics, *more = tmp_path.glob("arca-*/metrics.jsonl")
    assert not more and len(metrics.read_text().splitlines()) == 2
    found = json.loads((tmp_path / "real.json").read_text())["after"]["arca"]
    assert found["completions"] == 4
    (gini, low, high), ratio = found["rules"]["arca"]["2"]
    assert low <= gini <= high and 0 < gini < 1 and 0 < ratio[0] < 1, "the adapter did not train"
    assert found["rules"]["uniform"]["1"][0][0] == 0
    table = second.stdout.decode()
    assert f"{gini:.3f} [{low:.3f}, {high:.3f}]" in table and "0.490 / 0.334" in table
