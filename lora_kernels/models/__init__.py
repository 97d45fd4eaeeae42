"""Model surgery: which layers of a model become LoRA layers, and all that is asked of such a model as a whole.

The public functions are in ``model`` and ``grouping``; ``lora_kernels`` itself names them.
"""
