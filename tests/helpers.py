"""What several test files share: tiny models, settings, handmade rollouts, slow reference code."""

from types import SimpleNamespace

import torch

from grpo import Rollout, update
from lora import add_lora, lora_parameters
from model import Config, Qwen3
from sample import Completions

EOS = 0  # and what padding is made of: nothing may tell them apart by id


def tiny_model(vocab=11, hidden=16, seed=0, B=0.3, rank=2, lora=True):
    """A random Qwen3 of two layers; its adapter's B is normal with deviation `B`, or 0."""
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
    """The settings that grpo.py reads, with no gradient clipping and everything in one batch."""
    s = dict(credit="uniform", sharpening=1.0, temperature=1.0, top_p=1.0, samples=4, seed=0)
    s |= dict(max_new_tokens=6, aggregate="seq", updates=1, clip_low=0.2, clip_high=0.28, kl=0.0)
    s |= dict(grad_clip=1e9, micro_tokens=10**6, arca_layer="final")
    assert changes.keys() <= s.keys()
    return SimpleNamespace(**(s | changes))


def handmade(prompts, completions, rewards, logps=None):
    """A Rollout of given completions (lists of ids, the groups one after the other)."""
    lengths = torch.tensor([len(c) for c in completions])
    tokens = torch.full((len(completions), int(lengths.max())), EOS)
    for row, completion in enumerate(completions):
        tokens[row, : len(completion)] = torch.tensor(completion)
    logps = torch.zeros(tokens.shape) if logps is None else logps
    done = torch.tensor([c[-1] == EOS for c in completions])
    problems = [dict(problem=str(p), answer="1", prompt=p, negative=p[:1] + p) for p in prompts]
    rewards = torch.as_tensor(rewards, dtype=torch.float32).view(len(prompts), -1)
    texts = [str(c) for c in completions]
    return Rollout(problems, Completions(tokens, lengths, logps, done), texts, rewards)


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


def gradient(model, r, advantages, s, compare=False):
    """What one update hands to the optimizer, and its metrics and multipliers; changes nothing."""
    optimizer = Recorder(model)
    metrics, _, m = update(model, optimizer, r, advantages, s, compare)
    return optimizer.seen[0], metrics, m


def flat_grad(loss, model):
    """The gradient of a loss for the adapter, as one vector."""
    ps = list(lora_parameters(model).values())
    grads = torch.autograd.grad(loss, ps, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def close(a, b, relative):
    """Whether two vectors differ by at most this share of the second's norm."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm()) <= relative * float(b.norm()) and float(b.norm()) > 0


def reference(model, prompt, completion, temperature=1.0):
    """Log-probs, entropies and predicting states of one row: alone, unpadded, unchunked."""
    hidden = model(torch.tensor([prompt + completion]))[0]
    states = hidden[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    logits = states @ model.lm_head.weight.T / temperature
    logps = logits - logits.logsumexp(-1, keepdim=True)
    drawn = torch.stack([logps[t, token] for t, token in enumerate(completion)])
    return drawn, -(logps.exp() * logps).sum(-1), states
