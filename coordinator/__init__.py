"""The front door: tokenizer, relay, routing, admission. Runs without torch."""
