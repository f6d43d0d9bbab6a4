"""The peers of bench/speed.py, each doing the same work its own way, as fast as its options allow.

A job is a function of whether completions are free to end, and of the round: it does the work once
and returns the seconds that took and the tokens drawn. Nothing here is imported before it is used:
transformers, peft, and trl with datasets may be absent.
"""

import functools
import importlib.util
import os
import tempfile
import time
import warnings

import torch

from bench.common import timed
from data.problems import prompt_text
from eval_math import verify


def absent(packages):
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def load(work, adapter=False, train=False):
    """The checkpoint as transformers loads it, in PEFT's hands if with the adapter."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: everything is in a folder
    warnings.filterwarnings("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(work.folder, dtype=work.dtype)
    model = model.to(work.device).eval()
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, work.adapter, is_trainable=train)
    return model


shared = functools.cache(load)  # by those that do not change it


def count(ids, stop):
    """Tokens drawn: in each row up to the first that is in `stop`, that one included."""
    ended = torch.isin(ids, torch.tensor(stop, device=ids.device, dtype=ids.dtype))
    return int((ended.cumsum(dim=1) - ended.long() == 0).sum())


def left_padded(prompts, device):
    """ids (P, T) and mask (P, T), as transformers wants prompts of unequal length."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return dict(input_ids=ids, attention_mask=mask)


def sampler(work, adapter=False, cache=None):
    """generate() of transformers, or of PEFT if with the adapter; cache: None or "static"."""
    model, stop = shared(work, adapter), work.tokenizer.eos_ids
    from transformers import GenerationConfig

    inputs = left_padded(work.prompts(), work.device)
    how = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=stop[0],
        max_new_tokens=work.tokens,
        num_return_sequences=work.samples,
    )

    def job(free, turn):
        torch.manual_seed(turn)
        # As the model's own: what is None in a config that is passed is filled in from that.
        model.generation_config = GenerationConfig(
            **how, eos_token_id=stop if free else None, cache_implementation=cache
        )
        seconds, ids = timed(lambda: model.generate(**inputs), work.device)
        return seconds, count(ids[:, inputs["input_ids"].shape[1] :], stop if free else [])

    return job


def trl_config(work, checkpointing):
    """GRPO on all the completions at once, each used once, and nothing else: no KL, no logs."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=len(work.problems) * work.samples,
        num_generations=work.samples,
        max_completion_length=work.tokens,
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=0.0,
        max_steps=1,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=work.device == "cpu",
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trainer(work, checkpointing=False, credit=""):
    """A step of TRL's GRPOTrainer on PEFT's model: from its beginning to after the optimizer's;
    with our credit, a step of the trainer in examples/."""
    model = load(work, adapter=True, train=True)
    import transformers
    from datasets import Dataset
    from trl import GRPOTrainer

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **rest):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **rest):
            torch.cuda.synchronize() if model.device.type == "cuda" else None
            self.seconds = time.perf_counter() - self.started

    drawn = []

    def reward(completions, answer, completion_ids, **rest):
        """Graded by our verifier; then half of each group is right, so that all of them learn."""
        for text, gold in zip(completions, answer, strict=True):
            verify(text, gold)
        drawn.append(sum(map(len, completion_ids)))
        return [i % 2.0 for i in range(len(completions))]

    rows = [dict(prompt=prompt_text(p["problem"]), answer=p["answer"]) for p in work.problems]
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.folder, padding_side="left")
    data, clock, config = Dataset.from_list(rows), Clock(), trl_config(work, checkpointing)
    kind = GRPOTrainer
    if credit:
        from examples.trl_credit import CreditGRPOTrainer

        kind = functools.partial(CreditGRPOTrainer, credit=credit)
    it = kind(model, reward, config, data, processing_class=tokenizer, callbacks=[clock])
    it.remove_callback(transformers.PrinterCallback)

    def job(free, turn):
        torch.manual_seed(turn)
        it.generation_config.min_new_tokens = None if free else work.tokens
        it.generation_kwargs["min_new_tokens"] = None if free else work.tokens
        it.train()
        return clock.seconds, drawn[-1]

    return job
