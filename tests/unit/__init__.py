"""Pure decisions, without an event loop."""
