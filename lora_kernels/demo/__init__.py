"""``lora-kernels demo``: the worked example, from pre-training to a fine-tuned layer.

``training.py`` holds the data, the model and the loop; ``experiment.py`` runs them and compares; ``command.py`` prints
and plots.
"""

from .experiment import Report, run

__all__ = ["Report", "run"]
