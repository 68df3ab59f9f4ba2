"""``outrider doctor``: do two models make a pair, what does it cost, what is it worth, and are the tokens equal?

What is decided here is pure and tested without a model: `compatibility`, `memory`, `rounding`, `divergence`,
`prediction`. `pair` and `decoding` run the models, `examination` puts it together, `report` shows it.
"""
