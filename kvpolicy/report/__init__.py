"""What a plan says, for people: tables and heat maps in the terminal, as PNG and as one HTML file."""
