"""Adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors."""

from pathlib import Path

from safetensors.torch import save

from lora import attach, linear_layers, lora_layers, lora_parameters
from system import files
from system.errors import UserError

PREFIX = "base_model.model."  # what PEFT puts before each of our names

# What PEFT offers beyond this layer. An adapter that uses one of these is refused by name.
UNSUPPORTED = ["use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"]
UNSUPPORTED += ["lora_bias", "layer_replication", "target_parameters", "alora_invocation_tokens"]
UNSUPPORTED += ["trainable_token_indices"]

DEFAULTS = dict(r=8, lora_alpha=8.0, lora_dropout=0.0, use_rslora=False, bias="none")  # PEFT's


def save_adapter(model, folder, base_model=""):
    """Write the adapter in PEFT's format; PeftModel.from_pretrained(base, folder) loads it."""
    layers, folder = lora_layers(model), Path(folder)
    if not layers:
        raise UserError("this model has no adapter to save: call add_lora first")
    one, last = next(iter(layers.values())), {name.split(".")[-1] for name in layers}
    # Last names, as PEFT writes them, unless a layer of such a name is without an adapter.
    plain = {name.split(".")[-1] for name in linear_layers(model) if not name.endswith(".base")}
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base_model))
    config.update(r=one.rank, lora_alpha=one.alpha, lora_dropout=one.dropout.p, bias="none")
    config.update(use_rslora=one.rslora, target_modules=sorted(layers if last & plain else last))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "adapter_config.json", config)
    tensors = {
        PREFIX + name: p.detach().cpu().contiguous() for name, p in lora_parameters(model).items()
    }
    data = save(tensors, metadata={"format": "pt"})
    files.write_whole(folder / "adapter_model.safetensors", data)


def load_adapter(model, folder):
    """Put the PEFT adapter in `folder` on its base model; returns the model, ready to train on.

    The tensors say which layers are adapted, so every form of target_modules works. UserError on a
    damaged adapter, another model's, or one with a feature of PEFT that we do not compute.
    """
    kinds, folder = {name: type(value) for name, value in DEFAULTS.items()}, Path(folder)
    found = files.read_json(folder / "adapter_config.json")
    config = DEFAULTS | files.checked(found, folder, **kinds)
    asks = [key for key in UNSUPPORTED if config.get(key)]
    asks += ["bias"] * (config["bias"] != "none") + ["lora_dropout"] * (config["lora_dropout"] > 1)
    asks += ["peft_type"] * (config.get("peft_type") != "LORA")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        asks.append("init_lora_weights")  # such as pissa, which alters the base
    if asks:
        raise UserError(f"{folder}: {asks[0]} = {config.get(asks[0])!r} is not supported")
    tensors, _ = files.read_tensors(folder / "adapter_model.safetensors")
    names = sorted({name.removeprefix(PREFIX).rsplit(".", 2)[0] for name in tensors})
    if wrong := set(names) - set(linear_layers(model)):
        raise UserError(f"{folder} adapts {min(wrong)}, which is no plain layer of this model")
    rank, alpha, dropout, rslora, _ = (config[name] for name in DEFAULTS)
    numbers = rank * sum(sum(model.get_submodule(name).weight.shape) for name in names)
    files.check_size(tensors, numbers, folder)
    attach(model, names, rank, alpha, dropout, rslora)
    ours = {PREFIX + name: p for name, p in lora_parameters(model).items()}
    files.check_tensors(tensors, ours, folder)
    for name, parameter in ours.items():
        parameter.data.copy_(tensors[name])
    return model.eval()
