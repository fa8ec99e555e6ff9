"""Adapters to the interfaces of other projects; imported only on demand."""
