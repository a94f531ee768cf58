"""Methods: what is minimised. A method supplies a `Task` to the one train step."""
