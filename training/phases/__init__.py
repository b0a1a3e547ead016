"""The five phases of training: what each learns from, as one module per phase. Called by `training.engine`."""
