"""Zoo in, bundle out."""
