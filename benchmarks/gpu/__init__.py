"""The stem and whole networks on a GPU."""
