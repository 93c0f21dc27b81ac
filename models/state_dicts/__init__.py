"""Names, shapes and configs of public checkpoints, mapped to ours and back; no files.

``tensor_map``: what a mapping is. ``huggingface``, ``meta``, ``mamba_ssm`` …: one format each.
``mixture_of_mamba``: single mixers of the public code. ``parallel/checkpoint`` reads and writes.
"""
