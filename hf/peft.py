"""Adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors."""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import save

from hf.hub import hub_folder, is_hub_id
from lora import attach, linear_layers, lora_layers, lora_parameters
from system import files
from system.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before each of our names
DEFAULTS = dict(r=8, lora_alpha=8.0, lora_dropout=0.0, use_rslora=False, bias="none")  # PEFT's
# What PEFT offers beyond our layer. An adapter that uses one of these is refused by name.
UNSUPPORTED = """use_dora rank_pattern alpha_pattern modules_to_save fan_in_fan_out lora_bias
    layer_replication target_parameters alora_invocation_tokens use_qalora use_bdlora
    trainable_token_indices arrow_config kasa_config monteclora_config"""
ALLOWED = dict(peft_type=["LORA"], bias=["none"])  # other ways to start, as pissa, alter the base
ALLOWED.update(init_lora_weights=[None, True, False, "gaussian", "orthogonal", "eva"])


def save_adapter(model, folder, base_model=""):
    """Write the adapter of a model; PeftModel.from_pretrained(base, folder) loads it."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("this model has no adapter to save: call add_lora first")
    one = next(iter(layers.values()))  # all have the same rank and alpha
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model))
    config.update(r=one.rank, lora_alpha=float(one.alpha), lora_dropout=0.0, bias="none")
    config.update(use_rslora=False, target_modules=target_modules(model))
    ours = lora_parameters(model).items()
    tensors = {PREFIX + name: p.detach().cpu().contiguous() for name, p in ours}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / CONFIG, config)
    files.write_whole(folder / WEIGHTS, save(tensors, dict(format="pt")))


def target_modules(model) -> list[str]:
    """Return the last names of the adapted layers, or, where those say too much, the full ones."""
    adapted = list(lora_layers(model))
    last_names = {name.split(".")[-1] for name in adapted}
    plain = {n.split(".")[-1] for n in linear_layers(model) if not n.endswith(".base")}
    return sorted(adapted if plain & last_names else last_names)


def adapter_folder(path_or_id) -> Path:
    """Return the folder of an adapter, of which a folder around it, such as the run's, or a Hub id
    may be given as well; UserError if there are several in it."""
    folder = Path(path_or_id)
    if is_hub_id(str(path_or_id)) and folder.parts[0] != "runs":
        return hub_folder(str(path_or_id), needed=[CONFIG, WEIGHTS])
    if (folder / CONFIG).exists():
        return folder
    # PEFT puts an adapter that is not called `default` into a folder of its name.
    inner = sorted(
        path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}")
    )
    if len(inner) > 1:
        raise UserError(f"{folder} holds several adapters: give one, such as {inner[-1]}")
    if not inner:
        way = "give the folder of one or of a run, or a Hub id"
        raise UserError(f"{folder} holds no adapter ({CONFIG} is missing): {way}")
    return inner[0]


def read_adapter(folder: Path, most=math.inf) -> dict:
    """Return the tensors of an adapter's folder by the names that PEFT saves: where a program saved
    the model's own, an adapter's name stands before `weight`."""
    if not (folder / WEIGHTS).exists() and list(folder.glob("*.bin")):
        way = "save it again by PEFT's save_pretrained"
        raise UserError(f"{folder} holds its adapter as .bin, which can hold code: {way}")
    tensors, _ = files.read_tensors(folder / WEIGHTS, most)
    named = {re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", x): x for x in tensors}
    if len(named) < len(tensors):
        raise UserError(f"{folder / WEIGHTS} holds several adapters: save one alone")
    return {name: tensors[own] for name, own in named.items()}


def load_adapter(model, path_or_id):
    """Put the PEFT adapter of a folder, run or Hub id on its base model; return the model."""
    folder = adapter_folder(path_or_id)
    config = read_config(folder)
    tensors = read_adapter(folder, most_bytes(model, config["r"]))
    return put_adapter(model, tensors, config["r"], config["lora_alpha"], folder)


def most_bytes(model, rank) -> int:
    """Return how large a file A and B of all layers of a base model can be, with their names."""
    shapes = [model.get_submodule(name).weight.shape for name in linear_layers(model)]
    return 8 * rank * sum(map(sum, shapes)) + 2**24


def put_adapter(model, tensors, rank, alpha, where, prefix=PREFIX):
    """Put A and B, called `prefix` and our names, on a base model; return it. They say which layers
    are adapted. UserError on a damaged adapter, another model's, or one beyond our layer."""
    names = sorted({name.removeprefix(prefix).rsplit(".", 2)[0] for name in tensors})
    # Check names and shapes first: for layers of a size that is a lie there may be no memory.
    if lora_layers(model):
        raise UserError(f"this model has an adapter: {where} fits the base model only")
    if not names:
        raise UserError(f"{where} holds no adapter: lora_A and lora_B are missing")
    expected = {}
    for name in names:
        if name not in linear_layers(model):
            raise UserError(f"{where} adapts {name}, which is no linear layer of a block here")
        D_out, D_in = model.get_submodule(name).weight.shape
        expected[f"{prefix}{name}.lora_A.weight"] = torch.empty(rank, D_in, device="meta")
        expected[f"{prefix}{name}.lora_B.weight"] = torch.empty(D_out, rank, device="meta")
    files.check_tensors(tensors, expected, where)
    attach(model, names, rank, alpha)
    for name, p in lora_parameters(model).items():
        p.data.copy_(tensors[prefix + name])
    return model.eval()


def read_config(folder: Path) -> dict:
    """Return adapter_config.json with PEFT's defaults and our alpha; UserError on what we do not
    compute. Dropout is checked and not used, as our models stay in eval mode."""
    types = {name: type(value) for name, value in DEFAULTS.items()}
    found = files.read_json(folder / CONFIG)
    config = DEFAULTS | files.checked(found, folder, **types)
    refused = [name for name in UNSUPPORTED.split() if config.get(name)]
    refused += [name for name, values in ALLOWED.items() if config.get(name) not in values]
    refused += ["lora_dropout"] if config["lora_dropout"] > 1 else []
    refused += [name for name in ("r", "lora_alpha") if config[name] == 0]
    if refused:
        said = f"{refused[0]} = {config.get(refused[0])!r}"
        raise UserError(f"{folder}: {said} is not supported: merge it by PEFT, for --model")
    # For rsLoRA PEFT scales by alpha / sqrt(rank): arXiv 2312.03732.
    config["lora_alpha"] *= math.sqrt(config["r"]) if config["use_rslora"] else 1.0
    return config
