"""Metrics, logs and traces: what every role needs of them. Knows no other package of ours."""
