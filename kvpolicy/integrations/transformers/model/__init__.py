"""Models, tokenizers and what is known of them."""
