"""The pure half: bytes and values in, values and effects out. No event loop, no clock, no I/O."""
