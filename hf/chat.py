"""A user's turn as a chat model's own template writes it, and the token that ends the answer."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hf.template import LONGEST, SECONDS
from system.errors import UserError
from system.files import opened, read_json

# What a model is taken to know that has <|im_start|> and no template of its own.
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARK, ANSWER = "PROBLEM-0123", "ANSWER-4567"  # stand for what user and assistant say
PROBE = " \n</think><b> {{1}} \"\\n' & \u00c9\n"  # what a template could escape, cut or trim


@dataclass
class Turn:
    """What stands around a user's text, up to where the assistant begins."""

    before: str
    after: str
    trims: bool  # the template removes white space at both ends of the text

    def around(self, text: str) -> str:
        return self.before + (text.strip() if self.trims else text) + self.after


def render(template: str, cases: list[dict]) -> list[str]:
    """Return what a template makes of each case, the values of its names ("" where it fails);
    UserError if the first fails, or all take too long or too much memory."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("template.py"))]
    ask = json.dumps(dict(template=template, cases=cases)).encode()
    try:
        done = subprocess.run(command, input=ask, capture_output=True, timeout=4 * SECONDS)
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # ValueError: it was ended, and wrote nothing
        found = dict(error="it takes too long, or too much memory")
    if "error" in found:
        raise UserError(f"--chat: the model's chat template fails ({found['error']}): omit it")
    return found["texts"]


def read_template(folder: Path) -> tuple[str, dict]:
    """Return the chat template of a checkpoint ("" without one), and its special tokens by name."""
    path = folder / "tokenizer_config.json"
    raw = read_json(path) if path.exists() else {}
    template = raw.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = [x for x in template if isinstance(x, dict) and x.get("name") == "default"]
        template = named[0].get("template") if named else ""
    path = folder / "chat_template.jinja"
    if path.exists():
        with opened(path) as file:
            template = file.read(LONGEST).decode("utf-8", "replace")
    if not isinstance(template, str) or len(template) >= LONGEST:
        raise UserError(f"{folder}: chat_template is no text, or too long: get it again")
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = raw.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        tokens |= {name: token} if isinstance(token, str) else {}
    return template, tokens


def turn_cases(tokens: dict, system: str, thinking: str) -> list[dict]:
    """Return what to render: a turn with a mark for the text, one with a text that must come out as
    it is, one without the system's message, one with the other way of thinking, an answered one."""
    begin = [dict(role="system", content=system)] if system else []
    user = dict(role="user", content=MARK)
    names = tokens | dict(add_generation_prompt=True, tools=None, documents=None)
    names |= dict(enable_thinking=thinking == "on") if thinking else {}
    case = names | dict(messages=[*begin, user])
    answered = [*begin, user, dict(role="assistant", content=ANSWER)]
    return [
        case,
        case | dict(messages=[*begin, dict(role="user", content=PROBE)]),
        case | dict(messages=[user]),
        case | dict(enable_thinking=thinking == "off"),
        case | dict(messages=answered, add_generation_prompt=False),
    ]


def load_turn(folder: Path, tokenizer, system="", thinking="") -> tuple[Turn, list[int]]:
    """Return the Turn of a chat model, and the ids that end its answers besides its eos_ids.

    system: what the system's message says, "" for the template's own; thinking: on, off or "" for
    the template's default. UserError without a template, or if it takes no account of these.
    """
    template, tokens = read_template(folder)
    if not template and tokenizer.file.token_to_id("<|im_start|>") is None:
        raise UserError(
            "--chat: the model has no chat template, and no <|im_start|> for ChatML: omit it"
        )
    texts = render(template or CHATML, turn_cases(tokens, system, thinking))
    text, probe, without, otherwise, answer = texts
    if system and text == without:
        raise UserError("--system: the model's chat template takes no system message: omit it")
    if thinking and text == otherwise:
        raise UserError("--thinking: the model's chat template knows no such switch: omit it")

    # What is before and after the mark must be so for any text.
    before, *after = text.split(MARK)
    turns = [Turn(before, "".join(after), trims) for trims in (False, True)]
    turns = [turn for turn in turns if turn.around(PROBE) == probe]
    if len(after) != 1 or not turns:
        raise UserError("--chat: the model's chat template changes what a user says: omit --chat")

    # The first special token behind an answer ends it, and so does the tokenizer's own.
    added = tokenizer.file.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    ends = [special[tokens["eos_token"]]] if tokens.get("eos_token") in special else []
    behind = tokenizer.encode(answer.rpartition(ANSWER)[2], special=False)
    ends += [i for i in behind if i in special.values()][:1]
    return turns[0], ends
