"""Every causal-LM architecture of transformers, tiny: does a policy serve it?"""
