"""The benches: whether the table says what was measured, and the peers do the same work as we."""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import credit
import grpo
from bench import common, credit_cost, gpu, ours, peers, speed
from lora import adapter_off, lora_parameters
from model import Qwen3
from sample import generate

HOUSE = Path(__file__).parent.parent
SIZES = dict(device="cpu", dtype="fp32", prompts=2, samples=2, tokens=4, micro_batch_tokens=4096)


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


def table(text):
    """{first cell: the other cells} of all tables in what a bench prints."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return common.prepare("tiny", tmp_path_factory.mktemp("work"), **SIZES)


@pytest.mark.long
def test_the_table_says_what_was_measured(monkeypatch, capsys):
    """A row that is missing without a word, or a ratio of other numbers than those printed, would
    claim what nobody measured."""
    flags = ["--rows", "sampling,step", "--rounds", "1", "--tokens", "4"]
    flags += ["--prompts", "2", "--samples", "2"]
    monkeypatch.setattr(sys, "argv", ["bench/speed.py", *flags])
    speed.main()
    text = capsys.readouterr().out
    assert " ".join(["python bench/speed.py", *flags]) in text
    assert f"torch {torch.__version__}" in text
    rows, claims = table(text), 0
    for name, (_, _, packages) in speed.JOBS.items():
        assert (name in rows) == installed(*packages), name
        assert all(package in text for package in packages)  # with a version, or as missing
    for us, peer, *_ in speed.RATIOS:
        if peer in rows:
            for column in (1, 3):
                ratio = float(rows[us][column]) / float(rows[peer][column])
                ratio = ratio if us.startswith("sample") else 1 / ratio
                claims += 1
                assert float(rows[f"{us} / {peer}"][column]) == pytest.approx(ratio, rel=0.02)
    assert claims >= 2


def test_cost_of_every_rule_on_one_rollout(monkeypatch, capsys):
    """A rollout that lacks what some rule reads of the sampler ends the bench halfway."""
    flags = ["--updates-only", "--prompts", "2", "--samples", "2", "--rounds", "1"]
    flags += ["--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["bench/credit_cost.py", *flags])
    credit_cost.main()
    rows = table(capsys.readouterr().out)
    assert {*credit.METHODS, "arca, the authors' way"} <= rows.keys()
    assert rows["uniform"][1] == "1.00" and float(rows["arca"][1]) > 0


def test_turns_and_the_round_that_does_not_count(monkeypatch):
    """Contestants that do not take turns are compared across what else the machine was doing; a
    first round that counts measures how kernels are chosen."""
    calls = []

    def job(name):
        return lambda free, turn: calls.append((name, free, turn)) or (turn + 1.0, 10)

    found = speed.take_turns(dict(a=job("a"), b=job("b")), 2)
    assert calls[:4] == [("a", True, 0), ("b", True, 0), ("a", False, 0), ("b", False, 0)]
    assert found["b", False] == [(2.0, 10), (3.0, 10)]
    assert common.middle([2.0, 1.0, 9.0]) == ("2.00", "1.00 to 9.00")
    assert statistics.median([2.0, 1.0, 9.0]) == 2.0


def test_tokens_are_counted_up_to_the_end():
    """Padding after a completion that is counted would make a peer look faster than it is."""
    ids = torch.tensor([[5, 0, 0, 0], [5, 6, 7, 8], [9, 5, 6, 0], [0, 5, 0, 5]])
    assert peers.count(ids, [0]) == 2 + 4 + 4 + 1
    assert peers.count(ids, [0, 9]) == 2 + 4 + 1 + 1
    assert peers.count(ids, []) == 16


@pytest.mark.skipif(not installed("transformers", "peft"), reason="no transformers or no peft")
def test_peers_have_the_same_weights_and_do_the_same_work(work):
    """A peer whose adapter is not on, that pads wrongly or that stops early does other work."""
    for adapter in (False, True):
        model, theirs = work.model, peers.load(work, adapter)
        padded = peers.left_padded(work.prompts(), "cpu")
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = theirs(**padded, position_ids=positions).logits[:, -1]
        for prompt, row in zip(work.prompts(), logits, strict=True):
            ids = torch.tensor([prompt])
            if adapter:
                hidden = model(ids)[0, -1]
            else:
                with adapter_off(model):
                    hidden = model(ids)[0, -1]
            assert torch.allclose(model.logits(hidden), row, atol=1e-4)
        assert ours.sampler(work, adapter)(False, 1)[1] == 2 * 2 * 4
        assert peers.sampler(work, adapter)(False, 1)[1] == 2 * 2 * 4


@pytest.mark.skipif(not installed("transformers", "peft", "trl", "datasets"), reason="no TRL")
def test_trl_does_the_same_work(work):
    """TRL's step of other completions than ours would be another step."""
    job = peers.trainer(work)
    seconds, drawn = job(False, 1)
    assert drawn == ours.step(work, "uniform")(False, 1)[1] == 2 * 2 * 4
    assert seconds > 0


def test_the_work_is_counted_right(work):
    """FLOPs that nothing needs would make the share of the limit a boast. PyTorch's own counter
    sees the matrix products of what runs; it does not see attention on the CPU, 2 % here, nor the
    adapter's B, whose product is added in place."""
    model = work.model
    cfg = common.settings(samples=4, max_new_tokens=16)
    prompt = work.problems[0]["prompt"]
    problems, lengths, prompts = [work.problems[0]] * 2, [16] * 8, [len(prompt)] * 2
    with FlopCounterMode(display=False) as counter:
        generate(model, [prompt] * 2, 4, 16)
    flops, _ = common.sampling_work(model, prompts, lengths, adapter=True)
    B = sum(p.numel() for n, p in lora_parameters(model).items() if "lora_B" in n)
    unseen = 2 * B * (sum(prompts) + sum(lengths) - len(lengths))
    assert flops == pytest.approx(counter.get_total_flops() + unseen, rel=0.06)
    rollout = grpo.sample_rollout(model, work.ends(False), problems, cfg, 1)
    rollout, advantages = ours.half_right(rollout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for rule in ("uniform", "arca"):
        cfg.credit = rule
        with FlopCounterMode(display=False) as counter:
            grpo.update(model, optimizer, rollout, advantages, cfg)
        flops = common.update_work(model, prompts, lengths, rule == "arca")
        assert flops == pytest.approx(counter.get_total_flops() + unseen, rel=0.06)


def test_the_shapes_are_the_published_ones():
    """A bench of another model than it says. Billions of parameters without the embeddings, as the
    models' cards have them."""
    for name, billions in {"0.6B": 0.44, "1.7B": 1.4}.items():
        with torch.device("meta"):  # takes no memory
            model = Qwen3(common.config_of(name))
        count = sum(p.numel() for p in model.parameters())
        without = count - model.model.embed_tokens.weight.numel()
        assert without == pytest.approx(billions * 1e9, rel=0.015)


def test_peak_memory_is_found_and_forgotten():
    """A peak that loading left behind would be charged to the step that comes after it."""
    if common.held("cpu") is None:
        pytest.skip("no /proc")
    before = common.held("cpu")
    torch.ones(2**24)  # 64 MiB, freed at once
    assert common.held("cpu", "VmHWM") >= before + 60 * 2**20
    common.forget_peak("cpu")
    assert common.held("cpu", "VmHWM") <= common.held("cpu") + 2**23
    before = common.held("cpu")
    torch.ones(2**24)  # as large as before: the allocator keeps less than 32 MiB for itself
    assert common.held("cpu", "VmHWM") >= before + 60 * 2**20


def gpu_sh(*flags, python=sys.executable):
    """Exit code and output of bench/gpu.sh."""
    environment = os.environ | dict(PYTHON=python, OMP_NUM_THREADS="1")
    command = ["bash", "bench/gpu.sh", *flags]
    ended = subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True, text=True)
    return ended.returncode, ended.stdout


@pytest.mark.nightly
def test_gpu_sh_in_small():
    """The script runs for the first time where a GPU is rented by the minute."""
    code, text = gpu_sh("--device", "cpu", "--small")
    assert (code, text.count("\n## ")) == (0, len(gpu.BLOCKS)), text
    checks = [line for line in text.splitlines() if line.startswith(("| fp32", "| bf16"))]
    assert len(checks) == 18 and all(line.endswith("| yes |") for line in checks)
    rows = table(text)
    times = ["step, s", "sampling, s", "update, s", "evaluation, s"]
    for what in [*times, "sampling, TB/s", "update and scoring, TFLOP/s"]:
        assert float(rows[what][0]) > 0, what


def test_gpu_sh_says_that_it_failed():
    """A script that ends well though its Python did not start."""
    assert gpu_sh(python="false") == (1, "FAILED (exit code 1; 124 is out of time)\n")


def small(tmp_path):
    return gpu.Bench("cpu", SimpleNamespace(**gpu.SMALL), tmp_path)


def test_blocks_that_fail_leave_the_others(tmp_path, monkeypatch, capsys):
    """A block that fails, hangs or comes too late takes along what others have found, or would."""

    def fails(bench):
        raise ValueError("one\ntwo")

    monkeypatch.setattr(gpu, "MOST_SECONDS", 50)
    blocks = dict(bad=(fails, 1), slow=(lambda bench: time.sleep(9), 0.01), late=(fails, 60))
    blocks["good"] = (lambda bench: bench.found("a row", 1.234), 1)
    monkeypatch.setattr(gpu, "BLOCKS", blocks)
    bench = small(tmp_path)
    assert gpu.run(bench, ["good"])
    assert not gpu.run(bench, list(blocks))
    bench.table()
    text = capsys.readouterr().out
    for line in (
        "FAILED: bad: ValueError: one (at ",
        "FAILED: slow: TimeoutError",
        "LEFT OUT: late",
    ):
        assert line in text
    assert "two" not in text
    assert text.count("| a row | 1.23 |") == 4  # when it was found, and in the table


def test_the_quick_blocks(tmp_path, capsys):
    """Names that have changed in the project, on which a block would fail where a GPU is rented."""
    quick = ["profile", "pools", "attention", "draws"]
    assert gpu.run(small(tmp_path), quick), capsys.readouterr().out
    rows = table(capsys.readouterr().out)
    for what in ("a decoding step, ms", "draw and step, 2 rows of 8, ms", "draw_next, top_p 0.95"):
        assert float(rows[what][0]) > 0
