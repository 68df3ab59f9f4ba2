"""``outrider bench``: this machine and one pair, every system measured right beside plain decoding.

``settings`` says what to measure, ``stages`` brings up what runs together, ``systems`` are the things measured,
``measure`` runs them in turn, ``cells`` and ``figures`` are pure summaries, ``report`` shows them.
"""
