"""What people see."""

from __future__ import annotations

import io

from rich.console import Console

from outrider.client import Token, Tokens
from outrider.display import TokenPrinter


def test_a_models_text_does_not_drive_the_terminal() -> None:
    shown = io.StringIO()
    printer = TokenPrinter(Console(file=shown, force_terminal=True, no_color=True))
    text = "a\x1b[2J\x9b2J\x85é\n"
    printer.tokens(Tokens(text, (Token(1, text, drafted=True),), 1, 1))
    assert "a␛[2J�2J�é\n" in shown.getvalue()
