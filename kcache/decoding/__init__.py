"""What generation is made of: prompts in, forwards, the decode loop, tokens chosen, text out."""
