"""Chat templates against transformers' apply_chat_template, and as the programs of strangers."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from hf.chat import read_template
from hf.checkpoint import load_tokenizer
from run.flags import load_text
from system.errors import UserError

# Short templates of our own with what each family's does: ChatML with a default system message
# (Qwen2.5, SmolLM2), thinking that is switched off by an empty thought (Qwen3), a BOS of its own,
# headers and trimmed texts (Llama 3).
TURNS = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
SYSTEM = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
{%- endif %}"""
QWEN3 = "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages[::-1] %}"
QWEN3 += "{%- if m.role == 'user' and m.content is string and not m.content.startswith('<t>') %}"
QWEN3 += "{%- set ns.last = loop.index0 %}{%- break %}{%- endif %}{%- endfor %}" + TURNS
QWEN3 += "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false "
QWEN3 += "%}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
LLAMA = """{% for m in messages %}
    {% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' %}
    {% set text = text + m['content'] | trim %}
    {% if tools is not none %}{{ raise_exception('tools') }}{% endif %}
    {% if loop.first %}{% set text = bos_token + text %}{% endif %}
{{ text + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
END = dict(__type="AddedToken", content="<|im_end|>", lstrip=False, rstrip=False, normalized=False)
FAMILIES = dict(qwen2=SYSTEM + TURNS, qwen3=QWEN3, llama=LLAMA)


def checkpoint(folder, template, where, **config):
    """Give a checkpoint a chat template, the tokens of Llama 3 and a BOS before every text."""
    tokenizer = load_tokenizer(folder).file
    words = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>"]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text()) | dict(bos_token="<s>") | config
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    else:
        named = [dict(name="tool_use", template="x"), dict(name="default", template=template)]
        raw["chat_template"] = named if where == "named" else template
    path.write_text(json.dumps(raw))
    return folder


def chat(folder, system="", thinking=""):
    return load_text(SimpleNamespace(chat=True, system=system, thinking=thinking), folder)


@pytest.mark.parametrize(
    "family, where", [("qwen2", "jinja"), ("qwen3", "config"), ("llama", "named")]
)
def test_ids_are_those_of_transformers(scratch, family, where):
    """A chat model that sees other tokens than it was tuned on: no system message, a second BOS, a
    line end too many; or that does not stop at the end of its turn."""
    from transformers import AutoTokenizer

    folder = checkpoint(scratch, FAMILIES[family], where, eos_token=END)
    theirs = AutoTokenizer.from_pretrained(folder)
    for system, thinking in (("", ""), ("Be brief.", "off" if family == "qwen3" else "")):
        ours = chat(folder, system, thinking)
        for text in ("What is $3+4$?\n", " <|im_end|> \u00e9 {{ x }} </think>\n\n"):
            messages = [dict(role="user", content=text)]
            messages = [dict(role="system", content=system)] * bool(system) + messages
            names = dict(enable_thinking=False) if thinking else {}
            said = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **names
            )
            want = theirs(said, add_special_tokens=False)["input_ids"]
            assert ours.encode_prompt(text) == want
            assert ours.count_prompts([text]) == [len(want)]
        last = "<|eot_id|>" if family == "llama" else "<|im_end|>"
        assert {2, ours.file.token_to_id(last)} == {*ours.eos_ids}
    if family != "qwen3":
        with pytest.raises(UserError, match="--thinking: the model's chat template knows no"):
            chat(folder, thinking="on")


HOSTILE = {
    "{{ 'a' * 10000000000 }}": "MemoryError",
    "{{ 'a' * 2000000 }}": "more than a million characters",
    "{% for m in messages %}": "endfor",
    "{{ raise_exception('no users here') }}": "no users here",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe|not safely callable",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ messages[0].content | upper }}": "changes what a user says",
    "{{ messages[0].content | tojson }}": "changes what a user says",
    "{{ messages[0].content * 2 }}": "changes what a user says",
    "no user": "changes what a user says",
    "{{ " + "(" * 5000 + " }}": "fails",
}


def test_a_template_that_fails_is_one_line(scratch, monkeypatch):
    """A template takes the machine's memory or time, reads its files, or ends in a traceback."""
    checkpoint(scratch, TURNS, "config")
    monkeypatch.setattr("hf.chat.SECONDS", 1)
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    for template, says in (HOSTILE | {loops: "too long"}).items():
        (scratch / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=says) as error:
            chat(scratch)
        assert "\n" not in str(error.value)
    (scratch / "chat_template.jinja").write_text("{{ messages[-1].content }}<|im_end|>")
    with pytest.raises(UserError, match="--system: the model's chat template takes no system"):
        chat(scratch, system="Be brief.")
    (scratch / "chat_template.jinja").write_text("x" * 2**20)
    with pytest.raises(UserError, match="too long"):
        read_template(scratch)


def test_without_a_template_a_model_may_know_chatml(scratch):
    """A model with ChatML's tokens that was used before templates came with checkpoints."""
    text = chat(scratch).prompt_text("1+1?\n")
    assert text == "<|im_start|>user\n1+1?\n<|im_end|>\n<|im_start|>assistant\n"
