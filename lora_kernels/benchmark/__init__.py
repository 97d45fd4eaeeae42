"""Side-by-side timing of LoRA layers: what ``lora-kernels bench`` and the files in ``bench/`` run.

=============== ======================================================================================
``workloads``   one cell: shape, dtype, dropout, direction
``presets``     grids of cells by name; ``gpu_presets``: those for a GPU, and what they take
``setups``      a cell's tensors, a layer, a provider: what providers are made of
``providers``   the floor, the rivals and this package's backends, all around the same weight
``rebuilt``     the rival that is rebuilt in a checkout's ``bench/lorafusion``
``gate``        correctness before each timing
``timing``      interleaved rounds, ratios within the round; host clock, CUDA events or CUDA graphs
``capture``     a CUDA graph whose failure harms nothing; ``device``: clock and load of the GPU
``memory``      bytes kept for backward, peak
``profile``     where a call spends its host time
``roofline``    bytes, flops and launches of each provider, and the time that a machine model predicts
``prediction``  that for a whole preset, on a machine that is not here
``runner``      one cell, one preset, in parts where it is long
``results``     the JSON
``summary``     geometric means and worst cells; ``grid``: one compact table, dtypes side by side
``report``      tables of it, for the terminal and for Markdown; ``predicted_table``: predicted beside measured
``plot``        ratio over tokens
``command``     ``lora-kernels bench``
=============== ======================================================================================
"""
