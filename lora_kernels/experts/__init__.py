"""LoRA on a mixture's stacked experts: tokens sorted by expert, products of a group each, nothing of W's size made.

Not reachable from the public API yet: saving, merging and sharding are missing. :mod:`.layer` has the layer.
"""
