"""The command line, the local launcher, the Python client and the demo."""
