"""The load generator: real sessions through a server, and what they get: `python -m serving.bench`."""
