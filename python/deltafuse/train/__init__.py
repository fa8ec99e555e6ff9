"""Training and sampling of the byte-level language model; behind the `deltafuse` command."""
