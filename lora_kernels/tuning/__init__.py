"""``lora-kernels tune``: measures what can run on this device, and stores the choices.

===========  ==========================================================================
``cells``    what to tune, as data: presets, and lists from the command line
``search``   one cell: which plans are tried, successive halving, the decision
``session``  many cells under a budget, each on disk as soon as it is done
``bench``    the device: random inputs, compiling, the agreement check, the clock
``passes``   what is timed and judged of a layer; ``group_passes`` of layers that read one x
``report``   the table at the end, the plan of a dry run, JSON
``command``  the command line
``cpu``      on CPUs: own product or the library's, measured; ``cpu_command`` its options and tables
===========  ==========================================================================

All but ``bench`` runs without a GPU, and is tested so. Imports go one way: command → session → search → cells.
"""
