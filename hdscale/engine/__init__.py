"""DeepSpeed, and nothing else: ranks, engines, their state, their collectives."""
