"""LongAct in other frameworks, one file each, imported only on use."""
