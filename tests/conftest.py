"""Random tiny models, ours and transformers', and checkpoint folders made of them.

Nothing is left at its initial value: a norm of all ones or a bias of zeros would hide that it is
skipped, and weights too small would hide attention altogether.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test goes online
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: workers share the cores among themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hf.checkpoint import config_from_dict
from model import Qwen3
from system import processes

ROOT = Path(__file__).resolve().parents[1]
SHAPE = dict(
    vocab_size=311,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    rms_norm_eps=1e-2,
)
SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
# Files that take longest begin first: whoever begins one last keeps the others waiting.
LONGEST = "lessons fuzz resume processes grpo verifier lessons_text fast verifier_growth sample"
LONGEST = [f"test_{name}" for name in LONGEST.split()]
TEXT = """Solve this math problem step by step. Put your final answer in \\boxed{}. What is $3+4$?
The sum of three and four is seven, so the answer is $7$. A train leaves the station at noon and
travels sixty miles in an hour; how far has it gone by three? It has travelled for three hours."""


def randomise(model, seed=0):
    """Give every parameter a random value of a size that matters; return the model, frozen."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if p.dim() == 1:
            p.data = 0.4 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            p.data = noise * (0.3 if "embed_tokens" in name else 1.5 / p.shape[1] ** 0.5)
    return model.requires_grad_(False).eval()


def tiny_model(seed=0, **changes) -> Qwen3:
    """Return a random model of ours, tied, of the Qwen3 family unless told otherwise."""
    raw = SHAPE | dict(model_type="qwen3", rope_theta=500.0, tie_word_embeddings=True) | changes
    return randomise(Qwen3(config_from_dict(raw)), seed)


def hf_model(family="qwen3", seed=0, rope_theta=500.0, rope=None, **changes):
    """Return a random model of transformers; `changes` are fields of its config, and `rope` of its
    rope_parameters."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rope = dict(rope_type="default", rope_theta=rope_theta) | (rope or {})
    config = transformers.AutoConfig.for_model(family, **SHAPE | changes, rope_parameters=rope)
    return randomise(transformers.AutoModelForCausalLM.from_config(config), seed)


def peft_model(hf, **options):
    """Return PEFT's model on a copy of transformers', all of its own parameters random."""
    from peft import LoraConfig, get_peft_model

    options = dict(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]) | options
    torch.manual_seed(2)
    model = get_peft_model(copy.deepcopy(hf), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn_like(p)
    return model


def edit_json(path, drop=(), **changes):
    """Change some keys of a JSON file, and drop others."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


def save_tokenizer(folder):
    """Save a byte-level BPE tokenizer of 300 tokens in a folder, as transformers does."""
    from transformers import PreTrainedTokenizerFast

    file = Tokenizer(models.BPE())
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    file.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=file, eos_token=SPECIAL[0])
    fast.save_pretrained(folder)


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first, in the order of LONGEST."""
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True)
def keep_signals():
    """Put back the handlers of Ctrl-C and SIGTERM, which a command run in this process changes (a
    fixture may have run one already), and let go of its run."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    yield
    processes.HELD.clear()
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Make a whole checkpoint folder of the Qwen3 family, with a tokenizer. Not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint")
    hf_model(tie_word_embeddings=True, eos_token_id=2).save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.fixture
def scratch(folder, tmp_path):
    """Make a copy of `folder` that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "checkpoint"))
