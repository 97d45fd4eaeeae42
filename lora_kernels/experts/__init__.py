"""LoRA on a mixture's stacked experts: tokens sorted by expert, products of a group each, nothing of W's size made.

:mod:`.layer` has the layer, :mod:`.run` what it computes, :mod:`.autograd` the products of one projection both ways,
and :mod:`.loop`, :mod:`.native` and :mod:`.grouped` the ways to run them.
"""
