"""Further training: the number's definition, the workload contract, shards, and how the engine is proven.

Needs torch, numpy and safetensors alone, so that a shard also runs where Ray is not.
"""
