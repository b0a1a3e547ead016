"""The synthetic world and the training of the weights. Imports stages; nothing imports it."""
