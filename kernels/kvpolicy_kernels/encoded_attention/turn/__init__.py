"""What attention over codes does with its queries first."""
