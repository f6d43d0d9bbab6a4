"""Train a LoRA adapter by GRPO with token credit.

    python train.py --credit arca                    # the embedded model, minutes on a laptop
    python train.py --preset paper --credit arca     # the paper's run, on one GPU

One loop: sample a group of completions for each problem, grade them, turn rewards into advantages
and advantages into token credit, make one step, write one line of metrics. What a run leaves is in
its folder: config.json, metrics.jsonl, evals.jsonl, samples.jsonl, adapter/, trainer.safetensors.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import credit
from data.problems import load_split, problems_of_step
from eval_math import evaluate, rates, with_interval
from grpo import group_advantages, rollout, update
from lora import add_lora, load_adapter, lora_parameters, save_adapter
from model import UserError, read_json, run_cli
from sample import FLAGS, load_base


def setting(default, help):
    return field(default=default, metadata=dict(help=help))


@dataclass
class Settings:
    """Every setting, with its only default. Each is a flag of the command line."""

    credit: str = setting("arca", f"token-credit rule: {', '.join(credit.METHODS)}")
    sharpening: float = setting(1.0, "exponent on a rule's scores before they are normalised")
    preset: str = setting("", "'paper' for the settings of the ARCA paper")
    model: str = setting(*FLAGS["model"])
    revision: str = setting(*FLAGS["revision"])
    chat: bool = setting(False, "prompt as a chat turn (ChatML), for instruction-tuned models")
    data: str = setting(*FLAGS["data"])
    eval_data: str = setting("", "likewise; default: the test split, or every 10th line of a file")
    eval_problems: int = setting(500, "held-out problems to evaluate on")
    eval_samples: int = setting(4, "samples a problem for pass@k; 0 for greedy only")
    eval_every: int = setting(0, "steps between evaluations; 0 for before and after only")
    # rollouts
    steps: int = setting(80, "updates")
    prompts: int = setting(16, "problems a step")
    samples: int = setting(8, "completions a problem")
    max_prompt_tokens: int = setting(512, "problems with a longer prompt are left out")
    max_new_tokens: int = setting(128, "longer completions are cut off")
    temperature: float = setting(1.0, "of sampling, and of the policy that is trained")
    top_p: float = setting(1.0, "nucleus of sampling; below 1 it is not the policy that is scored")
    # the update
    rank: int = setting(16, "of LoRA, on all seven projections")
    alpha: float = setting(32.0, "LoRA scales by alpha / rank")
    lr: float = setting(2e-3, "peak learning rate")
    warmup: int = setting(5, "steps of linear warmup, before cosine decay")
    beta2: float = setting(0.95, "of AdamW; beta1 is 0.9, weight decay 0")
    grad_clip: float = setting(1.0, "largest norm of the gradient")
    advantage: str = setting("grpo", "grpo, rloo or centered")
    aggregate: str = setting("seq", "seq: completions count equally; token: tokens do")
    updates: int = setting(1, "passes over each rollout; above 1 with ratio and clip")
    clip_low: float = setting(0.2, "the ratio is clipped below 1 minus this")
    clip_high: float = setting(0.28, "the ratio is clipped above 1 plus this")
    kl: float = setting(0.0, "weight of the k3 KL penalty to the base model")
    micro_tokens: int = setting(4096, "tokens in memory at a time, which changes no gradient")
    # the run
    seed: int = setting(*FLAGS["seed"])
    device: str = setting(*FLAGS["device"])
    dtype: str = setting(*FLAGS["dtype"])
    out: str = setting("", "the run folder; default: runs/ and what the run does")
    save_every: int = setting(20, "steps between checkpoints")
    compare_rules: bool = setting(False, "log the concentration of every rule's weights as well")


# ARCA, section 5, and from its released configuration: sharpening 2, AdamW's default betas.
PAPER = dict(model="Qwen/Qwen3-1.7B-Base", data="math", eval_problems=200, steps=100, prompts=8)
PAPER |= dict(samples=4, max_new_tokens=512, top_p=0.95, rank=64, alpha=128.0, sharpening=2.0)
PAPER |= dict(lr=5e-6, warmup=10, beta2=0.999, seed=1337)
PRESETS = {"": {}, "paper": PAPER}


def parse_settings():
    """(settings, whether to resume): defaults, then the preset, then the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for f in fields(Settings):
        options = dict(type=type(f.default), metavar=repr(f.default))
        options = dict(action="store_true") if isinstance(f.default, bool) else options
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"]
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    given = vars(parser.parse_args())
    resume, preset = given.pop("resume"), given.get("preset", "")
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}: the only one is 'paper'")
    s = Settings(**PRESETS[preset] | given)
    if resume:  # the run's own settings hold; a flag may repeat them, not contradict them
        stored = read_json(Path(s.out) / "config.json")["settings"]
        for name in given.keys() - {"out", "device"}:
            if stored.get(name) != given[name]:
                raise UserError(f"{s.out} has {name} = {stored.get(name)}, not {given[name]}")
        s = Settings(**stored | dict(out=s.out, device=s.device))
    credit.needs(s.credit)  # a UserError if there is no such rule, and so on
    group_advantages(torch.zeros(1, 2), s.advantage)
    if s.aggregate not in ("seq", "token"):
        raise UserError(f"no aggregate {s.aggregate!r}: use seq or token")
    if s.samples < 2:
        raise UserError("GRPO compares the samples of a problem: use --samples 2 or more")
    positive = "rank alpha lr steps prompts updates max_prompt_tokens max_new_tokens eval_problems"
    positive += " micro_tokens save_every temperature top_p sharpening grad_clip"
    for name in positive.split():
        if not 0 < getattr(s, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)} is not positive")
    return s, resume


def lr_at(step, s: Settings):
    """Linear warmup from lr / warmup at step 1, then a cosine that is 0 after the last step."""
    if step <= s.warmup:
        return s.lr * step / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup + 1)))


# ---- The run folder ------------------------------------------------------------------------------


def open_run(s: Settings, resume) -> Path:
    """The run folder. One that holds a run is never written into, unless that run is resumed."""
    if s.out and (Path(s.out) / "config.json").exists() and not resume:
        raise UserError(f"{s.out} holds a run: give another --out, or --resume to go on with it")
    name = "-".join([s.credit, Path(s.model).name, Path(s.data).stem, f"seed{s.seed}"])
    folder, count = Path(s.out or f"runs/{name}"), 1
    while not s.out and folder.exists():
        count += 1
        folder = Path(f"runs/{name}-{count}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(folder, s: Settings, model):
    """config.json: every setting, and what else it takes to know what was run."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        revision = ""  # git is not installed
    both = dict(total=model.parameters(), trained=lora_parameters(model).values())
    count = {name: sum(p.numel() for p in parameters) for name, parameters in both.items()}
    config = dict(settings=asdict(s), argv=sys.argv, git=revision, parameters=count)
    config["versions"] = dict(python=platform.python_version(), torch=torch.__version__)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def append(path, row):
    """Add a line of JSON; floats keep 6 significant digits."""
    row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save(folder, model, optimizer, step, s: Settings):
    """adapter/ and trainer.safetensors: with the settings, the whole state of a run."""
    save_adapter(model, folder / "adapter", s.model)
    states = optimizer.state_dict()["state"]  # by the place of a parameter in lora_parameters
    state = {f"{i}.{key}": value for i, values in states.items() for key, value in values.items()}
    save_file(state, folder / "trainer.tmp", metadata=dict(step=str(step)))
    os.replace(folder / "trainer.tmp", folder / "trainer.safetensors")


def restore(folder, optimizer) -> int:
    """Give the optimizer back what `save` wrote; returns the step, and cuts the lines after it."""
    state = optimizer.state_dict()
    try:
        with safe_open(folder / "trainer.safetensors", framework="pt") as file:
            step = int(file.metadata()["step"])
            for name in file.keys():  # noqa: SIM118
                i, key = name.split(".")
                state["state"].setdefault(int(i), {})[key] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/trainer.safetensors cannot be read: {error}") from None
    optimizer.load_state_dict(state)
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        kept = [json.dumps(row) for row in read_rows(folder / name) if row["step"] <= step]
        (folder / name).write_text("".join(line + "\n" for line in kept))
    return step


# ---- What the user sees --------------------------------------------------------------------------


def evaluate_step(model, tokenizer, held_out, s: Settings, step, folder):
    """Evaluate; write a line of evals.jsonl, say it, and return the greedy accuracy."""
    prompts, golds = [p["prompt"] for p in held_out], [p["answer"] for p in held_out]
    sampling = (s.eval_samples, s.max_new_tokens, s.temperature, s.top_p, s.seed)
    result, _ = evaluate(model, tokenizer, prompts, golds, *sampling)
    append(folder / "evals.jsonl", dict(step=step) | result)
    said = [f"{key} {with_interval(result, key)}" for key in rates(result)]
    tqdm.write(f"step {step:4d}  held-out {', '.join(said)}, {result['n']} problems")
    return result["greedy"]


def keep_samples(r, m, advantages, tokenizer, step, folder):
    """Write the step's first wrong and first right completion, with tokens and weights; say one."""
    for value in (0, 1):
        for row in (r.rewards.flatten() == value).nonzero()[:1, 0].tolist():
            n, p = int(r.completions.lengths[row]), r.problems[row // r.rewards.shape[1]]
            tokens = [tokenizer.decode([t]) for t in r.completions.tokens[row, :n].tolist()]
            sample = dict(step=step, problem=p["problem"], gold=p["answer"], text=r.texts[row])
            sample.update(reward=float(value), advantage=float(advantages[row]), tokens=tokens)
            sample["weights"] = [round(w, 4) for w in m[row, :n].tolist()]
            append(folder / "samples.jsonl", sample)
    tqdm.write(f"step {step:4d}  {sample['problem']}  (gold {sample['gold']})")
    tqdm.write(f"  reward {sample['reward']:g}: {' '.join(sample['text'].split())[:300]}")


def show(bar, metrics, accuracy):
    """The progress bar's figures; where there is no bar, a line every five steps."""
    figures = dict(reward=f"{metrics['reward']:.2f}", accuracy=f"{accuracy:.2f}")
    figures.update(gini=f"{metrics['gini']:.2f}", eff=f"{metrics['effective_token_ratio']:.2f}")
    figures["tok/s"] = f"{metrics['tokens_per_second']:.0f}"
    bar.set_postfix(figures)
    if bar.disable and metrics["step"] % 5 == 0:
        text = "  ".join(f"{name} {figure}" for name, figure in figures.items())
        print(f"step {metrics['step']:4d}  {text}", flush=True)


def warn(history, model):
    """Say loudly what would otherwise fail in silence; UserError when to go on is pointless."""
    last, metrics = history[-5:], history[-1]
    if len(last) == 5 and all(row["reward"] == 0 for row in last):
        tqdm.write("WARNING: no reward in 5 steps: wrong prompt (--chat?), or problems too hard?")
    if metrics["truncated"] > 0.5:
        tqdm.write("WARNING: over half of the completions were cut off: raise --max-new-tokens")
    if metrics["skipped"]:
        tqdm.write("WARNING: the loss or gradient was not finite; this step was skipped")
    if len(last) == 5 and all(row["skipped"] for row in last):
        raise UserError("loss or gradient not finite in 5 steps in a row: lower --lr")
    if len(history) == 3 and any(row["groups_mixed"] for row in last):
        B = [p for name, p in lora_parameters(model).items() if "lora_B" in name]
        if not any(p.any() for p in B):
            tqdm.write("WARNING: LoRA's B is still zero after 3 steps: no gradient reaches it")


def summary(folder, history, s: Settings):
    """The table at the end of a run."""
    evals = read_rows(folder / "evals.jsonl")
    mean = lambda key, rows: sum(row[key] for row in rows) / max(1, len(rows))  # noqa: E731
    print(f"\n{'':22}{'before':>23}{'after':>23}")
    for key in rates(evals[0]):
        cells = [with_interval(result, key) for result in (evals[0], evals[-1])]
        print(f"{'held-out ' + key:22}{cells[0]:>23}{cells[1]:>23}")
    first, last = (f"{mean('reward', rows):.3f}" for rows in (history[:5], history[-5:]))
    print(f"{'reward, 5 steps':22}{first:>23}{last:>23}")
    spread = [f"{mean(key, history):.3f}" for key in ("gini", "effective_token_ratio")]
    print(f"\n{s.credit}: Gini {spread[0]}, effective-token ratio {spread[1]} (mean of the steps)")
    print(f"run folder: {folder}\nnext: python credit.py {folder}  (shows which tokens were paid)")
    print(f"      python train.py --credit {'arca' if s.credit == 'uniform' else 'uniform'}")


def main():
    s, resume = parse_settings()
    model, tokenizer = load_base(s)
    train, held_out, note = load_split(s, tokenizer)
    folder = open_run(s, resume)
    if resume:
        load_adapter(model, folder / "adapter")
    else:
        add_lora(model, s.rank, s.alpha, seed=s.seed)
        write_config(folder, s, model)
    trained = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0)
    done = restore(folder, optimizer) if resume else 0
    history = read_rows(folder / "metrics.jsonl")
    print(f"{s.credit} on {s.model}: {sum(p.numel() for p in trained):,} LoRA parameters, {note}")
    print(f"run folder {folder}", flush=True)
    if not read_rows(folder / "evals.jsonl"):
        save(folder, model, optimizer, 0, s)
        evaluate_step(model, tokenizer, held_out, s, 0, folder)
    accuracy = read_rows(folder / "evals.jsonl")[-1]["greedy"]

    bar = tqdm(range(done + 1, s.steps + 1), disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for step in bar:
        started = time.perf_counter()
        problems = problems_of_step(train, s.prompts, s.seed, step)
        r = rollout(model, tokenizer, problems, s, step)
        sampled = time.perf_counter()
        advantages = group_advantages(r.rewards, s.advantage).flatten()  # (B,)
        optimizer.param_groups[0]["lr"] = lr = lr_at(step, s)
        metrics, m = update(model, optimizer, r, advantages, s)
        ended = time.perf_counter()

        speed = metrics["completion_tokens"] / (ended - started)
        metrics = dict(step=step) | metrics | dict(lr=lr, tokens_per_second=speed)
        metrics.update(seconds_rollout=sampled - started, seconds_update=ended - sampled)
        append(folder / "metrics.jsonl", metrics)
        history.append(metrics)
        show(bar, metrics, accuracy)
        warn(history, model)
        if step % 10 == 1:
            keep_samples(r, m, advantages, tokenizer, step, folder)
        if step == s.steps or (s.eval_every and step % s.eval_every == 0):
            accuracy = evaluate_step(model, tokenizer, held_out, s, step, folder)
        if step == s.steps or step % s.save_every == 0:
            save(folder, model, optimizer, step, s)
    summary(folder, history, s)


if __name__ == "__main__":
    run_cli(main)
