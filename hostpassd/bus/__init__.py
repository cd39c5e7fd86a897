"""How it is told: the D-Bus face. Nothing below this package knows D-Bus."""
