"""The figures of an evaluation, as `evaluate` metrics that need no network."""
