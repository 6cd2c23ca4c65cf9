"""The kinds of store: one module each, all with the Protocol of `broker.stores.base`."""
