"""Broken messages of every kind through everything that reads messages: `python -m serving.fuzz`."""
