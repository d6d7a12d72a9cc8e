"""What trainers need beside the backend. Each module imports its library only when it is imported itself."""
