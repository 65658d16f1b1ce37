"""What plugins implement, how they are found, and the one door through which they are asked."""
