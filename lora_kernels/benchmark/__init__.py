"""Side-by-side timing of LoRA layers: what ``lora-kernels bench`` and the files in ``bench/`` run.

=============== ======================================================================================
``workloads``   the cells (shape, dtype, dropout, direction) and the presets, as data
``providers``   the floor, the rivals and this package's backends, all around the same weight
``gate``        correctness before each timing
``timing``      interleaved rounds, ratios within the round; host clock, CUDA events or CUDA graphs
``memory``      bytes kept for backward, peak
``roofline``    bytes, flops and launches of each provider, and the time that a machine model predicts
``runner``      one cell, one preset
``results``     the JSON
``summary``     geometric means and worst cells; ``grid``: one compact table, dtypes side by side
``report``      tables of it, for the terminal and for Markdown; ``plot``: ratio over tokens
``cli``         ``lora-kernels bench``
=============== ======================================================================================
"""
