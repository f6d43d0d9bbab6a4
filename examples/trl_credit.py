"""Our credit rules inside TRL's GRPOTrainer: any model and any number of GPUs that TRL can train.

    python examples/trl_credit.py --credit arca       # the embedded model, minutes on a CPU
    accelerate launch --multi_gpu --num_processes 2 examples/trl_credit.py --credit arca

CreditGRPOTrainer is GRPOTrainer (TRL 1.16) with two more arguments, `credit` and `sharpening`. It
needs nothing of this project but credit.py, and that as it stands: to use it elsewhere, copy the
two.

TRL samples, grades, and compares each completion with its group, which gives advantages (B,). Its
loss also takes advantages (B, T) "from subclasses". So all that there is to do is to read what the
rule reads, by passes without gradient, and to multiply. As this is done once for all completions
that were sampled together, before TRL cuts them up, it does not matter how they are cut,
accumulated, reused (num_iterations) or sampled (use_vllm).
"""

import itertools
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    absent = [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]
    if absent:
        print(f"error: no {absent[0]} here: pip install -r requirements-dev.txt", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from system.errors import before_imports

    before_imports()

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

# All that the trainer needs of this project:
from credit import METHODS, Signals, effective_token_ratio, gini, token_weights

# What the command needs:
from data.problems import NEGATIVE, load_split, problems_of_step, prompt_text
from eval_math import evaluate, verify
from hf.checkpoint import checkpoint_folder
from hf.peft import read_config
from run.flags import check, load_base, load_text
from run.folder import run_name, show_evaluation
from system import processes
from system.errors import Parser, UserError, flag_name, run_cli
from train import Settings

NEED_ADAPTER = {"residual", "ref_logp"}  # signals that compare the policy with its base path


# ---- The trainer ---------------------------------------------------------------------------------
@contextmanager
def states_of(model):
    """Collect what a model's backbone returns inside: states after the final norm, (b, S, D)."""
    base = model.get_base_model() if is_peft_model(model) else model  # as TRL finds it
    states = []
    hook = base.base_model.register_forward_hook(lambda *call: states.append(call[-1][0]))
    try:
        yield states
    finally:
        hook.remove()


class CreditGRPOTrainer(GRPOTrainer):
    """GRPOTrainer in which a rule of credit.py shares out each completion's advantage.

    `credit` names a rule of credit.METHODS, `sharpening` is its exponent; all other arguments are
    GRPOTrainer's. `uniform` is GRPOTrainer, bit for bit. It logs `gini`, `effective_token_ratio`
    and `credit_fallback`: the share of completions whose scores all vanish, and that therefore get
    uniform credit. ValueError, with what to do, where the rule cannot be had.
    """

    def __init__(self, *args, credit="arca", sharpening=1.0, **kwargs):
        if credit not in METHODS:
            raise ValueError(f"no credit rule {credit!r}: use one of {', '.join(METHODS)}")
        if not 0 < sharpening < math.inf:
            raise ValueError(f"sharpening {sharpening} is not positive")
        self.credit = credit
        self.sharpening = sharpening
        self.reads = set(METHODS[credit].reads)
        for name in ("tools", "environment_factory"):
            self.refuse(name, kwargs.get(name))
        super().__init__(*args, **kwargs)
        self.refuse("images", self._is_vlm)
        self.refuse("an encoder", getattr(self.model.config, "is_encoder_decoder", False))
        if self.reads & NEED_ADAPTER and not is_peft_model(self.model):
            way = "pass a peft_config or a PeftModel"
            raise ValueError(f"{credit} compares the policy with its base, without adapter: {way}")

    def refuse(self, what, present):
        """Raise ValueError if something is present of which no rule but `uniform` knows."""
        if present and self.credit != "uniform":
            only = "works on text that the policy wrote alone"
            raise ValueError(f"{self.credit} {only}, without {what}: use credit='uniform'")

    def _generate_and_score_completions(self, inputs):
        """Sample, grade and compare as TRL does; then share the advantages out among the tokens."""
        if "neg_logp" in self.reads and not all("negative_prompt" in row for row in inputs):
            raise ValueError(f"{self.credit} needs a column `negative_prompt` in the data set")
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]  # (B, T) all 0 if a truncated completion is masked
        if "tool_mask" in output:  # of a rollout_func
            self.refuse("an env_mask", True)
            mask = mask * output["tool_mask"]
        training = self.model.training
        self.model.eval()  # signals are without dropout; nothing is kept for a backward pass
        with torch.no_grad():
            multipliers = self.multipliers(self.signals(inputs, output, mask, training), training)
        self.model.train(training)
        output["advantages"] = output["advantages"][:, None] * multipliers  # (B, T)
        self.log_credit(multipliers, mask)
        return output

    def multipliers(self, signals, training):
        """Return the rule's multipliers (B, T) for the completions of this process."""
        B, T = signals.mask.shape
        first = 0
        if METHODS[self.credit].whole_step:  # then it sees those of all processes: (B_all, T_max)
            known = {name: x for name, x in vars(signals).items() if x is not None}
            known = self.accelerator.pad_across_processes(known, dim=1)
            signals = Signals(**self.accelerator.gather(known))
            first = self.accelerator.process_index * B
        if not signals.mask.any():  # every completion was truncated, and TRL masks those
            return torch.zeros(B, T, device=signals.mask.device)
        # TRL keeps the completions of a prompt side by side, here even over processes.
        G = self.num_generations if training else self.num_generations_eval
        signals.group = torch.arange(len(signals.mask), device=signals.mask.device) // G
        return token_weights(self.credit, signals, self.sharpening)[first : first + B, :T]

    def signals(self, inputs, output, mask, training):
        """Read what the rule reads of the completions of this process, a few rows at a time."""
        negative = None
        if "neg_logp" in self.reads:
            ids, _, _ = self._tokenize_prompts([row["negative_prompt"] for row in inputs])
            how = dict(padding_side="left", return_tensors="pt")
            negative = self._tokenizer.pad({"input_ids": ids}, **how).to(mask.device)
        size = self.args.per_device_train_batch_size
        if not training:
            size = self.args.per_device_eval_batch_size
        parts = [self.read(output, negative, rows) for rows in torch.arange(len(mask)).split(size)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "noise" in self.reads:  # from a stream of its own: TRL's streams are as without it
            place = (self.state.global_step, self._step, self.accelerator.process_index)
            rng = np.random.default_rng([self.args.seed, *place])
            found["noise"] = torch.from_numpy(rng.random(mask.shape)).to(mask.device)
        return Signals(mask, advantage=output["advantages"], **found)

    def read(self, output, negative, rows):
        """Return what the rule reads of some rows: a dict of signals (b, T), hidden (b, T, D)."""
        completion = output["completion_ids"][rows]  # (b, T) right-padded
        mask = output["completion_mask"][rows]
        prompt = (output["prompt_ids"][rows], output["prompt_mask"][rows])  # (b, P) left-padded
        found = {}

        # 1) The policy. Where TRL has scored it already (with vLLM), log-probs cost nothing.
        wanted = self.reads & {"logp", "entropy", "hidden", "residual"}
        if wanted == {"logp"} and "old_per_token_logps" in output:
            found["logp"] = output["old_per_token_logps"][rows]
        elif wanted:
            scored = self.score(*prompt, completion, mask, bool(wanted & {"logp", "entropy"}))
            found["logp"], found["entropy"], found["hidden"] = scored

        # 2) The base path: the same tokens and kernels, so LoRA's B = 0 gives exactly 0.
        if self.reads & NEED_ADAPTER:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                scored = self.score(*prompt, completion, mask, "ref_logp" in self.reads)
            found["ref_logp"], _, base = scored
            if "residual" in self.reads:  # ||h_adapted - h_base||_2
                found["residual"] = (found["hidden"].float() - base.float()).norm(dim=-1)

        # 3) The same completions after another prompt.
        if negative is not None:
            prompt = (negative["input_ids"][rows], negative["attention_mask"][rows])
            found["neg_logp"], _, _ = self.score(*prompt, completion, mask, True)
        return {name: x for name, x in found.items() if name in self.reads}

    def score(self, prompt, prompt_mask, completion, mask, with_head):
        """Run one pass over prompts (b, P) and completions (b, T). Returns log-prob and entropy of
        each completion token at the temperature (b, T), or None and None without the head, and the
        state that predicts it, which is the one at the position before (b, T, D)."""
        ids = torch.cat([prompt, completion], dim=1)
        attention = torch.cat([prompt_mask, mask], dim=1)
        T = completion.shape[1]
        logp = entropy = None
        with states_of(self.accelerator.unwrap_model(self.model)) as states:
            if with_head:
                logp, entropy, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, T, compute_entropy=True
                )
            else:  # logits of one position only: the head can cost as much as many layers
                with self.accelerator.autocast():
                    self.model(ids, attention_mask=attention, use_cache=False, logits_to_keep=1)
        return logp, entropy, states[0][:, -T - 1 : -1]

    def log_credit(self, multipliers, mask):
        """Add to TRL's logs how concentrated the multipliers (B, T) of all processes are."""
        tokens = mask.sum(dim=1)  # (B,) 0 for a masked completion
        long = tokens > 1
        flat = long & (multipliers == mask).all(dim=1) & (self.credit != "uniform")
        concentration = gini(multipliers, mask).sum()
        ratio = effective_token_ratio(multipliers, mask).sum()
        counts = [(tokens > 0).sum(), flat.sum(), long.sum()]
        sums = torch.stack([concentration, ratio, *counts]).float()
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        logs = self._metrics["train" if self.model.training else "eval"]
        logs["gini"].append(sums[0] / max(1, sums[2]))
        logs["effective_token_ratio"].append(sums[1] / max(1, sums[2]))
        logs["credit_fallback"].append(sums[3] / max(1, sums[4]))


# ---- The command ---------------------------------------------------------------------------------
# Settings of train.py that this has too, with its defaults. What else TRL offers: GRPOConfig.
SETTINGS = """credit sharpening model chat data eval_data eval_problems steps prompts samples
    max_new_tokens rank alpha lr warmup seed out"""


def parse():
    """Return the Settings of train.py that the flags give, and the flags that only this has."""
    parser = Parser(description=__doc__.splitlines()[0])
    ours = {field.name: field for field in fields(Settings)}
    for name in SETTINGS.split():
        options = dict(type=type(ours[name].default), default=ours[name].default)
        if isinstance(ours[name].default, bool):
            options = dict(action="store_true")
        parser.add_argument(flag_name(name), help=ours[name].metadata["help"], **options)
    parser.add_argument("--adapter", default="", help="a PEFT adapter to go on from; default: new")
    parser.add_argument("--rows", type=int, default=32, help="completions in memory at a time")
    parser.add_argument("--vllm", action="store_true", help="sample by vLLM, beside the training")
    parser.add_argument("--skip-eval", action="store_true", help="do not evaluate before and after")
    args = parser.parse_args()
    cfg = Settings(**{name: getattr(args, name) for name in SETTINGS.split()}, eval_samples=0)
    check(cfg)
    cfg.out = cfg.out or f"runs/trl-{run_name(cfg)}"
    if (Path(cfg.out) / "adapter_config.json").exists():
        raise UserError(f"{cfg.out} holds an adapter: give another --out")
    return cfg, args


def grpo_config(cfg, rows, vllm):
    """Return TRL's settings for the run that train.py makes of cfg, as far as TRL has them."""
    total = cfg.prompts * cfg.samples
    count = int(os.environ.get("WORLD_SIZE", 1))  # of the processes
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if by_accelerate and "WORLD_SIZE" not in os.environ:
        way = "add --multi_gpu, which is also how it starts several on CPUs"
        raise UserError(f"accelerate was asked for several processes and started one: {way}")
    rows = min(rows, total // count)
    if rows < 1 or total % (rows * count):
        way = "choose --prompts, --samples and --rows so that they are"
        raise UserError(f"{total} completions are no multiple of {count} x {rows}: {way}")
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=cfg.out,
        seed=cfg.seed,
        max_steps=cfg.steps,
        # One step is the same completions however many processes there are.
        num_generations=cfg.samples,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=total // (rows * count),
        shuffle_dataset=False,  # the data set has train.py's order
        # The same policy as train.py's: nothing is cut.
        max_completion_length=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        # The same loss: -mean_i 1/T_i sum_t.
        loss_type="grpo",
        beta=0.0,
        # The same optimizer.
        learning_rate=cfg.lr,
        lr_scheduler_type="cosine",
        warmup_steps=cfg.warmup,
        adam_beta2=cfg.beta2,
        weight_decay=0.0,
        max_grad_norm=cfg.max_grad_norm,
        # The machine, and what is left behind.
        ddp_find_unused_parameters=False,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        use_vllm=vllm,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )


def policy(folder, cfg, adapter, config):
    """Return the model, and what adapter TRL is to add to it: none if it has one already."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if not adapter:
        how = dict(target_modules="all-linear", task_type="CAUSAL_LM")
        return model, LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, **how)
    read_config(Path(adapter))  # UserError if it is none
    one_dtype = config.deepspeed_plugin is not None  # ZeRO-3 cannot mix bf16 and fp32
    how = dict(is_trainable=True, autocast_adapter_dtype=not one_dtype)
    return PeftModel.from_pretrained(model, adapter, **how), None


def reward(completions, answer, **rest):
    """Grade completions by our verifier: 1.0 or 0.0. TRL passes the data set's columns, too."""
    return [float(verify(text, gold)) for text, gold in zip(completions, answer, strict=True)]


def data_set(train, tokenizer, cfg):
    """Return the problems of all steps as TRL wants them, in the order in which train.py has them;
    `negative_prompt` is what gcpo's contrast is to."""
    steps = [problems_of_step(train, cfg.prompts, cfg.seed, i + 1) for i in range(cfg.steps)]
    rows = []
    for problem in itertools.chain(*steps):
        text = problem["problem"]
        row = dict(prompt=tokenizer.prompt_text(prompt_text(text)), answer=problem["answer"])
        negative = tokenizer.prompt_text(prompt_text(text, NEGATIVE))
        rows.append(row | dict(negative_prompt=negative))
    return Dataset.from_list(rows)


class Show(TrainerCallback):
    """Print a line every five steps, in place of the thirty numbers that TRL logs at each."""

    def on_log(self, args, state, control, logs, **rest):
        if state.is_world_process_zero and "reward" in logs and state.global_step % 5 == 0:
            figures = "reward {reward:.2f}  gini {gini:.2f}  eff {effective_token_ratio:.2f}"
            print(f"step {state.global_step:4d}  {figures.format(**logs)}", flush=True)


def evaluate_adapter(cfg, adapter, held_out, step):
    """Print greedy accuracy on the held-out problems by our own model and sampler, as train.py."""
    cfg.adapter = adapter
    model, tokenizer = load_base(cfg)
    prompts = [problem["prompt"] for problem in held_out]
    golds = [problem["answer"] for problem in held_out]
    how = (0, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    result, _ = evaluate(model, tokenizer, prompts, golds, *how)
    if processes.rank() == 0:
        show_evaluation(step, result)


def main():
    cfg, args = parse()
    disable_progress_bar()
    # First of all: here the processes meet, and ZeRO-3 learns that it is to load the model.
    config = grpo_config(cfg, args.rows, args.vllm)
    folder = checkpoint_folder(cfg.model)
    tokenizer = load_text(cfg, folder)
    train, held_out, left_out, _ = load_split(cfg, tokenizer)
    if processes.rank() == 0:
        print(f"{cfg.credit} on {cfg.model}, by TRL: {left_out}", flush=True)
    if held_out and not args.skip_eval:
        evaluate_adapter(cfg, args.adapter, held_out, 0)
    model, lora = policy(folder, cfg, args.adapter, config)
    trainer = CreditGRPOTrainer(
        model,
        reward,
        config,
        data_set(train, tokenizer, cfg),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=lora,
        callbacks=[Show()],
        credit=cfg.credit,
        sharpening=cfg.sharpening,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()  # PEFT's format, which eval_math.py reads
    trainer.save_state()  # trainer_state.json: what TRL logged at each step
    trainer.accelerator.wait_for_everyone()
    if held_out and not args.skip_eval:
        evaluate_adapter(cfg, cfg.out, held_out, cfg.steps)
    if processes.rank() == 0:
        print(f"the adapter is in {cfg.out}: python eval_math.py --adapter {cfg.out}")


if __name__ == "__main__":
    run_cli(main)
