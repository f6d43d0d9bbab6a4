"""Train a LoRA adapter by GRPO with token credit.

    python train.py --credit arca                    # the embedded model, minutes on a laptop
    python train.py --preset paper --credit arca     # the paper's run, on one GPU

One loop: sample a group of completions for each problem, grade them, turn rewards into advantages
and advantages into token credit, make one step, write one line of metrics. What a run leaves is in
its folder: config.json, metrics.jsonl, evals.jsonl, samples.jsonl, adapter/, trainer.safetensors.
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    from system.errors import before_imports

    before_imports()

import torch
from tqdm import tqdm

from credit import METHODS
from data.problems import load_split, problems_of_step
from eval_math import evaluate
from grpo import ADVANTAGES, group_advantages, sample_rollout, update
from hf.checkpoint import model_digest
from lora import lora_parameters
from run.checkpoints import adapt, check_inputs, resume_or_start, save, uninterrupted
from run.flags import CHAT, FLAGS, PRESETS, load_base, parse_settings
from run.folder import keep_samples, new_run, recorder, show, show_evaluation, summary, warn
from run.metrics import diagnose, measure
from system import processes
from system.errors import printable, run_cli
from system.files import read_rows


def setting(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Settings:
    """Every setting, each a flag with its only default (FLAGS has those of all commands)."""

    credit: str = setting("arca", "token-credit rule", tuple(METHODS))
    sharpening: float = setting(1.0, "exponent on a rule's scores before they are normalised")
    preset: str = setting("", "settings of the ARCA paper", ("", "paper"))
    model: str = setting(*FLAGS["model"])
    revision: str = setting(*FLAGS["revision"])
    adapter: str = setting(*FLAGS["adapter"])
    random_init: bool = setting(False, "random weights; needs only the model's config.json")
    chat: bool = setting(False, CHAT)
    system: str = setting(*FLAGS["system"])
    thinking: str = setting(*FLAGS["thinking"], ("", "on", "off"))
    data: str = setting(*FLAGS["data"])
    eval_data: str = setting("", "as --data; default: the test split, or every 10th line of a file")
    eval_problems: int = setting(500, "held-out problems to evaluate on; 0: no evaluation")
    eval_samples: int = setting(4, "samples a problem for pass@k; 0 for greedy only")
    eval_every: int = setting(0, "steps between evaluations; 0 for before and after only")
    # rollouts
    steps: int = setting(80, "number of rollouts")
    prompts: int = setting(16, "problems a step")
    samples: int = setting(8, "completions a problem")
    max_prompt_tokens: int = setting(512, "problems with a longer prompt are left out")
    max_new_tokens: int = setting(128, "longer completions are cut off")
    temperature: float = setting(1.0, "of sampling, and of the policy that is trained")
    top_p: float = setting(1.0, "nucleus sampling; below 1 the sampler is not the scored policy")
    # the update
    rank: int = setting(16, "of LoRA, on all seven projections; --adapter has its own")
    alpha: float = setting(32.0, "LoRA scales by alpha / rank")
    lr: float = setting(2e-3, "peak learning rate")
    warmup: int = setting(5, "steps of linear warmup, before cosine decay")
    beta2: float = setting(0.95, "of AdamW; beta1 is 0.9, weight decay 0")
    max_grad_norm: float = setting(1.0, "larger gradients are clipped to this norm")
    advantage: str = setting("grpo", "how a completion is compared with its group", ADVANTAGES)
    aggregate: str = setting("seq", "what counts equally: completions or tokens", ("seq", "token"))
    epochs_per_rollout: int = setting(1, "updates on each rollout; above 1 with ratio and clip")
    clip_eps_low: float = setting(0.2, "the ratio is clipped below 1 minus this")
    clip_eps_high: float = setting(0.28, "the ratio is clipped above 1 plus this")
    kl_coef: float = setting(0.0, "weight of the k3 KL penalty to the base model")
    micro_batch_tokens: int = setting(2048, "tokens in memory at a time; changes no gradient")
    gradient_checkpointing: bool = setting(False, "recompute activations: slower, less memory")
    # the run
    seed: int = setting(*FLAGS["seed"])
    device: str = setting(*FLAGS["device"])
    dtype: str = setting(*FLAGS["dtype"])
    out: str = setting("", "the run folder; default: runs/ and what the run does")
    save_every: int = setting(20, "steps between checkpoints")
    keep_checkpoints: int = setting(2, "how many to keep, should the newest get damaged")
    tensorboard: bool = setting(False, "write events for TensorBoard too (pip install tensorboard)")
    compare_rules: bool = setting(False, "compare all rules at every step, not at every tenth")


def lr_at(step, cfg: Settings):
    """Return the learning rate of step 1, 2, ...: linear warmup from lr / warmup, then a cosine
    that would be 0 one step after the last."""
    if step <= cfg.warmup:
        return cfg.lr * step / cfg.warmup
    done = (step - cfg.warmup) / (cfg.steps - cfg.warmup + 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * done))


def is_evaluated(step, cfg):
    """Return whether this is a step to look at: before a run, after it, and every eval_every."""
    return step in (0, cfg.steps) or (cfg.eval_every > 0 and step % cfg.eval_every == 0)


def evaluate_step(model, tokenizer, held_out, cfg, step):
    """Evaluate on the held-out problems and say how it went; return the row for evals.jsonl."""
    prompts = [p["prompt"] for p in held_out]
    golds = [p["answer"] for p in held_out]
    sampling = (cfg.eval_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    result, _ = evaluate(model, tokenizer, prompts, golds, *sampling)
    show_evaluation(step, result)
    return dict(step=step) | result


def main():
    # 1) The settings, the model, the problems.
    cfg, resume = parse_settings(Settings, PRESETS, __doc__)
    model, tokenizer = load_base(replace(cfg, adapter=""))
    processes.start(model.device)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    train, held_out, left_out, digests = load_split(cfg, tokenizer)
    digests["model"] = model_digest(model.folder)
    if resume:
        check_inputs(cfg, digests)

    # 2) The adapter, the optimizer and the run folder: new, or those of the newest checkpoint.
    tensors, done = adapt(model, cfg, resume)
    trained = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0)
    folder = Path(cfg.out) if resume else new_run(cfg, model, digests)
    resume_or_start(folder, model, optimizer, cfg, tensors, done)
    del tensors  # as large as the checkpoint
    processes.wait()  # the first process may have cut the files back to a checkpoint
    history = read_rows(folder / "metrics.jsonl")
    evals = read_rows(folder / "evals.jsonl")
    ended = evals if held_out else history
    if history and ended[-1]["step"] == cfg.steps:
        return print(printable(f"{folder} has finished its {cfg.steps} steps: nothing to do"))
    record = recorder(folder, cfg, done)
    size = sum(p.numel() for p in trained)
    print(f"{cfg.credit} on {cfg.model}: {size:,} LoRA parameters, {left_out}")
    print(printable(f"run folder {folder}" + f", going on after step {done}" * resume), flush=True)

    def evaluate_once(step):
        """Evaluate if it is time to, unless an interrupted run has already done so."""
        if held_out and is_evaluated(step, cfg) and (not evals or evals[-1]["step"] < step):
            evals.append(evaluate_step(model, tokenizer, held_out, cfg, step))
            record("evals.jsonl", evals[-1])

    # 3) Train.
    way = f"python train.py --resume {folder} goes on"
    off = processes.rank() > 0 or None  # None: where there is no terminal
    bar = tqdm(range(done + 1, cfg.steps + 1), disable=off, dynamic_ncols=True)
    try:
        evaluate_once(done)
        for step in bar:
            # What to learn from: completions, their rewards, their advantages.
            started = time.perf_counter()
            compare = cfg.compare_rules or is_evaluated(step, cfg) or step % 10 == 1
            problems = problems_of_step(train, cfg.prompts, cfg.seed, step)
            rollout = sample_rollout(model, tokenizer, problems, cfg, step, compare)
            sampled = time.perf_counter()
            advantages = group_advantages(rollout.rewards, cfg.advantage).flatten()  # (B,)

            with uninterrupted():  # runs to its end or not at all
                # Learn from it.
                lr = lr_at(step, cfg)
                optimizer.param_groups[0]["lr"] = lr
                metrics, signals, multipliers = update(
                    model, optimizer, rollout, advantages, cfg, compare
                )
                done, ended = step, time.perf_counter()

                # Write down what happened. A broken policy has no reward, so no loss tells of it.
                metrics |= dict(step=step, lr=lr) | measure(rollout, signals)
                metrics |= diagnose(rollout, signals, multipliers, cfg, tokenizer, compare)
                metrics["skipped"] |= not math.isfinite(metrics["entropy"])
                metrics["seconds_rollout"] = sampled - started
                metrics["seconds_update"] = ended - sampled
                metrics["tokens_per_second"] = metrics["completion_tokens"] / (ended - started)
                record("metrics.jsonl", metrics)
                history.append(metrics)
                show(bar, metrics, evals)
                warn(history, model, cfg)
                if compare:
                    keep_samples(record, rollout, signals, cfg, tokenizer, step)
                due = is_evaluated(step, cfg) or step % cfg.save_every == 0
                if due and (step == cfg.steps or not metrics["skipped"]):
                    save(folder, model, optimizer, step, cfg)
            evaluate_once(step)
    except KeyboardInterrupt as stop:  # whatever was in flight is dropped
        save(folder, model, optimizer, done, cfg)
        raise KeyboardInterrupt(*stop.args, f"step {done} is saved, {way}") from None
    except (OSError, MemoryError, RuntimeError) as error:  # the machine's fault, not the run's
        if (folder / "config.json").exists():
            error.add_note(way)
        raise
    summary(folder, history, evals, cfg)


if __name__ == "__main__":
    run_cli(main)
