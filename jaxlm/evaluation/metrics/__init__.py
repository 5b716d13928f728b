"""What figures are made of: pure functions of right answers and given ones."""
