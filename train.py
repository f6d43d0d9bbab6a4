"""Train a LoRA adapter by GRPO with token credit.

    python train.py --credit arca                    # the embedded model, minutes on a laptop
    python train.py --preset paper --credit arca     # the paper's run, on one GPU

One loop: sample a group of completions for each problem, grade them, turn rewards into advantages
and advantages into token credit, make one step, write one line of metrics. What a run leaves is in
its folder: config.json, metrics.jsonl, evals.jsonl, samples.jsonl, adapter/, trainer.safetensors.
"""

import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from eval_math import evaluate
from run.answers import rates, with_interval
from run.folder import keep_samples, new_run, open_board, record
from run.screen import on_screen, show, summary, warn
from system import processes

if __name__ == "__main__":  # until run_cli takes over: no traceback of an import that Ctrl-C hit
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from tqdm import tqdm

import credit
from data.problems import load_split, problems_of_step
from grpo import group_advantages, rollout, update
from lora import add_lora, lora_parameters
from run.checkpoints import begin, save, whole_step
from run.flags import FLAGS, load_base
from run.settings import parse_settings
from system.errors import run_cli
from system.files import read_rows


def setting(default, help):
    return field(default=default, metadata=dict(help=help))


@dataclass
class Settings:
    """Every setting, with its only default. Each is a flag of the command line."""

    credit: str = setting("arca", f"token-credit rule: {', '.join(credit.METHODS)}")
    sharpening: float = setting(1.0, "exponent on a rule's scores before they are normalised")
    arca_layer: str = setting("final", "state that ARCA compares: final (normed), prenorm or sum")
    preset: str = setting("", "'paper' for the settings of the ARCA paper")
    model: str = setting(*FLAGS["model"])
    revision: str = setting(*FLAGS["revision"])
    random_weights: bool = setting(False, "in place of the model's; needs only a config.json")
    chat: bool = setting(False, "prompt as a chat turn (ChatML), for instruction-tuned models")
    data: str = setting(*FLAGS["data"])
    eval_data: str = setting("", "likewise; default: the test split, or every 10th line of a file")
    eval_problems: int = setting(500, "held-out problems to evaluate on")
    eval_samples: int = setting(4, "samples a problem for pass@k; 0 for greedy only")
    eval_every: int = setting(0, "steps between evaluations; 0 for before and after only")
    # rollouts
    steps: int = setting(80, "updates; with --resume more only in the warmup, whose lr is the same")
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
    micro_tokens: int = setting(2048, "tokens in memory at a time, which changes no gradient")
    checkpoint: bool = setting(False, "make activations again in the backward pass: less memory")
    # the run
    seed: int = setting(*FLAGS["seed"])
    device: str = setting(*FLAGS["device"])
    dtype: str = setting(*FLAGS["dtype"])
    out: str = setting("", "the run folder; default: runs/ and what the run does")
    save_every: int = setting(20, "steps between checkpoints")
    keep: int = setting(2, "checkpoints to keep, should the newest get damaged")
    tensorboard: bool = setting(False, "write events for TensorBoard too (pip install tensorboard)")
    compare_rules: bool = setting(False, "compare all rules at every step, not at every tenth")


# ARCA, section 5, and from its released configuration: sharpening 2, AdamW's default betas.
PAPER = dict(model="Qwen/Qwen3-1.7B-Base", data="math", eval_problems=200, steps=100, prompts=8)
PAPER |= dict(samples=4, max_new_tokens=512, top_p=0.95, rank=64, alpha=128.0, sharpening=2.0)
PAPER |= dict(lr=5e-6, warmup=10, beta2=0.999, seed=1337, micro_tokens=8192)
PRESETS = {"": {}, "paper": PAPER}


def lr_at(step, s: Settings):
    """Linear warmup from lr / warmup at step 1, then a cosine that is 0 after the last step."""
    if step <= s.warmup:
        return s.lr * step / s.warmup
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup + 1)))


def is_evaluated(step, s):
    """Whether a run is evaluated here: before it, after it, and every s.eval_every steps."""
    return step in (0, s.steps) or (s.eval_every > 0 and step % s.eval_every == 0)


def evaluate_step(model, tokenizer, held_out, s, step, folder, board):
    """Evaluate; write a line of evals.jsonl, say it, and return it."""
    prompts, golds = [p["prompt"] for p in held_out], [p["answer"] for p in held_out]
    sampling = (s.eval_samples, s.max_new_tokens, s.temperature, s.top_p, s.seed)
    result, _ = evaluate(model, tokenizer, prompts, golds, *sampling)
    record(folder / "evals.jsonl", dict(step=step) | result, board)
    said = [f"{key} {with_interval(result, key)}" for key in rates(result)]
    tqdm.write(f"step {step:4d}  held-out {', '.join(said)}, {result['n']} problems")
    return dict(step=step) | result


def main():
    s, resume = parse_settings(Settings, PRESETS, __doc__)
    model, tokenizer = load_base(s)
    processes.start(model.device)
    model.checkpoint = s.checkpoint
    train, held_out, note = load_split(s, tokenizer)
    add_lora(model, s.rank, s.alpha, seed=s.seed)
    trained = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0)
    folder = Path(s.out) if resume else new_run(s, model)
    done = begin(folder, model, optimizer, s)
    processes.wait()  # the first process may have cut the files back to a checkpoint
    history, evals = (read_rows(folder / name) for name in ("metrics.jsonl", "evals.jsonl"))
    if history and evals[-1]["step"] == s.steps:
        return print(f"{folder} has finished its {s.steps} steps: nothing is left to do")
    board = open_board(s, folder, done)
    print(f"{s.credit} on {s.model}: {sum(p.numel() for p in trained):,} LoRA parameters, {note}")
    print(f"run folder {folder}" + f", going on after step {done}" * resume, flush=True)

    def evaluate(step):  # unless a run that was interrupted had it done
        if is_evaluated(step, s) and (not evals or evals[-1]["step"] < step):
            evals.append(evaluate_step(model, tokenizer, held_out, s, step, folder, board))

    bar = tqdm(range(done + 1, s.steps + 1), disable=not on_screen(), dynamic_ncols=True)
    try:
        evaluate(done)
        for step in bar:
            started = time.perf_counter()
            problems = problems_of_step(train, s.prompts, s.seed, step)
            compare = s.compare_rules or is_evaluated(step, s) or step % 10 == 1
            r = rollout(model, tokenizer, problems, s, step, compare)
            sampled = time.perf_counter()
            advantages = group_advantages(r.rewards, s.advantage).flatten()  # (B,)
            with whole_step():  # what changes parameters or writes is done, or not begun
                optimizer.param_groups[0]["lr"] = lr = lr_at(step, s)
                metrics, known, _ = update(model, optimizer, r, advantages, s, compare)
                metrics["skipped"] |= not math.isfinite(metrics["entropy"])  # of a broken policy
                done, ended = step, time.perf_counter()

                metrics = dict(step=step) | metrics | dict(lr=lr, seconds_verify=r.seconds_verify)
                metrics.update(seconds_rollout=sampled - started, seconds_update=ended - sampled)
                metrics["tokens_per_second"] = metrics["completion_tokens"] / (ended - started)
                record(folder / "metrics.jsonl", metrics, board)
                history.append(metrics)
                show(bar, metrics, evals[-1]["greedy"])
                warn(history, model)
                if compare:
                    keep_samples(r, known, s, tokenizer, step, folder)
                due = is_evaluated(step, s) or step % s.save_every == 0
                if due and (step == s.steps or not metrics["skipped"]):
                    save(folder, model, optimizer, step, s)
            evaluate(step)
    except KeyboardInterrupt as stop:  # whatever was in flight is dropped
        save(folder, model, optimizer, done, s)
        said = f"step {done} is saved, python train.py --resume {folder} goes on"
        raise KeyboardInterrupt(*stop.args, said) from None
    summary(folder, history, evals, s)


if __name__ == "__main__":
    run_cli(main)
