"""sample.py: the distribution against exact enumeration, the rows against each sampled alone.

Where `way` is an argument the test runs twice: with fast/decoder.py, and with the plain decoder.
"""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from helpers import EXACT, double, in_double, rounding

import eval_math
import sample
from data.problems import TINY, prompt_text
from hf.checkpoint import load_model, load_tokenizer
from hf.peft import save_adapter
from lora import add_lora, lora_parameters
from sample import generate, inverse_cdf, sample_token, top_p_filter, uniforms
from system.errors import UserError, printable, run_cli

BELOW_1 = 1 - 2**-53  # the largest float64 below 1
LARGEST = 10  # no state or logit here is larger: fp32's relative rounding, times this, is absolute
PROMPTS = [[1, 2, 3], [4], [5, 0, 5, 1, 2, 2, 3], [2, 4]]
SMALL = dict(vocab_size=12, max_new_tokens=40, eos_ids=(7, 9))  # ends after about 10 tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=12)


@pytest.fixture(params=["fp32", "float64"])
def either(request, model):
    """The model in fp32, or all that the test computes in float64: that is 10^8 times sharper."""
    if request.param == "fp32":
        yield model
    else:
        with double():
            yield in_double(model)


@pytest.fixture(params=["fast", "plain"])
def way(request, monkeypatch):
    """Sample with fast/, or without it."""
    make_decoder = sample.PlainDecoder
    if request.param == "fast":
        make_decoder = pytest.importorskip("fast.decoder").kept_decoder
    monkeypatch.setattr(sample, "make_decoder", make_decoder)
    return request.param


@torch.no_grad()
def exact(model, prompt, tokens):
    """The states (T, D) and logits (T, V) that predict `tokens` after `prompt`: one forward pass in
    float64, without a cache."""
    ids = torch.tensor([list(prompt) + list(tokens)])
    with double():
        wide = in_double(model)
        states = wide(ids)[0, len(prompt) - 1 : -1]
        return states, wide.logits(states)


def rows(completions):
    """The completions as lists: tokens, log-probs, finished."""
    c = completions
    fields = zip(c.tokens.tolist(), c.logps.tolist(), c.lengths.tolist(), c.finished, strict=True)
    return [(tokens[:end], logps[:end], bool(done)) for tokens, logps, end, done in fields]


def assert_near(model, found, want):
    """The same numbers, up to rounding in a pass through the model in fp32, or in float64."""
    bound = LARGEST * rounding(model)  # 2e-4 to 4e-4 for the models here
    if model.lm_head.weight.dtype == torch.float64:
        bound = 100 * EXACT
    torch.testing.assert_close(found.double(), want.double(), atol=bound, rtol=0)


def assert_same(model, got, want):
    """The same tokens; the same log-probs up to what a batch of another shape may round."""
    assert [(tokens, done) for tokens, _, done in got] == [(t, d) for t, _, d in want]
    for (_, a, _), (_, b, _) in zip(got, want, strict=True):
        assert_near(model, torch.tensor(a), torch.tensor(b))


# ---- The distribution ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.7, 0), (1.6, 4)])
def test_distribution_is_the_models(way, temperature, top_k):
    """Samples can look sensible and be from another distribution: a temperature applied twice or
    not at all, one uniform used for two tokens, a shifted CDF, a prompt's last token dropped."""
    model, prompt, eos, N = tiny_model(seed=3, vocab_size=6), [1, 2, 4], 5, 4000
    with torch.no_grad():
        ids = torch.tensor([prompt + [token] for token in range(6)])
        logits = model.logits(model(ids)).double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[..., -1:]] = -torch.inf
    first, second = logits[0, 2].softmax(-1), logits[:, 3].softmax(-1)  # (V,), (V, V)
    probs = {(a, b): first[a] * second[a, b] for a in range(6) for b in range(6) if a != eos}
    probs = {pair: float(p) for pair, p in probs.items() if p > 0} | {(eos,): float(first[eos])}
    assert abs(sum(probs.values()) - 1) < 1e-9

    options = dict(temperature=temperature, top_k=top_k, eos_ids=[eos], seed=5)
    got = [tuple(t) for t, _, _ in rows(generate(model, [prompt], N, 2, max_rows=N, **options))]
    assert len(got) == N and set(got) <= {pair for pair, p in probs.items() if p > 0}
    rare = [pair for pair, p in probs.items() if N * p < 5]  # together one cell
    cells = [[pair] for pair in probs if pair not in rare] + [rare] * bool(rare)
    seen = np.array([sum(got.count(pair) for pair in cell) for cell in cells])
    want = np.array([N * sum(probs[pair] for pair in cell) for cell in cells])
    degrees = len(cells) - 1
    critical = degrees * (1 - 2 / (9 * degrees) + 3.7 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert degrees >= 8  # and chi-square beyond 3.7 standard deviations (Wilson, Hilferty): 1e-4
    assert ((seen - want) ** 2 / want.clip(1)).sum() < critical


def test_nothing_is_cut_unless_asked_for():
    """A library's own top-k, of which nobody was told: what is sampled is then not what is scored,
    and no log-prob shows it. Of V even tokens N draws hit V (1 - (1 - 1/V)^N) different ones."""
    V, N = 400, 1000
    model = tiny_model(vocab_size=V, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()  # so every token is equally likely
    c = generate(model, [[1, 2, 4]], N, 1)
    want = V * (1 - (1 - 1 / V) ** N)  # 367, with a deviation of 5
    assert abs(len(c.tokens.unique()) - want) < 25
    assert torch.allclose(c.logps, torch.tensor(1 / V).log())


def test_draw_at_the_edges():
    """At the ends of the CDF a token of probability 0, or no token at all, could be drawn."""
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    u = torch.tensor([0.0, 0.25, 0.4999999, 0.5, 0.75, BELOW_1], dtype=torch.float64)
    tokens = sample_token(logits.expand(6, 5).log_softmax(-1), u)
    assert tokens.tolist() == [1, 1, 1, 3, 3, 3]
    even = torch.zeros(4, 4).log_softmax(-1)
    quarters = torch.tensor([0.0, 0.26, 0.51, 0.99], dtype=torch.float64)
    assert sample_token(even, quarters).tolist() == [0, 1, 2, 3]
    assert sample_token(even, quarters, top_k=2).tolist() == [0, 0, 1, 1]
    example = torch.tensor([[0.2, 0.5, 0.3]])  # of the docstring
    assert inverse_cdf(example, torch.tensor([0.6], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("V", [63, 1000, 4423])
def test_draw_equals_a_running_sum(V):
    """A token beside the right one, or one of many without any mass."""
    rng = np.random.default_rng(V)
    p = rng.random(V) * (rng.random(V) < 0.2)
    p[:128:2] = p[-1] = 0
    p[V // 2] = 1
    cdf = np.cumsum(p) / np.cumsum(p)[-1]
    u = np.concatenate([rng.random(300), [0, BELOW_1], cdf - 1e-6, cdf + 1e-6]).clip(0, BELOW_1)
    want = (cdf[None] > u[:, None]).argmax(1)
    logps = torch.from_numpy(p / p.sum()).log().expand(len(u), V)
    assert sample_token(logps, torch.from_numpy(u)).tolist() == want.tolist()


def test_draw_is_exact_over_a_large_vocabulary():
    """In fp32 the CDF of 151,936 tokens has steps of 6e-8, more than many a token's probability."""
    logits = torch.randn(151_936, generator=torch.Generator().manual_seed(0)) * 1.5
    p = np.exp(logits.double().numpy())
    p /= p.sum()
    cdf = p.cumsum()
    rare = np.flatnonzero((p > 4e-8) & (p < 8e-8) & (cdf > 0.5))
    want = rare[:: len(rare) // 24][:24]
    middle = torch.from_numpy(cdf[want] - p[want] / 2)
    logps = logits.double().log_softmax(-1).expand(24, -1)  # so that only the sums can round
    assert sample_token(logps, middle).tolist() == want.tolist()


def test_temperature_0_takes_the_likeliest(way):
    """Greedy evaluation must not depend on the uniforms, nor divide by zero."""
    model = tiny_model()
    for seed in (0, 1):
        c = generate(model, PROMPTS, 2, 9, temperature=0, seed=seed)
        for row, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
            _, logits = exact(model, prompt, c.tokens[row].tolist())
            logps = logits.log_softmax(-1)
            assert torch.equal(c.tokens[row], logps.argmax(-1))
            assert_near(model, c.logps[row], logps.amax(-1))


# ---- Top-p and top-k -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probs, top_p, top_k, want",
    [
        ([0.125, 0.5, 0.25, 0.125], 0.5, 0, {1}),  # the set's share is exactly top_p
        ([0.125, 0.5, 0.25, 0.125], 0.51, 0, {1, 2}),
        ([0.125, 0.5, 0.25, 0.125], 0.75, 0, {1, 2}),
        ([0.125, 0.5, 0.25, 0.125], 0.76, 0, {0, 1, 2}),  # of two equal tokens the first
        ([0.125, 0.5, 0.25, 0.125], 0.88, 0, {0, 1, 2, 3}),
        ([0.125, 0.5, 0.25, 0.125], 1e-9, 0, {1}),
        ([0.25] * 4, 0.5, 0, {0, 1}),
        ([0.1, 0.4, 0.1, 0.4], 1.0, 1, {1}),
        ([0.1, 0.4, 0.1, 0.4], 1.0, 3, {0, 1, 3}),
        ([0.1, 0.4, 0.1, 0.4], 1.0, 9, {0, 1, 2, 3}),
        ([0.1, 0.4, 0.1, 0.4], 0.5, 2, {1}),  # 0.4 of 0.8, not of 1
        ([0.4, 0.3, 0.2, 0.1], 0.5, 2, {0}),  # top-p first would leave {0, 1}
        ([0.4, 0.3, 0.2, 0.1], 0.6, 2, {0, 1}),
        ([0.1, 0.4, 0.1, 0.4], 0.9, 3, {0, 1, 3}),
        ([0.1, 0.4, 0.1, 0.4], 1.0, 0, {0, 1, 2, 3}),
    ],
)
def test_top_p_filter_by_hand(probs, top_p, top_k, want):
    """Off by one, a cut keeps a token too many or none at all; ties must not be kept by chance."""
    given = torch.tensor([probs, probs[::-1]], dtype=torch.float64)
    before = given.clone()
    kept = top_p_filter(given, top_p, top_k)[0]
    assert set(kept.nonzero()[:, 0].tolist()) == want
    assert all(kept[i] == probs[i] for i in want)  # not renormalised
    assert torch.equal(given, before)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 60, 500])
def test_top_p_filter_equals_transformers(top_p, top_k):
    """Our nucleus would not be everyone's; and every drawn token must lie in it."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    scores = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    kept = scores > -torch.inf
    probs = logits.double().softmax(-1)
    assert torch.equal(top_p_filter(probs, top_p, top_k) > 0, kept)
    for u in (0.0, 0.3, 0.9, 0.999, BELOW_1):
        u = torch.full((40,), u, dtype=torch.float64)
        tokens = sample_token(logits.log_softmax(-1), u, top_p, top_k)
        assert kept.gather(1, tokens[:, None]).all()


# ---- Completions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.6),
        dict(temperature=1.4, top_p=0.7),
        dict(top_k=3),
        dict(temperature=0, n=1),
    ],
    ids=str,
)
def test_logps_are_those_of_the_whole_distribution(way, either, options):
    """The ratio and the KL of training compare with these: at the sampling temperature, uncut."""
    options = dict(n=5, max_new_tokens=30, eos_ids=[7]) | options
    got = rows(generate(either, PROMPTS, **options))
    assert len(got) == len(PROMPTS) * options["n"]
    for i, (tokens, logps, _) in enumerate(got):
        _, logits = exact(either, PROMPTS[i // options["n"]], tokens)
        want = (logits / (options.get("temperature") or 1.0)).log_softmax(-1)
        assert_near(either, torch.tensor(logps), want[range(len(tokens)), tokens])


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_what_is_kept_is_of_the_predicting_state(way, either, temperature, top_p):
    """DelTA, EAPO and forking tokens read the sampler's own states and entropies: those of the next
    position, of the cut distribution, or of a row that has moved since others were dropped."""
    prompts, options = [[1, 2, 4], [3], [5, 6]], dict(temperature=temperature, top_p=top_p)
    keep = ("entropy", "hidden")
    c = generate(either, prompts, 8, 40, **options, eos_ids=[5], seed=3, keep=keep)
    assert len(set(c.lengths.tolist())) > 5  # so rows are dropped on the way
    for row, n in enumerate(c.lengths.tolist()):
        prompt, tokens = prompts[row // 8], c.tokens[row, :n].tolist()
        states, logits = exact(either, prompt, tokens)
        p = (logits / temperature).softmax(-1)
        assert_near(either, c.hidden[row, :n], states)
        assert_near(either, c.entropy[row, :n], -(p * p.log()).sum(-1))
    plain = generate(either, prompts, 8, 40, **options, eos_ids=[5], seed=3)
    assert torch.equal(plain.tokens, c.tokens) and plain.hidden is plain.entropy is None


def test_completion_depends_on_its_own_key_only(way, model):
    """Then a run could not be repeated, resumed or split: what else is in the batch, its order,
    more samples, a higher limit or fewer rows at a time must not change a completion."""
    options = dict(eos_ids=(7, 9), seed=3, step=2)
    want = rows(generate(model, PROMPTS, 4, 40, **options))
    alone = [row for p in PROMPTS for row in rows(generate(model, [p], 4, 40, **options))]
    assert_same(model, alone, want)
    backwards = rows(generate(model, PROMPTS[::-1], 4, 40, **options))
    assert_same(model, [row for i in (3, 2, 1, 0) for row in backwards[4 * i : 4 * i + 4]], want)
    for max_rows in (1, 5, 8, 11):
        fewer = rows(generate(model, PROMPTS, 4, 40, max_rows=max_rows, **options))
        assert_same(model, fewer, want)
    more = rows(generate(model, PROMPTS, 7, 40, **options))
    assert_same(model, [row for i in range(4) for row in more[7 * i : 7 * i + 4]], want)
    for limit in (1, 9, 20):
        short = rows(generate(model, PROMPTS, 4, limit, **options))
        ended = [done and len(tokens) <= limit for tokens, _, done in want]
        cut_off = [(t[:limit], p[:limit], e) for (t, p, _), e in zip(want, ended, strict=True)]
        assert_same(model, short, cut_off)


def test_copies_of_a_prompt_are_further_samples(way, model):
    """Eight copies of a problem in a step that earn the same eight rewards; or ones that differ
    with the number of processes."""
    prompts = [[5, 6], [7], [5, 6], [5, 6]]
    some = dict(max_new_tokens=8, seed=1, step=2)
    whole = generate(model, prompts, 2, **some)
    more = generate(model, [[5, 6]], 6, **some)
    copies = torch.tensor([0, 1, 4, 5, 6, 7])
    assert torch.equal(whole.tokens[copies], more.tokens)
    share = generate(model, prompts, 2, **some, only=[1, 3])
    assert torch.equal(share.tokens, whole.tokens[[2, 3, 6, 7]])


def test_other_keys_give_other_completions(model):
    """Were seed, step or sample left out of the key, every step would see the same rollouts."""
    options = dict(n=3, max_new_tokens=20)
    runs = [dict(), dict(seed=1), dict(step=1), dict(seed=1, step=1)]
    got = [generate(model, [[1, 2], [3]], **options, **run).tokens.tolist() for run in runs]
    assert len({tuple(row) for run in got for row in run}) == 4 * 6


def test_uniforms():
    """Streams that overlap would make completions depend on each other; a longer one must start
    as the shorter, or a higher limit would change the text."""
    long = uniforms(1, 2, [3, 4], 5, 4000)
    assert long.dtype == np.float64 and long.min() >= 0 and long.max() < 1
    assert np.array_equal(long[:7], uniforms(1, 2, (3, 4), 5, 7))
    assert abs(long.mean() - 1 / 2) < 0.02 and abs(long.var() - 1 / 12) < 0.006
    assert abs(np.corrcoef(long[1:], long[:-1])[0, 1]) < 0.06
    keys = [(s, t, p, i) for s in (0, 1, 11) for t in (0, 1, 12) for i in (0, 1, 2) for p in (0, 1)]
    prompts = [[1, 2], [12], [1], [2, 1], [1, 2, 0]]
    starts = [uniforms(s, t, prompts[p], i, 1)[0] for s, t, p, i in keys]
    starts += [uniforms(0, 0, p, 0, 1)[0] for p in prompts[2:]]
    assert min(b - a for a, b in pairwise(sorted(starts))) > 0


def test_ends_lengths_and_padding(way, model):
    """The end token counts and is kept, nothing follows it, and a row without one is not finished;
    rows that end early, and are dropped, must leave the others as they were."""
    n, limit, eos = 12, 30, (7, 9)
    endless = generate(model, PROMPTS, n, limit)
    assert endless.lengths.tolist() == [limit] * 48 and not endless.finished.any()
    got = generate(model, PROMPTS, n, limit, eos_ids=eos)
    assert got.lengths.dtype == torch.long and got.logps.dtype == torch.float32
    assert got.tokens.shape == got.logps.shape == (48, got.lengths.max())
    for row, tokens in enumerate(endless.tokens.tolist()):
        ends = [i for i, token in enumerate(tokens) if token in eos]
        length = ends[0] + 1 if ends else limit
        assert got.lengths[row] == length and got.finished[row] == bool(ends)
        assert got.tokens[row, :length].tolist() == tokens[:length]
        assert_near(model, got.logps[row, :length], endless.logps[row, :length])
        assert not got.tokens[row, length:].any() and not got.logps[row, length:].any()
    lengths, last = got.lengths.tolist(), got.tokens.gather(1, got.lengths[:, None] - 1)
    assert min(lengths) == 1 and max(lengths) == limit  # ended at once; never
    assert {7, 9} < set(last.flatten().tolist())
    assert any(8 < length < limit - 8 for length in lengths)  # dropped on the way


@pytest.mark.parametrize("limit", [1, 8, 9])
def test_all_rows_may_end_before_the_limit(way, model, limit):
    """When nothing is left to write, the batch could run on, or come back too wide."""
    every = range(12)
    got = generate(model, PROMPTS, 3, limit, eos_ids=every)
    assert got.tokens.shape == (12, 1) and got.finished.all() and got.lengths.tolist() == [1] * 12
    got = generate(model, PROMPTS, 3, limit, temperature=0, eos_ids=[int(got.tokens[0, 0])])
    assert got.finished.tolist() == [len(t) <= limit and d for t, _, d in rows(got)]


def test_texts_leave_out_the_end_token(folder):
    """With the end token in it, the text of an answer would not be the answer."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    got = generate(model, [[5], [6]], 20, 30, eos_ids=tokenizer.eos_ids)
    assert {True, False} == set(got.finished.tolist())
    for text, (tokens, _, done) in zip(got.texts(tokenizer), rows(got), strict=True):
        assert text == tokenizer.decode(tokens[:-1] if done else tokens)


@pytest.mark.parametrize(
    "bad",
    [
        dict(prompts=[[1], []]),
        dict(n=0),
        dict(max_new_tokens=0),
        dict(temperature=-1),
        dict(top_p=0),
    ],
)
def test_nothing_to_sample_is_refused(model, bad):
    """An empty prompt has no state to predict from: it would predict from its padding."""
    with pytest.raises(UserError, match="nothing to sample"):
        generate(model, **dict(prompts=[[1]]) | bad)


def test_nan_is_noticed_wherever_it_begins(way):
    """Tokens of chance that pass for a bad answer; a check that sees the first token only. Here
    every token but the prompt has an embedding of NaN, so the first one is drawn as it should."""
    broken = tiny_model(vocab_size=12, tie_word_embeddings=False)
    broken.model.embed_tokens.weight.data[[token for token in range(12) if token != 1]] = torch.nan
    for temperature, n in ((0, 1), (1.0, 8)):
        found = generate(broken, [[1]], n, max_new_tokens=6, temperature=temperature)
        assert not found.logps[:, 0].isnan().any()
        with pytest.raises(UserError, match="gives NaN"):
            found.check()


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_cli_prints_what_generate_gives(folder, monkeypatch, capsys, greedy):
    """Completions of another prompt or seed than was asked for; in another process, other ones.

    The greedy completion is printed by main in this process, the sampled ones by a command.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    problem = "What is $3+4$?"
    prompts = [tokenizer.encode(prompt_text(problem))]
    options = dict(temperature=0, eos_ids=tokenizer.eos_ids)
    flags = [problem, "--model", str(folder)]
    if not greedy:  # the first seed with a completion that ends by itself
        options |= dict(temperature=1.3, n=2, max_new_tokens=40)
        runs = ((seed, generate(model, prompts, seed=seed, **options)) for seed in range(2, 200))
        options["seed"] = next(seed for seed, run in runs if run.finished.any())
        flags += ["--temperature", "1.3", "--samples", "2", "--max-new-tokens", "40"]
        flags += ["--seed", str(options["seed"])]
    want = generate(model, prompts, **options)
    if greedy:
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        sample.main()
        out, err = capsys.readouterr()
    else:
        command = [sys.executable, "sample.py", *flags]
        environment = os.environ | dict(PYTHONUTF8="1", OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0
        out, err = done.stdout.decode(), done.stderr.decode()  # as bytes: a \r stays one
    assert err == ""
    texts = [printable(f"\n{problem}\n{text}\n") for text in want.texts(tokenizer)]
    assert out == "".join(texts)


def refused(command, flags, monkeypatch, capsys):
    """The line on standard error of a command that ends with code 2, and has printed nothing."""
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_cli(command.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("command", [sample, eval_math])
def test_cli_refuses_what_makes_no_sense(command, monkeypatch, capsys):
    """A slip that gives another result in silence (top-p 5, -1 problems), or a traceback; training
    has more such flags, and other limits for two of them."""
    for flags, says in [
        (["--temperature", "nan"], "--temperature nan: use 0.001 to 1000.0 or 0"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--top-p", "5"], "--top-p 5.0: use 1e-06 to 1.0"),
        (["--problems", "-1"], "--problems -1: use 1 to"),
        (["--seed", str(2**64)], "use 0 to 18446744073709551615"),
        (["--max-new-tokens", "10000000000"], "--max-new-tokens 10000000000: use 1 to"),
        (["--samples", "-1"], "--samples -1: use 1 to"),
        (["--problem", "3"], "unrecognized arguments: --problem"),
        (["--device", "mps"], "--device mps: it has no float64"),
        (["--samples", "two"], "--samples: invalid int value: 'two'"),
    ]:
        assert says in refused(command, flags, monkeypatch, capsys)


@pytest.mark.parametrize("command", [sample, eval_math])
def test_cli_says_that_a_model_gives_nan(command, monkeypatch, capsys, tmp_path):
    """An adapter that overflows, whose answers were printed, and counted as wrong ones."""
    monkeypatch.chdir(tmp_path)
    broken = add_lora(load_model(TINY), 2, 4)
    for name, p in lora_parameters(broken).items():
        p.data.fill_(1e30 if "lora_B" in name else 1.0)
    save_adapter(broken, tmp_path / "adapter")
    flags = ["--adapter", "adapter", "--problems", "2"]
    assert "gives NaN" in refused(command, flags, monkeypatch, capsys)
    assert not (tmp_path / "runs").exists()


def test_cli_without_a_model_says_so(tmp_path, monkeypatch, capsys):
    """A mistyped path would end in a traceback, or in success."""
    path = str(tmp_path / "none")
    assert path in refused(sample, ["1+1", "--model", path], monkeypatch, capsys)
