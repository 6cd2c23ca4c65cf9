"""The client library and transfer engine; it knows the HTTP contract and nothing of the broker behind it."""
