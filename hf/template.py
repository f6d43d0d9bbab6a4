"""Render a chat template: a small program in Jinja, by whoever made the checkpoint. So hf/chat.py
starts this file as a process of its own, which may take neither long nor much memory; it imports
nothing of ours. It reads {template, cases} from stdin, as JSON, and writes {texts}, one for each
case, or {error}. What a template may use is what transformers offers it."""

import json
import sys
from contextlib import suppress
from datetime import datetime

SECONDS = 5  # of CPU time
MEMORY = 2**30  # bytes
LONGEST = 2**20  # characters of a text


def environment():
    """Return Jinja's sandbox, in which a template reaches nothing but what it is given."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model says, for training on it: here it does nothing."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise TemplateError(message)

    def as_json(value, ensure_ascii=False, **layout):
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    extensions = [Generation, loopcontrols]
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    jinja.filters["tojson"] = as_json
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return jinja


def render(template, case, first):
    """Return a case's text; of one that fails, the empty one, unless it is the first."""
    try:
        return template.render(**case)[: LONGEST + 1]
    except Exception:
        if case is first:
            raise
        return ""


def main():
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    request = json.load(sys.stdin)
    cases = request["cases"]
    try:
        template = environment().from_string(request["template"])
        found = dict(texts=[render(template, case, cases[0]) for case in cases])
        if max(map(len, found["texts"])) > LONGEST:
            found = dict(error="it writes more than a million characters")
    except ImportError:
        found = dict(error="pip install jinja2")
    except Exception as error:  # a template may raise anything
        found = dict(error=str(error)[:300] or type(error).__name__)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
