"""``outrider simulate``: sweeps over `speculation.simulator`, and its comparison with what was measured."""
