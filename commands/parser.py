"""Arguments: one line of error, and a guess at what was meant."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import InputError, did_you_mean
from ..typed import printable


class Parser(argparse.ArgumentParser):
    """An argument parser that raises an InputError where argparse prints its usage and ends the program."""

    _given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        if "required" in message:  # perhaps it was given, misspelt
            for word in self._given:
                if word.startswith("--") and (guess := self._guess(word)):
                    message = f"unknown argument {word.partition('=')[0]!r}{guess}"
        raise InputError(f"{printable(message, 200)}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = args or ()
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), rest[0])
            self.error(f"unknown argument {unknown.partition('=')[0]!r}{self._guess(unknown)}")
        return namespace, rest

    def _guess(self, word: str) -> str:
        options = re.findall(r"(?<![\w-])--[\w-]+", self.format_help())
        name = word.partition("=")[0]
        return "" if any(option.startswith(name) for option in options) else did_you_mean(name, options)
