"""What several test files share: tiny models, settings, handmade rollouts, slow reference code, and
arithmetic in float64."""

import copy
import multiprocessing
from contextlib import contextmanager
from dataclasses import replace

import torch

from grpo import Rollout, group_advantages, update
from lora import add_lora, lora_parameters
from model import Config, Qwen3
from run.metrics import diagnose, measure
from sample import Completions
from train import Settings

EOS = 0  # and what padding is made of: nothing may tell them apart by id
PRELOAD = ["train", "torch._dynamo", "torch.distributed.run"]  # seconds, and no huggingface_hub
EPSILON = torch.finfo(torch.float32).eps
EXACT = 1e-12  # relative; float64 rounds at 2e-16, and no test adds up 1000 numbers one by one


# ---- Models, settings and rollouts ---------------------------------------------------------------
def tiny_model(vocab=11, hidden=16, seed=0, B=0.3, rank=2, lora=True):
    """Return a random Qwen3 of two layers; its adapter's B is normal with deviation `B`, or 0."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden)
    heads = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    rest = dict(rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False)
    model = Qwen3(Config(**sizes, **heads, **rest, qkv_bias=False, qk_norm=True))
    model.requires_grad_(False).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # far from the uniform distribution
    if lora:
        add_lora(model, rank, 2 * rank)
        scale_B(model, B, seed=1)
    return model


def scale_B(model, scale, seed=1):
    """Make the adapter's B a fixed random direction (given by the seed) times `scale`."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=rng) * scale


def settings(**changes):
    """Return Settings of train.py: plain GRPO, no gradient clipping, everything in one batch."""
    cfg = Settings(credit="uniform", samples=4, max_new_tokens=6, seed=0)
    cfg.max_grad_norm = 1e9
    cfg.micro_batch_tokens = 10**6
    return replace(cfg, **changes)


def handmade(prompts, completions, rewards, logps=None):
    """Return a Rollout of given completions (lists of ids, the groups one after the other)."""
    lengths = torch.tensor([len(c) for c in completions])
    tokens = torch.full((len(completions), int(lengths.max())), EOS)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion)] = torch.tensor(completion)
    logps = torch.zeros(tokens.shape) if logps is None else logps
    done = torch.tensor([c[-1] == EOS for c in completions])
    problems = [dict(problem=str(p), answer="1", prompt=p, negative=p[:1] + p) for p in prompts]
    rewards = torch.as_tensor(rewards, dtype=torch.get_default_dtype()).view(len(prompts), -1)
    texts = [str(c) for c in completions]
    return Rollout(problems, Completions(tokens, lengths, logps, done), texts, rewards)


# ---- Processes -----------------------------------------------------------------------------------
def forks():
    """Return a way to start processes: forked from one that has imported all that takes seconds.
    The first call starts that one, for all tests of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


# ---- Gradients -----------------------------------------------------------------------------------
class Recorder(torch.optim.SGD):
    """SGD that keeps each gradient it was given, as one vector."""

    def __init__(self, model, lr=0.0):
        super().__init__(lora_parameters(model).values(), lr=lr)
        self.seen = []

    def step(self):
        ps = self.param_groups[0]["params"]
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in ps)
        self.seen.append(torch.cat([g.flatten() for g in zeros]))
        super().step()


def gradient(model, rollout, advantages, cfg, compare=False):
    """Return what one update hands to the optimizer, the metrics of the step as train.py logs them,
    and its multipliers; change nothing."""
    optimizer = Recorder(model)
    metrics, signals, multipliers = update(model, optimizer, rollout, advantages, cfg, compare)
    metrics |= measure(rollout, signals)
    metrics |= diagnose(rollout, signals, multipliers, cfg, None, compare)
    return optimizer.seen[0], metrics, multipliers


def flat_grad(loss, model):
    """Return the gradient of a loss for the adapter, as one vector."""
    ps = list(lora_parameters(model).values())
    grads = torch.autograd.grad(loss, ps, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def close(a, b, relative):
    """Return whether two vectors differ by at most this share of the second's norm."""
    a = a.detach().double()
    b = b.detach().double()
    return float((a - b).norm()) <= relative * float(b.norm()) and float(b.norm()) > 0


def reference(model, prompt, completion, temperature=1.0):
    """Return log-probs, entropies and predicting states of one row: alone, unpadded, unchunked."""
    hidden = model(torch.tensor([prompt + completion]))[0]
    states = hidden[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    logits = states @ model.lm_head.weight.T / temperature
    logps = logits - logits.logsumexp(-1, keepdim=True)
    drawn = torch.stack([logps[t, token] for t, token in enumerate(completion)])
    return drawn, -(logps.exp() * logps).sum(-1), states


# ---- A step of two problems ----------------------------------------------------------------------
PROMPTS = [[3, 5], [7, 2, 9, 4]]  # two groups, of unequal prompts
COMPLETIONS = [[4, EOS], [6, 0, 0, 3, EOS], [5, 1, 8], [EOS]]  # 0 is a token, EOS and padding
COMPLETIONS += [[2, 2, 2, 2], [9, EOS], [1, 3, 5, 7, 9, EOS], [8]]
REWARDS = [[1, 0, 0, 1], [0, 0, 1, 0]]
TOKENS = sum(map(len, COMPLETIONS))


def rollout_of(model, rewards=REWARDS):
    """Return the completions above with all that a sampler would have kept of them."""
    rows = [reference(model, PROMPTS[i // 4], c) for i, c in enumerate(COMPLETIONS)]
    kept = []
    for values in zip(*rows, strict=True):  # log-probs, entropies, states
        detached = [x.detach() for x in values]
        kept.append(torch.nn.utils.rnn.pad_sequence(detached, batch_first=True))
    logps, entropy, hidden = kept
    rollout = handmade(PROMPTS, COMPLETIONS, rewards, logps)
    rollout.completions.entropy = entropy
    rollout.completions.hidden = hidden
    rng = torch.Generator().manual_seed(0)
    rollout.noise = torch.rand(8, 6, generator=rng, dtype=torch.float64)
    return rollout


def advantages_of(rollout, kind="grpo"):
    """Return the advantages (B,) of a rollout's completions."""
    return group_advantages(rollout.rewards, kind).flatten()


# ---- float64, and how far fp32 may be from it ----------------------------------------------------
@contextmanager
def double():
    """Have the code compute in float64: inside, each `.float()` of it is `.double()`, and the
    tensors that it makes are float64."""
    float32, default = torch.Tensor.float, torch.get_default_dtype()
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = float32
        torch.set_default_dtype(default)


def in_double(model):
    """Return a copy of a model with the same weights, in float64."""
    return copy.deepcopy(model).double()


def rollout_in_double(rollout):
    """Return a rollout with the same numbers, in float64."""

    def wide(x):
        return x.double() if torch.is_tensor(x) and x.is_floating_point() else x

    known = {name: wide(x) for name, x in vars(rollout.completions).items()}
    return replace(rollout, completions=Completions(**known), rewards=rollout.rewards.double())


def gradient_in_double(model, rollout, advantages, cfg, compare=False):
    """Return what `gradient` does with a model in float64, from the same numbers."""
    given = (rollout_in_double(rollout), advantages.double(), cfg, compare)
    with double():
        found, metrics, multipliers = gradient(model, *given)
    assert found.dtype == multipliers.dtype == torch.float64
    return found, metrics, multipliers


def rounding(model, passes=1):
    """Return how far fp32 may be from float64 after so many passes, as a share of the result.

    A state goes through about 12 operations a block (two norms, seven products, rotation, softmax,
    activation) and 4 more (embedding, last norm, head, log-softmax). Each rounds by fp32's epsilon,
    a sum of n products by sqrt(n) epsilons (errors are as often up as down: Higham and Mary, SIAM
    J. Sci. Comput. 41, 2019). A backward pass counts as two. Nothing here is about a processor.
    """
    config = model.config
    longest = max(config.hidden_size, config.intermediate_size, config.vocab_size)
    operations = 12 * config.num_hidden_layers + 4
    return passes * operations * longest**0.5 * EPSILON
