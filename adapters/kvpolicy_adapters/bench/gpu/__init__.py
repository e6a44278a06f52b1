"""``python -m kvpolicy_adapters.bench.gpu``: what one GPU makes of kvpolicy, in six minutes."""
