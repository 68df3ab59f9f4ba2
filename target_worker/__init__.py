"""The target worker: verifies, free-runs, and alone decides what is committed."""
