"""What asyncio and systemd lack."""
