"""``outrider bench``: this machine and one pair, every system measured right beside plain decoding.

``settings`` says what to measure, ``plan`` what of it together, ``stages`` brings that up, ``systems`` are the things
measured, ``measure`` runs them in turn, ``cells``, ``ideal`` and ``figures`` are pure summaries, ``report`` and
``plot`` show them. Whatever needs torch is a process of its own: ``transformers_worker``, ``ideal_worker``,
``synthetic_pair``, ``wrong_drafter``.
"""
