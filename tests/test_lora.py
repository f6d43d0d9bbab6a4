"""lora.py against PEFT, in both directions, and against the base model, bit for bit."""

import copy
import json
import math

import pytest
import torch
from conftest import edit_json, hf_model, peft_model
from helpers import COMPLETIONS, PROMPTS, REWARDS, advantages_of, handmade, settings
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from grpo import update
from hf.checkpoint import load_model
from hf.peft import PREFIX, load_adapter, save_adapter
from lora import ALL_LINEAR, adapter_off, add_lora, lora_parameters
from run.checkpoints import adapt
from system.errors import UserError

IDS = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def base(request, tmp_path_factory):
    """A random model of transformers, and the folder it was saved in."""
    hf = hf_model(request.param, num_hidden_layers=3)
    folder = tmp_path_factory.mktemp(request.param)
    hf.save_pretrained(folder)
    return hf, folder


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.logits(model(ids))


def adapted(folder, rank=3, alpha=5, scale=0.2, **options):
    """Our model with an adapter that does something: B is random."""
    model = add_lora(load_model(folder), rank, alpha, **options)
    rng = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if "lora_B" in name:
            p.data = scale * torch.randn(p.shape, generator=rng)
    return model


def peft_names(model):
    """What PEFT calls the parameters of our adapter."""
    return {PREFIX + name for name in lora_parameters(model)}


def in_peft(hf, model, folder):
    """The logits of PEFT's model with the adapter of ours, saved in `folder`."""
    save_adapter(model, folder)
    theirs = PeftModel.from_pretrained(copy.deepcopy(hf), folder).eval()
    assert get_peft_model_state_dict(theirs).keys() == peft_names(model)
    with torch.no_grad():
        return theirs(IDS).logits


def close(got, want, base):
    """Equal, and far from what the base model gives."""
    assert (want - base).abs().max() > 0.05
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# PEFT


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj"), ("down_proj",)])
def test_peft_loads_ours(base, tmp_path, targets):
    """A wrong scale, name or file format would make our adapters useless, or wrong, elsewhere."""
    hf, folder = base
    model = adapted(folder, targets=targets)
    close(in_peft(hf, model, tmp_path), logits(model), hf(IDS).logits)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert sorted(config["target_modules"]) == sorted(targets)  # short: every layer is adapted
    assert (config["r"], config["lora_alpha"], config["bias"]) == (3, 5, "none")


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules="all-linear"),
        dict(r=1, lora_alpha=1, target_modules=["v_proj"]),
        dict(r=8, lora_alpha=32, target_modules=["o_proj", "gate_proj", "down_proj"]),
        dict(r=5, lora_alpha=2.5, use_rslora=True),
        dict(lora_dropout=0.5),
        dict(target_modules=r".*layers\.[02]\.(self_attn\.[kv]|mlp\.up)_proj"),
        dict(target_modules=["k_proj", "o_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\..*"),
    ],
    ids=str,
)
def test_ours_loads_peft_and_saves_it_again(base, tmp_path, options):
    """Scale, rslora or the choice of layers could be misread; an adapter that covers some layers
    only could come back from us as one for all layers."""
    hf, folder = base
    theirs = peft_model(hf, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want, plain = theirs(IDS).logits, hf(IDS).logits
    model = load_adapter(load_model(folder), tmp_path / "theirs")
    close(logits(model), want, plain)
    assert get_peft_model_state_dict(theirs).keys() == peft_names(model)
    close(in_peft(hf, model, tmp_path / "ours"), want, plain)
    saved = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (saved["use_rslora"], saved["lora_dropout"]) == (False, 0.0)
    again = load_adapter(load_model(folder), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_training_goes_on_from_an_adapter_of_peft(base, tmp_path):
    """A start that is not the adapter, or a step that is not the one from these numbers: a layer
    that is missed, bf16 tensors trained in bf16, another scale, a base path that moved."""
    hf, folder = base
    theirs = peft_model(hf, target_modules=["q_proj", "up_proj"]).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    given = get_peft_model_state_dict(theirs)
    twin = add_lora(load_model(folder), 3, 5, ("q_proj", "up_proj"))
    for name, p in lora_parameters(twin).items():
        p.data.copy_(given[PREFIX + name])
    model = load_model(folder)
    adapt(model, settings(adapter=str(tmp_path / "theirs")), resume=False)
    rollout = handmade(PROMPTS, COMPLETIONS, REWARDS)
    for one in (model, twin):
        optimizer = torch.optim.AdamW(lora_parameters(one).values(), lr=0.1)
        how = (advantages_of(rollout), settings(credit="arca", kl_coef=0.1))
        _, signals, _ = update(one, optimizer, rollout, *how)
        assert (signals.residual[signals.mask] > 0).all()  # the adapter speaks at step 1
    ours, wanted = lora_parameters(model), lora_parameters(twin)
    assert ours.keys() == wanted.keys()
    for name, p in ours.items():
        assert torch.equal(p, wanted[name]) and not torch.equal(p, given[PREFIX + name].float())
    with adapter_off(model):
        assert torch.equal(logits(model), logits(load_model(folder)))
    close(in_peft(hf, model, tmp_path / "ours"), logits(model), hf(IDS).logits)


def test_a_run_folder_is_an_adapter(base, tmp_path):
    """runs/NAME is what users type, and what other commands take."""
    model = adapted(base[1])
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(load_model(base[1]), tmp_path)), logits(model))


@pytest.mark.parametrize("names", ["default", "my-task"])
@pytest.mark.parametrize("place", [".", "my-task", "checkpoints/checkpoint-20"])
def test_adapters_load_as_programs_leave_them(base, tmp_path, names, place):
    """PEFT's folder for a named adapter, a trainer's for a checkpoint, the names of a state dict:
    such an adapter would be none, or, in PEFT itself, one that does nothing."""
    save_adapter(adapted(base[1]), tmp_path / place)
    plain = logits(load_adapter(load_model(base[1]), tmp_path / place))
    tensors = load_file(tmp_path / place / WEIGHTS)
    renamed = {name.replace(".weight", f".{names}.weight"): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / place / WEIGHTS)
    edit_json(tmp_path / place / CONFIG, init_lora_weights="eva")  # B starts at 0, as usual
    assert torch.equal(logits(load_adapter(load_model(base[1]), tmp_path)), plain)


def test_what_is_no_adapter_or_several_is_said(base, tmp_path):
    """An adapter at random, of two; or a missing file, where the user gave the model."""

    def says(words):
        with pytest.raises(UserError, match=words):
            load_adapter(load_model(base[1]), tmp_path)

    (tmp_path / "config.json").touch()
    says("holds no adapter .* is missing.: give the folder of one")
    for step in (10, 20):
        save_adapter(adapted(base[1]), tmp_path / f"checkpoint-{step}")
    says("holds several adapters: give one, such as .*checkpoint-20")
    (tmp_path / CONFIG).write_bytes((tmp_path / "checkpoint-20" / CONFIG).read_bytes())
    (tmp_path / "adapter_model.bin").touch()
    says(r"as \.bin, which can hold code: save it again")
    tensors = load_file(tmp_path / "checkpoint-20" / WEIGHTS)
    two = {name.replace(".weight", ".two.weight"): x + 1 for name, x in tensors.items()}
    save_file(tensors | two, tmp_path / WEIGHTS)
    says("holds several adapters: save one alone")


def test_a_second_adapter_is_refused(base, tmp_path):
    """Put over another one, an adapter would be added to it, or take its layers for the base."""
    peft_model(base[0]).save_pretrained(tmp_path)
    other = adapted(base[1], targets=("k_proj",))  # on other layers than the file's
    with pytest.raises(UserError, match="has an adapter"):
        load_adapter(other, tmp_path)
    model = adapted(base[1])
    before = logits(model)
    with pytest.raises(UserError, match="has an adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError):
        add_lora(model, 2, 4)
    assert torch.equal(logits(model), before)


# --------------------------------------------------------------------------------------------------
# The two paths


def test_adapter_off_is_the_base_model(base):
    """Base states that are off by one rounding would be read as the adapter's doing."""
    plain, model = logits(load_model(base[1])), adapted(base[1])
    on = logits(model)
    assert (on - plain).abs().max() > 0.05
    with adapter_off(model):
        assert torch.equal(logits(model), plain)
        with adapter_off(model):
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), plain)  # the inner one does not switch it on again
    assert torch.equal(logits(model), on)


def test_adapter_off_restores_after_an_error(base):
    """After an error inside, a notebook would go on without its adapter."""
    model = adapted(base[1])
    on = logits(model)
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        _ = 1 / 0
    assert torch.equal(logits(model), on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(base, dtype):
    """At step 1 the residual must be exactly zero, or the fallback to uniform credit is missed."""
    model = load_model(base[1], dtype=dtype)
    plain = logits(model)
    assert torch.equal(logits(add_lora(model, 4, 8)), plain)


def test_only_the_adapter_learns(base):
    """A base weight that moves breaks `adapter_off`; an adapter without gradient learns nothing."""
    model = add_lora(load_model(base[1]).requires_grad_(True), 3, 5)
    for p in lora_parameters(model).values():
        p.data = 0.1 * torch.ones_like(p)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if "lora_" in name}
    assert len(trained) == len(lora_parameters(model)) == 2 * 7 * 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.logits(model(IDS)).log_softmax(-1)[..., 7].sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_fp32_adapter_on_a_bf16_base(base):
    """In bf16 a small update of the adapter rounds to nothing; its gradient must be fp32 too."""
    hf, folder = base
    model, exact = load_model(folder, dtype=torch.bfloat16), adapted(folder)
    add_lora(model, 3, 5)
    for name, p in lora_parameters(model).items():
        assert p.dtype == torch.float32
        p.data = lora_parameters(exact)[name].data
    got, want = logits(model).float(), logits(exact)
    assert (got - want).std() < 0.1 * (want - hf(IDS).logits).std()
    model.logits(model(IDS)).float().square().sum().backward()
    grads = [p.grad for p in lora_parameters(model).values()]
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)


def test_initial_adapter(base):
    """A comes from the seed alone, whatever else was drawn; its variance is 1 / D_in in every layer
    and no two layers share it; B is zero."""
    first = lora_parameters(add_lora(load_model(base[1]), 64, 64))
    torch.manual_seed(99)
    same = lora_parameters(add_lora(load_model(base[1]), 64, 64, seed=0))
    other = lora_parameters(add_lora(load_model(base[1]), 64, 64, seed=1))
    A = [name for name in first if "lora_A" in name]
    for name in first:
        assert torch.equal(first[name], same[name])
    for name in A:
        size = first[name].shape[1]
        assert not torch.equal(first[name], other[name])
        assert abs(first[name].var() * size - 1) < 0.15  # 5 standard errors
        assert abs(first[name].mean()) < 5 / math.sqrt(64 * size * size)
        assert not first[name.replace("lora_A", "lora_B")].any()
    assert len({first[name].flatten()[0].item() for name in A}) == len(A)


def test_round_trip_is_exact(base, tmp_path):
    """A resumed run or a reloaded adapter must be the same adapter, bit for bit."""
    model = adapted(base[1], rank=2, alpha=7, targets=("k_proj", "up_proj"))
    save_adapter(model, tmp_path / "a" / "b")  # makes the folders
    again = load_adapter(load_model(base[1]), tmp_path / "a" / "b")
    saved = lora_parameters(again)
    assert saved.keys() == lora_parameters(model).keys()
    assert all(torch.equal(saved[name], p) for name, p in lora_parameters(model).items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in saved.values())
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "c")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / "b" / file).read_bytes()


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (dict(bias="all"), "bias"),
        (dict(bias="lora_only"), "bias"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "pissa"),
        (dict(alora_invocation_tokens=[1, 2]), "alora"),
        (dict(target_modules=["embed_tokens"]), "adapts"),
        (dict(target_modules=["lm_head"]), "lm_head"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # PEFT warns of some of these combinations
def test_features_we_do_not_compute_are_refused(base, tmp_path, options, message):
    """Such an adapter would load, and give other logits than it has in PEFT."""
    peft_model(base[0], **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(base[1]), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_hidden_layers=4), r"layers\.3"),
        (dict(hidden_size=44), "lora_[AB]"),
        (dict(num_key_value_heads=4), r"k_proj\.lora_B"),
    ],
    ids=str,
)
def test_adapter_of_another_model_is_refused(base, tmp_path, changes, message):
    """It would be put on the layers it happens to fit, or fail in the first forward."""
    peft_model(hf_model(**changes), target_modules="all-linear").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(base[1]), tmp_path)


def change(path, function):
    save_file({name: function(t) for name, t in load_file(path).items()}, path)


def drop_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[max(tensors)]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
        (lambda f: (f / CONFIG).unlink(), CONFIG),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-10]), WEIGHTS),
        (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS),
        (lambda f: (f / CONFIG).write_text('{"r": 3,'), CONFIG),
        (drop_tensor, "lora_[AB]"),
        (lambda f: edit_json(f / CONFIG, peft_type="LOHA"), "LOHA"),
        (lambda f: edit_json(f / CONFIG, r=4), "lora_[AB]"),
        (lambda f: edit_json(f / CONFIG, drop=["r"]), "lora_[AB]"),  # 8
        (lambda f: edit_json(f / CONFIG, r=2), "lora_[AB]"),
        (lambda f: edit_json(f / CONFIG, r=0), "r = 0 is not"),
        (lambda f: edit_json(f / CONFIG, lora_alpha=0), "lora_alpha = 0 is not"),
        (lambda f: edit_json(f / CONFIG, r=2**20), "lora_[AB]"),  # 500 GB
        (lambda f: edit_json(f / CONFIG, r="3"), "r should be of type int, not str"),
        (lambda f: edit_json(f / CONFIG, lora_alpha=float("inf")), "lora_alpha = inf"),
        (lambda f: edit_json(f / CONFIG, lora_dropout=1.5), "lora_dropout = 1.5"),
        (lambda f: edit_json(f / CONFIG, lora_dropout=-0.5), "lora_dropout = -0.5"),
        (lambda f: edit_json(f / CONFIG, kasa_config={"beta": 1}), "kasa_config"),
        (lambda f: save_file({}, f / WEIGHTS), "lora_A and lora_B are missing"),
        (lambda f: change(f / WEIGHTS, lambda t: t * float("nan")), "NaN"),
        (lambda f: change(f / WEIGHTS, torch.Tensor.int), "float expected"),
    ],
)
def test_damaged_adapters_are_refused(base, tmp_path, harm, message):
    """A half-written adapter must be an error of one line, and never load in part."""
    save_adapter(adapted(base[1]), tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message):
        load_adapter(load_model(base[1]), tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "rank"),
        (dict(rank=-1), "rank"),
        (dict(targets=("q_proj", "w_proj")), "w_proj"),
        (dict(targets=("embed_tokens",)), "embed_tokens"),
    ],
    ids=str,
)
def test_add_lora_refuses(base, options, message):
    """A mistyped target would train fewer layers than asked; rank 0 would train nothing."""
    with pytest.raises(ValueError, match=message):
        add_lora(load_model(base[1]), **dict(rank=2, alpha=4) | options)


def test_nothing_to_save_is_refused(base, tmp_path):
    """A run that forgot its adapter would write a folder that loads as nothing."""
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(load_model(base[1]), tmp_path / "none")
    assert not (tmp_path / "none").exists()
