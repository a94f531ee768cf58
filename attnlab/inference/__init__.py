"""After training: sampling rules and the jitted decode loop."""
