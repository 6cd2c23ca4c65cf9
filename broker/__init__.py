"""A broker that negotiates transfers of blobs and never carries a byte of them."""

__version__ = "0.1.0"
