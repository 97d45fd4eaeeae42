"""LoRA on a mixture's stacked experts: tokens sorted by expert, products of a group each, nothing of W's size made.

:mod:`.layer` has the layer, :mod:`.run` what it computes, :mod:`.autograd` the products of one projection both ways,
:mod:`.gate` what stands between two, and :mod:`.grouped` the products by torch's ``grouped_mm``.
"""
