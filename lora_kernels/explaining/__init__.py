"""Why this plan: what every backend tells of it (``report``), and the command (``command``)."""
