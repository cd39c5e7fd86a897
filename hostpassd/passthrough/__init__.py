"""What may be done with a device, and doing it."""
