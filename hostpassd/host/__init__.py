"""What is plugged in: the tree of host devices and what the host uses them for."""
