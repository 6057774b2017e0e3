"""One further-training shard: workloads, the replica loop, removal modes and evaluation.

Needs torch, numpy and safetensors alone, so that a shard also runs where Ray is not.
"""
