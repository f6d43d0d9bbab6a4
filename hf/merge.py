"""Add an adapter to the weights of its base model, for programs that know no adapters.

    python -m hf.merge RUN OUT      # RUN: a run folder, a PEFT adapter, or the Hub id of one

OUT gets copies of the base's files, in Hugging Face's layout. Only adapted weights are changed.
"""

import json
import shutil
from pathlib import Path
from statistics import fmean

import torch

from hf.checkpoint import (
    INDEX,
    check_quantised,
    checkpoint_folder,
    config_from_dict,
    weight_files,
)
from hf.hub import hub_folder, is_hub_id
from hf.peft import CONFIG, PREFIX, adapter_folder, load_adapter, read_adapter
from lora import lora_layers
from model import Qwen3
from system import files
from system.errors import Parser, UserError, run_cli

# What goes along if it is there. (Not all that is there: other files may change how a model loads.)
BESIDE = """generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json
    merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json"""


def base_of(adapter: Path):
    """Return name and revision of an adapter's base model, as its run or else PEFT's file says."""
    about = files.read_json(adapter / CONFIG)
    found = dict(model=about.get("base_model_name_or_path"), revision=about.get("revision"))
    run = adapter.parent / "config.json"
    if adapter.name == "adapter" and run.exists():
        found |= files.checked(files.read_json(run), run, settings=dict).get("settings", {})
    found = files.checked(found, adapter, model=str, revision=str, random_init=bool)
    if found.get("random_init") or not found.get("model"):
        raise UserError(f"{adapter} names no base model that has weights: give --model")
    return found["model"], found.get("revision", "")


def copy_merged(source: Path, target: Path, layers, adapter) -> dict:
    """Copy a file of weights, and in the copy add the adapter to those of these layers: in fp32,
    one at a time, then in the weight's dtype. Return which share of each has changed by that."""
    weights, _ = files.read_tensors(source)
    check_quantised(weights, {}, source)
    found = {name: weights[name] for name in weights.keys() & layers.keys()}
    files.check_tensors(found, {name: layers[name].base.weight for name in found}, source)
    shares = {}
    with files.writing(target), open(shutil.copyfile(source, target), "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, W in found.items():
            layer = PREFIX + name.removesuffix(".weight")
            A = adapter[f"{layer}.lora_A.weight"].float()  # (r, D_in)
            B = adapter[f"{layer}.lora_B.weight"].float()  # (D_out, r)
            product = layers[name].scale * (B @ A)
            merged = (W.float() + product).to(W.dtype)  # (D_out, D_in)
            shares[name] = (merged != W).float().mean().item()
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(merged.view(torch.uint8).numpy())
    files.sync(target)
    return shares


def merge(run, out, model="") -> float:
    """Write base model and adapter as one into a folder that is new or empty. Return which share of
    the adapted weights has changed: in bf16 a small change is rounded away."""
    # 1) The adapter, and the base that it fits. On `meta` a model takes no memory.
    folder = adapter_folder(run)
    base, revision = (model, "") if model else base_of(folder)
    source = checkpoint_folder(base, revision)
    if is_hub_id(base):  # the Hub has more of it
        source = hub_folder(base, source.name, optional=BESIDE.split())
    with torch.device("meta"):
        bare = Qwen3(config_from_dict(files.read_json(source / "config.json")))
    layers = {f"{name}.weight": x for name, x in lora_layers(load_adapter(bare, folder)).items()}
    adapter = read_adapter(folder)

    # 2) Where it goes: nothing is there yet.
    out = Path(out).resolve()
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken or source.resolve() in (out, *out.parents):
        raise UserError(f"{out} is not new and empty, or in the base's folder: give another")

    # 3) The files. Without config.json, the last one, nothing takes the folder for a model.
    shards = weight_files(source)
    index = [] if shards == ["model.safetensors"] else [INDEX]
    beside = [*index, *BESIDE.split(), "config.json"]
    beside = [name for name in beside if (source / name).is_file()]
    shares = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in shards:
            shares |= copy_merged(source / name, out / name, layers, adapter)
        absent = {name: layers[name].base.weight for name in layers.keys() - shares.keys()}
        files.check_tensors({}, absent, source)
        for name in beside:
            files.write_whole(out / name, (source / name).read_bytes())
    except BaseException:
        for name in [*shards, *beside]:
            (out / name).unlink(missing_ok=True)
        raise
    return fmean(shares.values())


def main():
    parser = Parser(description="Add an adapter to its base model's weights.")
    parser.add_argument("run", help="a run folder, a PEFT adapter, or the Hub id of one")
    parser.add_argument("out", help="a new folder for the merged model")
    parser.add_argument("--model", default="", help="the base model, if it has moved")
    args = parser.parse_args()
    changed = merge(args.run, args.out, args.model)
    print(f"merged: {100 * changed:.1f} % of the numbers in adapted weights have changed")
    print(f"next: python eval_math.py --model {args.out}")


if __name__ == "__main__":
    run_cli(main)
