"""The experiment: do salient rows help? `python -m experiments run`, then `report`."""
