"""Values: frozen, typed, without I/O. Every room imports them; they import no room."""
