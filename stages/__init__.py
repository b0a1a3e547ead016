"""What a chunk of driving frames goes through: networks, the sliding window, the four stages. PyTorch, no Ray."""
