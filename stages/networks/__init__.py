"""The networks, in plain torch, every size from `stages.config`. They hold weights and no session state."""
