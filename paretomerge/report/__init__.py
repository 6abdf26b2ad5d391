"""What a study looks like: one HTML file, and tables for the terminal."""
