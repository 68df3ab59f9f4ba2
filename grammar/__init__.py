"""Which tokens a structured answer may go on with. Knows no session, no socket and no tensor.

A `GrammarCompiler` belongs to one tokenizer and makes `GrammarPath`s from what a request says (`Grammar`): JSON schema,
regular expression or EBNF. A path stands behind the committed tokens of one answer, looks ahead along drafted ones, and
says for each place which tokens are allowed. The work is done by llguidance.
"""

from grammar.compiler import GrammarCompiler
from grammar.errors import GrammarError
from grammar.path import GrammarPath, Mask
from grammar.pending import PendingPaths

__all__ = ["GrammarCompiler", "GrammarError", "GrammarPath", "Mask", "PendingPaths"]
