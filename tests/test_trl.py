"""TRL's GRPOTrainer with our credit rules: its gradient is that of our update, on any number of
processes, and with `uniform` it is GRPOTrainer."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

# ruff: noqa: E402 (imports below what skips this file)
import pytest
import torch

for package in ("trl", "peft", "datasets"):
    pytest.importorskip(package)

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from helpers import (
    COMPLETIONS,
    EOS,
    PROMPTS,
    REWARDS,
    close,
    handmade,
    reference,
    scale_B,
    settings,
)
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from credit import METHODS
from data.problems import TINY
from examples import trl_credit
from examples.trl_credit import CreditGRPOTrainer
from grpo import group_advantages, update
from hf.checkpoint import load_model
from hf.peft import PREFIX, load_adapter, save_adapter
from lora import add_lora, lora_parameters
from system.errors import run_cli

HOUSE = Path(__file__).parent.parent
# Two groups of unequal prompts and ragged completions, of which some are cut off, with EOS inside
# as a token; and a third group, whose rewards have no spread.
PROMPTS = [*PROMPTS, [1]]
COMPLETIONS = [*COMPLETIONS, [3, EOS], [2, 2, 7], [5, 6, 7, 8, 9, 1, 2, EOS], [4]]
REWARDS = [*REWARDS, [1, 1, 1, 1]]
SCALE = 2.0**20  # of the rewards, so that TRL's epsilon of 1e-4 in the deviation is nothing
T = 0.8  # temperature
CONTROLS = ("permuted", "random")


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Spare what takes most of the time: at each end of a training TRL's parents call it."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


# ---- TRL's side ----------------------------------------------------------------------------------
class Keeper(torch.optim.SGD):
    """SGD that keeps the gradients it is given, by the names of our parameters."""

    def __init__(self, model):
        self.named = trained(model)
        super().__init__(self.named.values(), lr=0.0)

    def step(self, closure=None):
        self.seen = {name: p.grad.clone() for name, p in self.named.items()}


def trained(model):
    """Return the parameters that are trained, by the names that they have here."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix(PREFIX).replace(".default", ""): p for name, p in named.items()}


def config(out, **changes):
    """Return TRL's settings for one step on twelve completions in one process."""
    common = dict(num_generations=4, per_device_train_batch_size=12, max_completion_length=8)
    loss = dict(loss_type="grpo", temperature=T, max_steps=1, max_grad_norm=0.0, seed=0)
    machine = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    quiet = dict(logging_steps=1, save_strategy="no", report_to=[], shuffle_dataset=False)
    return GRPOConfig(str(out), **common | loss | machine | quiet | changes)


def trainer_of(model, args, kind=CreditGRPOTrainer, reward=None, drop=(), **more):
    """Return a trainer on three rows of data, whose prompts are their numbers."""
    rows = [dict(prompt=str(i), negative_prompt=f"not {i}") for i in range(len(PROMPTS))]
    data = Dataset.from_list(rows).remove_columns(list(drop))
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, padding_side="left")
    reward = reward or (lambda completions, **rest: [float(len(c) % 3) for c in completions])
    trainer = kind(model, reward, args, data, processing_class=tokenizer, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def on_given_completions(trainer):
    """Have a trainer find the prompts and completions above in the place of sampling."""
    accelerator = trainer.accelerator
    first = accelerator.process_index * len(COMPLETIONS) // accelerator.num_processes

    def tokenize(prompts):
        ids = [PROMPTS[int(text.split()[-1])] for text in prompts]
        negative = prompts[0].startswith("not")
        return [x[:1] + x if negative else x for x in ids], None, {}

    def sample(prompt_ids, *rest):
        return COMPLETIONS[first : first + len(prompt_ids)], None

    trainer._tokenize_prompts = tokenize
    trainer._generate_single_turn = sample


def rewarded(prompts, completion_ids, **rest):
    """Return the rewards above of some completions, by prompt and tokens."""
    rewards = {}
    for i, completion in enumerate(COMPLETIONS):
        rewards[str(i // 4), *completion] = SCALE * REWARDS[i // 4][i % 4]
    return [rewards[p, *ids] for p, ids in zip(prompts, completion_ids, strict=True)]


def given_trainer(folder, adapter, args):
    """Return a trainer on the completions above, whose rule `switch` changes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainer = trainer_of(model, args, reward=rewarded, optimizers=(Keeper(model), None))
    trainer.keeper = trainer.optimizer
    on_given_completions(trainer)
    return trainer


def switch(trainer, credit):
    """Have a trainer use another rule."""
    trainer.credit = credit
    trainer.reads = set(METHODS[credit].reads)


def trl_gradient(trainer, credit):
    """Return what TRL hands to the optimizer, and what it logs."""
    switch(trainer, credit)
    trainer.train()
    return trainer.keeper.seen, trainer.state.log_history[0]


@pytest.fixture(scope="module")
def trainer(folder, adapter, tmp_path_factory):
    """Make a trainer that cuts the completions above, shuffled, into three pieces."""
    pieces = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    return given_trainer(folder, adapter, config(tmp_path_factory.mktemp("out"), **pieces))


# ---- Our side ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """Make an adapter of ours that is not zero."""
    model = add_lora(load_model(folder), rank=3, alpha=6.0)
    scale_B(model, 0.1)
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(model, path)
    return path


def our_gradient(folder, adapter, credit):
    """Return what our update hands to the optimizer for the same completions."""
    model = load_adapter(load_model(folder), adapter)
    rows = [reference(model, PROMPTS[i // 4], c, T) for i, c in enumerate(COMPLETIONS)]
    columns = zip(*rows, strict=True)  # log-probs, entropies, states
    kept = [pad_sequence([x.detach() for x in column], batch_first=True) for column in columns]
    rollout = handmade(PROMPTS, COMPLETIONS, REWARDS, kept[0])
    rollout.completions.entropy, rollout.completions.hidden = kept[1:]
    advantages = group_advantages(rollout.rewards).flatten()
    keeper = Keeper(model)
    update(model, keeper, rollout, advantages, settings(credit=credit, temperature=T))
    return keeper.seen


def assert_same(ours, theirs, relative=1e-5):
    """Assert that two gradients have the same names and, as one vector, the same values."""
    assert ours.keys() == theirs.keys()
    flat = [torch.cat([part[name].flatten() for name in ours]) for part in (theirs, ours)]
    assert close(*flat, relative)


# ---- The gradient --------------------------------------------------------------------------------
@pytest.mark.parametrize("credit", [name for name in METHODS if name not in CONTROLS])
def test_the_gradient_is_that_of_our_update(folder, adapter, trainer, credit):
    """A state or mask that is off by one place, padding or a stop token that counts wrongly, a
    signal at another temperature, a base path with the adapter, or a normaliser of the wrong rows;
    and a piece of the step that a rule takes for the whole: TRL works in three, we in one."""
    theirs, logs = trl_gradient(trainer, credit)
    assert_same(our_gradient(folder, adapter, credit), theirs)
    assert 0 <= logs["gini"] < 1 and 0 < logs["effective_token_ratio"] <= 1


# ---- Plain GRPO ----------------------------------------------------------------------------------
def test_uniform_is_plain_grpo_and_what_it_saves_loads_here(folder, tmp_path):
    """A subclass that changes more than the credit: a random stream, a mode, a rounding. The last
    run's rule draws noise and makes passes; while B is 0 its credit is uniform, so its second step
    samples the same."""
    runs = {}
    for credit in ("plain", "uniform", "random"):
        kind = GRPOTrainer if credit == "plain" else CreditGRPOTrainer
        more = {} if credit == "plain" else dict(credit=credit)
        lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear")
        model = AutoModelForCausalLM.from_pretrained(folder)
        args = config(tmp_path, max_steps=2, learning_rate=0.01)
        trainer = trainer_of(model, args, kind, peft_config=lora, **more)
        trainer.train()
        runs[credit] = trainer
    logs = {credit: trainer.state.log_history for credit, trainer in runs.items()}
    for step in (0, 1):
        for key in logs["plain"][step].keys() - {"step_time"}:
            assert logs["plain"][step][key] == logs["uniform"][step][key], key
        for key in ("num_tokens", "reward", "entropy"):
            assert logs["plain"][step][key] == logs["random"][step][key], key
    assert logs["random"][0]["credit_fallback"] == 1 and logs["random"][1]["gini"] > 0.1
    plain, uniform, random = (trained(trainer.model) for trainer in runs.values())
    assert all(torch.equal(plain[name], uniform[name]) for name in plain)
    assert not all(torch.equal(plain[name], random[name]) for name in plain)

    trainer.save_model()
    here = lora_parameters(load_adapter(load_model(folder), tmp_path))
    assert here.keys() == random.keys()
    assert all(torch.equal(here[name], random[name]) for name in here)


# ---- A step without training ---------------------------------------------------------------------
def use(trainer, credit):
    """Return what a trainer makes of the completions above by a rule, before it learns."""
    switch(trainer, credit)
    trainer.model.train()
    rows = [dict(prompt=str(i // 4), negative_prompt=f"not {i // 4}") for i in range(12)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("credit", METHODS)
def test_completions_without_tokens(trainer, credit, monkeypatch):
    """A truncated completion that mask_truncated_completions leaves no token: a rank, a mean or a
    quantile over nothing, a NaN in its row, or credit for it."""
    monkeypatch.setattr(trainer, "mask_truncated_completions", True)
    ended = torch.tensor([ids[-1] in trainer.eos_token_ids for ids in COMPLETIONS])  # (B,)
    advantages = use(trainer, credit)["advantages"]  # (B, T)
    mask = torch.arange(8) < torch.tensor([len(completion) for completion in COMPLETIONS])[:, None]
    assert advantages.shape == (12, 8) and advantages.isfinite().all()
    assert not advantages[~(mask & ended[:, None])].any()
    if credit not in ("forking", "gcpo_linear"):  # which give nothing to some
        assert advantages[:8][ended[:8]].any(dim=1).all()
    assert trainer.model.training

    monkeypatch.setattr(sys.modules[__name__], "COMPLETIONS", [[3]] * 12)
    assert not use(trainer, credit)["advantages"].any()


@pytest.mark.parametrize(
    "credit, passes, scored",
    [("uniform", 0, 0), ("surprisal", 1, 0), ("eapo", 1, 1), ("divergence", 2, 1)]
    + [("arca", 2, 2), ("random", 2, 2), ("gcpo", 2, 1), ("delta", 1, 1)],
)
def test_passes(trainer, credit, passes, scored, monkeypatch):
    """A rule that pays for a signal which it does not read, or which TRL has: a policy that has
    stepped since it sampled, and one that vLLM sampled, is scored by TRL. Either way the credit is
    the same."""
    calls = []
    backbone = trainer.model.get_base_model().base_model
    hook = backbone.register_forward_hook(lambda *call: calls.append(1))
    try:
        first = use(trainer, credit)["advantages"]
        assert len(calls) == 3 * passes
        monkeypatch.setattr(trainer.args, "steps_per_generation", 2)
        again = use(trainer, credit)["advantages"]
        assert len(calls) == 3 * (passes + 1 + scored)
    finally:
        hook.remove()
    assert torch.allclose(first, again, rtol=1e-5) or "noise" in METHODS[credit].reads


# ---- What is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize("credit", ["arca", "divergence", "permuted", "random"])
def test_a_base_path_needs_an_adapter(folder, credit, tmp_path):
    """A residual that is zero everywhere, since there is nothing to switch off."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{credit}.*adapter.*peft_config"):
        trainer_of(model, config(tmp_path), credit=credit)


def test_what_is_not_there_is_refused(trainer, folder, tmp_path):
    """A rule or exponent that does not exist, which is found out after the model is loaded; and a
    contrast to no prompt."""
    for wrong, says in (
        (dict(credit="arac"), "'arac'.*arca"),
        (dict(sharpening=0), "sharpening 0"),
    ):
        with pytest.raises(ValueError, match=says):
            CreditGRPOTrainer("no/model", **wrong)
    trainer.reads = {"neg_logp"}
    with pytest.raises(ValueError, match="negative_prompt"):
        trainer._generate_and_score_completions([dict(prompt="0")] * 12)


def test_what_no_rule_knows_is_refused(folder, monkeypatch, tmp_path):
    """Credit for text that the policy did not write, or by states that are not all of one text."""
    for name in ("tools", "environment_factory"):
        with pytest.raises(ValueError, match=f"arca.*{name}"):
            CreditGRPOTrainer("no/model", **{name: [print]})
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"surprisal.*encoder"):
        trainer_of(model, config(tmp_path), credit="surprisal")
    model.config.is_encoder_decoder = False
    images = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(GRPOTrainer, "_is_vlm", images, raising=False)
    with pytest.raises(ValueError, match=r"surprisal.*images"):
        trainer_of(model, config(tmp_path), credit="surprisal")


def test_text_of_others_is_refused(trainer, monkeypatch):
    """Tokens of an environment inside a completion (env_mask), whose credit would be the policy's;
    uniform credit needs no signals, and leaves them to TRL."""
    turn = trainer._generate

    def with_mask(prompts):
        ids, completions, _, *rest = turn(prompts)
        return ids, completions, [[1] * len(completion) for completion in completions], *rest

    monkeypatch.setattr(trainer, "_generate", with_mask)
    with pytest.raises(ValueError, match=r"arca.*env_mask"):
        use(trainer, "arca")
    assert use(trainer, "uniform")["advantages"].any()


# ---- The command and several processes -----------------------------------------------------------
def command(monkeypatch, *flags):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["trl_credit.py", *map(str, flags)])
    run_cli(trl_credit.main)


def test_what_the_command_refuses(monkeypatch, capsys, tmp_path):
    """A run that starts although its result would overwrite another, or that is not the one asked
    for: a step of other completions, or one process where accelerate was asked for several."""
    (tmp_path / "adapter_config.json").write_text("{}")
    out = ["--out", tmp_path / "new"]
    asked = [(["--out", tmp_path], "holds an adapter"), (["--credit", "arac", *out], "use one of")]
    asked += [(["--rows", 3, *out], "128 completions"), (["--samples", 1, *out], "--samples 2")]
    asked += [(["--model", "no/such/model", *out], "no model folder")]
    for flags, says in asked:
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, *flags)
        assert says in capsys.readouterr().err
    for name in ("MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "no")
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, *out)
    assert "--multi_gpu" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_without_trl_it_says_what_to_install(monkeypatch, capsys):
    """A traceback of an import, where a requirement is missing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else name)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(HOUSE / "examples/trl_credit.py", run_name="__main__")
    said = capsys.readouterr().err
    assert "trl" in said and "pip install" in said


@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_accelerate_reads_the_configs(name):
    """A key that accelerate does not know, or a value that it reads as something else."""
    config = load_config_from_file(str(HOUSE / f"examples/{name}.yaml"))
    assert (config.num_processes, config.mixed_precision) == (8, "bf16")
    arguments = launch_command_parser().parse_args(["x.py"])
    for key in (*config.deepspeed_config, *config.fsdp_config):
        assert hasattr(arguments, key), key


FLAGS = "--prompts 2 --samples 4 --rows 2 --max-new-tokens 16 --eval-problems 4"
ON_TWO = ("arca", "eapo", "delta", "forking")


@pytest.mark.long
def test_two_processes_are_as_one(folder, adapter, tmp_path):
    """A rule that sees its own process's part of the step only, or takes another's rows; a command
    whose processes do not meet, that prints each line twice, or whose adapter nobody can read."""
    way = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HOUSE))
    command = [sys.executable, *way, *map(str, (folder, adapter, tmp_path))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for credit in ON_TWO:
        assert_same(our_gradient(folder, adapter, credit), load_file(tmp_path / credit))
    assert done.stdout.count("held-out greedy") == 2
    assert done.stdout.count("step    5  reward") == 1
    load_adapter(load_model(TINY), tmp_path / "run")


def main():
    """Be one of the processes that the test above starts: save gradients, then run the command."""
    folder, adapter, out = map(Path, sys.argv[1:])
    args = config(out, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = given_trainer(folder, adapter, args)
    for credit in ON_TWO:
        found, _ = trl_gradient(trainer, credit)
        if args.process_index == 0:
            save_file(found, out / credit)
    sys.argv = ["trl_credit.py", *FLAGS.split(), "--steps", "5", "--out", str(out / "run")]
    trl_credit.main()


if __name__ == "__main__":
    main()
