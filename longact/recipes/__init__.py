"""Configuration files of whole algorithms, for `python -m longact train`."""
