"""What is found out about weights without changing them."""
