"""Names, shapes and configs of public checkpoints, mapped to ours and back; no file is opened.

``tensor_map``: how target tensors are made of source tensors. ``plain_decoder``: models that public
formats can express. ``huggingface``, ``huggingface_mamba``, ``mamba_ssm``, ``meta``:
``import_model`` and ``export_model`` of one format. ``mixture_of_mamba``: single mixers.
``parallel/checkpoint`` reads and writes the files.
"""
