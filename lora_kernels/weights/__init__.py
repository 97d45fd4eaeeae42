"""Frozen weights whose values are not their own memory: what a quantised weight answers, and the forms that are known.

``packed`` is what the layers, the operators and merging see; ``known`` finds the form of a weight. Each other file is
one package's forms. A plain Parameter has no form: it is read as it is.
"""
