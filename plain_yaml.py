"""YAML that people write by hand: no aliases, so that a few bytes cannot stand for gigabytes, one error for all."""

from typing import Any

import yaml

from .errors import InputError

MAX_CHARACTERS = 250_000  # PyYAML reads some 50,000 a second


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise InputError(f"line {line}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node):
        if len(node.value) > 40:
            raise ValueError  # 1:1:1:… and 0x… make numbers that cannot even be printed
        return super().construct_yaml_int(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def load_yaml(text: str, where: str) -> Any:
    """Return what a YAML text says, as plain Python values.

    Args:
        where: the file or option, named in errors; the text itself is never quoted.

    Raises:
        InputError: the text is too long, not valid YAML, or uses aliases, naming the line where there is one.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where}: longer than {MAX_CHARACTERS} characters; split it")
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader
    except InputError as error:
        raise InputError(f"{where} {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not valid YAML; correct it") from None
    # A date that is none, `!!int x`, thousands of nested brackets: PyYAML lets Python's own errors through.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(f"{where}: not valid YAML (a value or the nesting); put texts in quotes") from None
